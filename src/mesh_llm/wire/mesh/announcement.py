"""A machine's measured speed, as it travels: eleven small numbers, rates in megabytes per second.

A node's part in a split group, as it travels within its announcement.

A node's wish that its mesh be listed, as it travels within its announcement.

A node's word about itself as bytes: what it signs. A MessagePack map; nested values are arrays that may grow.

The same announcement gives the same bytes. Fields at their defaults are left out; unknown ones are skipped, so that a
later version may add some. Every text, number and list is bounded; texts hold no control characters.
"""

import math
from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.types import announcement as bounds
from mesh_llm.core.types.announcement import (
    MAX_CLIENTS,
    MAX_MESH_NAME,
    MAX_REGION,
    MAX_ROUND_TRIP_MS,
    MOST_ROUND_TRIPS,
    Announcement,
    ListingScope,
    Publicity,
    Serving,
    SplitWish,
    SplitWord,
)
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import (
    MOST_SHARES,
    Capacity,
    ModelFacts,
    ModelKind,
    ModelStatus,
    Rates,
    Role,
    Speed,
    SplitShare,
)
from mesh_llm.wire.mesh.frames import Key, Malformed, decoded

_UNIT = 10**6

_Small: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**40)]


class _Rates(msgspec.Struct, frozen=True, array_like=True):
    f16: _Small = 0
    q8: _Small = 0
    q4: _Small = 0


class WireSpeed(msgspec.Struct, frozen=True, array_like=True):
    """core.speed.Speed, field by field; an array that may grow."""

    cores: _Small = 0
    cached: _Rates = _Rates()
    one: _Rates = _Rates()
    full: _Rates = _Rates()
    step_ns: _Small = 0
    full_step_ns: _Small = 0


def speed_out(speed: Speed) -> WireSpeed:
    """As it travels."""
    return WireSpeed(
        speed.cores,
        _rates_out(speed.cached),
        _rates_out(speed.one),
        _rates_out(speed.full),
        speed.step_ns,
        speed.full_step_ns,
    )


def speed_in(wire: WireSpeed) -> Speed:
    """The opposite."""
    return Speed(
        cores=wire.cores,
        cached=_rates_in(wire.cached),
        one=_rates_in(wire.one),
        full=_rates_in(wire.full),
        step_ns=wire.step_ns,
        full_step_ns=wire.full_step_ns,
    )


def _rates_out(rates: Rates) -> _Rates:
    return _Rates(rates.f16 // _UNIT, rates.q8 // _UNIT, rates.q4 // _UNIT)


def _rates_in(wire: _Rates) -> Rates:
    return Rates(f16=wire.f16 * _UNIT, q8=wire.q8 * _UNIT, q4=wire.q4 * _UNIT)


_MAX_NUMBER = 2**53
_MAX_MILLISECONDS = 1e6
_MAX_PART = 1e12

_AnnouncedSplitNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)]
_Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_MILLISECONDS)]
_Part: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_PART)]
_AnnouncedSplitText: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
_AnnouncedSplitModel: TypeAlias = Annotated[
    str, msgspec.Meta(min_length=1, max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)
]


class _Share(msgspec.Struct, frozen=True, array_like=True):
    node: Key
    layers: _AnnouncedSplitNumber
    memory_bytes: _AnnouncedSplitNumber = 0


class _Distance(msgspec.Struct, frozen=True, array_like=True):
    node: Key
    milliseconds: _Milliseconds


class _Wish(msgspec.Struct, frozen=True, array_like=True):
    context: _AnnouncedSplitNumber = 0
    slots: _AnnouncedSplitNumber = 0
    shares: Annotated[tuple[_Part, ...], msgspec.Meta(max_length=MOST_SHARES)] = ()


