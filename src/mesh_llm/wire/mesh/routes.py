"""ROUTES streams: a passive node fetches the routing table: which nodes serve which models, and where to dial them.

The table never contains the loopback addresses of local engines.
"""

from functools import partial
from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.routing.table import as_announced
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import MAX_SPLIT_NODES, ModelKind, ModelStatus
from mesh_llm.wire.codec import Signature, copied, decode

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
    """Asks for the table if it differs from (epoch, version), and waits up to `wait` seconds for a change.

    `epoch` identifies the process that answers: versions start again in each process.
    """

    epoch: Annotated[bytes, msgspec.Meta(max_length=EPOCH_BYTES)] = b""
    version: Count = 0
    wait: Annotated[float, msgspec.Meta(ge=0, le=MAX_WAIT)] = 0.0


class RouteHost(msgspec.Struct, frozen=True, array_like=True):
    """Where to dial a serving node."""

    node: NodeName
    addresses: Annotated[tuple[Address, ...], msgspec.Meta(max_length=16)] = ()
    relay: Annotated[str, msgspec.Meta(max_length=256)] = ""


class RouteTarget(msgspec.Struct, frozen=True, array_like=True):
    """A core.routing.ranking.Target of a remote node."""

    node: NodeName
    status: ModelStatus
    slots: Count
    context: Count
    load: float
    tokens_per_second: float
    term: Count
    workers: Annotated[tuple[NodeName, ...], msgspec.Meta(max_length=MAX_SPLIT_NODES)] = ()


class RouteModel(msgspec.Struct, frozen=True, array_like=True):
    """A core.routing.ranking.ModelRoute."""

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


class RouteOwner(msgspec.Struct, frozen=True, array_like=True):
    """Whose node it is, as its owner signed; a passive node verifies that itself."""

    node: NodeName
    owner: NodeName
    issued: Count
    expires: Count
    signature: Signature


class RouteTable(msgspec.Struct, frozen=True, array_like=True, tag="table"):
    """The whole table.

    Attributes:
        again: seconds to wait before the next request if the answering node granted no long poll.
        alive: as in core.routing.ranking.RoutingSnapshot, and the answering node.
        owners: of the nodes in the table that have one.
    """

    epoch: Annotated[bytes, msgspec.Meta(max_length=EPOCH_BYTES)]
    version: Count
    models: Annotated[tuple[RouteModel, ...], msgspec.Meta(max_length=MAX_MODELS)] = ()
    hosts: Annotated[tuple[RouteHost, ...], msgspec.Meta(max_length=MAX_TARGETS)] = ()
    default: Name = ""
    again: Annotated[float, msgspec.Meta(ge=0, le=600)] = 0.0
    alive: Annotated[tuple[NodeName, ...], msgspec.Meta(max_length=MAX_TARGETS)] = ()
    owners: Annotated[tuple[RouteOwner, ...], msgspec.Meta(max_length=MAX_TARGETS)] = ()


class RoutesUnchanged(msgspec.Struct, frozen=True, array_like=True, tag="unchanged"):
    """The table has not changed. Ask again after `again` seconds."""

    again: Annotated[float, msgspec.Meta(ge=0, le=600)] = 0.0


RoutesReply: TypeAlias = RouteTable | RoutesUnchanged

decode_routes_request = partial(decode, msgspec.msgpack.Decoder(RoutesRequest))
decode_routes_reply = partial(decode, msgspec.msgpack.Decoder(RouteTable | RoutesUnchanged))


def table_of(snapshot: RoutingSnapshot, epoch: bytes, hosts: tuple[RouteHost, ...]) -> RouteTable:
    """The table for other nodes: this node's own engines become remote targets on it."""
    snapshot = as_announced(snapshot)
    owners = snapshot.owners
    return RouteTable(
        epoch=epoch,
        version=snapshot.version,
        models=tuple(
            copied(
                RouteModel,
                route,
                targets=tuple(copied(RouteTarget, target) for target in route.targets),
                reason=route.reason[:500],
                aliases=route.aliases[:64],
            )
            for route in snapshot.models.values()
        ),
        hosts=hosts,
        default=snapshot.default or "",
        alive=(snapshot.node, *sorted(snapshot.alive)[: MAX_TARGETS - 1]),
        owners=tuple(copied(RouteOwner, owners[node], node=node) for node in sorted(owners)[:MAX_TARGETS]),
    )


def snapshot_of(table: RouteTable, node: NodeId, version: int) -> RoutingSnapshot:
    """The table as the routes of passive node `node`, with its own version count. Round trips are not known yet."""
    targets = [target.node for model in table.models for target in model.targets]
    return RoutingSnapshot(
        version=version,
        node=node,
        default=ModelName(table.default) if table.default else None,
        models={ModelName(model.name): _route_of(model) for model in table.models},
        # Earlier versions do not send `alive`: then the nodes that they route to are alive.
        alive=frozenset(NodeId(node) for node in (*table.alive, *targets)),
        owners={NodeId(one.node): copied(Ownership, one, owner=OwnerId(one.owner)) for one in table.owners},
    )


def _route_of(model: RouteModel) -> ModelRoute:
    targets = (
        Target(
            node=NodeId(target.node),
            local=False,
            status=target.status,
            slots=target.slots,
            context=target.context,
            load=target.load,
            tokens_per_second=target.tokens_per_second,
            term=target.term,
            workers=tuple(map(NodeId, target.workers)),
        )
        for target in model.targets
    )
    return copied(ModelRoute, model, targets=tuple(targets))
