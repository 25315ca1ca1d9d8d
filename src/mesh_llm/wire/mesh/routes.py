"""The routing table as passive nodes fetch it: who serves what, and where to dial them. No loopback address leaves."""

from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelKind, ModelStatus
from mesh_llm.wire.mesh.frames import Malformed, decoded

MAX_MODELS = 4096
MAX_TARGETS = 4096
MAX_WAIT = 60.0
EPOCH_BYTES = 8

Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=256)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=600)]
Address: TypeAlias = Annotated[str, msgspec.Meta(max_length=64)]
NodeName: TypeAlias = Annotated[str, msgspec.Meta(min_length=64, max_length=64, pattern="^[0-9a-f]{64}$")]
Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class RoutesRequest(msgspec.Struct, frozen=True, array_like=True):
    """Give me the table if it is not (epoch, version) any more, waiting up to `wait` seconds for that.

    `epoch` names the answering process's life, as versions count from the start again in the next.
    """

    epoch: Annotated[bytes, msgspec.Meta(max_length=EPOCH_BYTES)] = b""
    version: Count = 0
    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT)] = 0.0


class RouteHost(msgspec.Struct, frozen=True, array_like=True):
    """Where a serving node can be dialled."""

    node: NodeName
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)] = ()
    relay: Annotated[str, msgspec.Meta(max_length=256)] = ""


class RouteTarget(msgspec.Struct, frozen=True, array_like=True):
    """One host of a model; see core.routing.Target."""

    node: NodeName
    status: ModelStatus
    slots: Count
    context: Count
    load: float
    tokens_per_second: float
    term: Count


class RouteModel(msgspec.Struct, frozen=True, array_like=True):
    """One model; see core.routing.ModelRoute."""

    name: Name
    status: ModelStatus
    targets: Annotated[tuple[RouteTarget, ...], msgspec.Meta(max_length=MAX_TARGETS)] = ()
    context: Count = 0
    size_bytes: Count = 0
    reason: Text = ""
    aliases: Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)] = ()
    owner: Name = ""
    created: Count = 0
    embeddings: bool = True
    kind: ModelKind = ModelKind.CHAT


class RouteTable(msgspec.Struct, frozen=True, array_like=True, tag="table"):
    """The whole table; `again` is how many seconds to wait before asking again where no long poll was granted.

    `alive`: see core.routing.RoutingSnapshot; the answering node is one of them.
    """

    epoch: Annotated[bytes, msgspec.Meta(max_length=EPOCH_BYTES)]
    version: Count
    models: Annotated[tuple[RouteModel, ...], msgspec.Meta(max_length=MAX_MODELS)] = ()
    hosts: Annotated[tuple[RouteHost, ...], msgspec.Meta(max_length=MAX_TARGETS)] = ()
    default: Name = ""
    again: Annotated[float, msgspec.Meta(ge=0, le=600)] = 0.0
    alive: Annotated[tuple[NodeName, ...], msgspec.Meta(max_length=MAX_TARGETS)] = ()


class RoutesUnchanged(msgspec.Struct, frozen=True, array_like=True, tag="unchanged"):
    """The table is still what was named; ask again after `again` seconds."""

    again: Annotated[float, msgspec.Meta(ge=0, le=600)] = 0.0


RoutesReply: TypeAlias = RouteTable | RoutesUnchanged

_encode = msgspec.msgpack.Encoder().encode
_request_decoder = msgspec.msgpack.Decoder(RoutesRequest)
_reply_decoder = msgspec.msgpack.Decoder(RouteTable | RoutesUnchanged)


def encode_routes(message: RoutesRequest | RoutesReply) -> bytes:
    """As it travels."""
    return _encode(message)


def decode_routes_request(payload: bytes) -> RoutesRequest | Malformed:
    """Read a request."""
    return decoded(_request_decoder, payload)


def decode_routes_reply(payload: bytes) -> RoutesReply | Malformed:
    """Read a reply."""
    return decoded(_reply_decoder, payload)


def table_of(snapshot: RoutingSnapshot, epoch: bytes, hosts: tuple[RouteHost, ...]) -> RouteTable:
    """A serving node's snapshot as others may see it: its own engines become remote targets on it."""
    return RouteTable(
        epoch=epoch,
        version=snapshot.version,
        models=tuple(_model_of(route) for route in snapshot.models.values()),
        hosts=hosts,
        default=snapshot.default or "",
        alive=(snapshot.node, *sorted(snapshot.alive)[: MAX_TARGETS - 1]),
    )


def snapshot_of(table: RouteTable, node: NodeId, version: int) -> RoutingSnapshot:
    """The table as a passive node's own routes, with its own count of versions; round trips are not known yet."""
    return RoutingSnapshot(
        version=version,
        node=node,
        default=ModelName(table.default) if table.default else None,
        models={ModelName(model.name): _route_of(model) for model in table.models},
        # Earlier versions do not say who is alive; whom they route to is.
        alive=frozenset(
            NodeId(node) for node in (*table.alive, *(t.node for model in table.models for t in model.targets))
        ),
    )


def _model_of(route: ModelRoute) -> RouteModel:
    return RouteModel(
        name=route.name,
        status=route.status,
        targets=tuple(
            RouteTarget(
                target.node,
                target.status,
                target.slots,
                target.context,
                target.load,
                target.tokens_per_second,
                target.term,
            )
            for target in route.targets
        ),
        context=route.context,
        size_bytes=route.size_bytes,
        reason=route.reason[:500],
        aliases=route.aliases[:64],
        owner=route.owner,
        created=route.created,
        embeddings=route.embeddings,
        kind=route.kind,
    )


def _route_of(model: RouteModel) -> ModelRoute:
    return ModelRoute(
        name=ModelName(model.name),
        status=model.status,
        targets=tuple(
            Target(
                node=NodeId(target.node),
                local=False,
                status=target.status,
                slots=target.slots,
                context=target.context,
                load=target.load,
                tokens_per_second=target.tokens_per_second,
                term=target.term,
            )
            for target in model.targets
        ),
        context=model.context,
        size_bytes=model.size_bytes,
        reason=model.reason,
        aliases=model.aliases,
        owner=model.owner,
        created=model.created,
        embeddings=model.embeddings,
        kind=model.kind,
    )
