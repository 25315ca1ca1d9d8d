"""A node's word about itself as bytes: what it signs. A MessagePack map; nested values are arrays that may grow.

The same announcement gives the same bytes. Fields at their defaults are left out; unknown ones are skipped, so that a
later version may add some. Every text, number and list is bounded; texts hold no control characters.
"""

import math
from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core import bounds
from mesh_llm.core.announcement import Announcement, Serving
from mesh_llm.core.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.model import Capacity, ModelFacts, ModelKind, ModelStatus, Role
from mesh_llm.core.publicity import MAX_CLIENTS
from mesh_llm.core.speed import Speed
from mesh_llm.wire.announced_publicity import WirePublicity, publicity_in, publicity_out
from mesh_llm.wire.announced_speed import WireSpeed, speed_in, speed_out
from mesh_llm.wire.announced_split import WireSplit, split_in, split_out
from mesh_llm.wire.decoding import Malformed, decoded
from mesh_llm.wire.signing import Key

_MAX_NUMBER = 2**53
_MAX_RATE = 1e12

_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)]
_Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_RATE)]
_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_NAME, pattern=bounds.ONE_LINE)]
_Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
_Model: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
_Lines: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_REASON, pattern=bounds.LINES)]


class _Serving(msgspec.Struct, frozen=True, array_like=True):
    model: _Model
    status: ModelStatus
    term: _Number = 0
    context: _Number = 0
    slots: _Number = 1
    in_flight: _Number = 0
    tokens_per_second: _Rate = 0.0
    size_bytes: _Number = 0
    reason: _Lines = ""
    embeddings: bool = True
    aliases: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=bounds.MAX_ALIASES)] = ()
    kind: ModelKind = ModelKind.CHAT


class _Facts(msgspec.Struct, frozen=True, array_like=True):
    name: _Model
    kind: ModelKind
    size_bytes: _Number
    layers: _Number
    context_train: _Number
    embedding_length: _Number
    vocabulary: _Number
    kv_bytes_per_token: _Number
    output_bytes: _Number = 0
    architecture: _Text = ""
    fingerprint: _Text = ""
    source: _Text = ""
    ranks: bool = False
    """A reranker. Its `kind` says embedding: nodes of 0.1 refuse the whole announcement for a kind they do not know."""


class _Capacity(msgspec.Struct, frozen=True, array_like=True):
    memory_bytes: _Number = 0
    memory_total_bytes: _Number = 0
    devices: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=bounds.MAX_DEVICES)] = ()
    engine: _Text = ""
    rpc_version: _Text = ""
    speed: WireSpeed | None = None


class _Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    mesh: Key
    node: Key
    incarnation: _Number
    sequence: _Number
    name: _Name = ""
    role: Role = Role.SERVE
    version: _Name = ""
    serving: Annotated[tuple[_Serving, ...], msgspec.Meta(max_length=bounds.MAX_SERVING)] = ()
    on_disk: Annotated[tuple[_Facts, ...], msgspec.Meta(max_length=bounds.MAX_ON_DISK)] = ()
    wanted: Annotated[tuple[_Model, ...], msgspec.Meta(max_length=bounds.MAX_WANTED)] = ()
    demand: Annotated[dict[_Model, _Rate], msgspec.Meta(max_length=bounds.MAX_DEMAND)] = {}
    capacity: _Capacity = _Capacity()
    addresses: Annotated[tuple[_Text, ...], msgspec.Meta(max_length=bounds.MAX_ADDRESSES)] = ()
    relay: _Text = ""
    certificate: Annotated[bytes, msgspec.Meta(max_length=bounds.MAX_CERTIFICATE)] = b""
    left: bool = False
    split: WireSplit | None = None
    shares: bool = False
    publicity: WirePublicity | None = None
    clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CLIENTS)] = 0


_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decoder = msgspec.msgpack.Decoder(_Announcement)


def _number(value: int) -> int:
    return min(max(0, value), _MAX_NUMBER)


def _rate(value: float) -> float:
    return min(max(0.0, value), _MAX_RATE) if math.isfinite(value) else 0.0


