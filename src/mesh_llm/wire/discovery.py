"""What a node publishes of its mesh: the TXT record of DNS-SD on the local network, and the listing on Nostr relays.

The TXT record (RFC 6763) holds no secret: a reader learns that a mesh exists, and must still be admitted. Its content
is an unproven claim, except the node's key, which is verified when the node is dialled.

A listing is the JSON content of a Nostr event. Anybody can sign such an event. So the content holds an invite, which a
chain of signatures ties to the mesh's key, and a proof: the invite's issuer, a member, signed the key of the event's
author. The numbers in a listing remain claims of that member.
"""

import re
from collections.abc import Mapping
from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.listing.content import MAX_LISTED_MODELS, ListedModel, Listing
from mesh_llm.core.types import announcement as bounds
from mesh_llm.core.types.announcement import MAX_CLIENTS, MAX_MESH_NAME, MAX_REGION, ListingScope
from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.wire.codec import (
    KEY_BYTES,
    LISTING,
    SIGNATURE_BYTES,
    Malformed,
    Sign,
    Verify,
    copied,
    key_of,
    statement,
)
from mesh_llm.wire.mesh.admission import MAX_INVITE_BYTES, Refusal, refusal_error
from mesh_llm.wire.mesh.certificates import NothingRevoked
from mesh_llm.wire.mesh.frames import PROTOCOL
from mesh_llm.wire.mesh.invites import Invite, check_invite, parse_invite

SERVICE_TYPE = "_mesh-llm._udp.local."
RECORD_VERSION = "1"
MAX_NAME = 64
MAX_VERSION = 32
MAX_MODELS = 8
MAX_MODEL = 96
MAX_RECORD = 1200
"""Most bytes of all entries: the whole answer must fit one packet."""
_MAX_ENTRIES = 32
_KEY = re.compile(r"[0-9a-f]{64}")


