"""Nostr events of listings: made, and read with their signature checked. What is in them is wire.nostr_listing's."""

import msgspec
from nostr_sdk import Event, EventBuilder, Filter, Keys, Kind, PublicKey, SingleLetterTag, Tag, Timestamp

from mesh_llm.core.ids import MeshId
from mesh_llm.core.listing import Listing
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.nostr_listing import (
    DELETION_KIND,
    KIND,
    TAG,
    check_posting,
    check_times,
    decode_posting,
)
from mesh_llm.wire.signing import Verify

MOST_EVENTS = 200
"""Of one relay in one answer."""
_MOST_TAGS = 16


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A listing that may be believed as far as it goes.

    Attributes:
        listing: what it says.
        token: the invite that it holds.
        author: the Nostr key that signed it, as hex.
        created, expires: UNIX seconds.
        relays: where it was found.
    """

    listing: Listing
    token: str
    author: str
    created: float
    expires: float
    relays: tuple[str, ...] = ()


def listing_event(keys: Keys, content: str, mesh: MeshId, *, created: int, expires: int) -> Event:
    """A listing; it replaces an older one of the same key and mesh."""
    tags = [["d", mesh], ["k", TAG], ["expiration", str(expires)]]
    return _signed(keys, KIND, content, tags, created)


def deletion_event(keys: Keys, mesh: MeshId, *, created: int) -> Event:
    """Asks relays to forget this key's listing of a mesh."""
    coordinate = f"{KIND}:{keys.public_key().to_hex()}:{mesh}"
    return _signed(keys, DELETION_KIND, "", [["a", coordinate], ["k", str(KIND)]], created)


def all_listings() -> Filter:
    """Every listing of this protocol."""
    return Filter().kind(Kind(KIND)).custom_tag(SingleLetterTag.from_byte(ord("k")), TAG).limit(MOST_EVENTS)


def listings_of(author: PublicKey) -> Filter:
    """Those that one key signed."""
    return all_listings().author(author)


def mesh_of(event: Event) -> MeshId | None:
    """The mesh that an event names, whether or not its content is good; None where it names none."""
    name = _tag(event, "d")
    if name is None or len(name) != 64 or not all(char in "0123456789abcdef" for char in name):
        return None
    return MeshId(name)


def read_event(event: Event, *, now: float, verify: Verify) -> Found | Malformed:
    """Read and judge an event of a relay. `verify` checks Ed25519; the event's own signature is checked here too."""
    if event.kind().as_u16() != KIND or len(event.tags()) > _MOST_TAGS or _tag(event, "k") != TAG:
        return Malformed("no listing of ours")
    created = event.created_at().as_secs()
    expiration = _tag(event, "expiration") or ""
    if not expiration.isascii() or not expiration.isdigit() or len(expiration) > 12:
        return Malformed("it never expires")
    expires = int(expiration)
    if wrong := check_times(created, expires, now):
        return Malformed(wrong)
    posting = decode_posting(event.content())
    if isinstance(posting, Malformed):
        return posting
    if mesh_of(event) != posting.listing.mesh:
        return Malformed("it names two meshes")
    if not event.verify():
        return Malformed("its signature is wrong")
    author = event.author().to_hex()
    invite = check_posting(posting, bytes.fromhex(author), now=now, verify=verify)
    if isinstance(invite, Malformed):
        return invite
    return Found(listing=posting.listing, token=posting.token, author=author, created=created, expires=expires)


def _tag(event: Event, name: str) -> str | None:
    for tag in event.tags():
        words = tag.to_vec()
        if len(words) >= 2 and words[0] == name:
            return words[1]
    return None


def _signed(keys: Keys, kind: int, content: str, tags: list[list[str]], created: int) -> Event:
    builder = EventBuilder(Kind(kind), content).tags([Tag.parse(tag) for tag in tags])
    return builder.custom_created_at(Timestamp.from_secs(created)).finalize(keys)
