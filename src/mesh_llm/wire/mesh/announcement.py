"""A node's announcement as bytes: what it signs. A MessagePack map; nested structs are arrays that may grow.

The same announcement gives the same bytes. Fields at their defaults are left out and unknown ones are skipped, so a
later version may add fields. `core/types/announcement.py` declares the fields and their limits; here is only what
travels in another form.
"""

from typing import Annotated, Any, TypeAlias

import msgspec

from mesh_llm.core.types.announcement import (
    LATER_SIZES,
    MAX_DEVICES,
    MAX_PAYLOAD,
    Announcement,
    Count,
    Milliseconds,
    Model,
    SplitState,
    Text,
    has_later_sizes,
)
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import AttentionRates, Capacity, ModelFacts, ModelKind, Rates, Speed
from mesh_llm.wire.codec import Key, Malformed, decode
from mesh_llm.wire.mesh.structs import Codec, derive

_RATE_UNIT = 10**6
_Small: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class _Rates(msgspec.Struct, frozen=True, array_like=True):
    """Megabytes per second."""

    f16: _Small = 0
    q8: _Small = 0
    q4: _Small = 0


def _write_rates(rates: Rates) -> _Rates:
    return _Rates(rates.f16 // _RATE_UNIT, rates.q8 // _RATE_UNIT, rates.q4 // _RATE_UNIT)


def _read_rates(wire: _Rates) -> Rates:
    return Rates(f16=wire.f16 * _RATE_UNIT, q8=wire.q8 * _RATE_UNIT, q4=wire.q4 * _RATE_UNIT)


class _AttentionRates(msgspec.Struct, frozen=True, array_like=True):
    """Millions per second."""

    prompt: _Small = 0
    token: _Small = 0


def _write_attention(rates: AttentionRates) -> _AttentionRates:
    return _AttentionRates(rates.prompt // _RATE_UNIT, rates.token // _RATE_UNIT)


def _read_attention(wire: _AttentionRates) -> AttentionRates:
    return AttentionRates(prompt=wire.prompt * _RATE_UNIT, token=wire.token * _RATE_UNIT)


SPEED = derive(
    Speed,
    {
        Rates: Codec(_Rates, _write_rates, _read_rates),
        AttentionRates: Codec(_AttentionRates, _write_attention, _read_attention),
        int: Codec(_Small),
    },
)
"""A machine's measured speed."""


class Distance(msgspec.Struct, frozen=True, array_like=True):
    """The round trip to one node."""

    node: Key
    milliseconds: Milliseconds


def _write_distances(round_trips: dict[NodeId, float]) -> tuple[Distance, ...]:
    return tuple(Distance(bytes.fromhex(node), round_trips[node]) for node in sorted(round_trips))


def read_distances(wire: tuple[Distance, ...]) -> dict[NodeId, float]:
    """Milliseconds by node."""
    return {NodeId(entry.node.hex()): entry.milliseconds for entry in wire}


_DISTANCES = Codec(tuple[Distance, ...], _write_distances, read_distances)


def _no_text(_: bool) -> str:
    return ""


_SPLIT = derive(SplitState, {dict[NodeId, Milliseconds]: _DISTANCES, "bare": Codec(Text, _no_text, bool)})


def _write_split(split: SplitState) -> Any:
    """A node without the file gives the fingerprint in the last field: versions before it would elect such a node."""
    wire = _SPLIT.write(split)
    return msgspec.structs.replace(wire, fingerprint="", bare=split.fingerprint) if split.bare else wire


def _read_split(wire: Any) -> SplitState:
    return msgspec.structs.replace(_SPLIT.read(wire), fingerprint=wire.bare or wire.fingerprint)


class _Facts(msgspec.Struct, frozen=True, array_like=True):
    """The part of ModelFacts that travels; at the end `LATER_SIZES`, in their order."""

    name: Model
    kind: ModelKind
    size_bytes: Count
    layers: Count
    context_train: Count
    embedding_length: Count
    vocabulary: Count
    kv_bytes_per_token: Count
    output_bytes: Count = 0
    architecture: Text = ""
    fingerprint: Text = ""
    source: Text = ""
    ranks: bool = False
    """A reranker. Its `kind` says embedding: nodes of 0.1 refuse the whole announcement for a kind they do not know."""
    kv_window_bytes_per_token: Count = 0
    window: Count = 0
    state_bytes: Count = 0
    compute_width: Count = 0
    companion_bytes: Count = 0


_SAME_FACTS = tuple(name for name in _Facts.__struct_fields__ if name not in {"kind", "ranks"})


def _write_facts(facts: ModelFacts) -> _Facts | tuple[Any, ...]:
    ranks = facts.kind is ModelKind.RERANK
    same = {name: getattr(facts, name) for name in _SAME_FACTS}
    wire = _Facts(kind=ModelKind.EMBEDDING if ranks else facts.kind, ranks=ranks, **same)
    return wire if has_later_sizes(facts) else msgspec.structs.astuple(wire)[: -len(LATER_SIZES)]


def _read_facts(wire: _Facts) -> ModelFacts:
    same = {name: getattr(wire, name) for name in _SAME_FACTS}
    return ModelFacts(kind=ModelKind.RERANK if wire.ranks else wire.kind, **same)


def _write_speed(speed: Speed) -> Any:
    return SPEED.write(speed) if speed.known else None


def _read_speed(wire: Any) -> Speed:
    return Speed() if wire is None else SPEED.read(wire)


_DEVICES: Any = Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_DEVICES)]
_SPEED_IF_KNOWN = Codec(SPEED.type | None, _write_speed, _read_speed)
_CAPACITY = derive(Capacity, {"devices": Codec(_DEVICES), "speed": _SPEED_IF_KNOWN, "host_speed": _SPEED_IF_KNOWN})
SPECIAL = {
    Capacity: _CAPACITY,
    ModelFacts: Codec(_Facts, _write_facts, _read_facts),
    SplitState: Codec(_SPLIT.type, _write_split, _read_split),
}
"""What in an announcement travels in another form than its declaration says."""

_ANNOUNCEMENT = derive(Announcement, SPECIAL, as_map=True)
_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_ANNOUNCEMENT.type)


def encode_announcement(announcement: Announcement) -> bytes:
    """The payload that the node signs. Raises ValueError if it is longer than others accept: call `trimmed` before."""
    payload = _encode(_ANNOUNCEMENT.write(announcement))
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"an announcement of {len(payload)} bytes, at most {MAX_PAYLOAD}")
    return payload


def decode_announcement(payload: bytes) -> Announcement | Malformed:
    """Read a payload. The caller checks who signed it, and whether its node is admitted."""
    if len(payload) > MAX_PAYLOAD:
        return Malformed(f"an announcement of {len(payload)} bytes, at most {MAX_PAYLOAD}")
    wire = decode(_decoder, payload)
    return wire if isinstance(wire, Malformed) else _ANNOUNCEMENT.read(wire)