class LanListing(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a mesh, as it is announced on the local network.

    Attributes:
        mesh: the mesh's key.
        node: the node's key.
        mesh_name: name of the mesh, for people; may be empty.
        name: name of the node, for people.
        version: of its program.
        protocol: newest protocol that it speaks.
        models: models that its mesh serves, as many as fit.
        more_models: how many more models the mesh serves.
    """

    mesh: MeshId
    node: NodeId
    mesh_name: str = ""
    name: str = ""
    version: str = ""
    protocol: int = PROTOCOL
    models: tuple[str, ...] = ()
    more_models: int = 0


def encode_txt(listing: LanListing) -> dict[str, bytes]:
    """The entries of the TXT record. Long texts are cut; models that do not fit are counted."""
    fields = {
        "txtvers": RECORD_VERSION,
        "p": str(listing.protocol),
        "mesh": listing.mesh,
        "node": listing.node,
        "mn": _clean(listing.mesh_name, MAX_NAME),
        "n": _clean(listing.name, MAX_NAME),
        "v": _clean(listing.version, MAX_VERSION),
    }
    entries = {key: value.encode() for key, value in fields.items() if value}
    room = MAX_RECORD - _size(entries) - _length("more", b"99999")
    kept = 0
    models = [name for name in (_clean(model, MAX_MODEL) for model in listing.models) if name]
    for model in models[:MAX_MODELS]:
        key, value = f"m{kept}", model.encode()
        room -= _length(key, value)
        if room < 0:
            break
        entries[key] = value
        kept += 1
    left = min(len(models) - kept + listing.more_models, 99_999)
    if left:
        entries["more"] = str(left).encode()
    return entries


def decode_txt(entries: Mapping[bytes, bytes | None]) -> LanListing | Malformed:
    """Read a TXT record of an unknown sender."""
    if len(entries) > _MAX_ENTRIES or sum(len(key) + len(value or b"") for key, value in entries.items()) > MAX_RECORD:
        return Malformed("the record is too long")
    texts: dict[str, str] = {}
    for key, value in entries.items():
        try:
            texts[key.decode("ascii").lower()] = (value or b"").decode("utf-8")
        except UnicodeDecodeError:
            return Malformed("the record is not text")
    if texts.get("txtvers", "") != RECORD_VERSION:
        return Malformed("the record is of another version")
    mesh, node = texts.get("mesh", ""), texts.get("node", "")
    if not _KEY.fullmatch(mesh) or not _KEY.fullmatch(node):
        return Malformed("mesh or node is no key")
    protocol, more = _number(texts.get("p", "")), _number(texts.get("more", "0"))
    if protocol is None or more is None:
        return Malformed("a number is none")
    models = [texts[f"m{index}"] for index in range(MAX_MODELS) if texts.get(f"m{index}")]
    return LanListing(
        mesh=MeshId(mesh),
        node=NodeId(node),
        mesh_name=_clean(texts.get("mn", ""), MAX_NAME),
        name=_clean(texts.get("n", ""), MAX_NAME),
        version=_clean(texts.get("v", ""), MAX_VERSION),
        protocol=protocol,
        models=tuple(_clean(model, MAX_MODEL) for model in models),
        more_models=more,
    )


def _clean(text: str, most: int) -> str:
    """At most `most` bytes of UTF-8, without characters that move the cursor or reverse the text."""
    visible = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:most])
    return visible.encode("utf-8", "replace")[:most].decode("utf-8", "ignore").strip()


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else None


def _size(entries: Mapping[str, bytes]) -> int:
    return sum(_length(key, value) for key, value in entries.items())


def _length(key: str, value: bytes) -> int:
    return len(key) + 1 + len(value) + 1


KIND = 31990
"""An addressable event (NIP-01): a newer one of the same author and `d` tag replaces it."""
DELETION_KIND = 5
LISTING_PROTOCOL = 1
TAG = f"mesh-llm-mesh/{LISTING_PROTOCOL}"
"""Value of the `k` tag: distinguishes listings from other programs' events of the same kind."""
MAX_CONTENT = 16 * 1024
"""Most bytes of the content."""
MAX_LIFE = 3600.0
"""Seconds after which a listing has expired, whatever expiry it states."""
MAX_AHEAD = 300.0
"""Most seconds by which a publisher's clock may be ahead."""

_MAX_NUMBER = 2**53
_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)]
_Model: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
_Models: TypeAlias = Annotated[tuple[tuple[_Model, _Number], ...], msgspec.Meta(max_length=MAX_LISTED_MODELS)]


class Posting(msgspec.Struct, frozen=True, kw_only=True):
    """A listing with an invite, and the proof that the invite's issuer named the event's author (`author_proof`)."""

    listing: Listing
    token: str
    proof: bytes = b""


class _Content(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    v: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    mesh: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
    token: Annotated[str, msgspec.Meta(min_length=8, max_length=2 * MAX_INVITE_BYTES)]
    proof: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{128}$")]
    scope: ListingScope
    name: Annotated[str, msgspec.Meta(max_length=MAX_MESH_NAME, pattern=bounds.ONE_LINE)] = ""
    region: Annotated[str, msgspec.Meta(max_length=MAX_REGION, pattern=bounds.ONE_LINE)] = ""
    version: Annotated[str, msgspec.Meta(max_length=bounds.MAX_NAME, pattern=bounds.ONE_LINE)] = ""
    nodes: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1
    clients: Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)] = 0
    max_clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CLIENTS)] = 0
    load: Annotated[float, msgspec.Meta(ge=0.0, le=1.0)] = 0.0
    memory: _Number = 0
    serving: _Models = ()
    wanted: _Models = ()
    on_disk: _Models = ()


_encode_json = msgspec.json.Encoder().encode
_decoder = msgspec.json.Decoder(_Content)