def encode_announcement(announcement: Announcement) -> bytes:
    """The payload that the node signs. Raises ValueError where it exceeds what others accept: `core.bounds.trimmed`."""
    payload = _encode(
        _Announcement(
            mesh=bytes.fromhex(announcement.mesh),
            node=bytes.fromhex(announcement.node),
            incarnation=announcement.incarnation,
            sequence=announcement.sequence,
            name=announcement.name,
            role=announcement.role,
            version=announcement.version,
            serving=tuple(map(_serving_out, announcement.serving)),
            on_disk=tuple(map(_facts_out, announcement.on_disk)),
            wanted=announcement.wanted,
            demand={name: _rate(rate) for name, rate in announcement.demand.items()},
            capacity=_capacity_out(announcement.capacity),
            addresses=announcement.addresses,
            relay=announcement.relay,
            certificate=announcement.certificate,
            left=announcement.left,
            split=None if announcement.split is None else split_out(announcement.split),
            shares=announcement.shares,
            publicity=None if announcement.publicity is None else publicity_out(announcement.publicity),
            clients=min(max(0, announcement.clients), MAX_CLIENTS),
        )
    )
    if len(payload) > bounds.MAX_PAYLOAD:
        raise ValueError(f"an announcement of {len(payload)} bytes, at most {bounds.MAX_PAYLOAD}")
    return payload


def decode_announcement(payload: bytes) -> Announcement | Malformed:
    """Read a payload. Who signed it, and whether its node is admitted, are the caller's questions."""
    if len(payload) > bounds.MAX_PAYLOAD:
        return Malformed(f"an announcement of {len(payload)} bytes, at most {bounds.MAX_PAYLOAD}")
    wire = decoded(_decoder, payload)
    if isinstance(wire, Malformed):
        return wire
    return Announcement(
        mesh=MeshId(wire.mesh.hex()),
        node=NodeId(wire.node.hex()),
        incarnation=Incarnation(wire.incarnation),
        sequence=wire.sequence,
        name=wire.name,
        role=wire.role,
        version=wire.version,
        serving=tuple(map(_serving_in, wire.serving)),
        on_disk=tuple(map(_facts_in, wire.on_disk)),
        wanted=tuple(map(ModelName, wire.wanted)),
        demand=dict(wire.demand),
        capacity=Capacity(
            memory_bytes=wire.capacity.memory_bytes,
            memory_total_bytes=wire.capacity.memory_total_bytes,
            devices=wire.capacity.devices,
            engine=wire.capacity.engine,
            rpc_version=wire.capacity.rpc_version,
            speed=Speed() if wire.capacity.speed is None else speed_in(wire.capacity.speed),
        ),
        addresses=wire.addresses,
        relay=wire.relay,
        certificate=wire.certificate,
        left=wire.left,
        split=None if wire.split is None else split_in(wire.split),
        shares=wire.shares,
        publicity=None if wire.publicity is None else publicity_in(wire.publicity),
        clients=wire.clients,
    )


def _capacity_out(capacity: Capacity) -> _Capacity:
    return _Capacity(
        _number(capacity.memory_bytes),
        _number(capacity.memory_total_bytes),
        capacity.devices,
        capacity.engine,
        capacity.rpc_version,
        speed_out(capacity.speed) if capacity.speed.known else None,
    )


def _serving_out(serving: Serving) -> _Serving:
    return _Serving(
        serving.model,
        serving.status,
        _number(serving.term),
        _number(serving.context),
        _number(serving.slots),
        _number(serving.in_flight),
        _rate(serving.tokens_per_second),
        _number(serving.size_bytes),
        serving.reason,
        serving.embeddings,
        serving.aliases,
        serving.kind,
    )


def _serving_in(wire: _Serving) -> Serving:
    return Serving(
        model=ModelName(wire.model),
        status=wire.status,
        term=wire.term,
        context=wire.context,
        slots=wire.slots,
        in_flight=wire.in_flight,
        tokens_per_second=wire.tokens_per_second,
        size_bytes=wire.size_bytes,
        reason=wire.reason,
        embeddings=wire.embeddings,
        aliases=wire.aliases,
        kind=wire.kind,
    )


def _facts_out(facts: ModelFacts) -> _Facts:
    ranks = facts.kind is ModelKind.RERANK
    return _Facts(
        facts.name,
        ModelKind.EMBEDDING if ranks else facts.kind,
        _number(facts.size_bytes),
        _number(facts.layers),
        _number(facts.context_train),
        _number(facts.embedding_length),
        _number(facts.vocabulary),
        _number(facts.kv_bytes_per_token),
        _number(facts.output_bytes),
        facts.architecture,
        facts.fingerprint,
        facts.source,
        ranks,
    )


def _facts_in(wire: _Facts) -> ModelFacts:
    return ModelFacts(
        name=ModelName(wire.name),
        kind=ModelKind.RERANK if wire.ranks else wire.kind,
        size_bytes=wire.size_bytes,
        layers=wire.layers,
        context_train=wire.context_train,
        embedding_length=wire.embedding_length,
        vocabulary=wire.vocabulary,
        kv_bytes_per_token=wire.kv_bytes_per_token,
        output_bytes=wire.output_bytes,
        architecture=wire.architecture,
        fingerprint=wire.fingerprint,
        source=wire.source,
    )