class WireSplit(msgspec.Struct, frozen=True, array_like=True):
    """core.split_word.SplitWord, field by field; an array that may grow."""

    model: _AnnouncedSplitModel
    fingerprint: _AnnouncedSplitText = ""
    memory_bytes: _AnnouncedSplitNumber = 0
    seeds: bool = False
    asked: bool = False
    max_rtt_ms: _Milliseconds = MAX_ROUND_TRIP_MS
    round_trips: Annotated[tuple[_Distance, ...], msgspec.Meta(max_length=MOST_ROUND_TRIPS)] = ()
    term: _AnnouncedSplitNumber = 0
    leads: bool = False
    shares: Annotated[tuple[_Share, ...], msgspec.Meta(max_length=MOST_SHARES)] = ()
    wish: _Wish = _Wish()
    bare_of: _AnnouncedSplitText = ""
    """The fingerprint of who has not got the file. Not in `fingerprint`: earlier versions would elect such a node."""


def split_out(word: SplitWord) -> WireSplit:
    """As it travels."""
    return WireSplit(
        word.model,
        "" if word.bare else word.fingerprint,
        _announced_split_number(word.memory_bytes),
        word.seeds,
        word.asked,
        _bounded(word.max_rtt_ms, _MAX_MILLISECONDS),
        tuple(
            _Distance(bytes.fromhex(node), _bounded(word.round_trips[node], _MAX_MILLISECONDS))
            for node in sorted(word.round_trips)
        ),
        _announced_split_number(word.term),
        word.leads,
        tuple(
            _Share(
                bytes.fromhex(share.node),
                _announced_split_number(share.layers),
                _announced_split_number(share.memory_bytes),
            )
            for share in word.shares
        ),
        _Wish(
            _announced_split_number(word.wish.context),
            _announced_split_number(word.wish.slots),
            tuple(_bounded(part, _MAX_PART) for part in word.wish.shares),
        ),
        word.fingerprint if word.bare else "",
    )


def split_in(wire: WireSplit) -> SplitWord:
    """The opposite."""
    return SplitWord(
        model=ModelName(wire.model),
        fingerprint=wire.bare_of or wire.fingerprint,
        memory_bytes=wire.memory_bytes,
        seeds=wire.seeds,
        asked=wire.asked,
        max_rtt_ms=wire.max_rtt_ms,
        round_trips={NodeId(entry.node.hex()): entry.milliseconds for entry in wire.round_trips},
        term=wire.term,
        leads=wire.leads,
        shares=tuple(
            SplitShare(node=NodeId(share.node.hex()), layers=share.layers, memory_bytes=share.memory_bytes)
            for share in wire.shares
        ),
        wish=SplitWish(context=wire.wish.context, slots=wire.wish.slots, shares=wire.wish.shares),
        bare=bool(wire.bare_of),
    )


def _announced_split_number(value: int) -> int:
    return min(max(0, value), _MAX_NUMBER)


def _bounded(value: float, most: float) -> float:
    return min(max(0.0, value), most) if math.isfinite(value) else 0.0


class WirePublicity(msgspec.Struct, frozen=True, array_like=True):
    """core.publicity.Publicity, field by field; an array that may grow."""

    name: Annotated[str, msgspec.Meta(max_length=MAX_MESH_NAME, pattern=bounds.ONE_LINE)] = ""
    region: Annotated[str, msgspec.Meta(max_length=MAX_REGION, pattern=bounds.ONE_LINE)] = ""
    max_clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CLIENTS)] = 0
    scope: ListingScope = "serve"
    failing: bool = False


def publicity_out(publicity: Publicity) -> WirePublicity:
    """As it travels."""
    return WirePublicity(
        publicity.name,
        publicity.region,
        publicity.max_clients,
        publicity.scope,
        publicity.failing,
    )


def publicity_in(wire: WirePublicity) -> Publicity:
    """The opposite."""
    return Publicity(
        name=wire.name,
        region=wire.region,
        max_clients=wire.max_clients,
        scope=wire.scope,
        failing=wire.failing,
    )


_MAX_RATE = 1e12

_AnnouncementNumber: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)]
_Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_RATE)]
_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_NAME, pattern=bounds.ONE_LINE)]
_AnnouncementText: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
_AnnouncementModel: TypeAlias = Annotated[
    str, msgspec.Meta(min_length=1, max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)
]
_Lines: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_REASON, pattern=bounds.LINES)]