def author_proof(listing_mesh: MeshId, author: bytes, sign: Sign) -> bytes:
    """The issuer's signature that this Nostr key may publish listings of this mesh."""
    return sign(_proven(listing_mesh, author))


def encode_posting(posting: Posting) -> str:
    """The event's content. If it is too long, models are left out: those on disk first, then wanted ones."""
    listing = posting.listing
    wanted, on_disk = [*listing.wanted], [*listing.on_disk]
    while True:
        content = _encode_json(
            copied(
                _Content,
                listing,
                v=LISTING_PROTOCOL,
                token=posting.token,
                proof=posting.proof.hex(),
                memory=min(listing.memory_bytes, _MAX_NUMBER),
                serving=_models_out(listing.serving),
                wanted=_models_out(wanted),
                on_disk=_models_out(on_disk),
            )
        )
        if len(content) <= MAX_CONTENT or not (on_disk or wanted):
            return content.decode()
        (on_disk or wanted).pop()


def decode_posting(content: str) -> Posting | Malformed:
    """Read the content of an unknown author's event; nothing is verified yet."""
    if len(content) > MAX_CONTENT:
        return Malformed(f"a listing of {len(content)} characters, at most {MAX_CONTENT}")
    try:
        data = content.encode()
        if len(data) > MAX_CONTENT:
            return Malformed(f"a listing of {len(data)} bytes, at most {MAX_CONTENT}")
        wire = _decoder.decode(data)
    except (UnicodeEncodeError, *UNREADABLE) as error:
        return Malformed(str(error)[:200])
    listing = copied(
        Listing,
        wire,
        memory_bytes=wire.memory,
        serving=_models_in(wire.serving),
        wanted=_models_in(wire.wanted),
        on_disk=_models_in(wire.on_disk),
    )
    return Posting(listing=listing, token=wire.token, proof=bytes.fromhex(wire.proof))


def check_posting(posting: Posting, author: bytes, *, now: float, verify: Verify) -> Invite | Malformed:
    """Check that `author` (a Nostr public key) may list this mesh: the listing's invite, or why not.

    `now`: UNIX seconds. Only the mesh knows whether the invite was revoked.
    """
    invite = parse_invite(posting.token)
    if isinstance(invite, Refusal):
        return Malformed(f"its invite: {refusal_error(invite).message}")
    mesh = posting.listing.mesh
    refusal = check_invite(invite, now=now, verify=verify, revoked=NothingRevoked(), mesh=mesh)
    if refusal is not None:
        return Malformed(f"its invite: {refusal_error(refusal).message}")
    if invite.terms.scope.word != posting.listing.scope:
        return Malformed(f"its invite has scope {invite.terms.scope.word}, not {posting.listing.scope}")
    if invite.terms.uses:
        return Malformed("its invite is for a limited number of nodes")
    if len(author) != KEY_BYTES or len(posting.proof) != SIGNATURE_BYTES:
        return Malformed("a key or signature of another length")
    if not verify(invite.terms.contacts[0].node, _proven(mesh, author), posting.proof):
        return Malformed("the invite's issuer named another author")
    return invite


def check_times(created: float, expires: float, now: float) -> str:
    """Why an event of these times is not accepted at `now`; empty if it is. All in UNIX seconds."""
    if created > now + MAX_AHEAD:
        return "it comes from the future"
    if min(expires, created + MAX_LIFE) <= now:
        return "it expired"
    return ""


def _proven(mesh: MeshId, author: bytes) -> bytes:
    return statement(LISTING, key_of(mesh) + author)


def _models_out(models: tuple[ListedModel, ...] | list[ListedModel]) -> tuple[tuple[str, int], ...]:
    return tuple((model.name, min(max(0, model.context), _MAX_NUMBER)) for model in models[:MAX_LISTED_MODELS])


def _models_in(models: tuple[tuple[str, int], ...]) -> tuple[ListedModel, ...]:
    return tuple(ListedModel(name=name, context=context) for name, context in models)
