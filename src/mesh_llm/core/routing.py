"""Which nodes can answer a request for a model, best first. Read from an immutable snapshot: no locks, no await."""

from collections.abc import Mapping

import msgspec

from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.model import ModelStatus


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One place that serves a model.

    Attributes:
        node: who serves it.
        local: True where this node's own engine does.
        address: `host:port` of the local engine; empty for a remote one.
        status: only WARM ones are routed to.
        slots: requests that it answers at once.
        context: tokens per slot there.
        load: its own in-flight requests over its slots, as last heard (0.0 idle, 1.0 full).
        tokens_per_second: measured generation speed per request; 0.0 unknown.
        rtt_ms: round trip to it; 0.0 for local.
        term: the launch that this target belongs to.
    """

    node: NodeId
    local: bool
    address: str = ""
    status: ModelStatus = ModelStatus.WARM
    slots: int = 1
    context: int = 0
    load: float = 0.0
    tokens_per_second: float = 0.0
    rtt_ms: float = 0.0
    term: int = 0


class ModelRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A model that the mesh knows, served or not.

    Attributes:
        name: as served.
        status: best of its targets' states; COLD when it is known but nobody serves it.
        targets: who serves it, or is about to.
        context: the tokens that every warm target can take at least.
        size_bytes: weights.
        reason: why it is not warm (last lines of a crash, `need 55.0 GB, have 51.5 GB`); empty when warm.
        aliases: further exact names, such as the file stem.
        owner: for `owned_by`: node id (or name) of the first host.
        created: UNIX seconds at which it became known here; for `created`.
        embeddings: whether its engine answers /v1/embeddings.
    """

    name: ModelName
    status: ModelStatus
    targets: tuple[Target, ...] = ()
    context: int = 0
    size_bytes: int = 0
    reason: str = ""
    aliases: tuple[str, ...] = ()
    owner: str = ""
    created: int = 0
    embeddings: bool = True


class RoutingSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All routes at one moment.

    Attributes:
        version: rises with every change.
        node: whose view this is.
        default: what a request without `model` means; None where this node serves nothing.
        models: by served name.
        accepting: False while draining: new requests get 503.
    """

    version: int
    node: NodeId
    default: ModelName | None = None
    models: Mapping[ModelName, ModelRoute] = {}
    accepting: bool = True