class _Serving(msgspec.Struct, frozen=True, array_like=True):
    model: _AnnouncementModel
    status: ModelStatus
    term: _AnnouncementNumber = 0
    context: _AnnouncementNumber = 0
    slots: _AnnouncementNumber = 1
    in_flight: _AnnouncementNumber = 0
    tokens_per_second: _Rate = 0.0
    size_bytes: _AnnouncementNumber = 0
    reason: _Lines = ""
    embeddings: bool = True
    aliases: Annotated[tuple[_AnnouncementText, ...], msgspec.Meta(max_length=bounds.MAX_ALIASES)] = ()
    kind: ModelKind = ModelKind.CHAT


class _Facts(msgspec.Struct, frozen=True, array_like=True):
    name: _AnnouncementModel
    kind: ModelKind
    size_bytes: _AnnouncementNumber
    layers: _AnnouncementNumber
    context_train: _AnnouncementNumber
    embedding_length: _AnnouncementNumber
    vocabulary: _AnnouncementNumber
    kv_bytes_per_token: _AnnouncementNumber
    output_bytes: _AnnouncementNumber = 0
    architecture: _AnnouncementText = ""
    fingerprint: _AnnouncementText = ""
    source: _AnnouncementText = ""
    ranks: bool = False
    """A reranker. Its `kind` says embedding: nodes of 0.1 refuse the whole announcement for a kind they do not know."""


class _Capacity(msgspec.Struct, frozen=True, array_like=True):
    memory_bytes: _AnnouncementNumber = 0
    memory_total_bytes: _AnnouncementNumber = 0
    devices: Annotated[tuple[_AnnouncementText, ...], msgspec.Meta(max_length=bounds.MAX_DEVICES)] = ()
    engine: _AnnouncementText = ""
    rpc_version: _AnnouncementText = ""
    speed: WireSpeed | None = None


class _Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    mesh: Key
    node: Key
    incarnation: _AnnouncementNumber
    sequence: _AnnouncementNumber
    name: _Name = ""
    role: Role = Role.SERVE
    version: _Name = ""
    serving: Annotated[tuple[_Serving, ...], msgspec.Meta(max_length=bounds.MAX_SERVING)] = ()
    on_disk: Annotated[tuple[_Facts, ...], msgspec.Meta(max_length=bounds.MAX_ON_DISK)] = ()
    wanted: Annotated[tuple[_AnnouncementModel, ...], msgspec.Meta(max_length=bounds.MAX_WANTED)] = ()
    demand: Annotated[dict[_AnnouncementModel, _Rate], msgspec.Meta(max_length=bounds.MAX_DEMAND)] = {}
    capacity: _Capacity = _Capacity()
    addresses: Annotated[tuple[_AnnouncementText, ...], msgspec.Meta(max_length=bounds.MAX_ADDRESSES)] = ()
    relay: _AnnouncementText = ""
    certificate: Annotated[bytes, msgspec.Meta(max_length=bounds.MAX_CERTIFICATE)] = b""
    left: bool = False
    split: WireSplit | None = None
    shares: bool = False
    publicity: WirePublicity | None = None
    clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CLIENTS)] = 0


_encode = msgspec.msgpack.Encoder(order="deterministic").encode
_decoder = msgspec.msgpack.Decoder(_Announcement)


def _announcement_number(value: int) -> int:
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
        _announcement_number(capacity.memory_bytes),
        _announcement_number(capacity.memory_total_bytes),
        capacity.devices,
        capacity.engine,
        capacity.rpc_version,
        speed_out(capacity.speed) if capacity.speed.known else None,
    )


def _serving_out(serving: Serving) -> _Serving:
    return _Serving(
        serving.model,
        serving.status,
        _announcement_number(serving.term),
        _announcement_number(serving.context),
        _announcement_number(serving.slots),
        _announcement_number(serving.in_flight),
        _rate(serving.tokens_per_second),
        _announcement_number(serving.size_bytes),
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
        _announcement_number(facts.size_bytes),
        _announcement_number(facts.layers),
        _announcement_number(facts.context_train),
        _announcement_number(facts.embedding_length),
        _announcement_number(facts.vocabulary),
        _announcement_number(facts.kv_bytes_per_token),
        _announcement_number(facts.output_bytes),
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
