"""Listings made by hand, good and bad, signed with real keys."""

import json
import time
from typing import Any

import msgspec
from nostr_sdk import Event, EventBuilder, Keys, Kind, Tag, Timestamp

from mesh_llm.core.listing.content import ListedModel, Listing
from mesh_llm.discovery.nostr.identity import public_bytes
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.wire.discovery import KIND, TAG, Posting, author_proof, encode_posting
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.invites import Contact, Invite, InviteTerms, format_invite, issue_invite, pack_address


class Poster:
    """A mesh of one node that nobody runs, its Nostr key, and what it would post."""

    def __init__(self, name: str = "Lab", address: str = "127.0.0.1:9", node: SigningKey | None = None) -> None:
        """`address`, `node`: where the invite leads, and whose key is there."""
        self.mesh, self.node, self.keys = SigningKey.generate(), node or SigningKey.generate(), Keys.generate()
        self.listing = Listing(
            mesh=self.mesh.mesh_id, name=name, nodes=9, serving=(ListedModel(name="qwen", context=8192),)
        )
        self._address = address

    def posting(self, **fields: Any) -> Posting:
        contact = Contact(self.node.public, (pack_address(self._address),))
        terms = InviteTerms(self.mesh.public, (contact,), b"12345678", Scope.SERVE, int(time.time()) + 1000)
        invite = issue_invite(terms, None, self.mesh.sign)
        assert isinstance(invite, Invite)
        proof = author_proof(self.mesh.mesh_id, public_bytes(self.keys), self.node.sign)
        listing = msgspec.structs.replace(self.listing, **fields)
        return Posting(listing=listing, token=format_invite(invite), proof=proof)

    def content(self, **fields: Any) -> str:
        return encode_posting(self.posting(**fields))

    def event(
        self,
        content: str | None = None,
        *,
        keys: Keys | None = None,
        created: float = 0.0,
        life: float | None = 60.0,
        mesh: str = "",
        tag: str = TAG,
    ) -> Event:
        """An event as `read_event` should take it, but for what is said; `created`: seconds from now."""
        at = int(time.time() + created)
        tags = [["d", mesh or self.mesh.mesh_id], ["k", tag]]
        if life is not None:
            tags.append(["expiration", str(int(at + life))])
        builder = EventBuilder(Kind(KIND), self.content() if content is None else content)
        builder = builder.tags([Tag.parse(words) for words in tags]).custom_created_at(Timestamp.from_secs(at))
        return builder.finalize(keys or self.keys)


def tampered(event: Event, **fields: Any) -> Event:
    """The event with other fields and the same signature: what a relay could make of it."""
    return Event.from_json(json.dumps({**json.loads(event.as_json()), **fields}))
