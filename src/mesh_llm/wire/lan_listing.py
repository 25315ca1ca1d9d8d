"""What a node says of its mesh on the local network: the TXT record of DNS-SD (RFC 6763), bounded both ways.

No token and no secret: whoever reads it learns that a mesh is there, and must still be let in. Everything in it is a
claim of a stranger, except that the node's key is proven when it is dialled.
"""

import re
from collections.abc import Mapping

import msgspec

from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.frames import PROTOCOL

SERVICE_TYPE = "_mesh-llm._udp.local."
RECORD_VERSION = "1"
MAX_NAME = 64
MAX_VERSION = 32
MAX_MODELS = 8
MAX_MODEL = 96
MAX_RECORD = 1200
"""Bytes of all entries together: the whole answer must fit one packet."""
_MAX_ENTRIES = 32
_KEY = re.compile(r"[0-9a-f]{64}")


class LanListing(msgspec.Struct, frozen=True, kw_only=True):
    """A node of a mesh, as it is announced.

    Attributes:
        mesh: its mesh's key.
        node: its own.
        mesh_name: of the mesh, for people; may be empty.
        name: of the node, for people.
        version: of its program.
        protocol: newest protocol that it speaks.
        models: served in its mesh, as far as they fit.
        more_models: how many more there are.
    """

    mesh: MeshId
    node: NodeId
    mesh_name: str = ""
    name: str = ""
    version: str = ""
    protocol: int = PROTOCOL
    models: tuple[str, ...] = ()
    more_models: int = 0


def encode_listing(listing: LanListing) -> dict[str, bytes]:
    """The TXT record's entries. What is too long is cut; models that do not fit are counted."""
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


def decode_listing(entries: Mapping[bytes, bytes | None]) -> LanListing | Malformed:
    """Read a TXT record of anybody."""
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
    """At most so many bytes of UTF-8, and nothing in it that moves a cursor or turns a line around."""
    visible = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text[:most])
    return visible.encode("utf-8", "replace")[:most].decode("utf-8", "ignore").strip()


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else None


def _size(entries: Mapping[str, bytes]) -> int:
    return sum(_length(key, value) for key, value in entries.items())


def _length(key: str, value: bytes) -> int:
    return len(key) + 1 + len(value) + 1
