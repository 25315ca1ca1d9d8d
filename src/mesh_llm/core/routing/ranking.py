"""Which nodes can answer a request for a model, best first. Read from an immutable snapshot: no locks, no await."""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from zlib import crc32

import msgspec

from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelKind, ModelStatus


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
        kind: what it is for.
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
    kind: ModelKind = ModelKind.CHAT


class RoutingSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All routes at one moment.

    Attributes:
        version: rises with every change.
        node: whose view this is.
        default: what a request without `model` means; None where this node serves nothing.
        models: by served name.
        accepting: False while draining: new requests get 503.
        alive: other nodes that serve anything, or are ending it, and are not taken for dead: also those that nothing is
            routed to at present.
    """

    version: int
    node: NodeId
    default: ModelName | None = None
    models: Mapping[ModelName, ModelRoute] = {}
    accepting: bool = True
    alive: frozenset[NodeId] = frozenset()


class HealthState(StrEnum):
    """Whether a node's API can answer."""

    READY = "ready"
    LOADING = "loading"
    FAILED = "failed"
    STOPPING = "stopping"


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """What `/health` says; `reason` where it is not ready."""

    state: HealthState
    reason: str = ""


def health(snapshot: RoutingSnapshot) -> Health:
    """Judge a node by its own model, or, where it has none, by the best that the mesh offers."""
    if not snapshot.accepting:
        return Health(state=HealthState.STOPPING, reason="the node is stopping")
    default = snapshot.models.get(snapshot.default) if snapshot.default is not None else None
    routes = (default,) if default is not None else tuple(snapshot.models.values())
    by_status = {route.status: route for route in routes}
    if ModelStatus.WARM in by_status:
        return Health(state=HealthState.READY)
    failed = by_status.get(ModelStatus.FAILED)
    if failed is not None and ModelStatus.LOADING not in by_status:
        return Health(state=HealthState.FAILED, reason=failed.reason or f"{failed.name} failed")
    waiting = next(iter(by_status.values()), None)
    return Health(state=HealthState.LOADING, reason=(waiting.reason if waiting else "") or "no model is ready yet")


class Warmth(msgspec.Struct, frozen=True, kw_only=True):
    """What a node has seen of a prompt before.

    Attributes:
        prefix_bytes: length of the longest beginning of this prompt that was sent there.
        conversation: it reaches into what the user said, beyond a system prompt that many requests share.
    """

    prefix_bytes: int
    conversation: bool = False


TYPICAL_TOKENS = 128.0
"""Length of the answer by which targets are compared."""
_DEFAULT_SPEED = 20.0
_PROMPT_SPEEDUP = 10.0
_BYTES_PER_TOKEN = 4.0
_CONVERSATION_BONUS = 0.5
_MOST_BONUS = 3.0
_QUEUE_WEIGHT = 2.0
_ROUND_TRIPS = 2.0


def rank(
    route: ModelRoute,
    in_flight: Mapping[NodeId, int],
    *,
    warmth: Mapping[NodeId, Warmth] | None = None,
    local_only: bool = False,
    salt: int = 0,
    prompt_tokens: int = 0,
) -> list[Target]:
    """Order the warm targets of a route by how long a typical answer would take there, quickest first.

    The estimate is in seconds: generation at the measured speed, slowed by the requests that share it and more so by
    those that would queue before it, plus round trips, less the prompt processing that a warm cache saves. A host
    that knows the conversation is worth half an answer more: enough to stay with it while it has room. What warmth is
    worth has a bound, so that an overloaded host always yields to a free one.

    Args:
        route: the model.
        in_flight: requests that this node has at each target now; more recent than the load that targets tell.
        warmth: what targets have seen of this prompt.
        local_only: leave remote targets out (for a request that came from another node).
        salt: any number that differs between requests, so that equals take turns.
        prompt_tokens: about how long the prompt is; who has not the context for it comes last, the largest first.
    """
    targets = [t for t in route.targets if t.status is ModelStatus.WARM and (t.local or not local_only)]
    if len(targets) <= 1:
        return targets
    fallback = typical_speed(targets)
    warmth = warmth or {}

    def order(target: Target) -> tuple[int, float, int]:
        if 0 < target.context <= prompt_tokens:
            return 1, -float(target.context), 0
        seconds = expected_seconds(target, in_flight.get(target.node, 0), warmth.get(target.node), fallback)
        return 0, seconds, crc32(f"{salt}/{target.node}".encode())

    return sorted(targets, key=order)


def typical_speed(targets: Sequence[Target]) -> float:
    """Tokens per second of a target that told none: the mean of those that did."""
    known = [target.tokens_per_second for target in targets if target.tokens_per_second > 0.0]
    return sum(known) / len(known) if known else _DEFAULT_SPEED


def expected_seconds(target: Target, in_flight: int, warmth: Warmth | None, fallback_speed: float) -> float:
    """Estimate a typical answer's time at a target; see `rank`. `fallback_speed` stands in where none was measured."""
    speed = target.tokens_per_second or fallback_speed
    slots = max(1, target.slots)
    busy = max(float(in_flight), target.load * slots)
    queued = max(0.0, busy + 1.0 - slots)
    slowdown = 1.0 + busy / slots + _QUEUE_WEIGHT * queued / slots
    answer = TYPICAL_TOKENS / speed
    seconds = answer * slowdown + _ROUND_TRIPS * target.rtt_ms / 1000.0
    if warmth is not None:
        saved = warmth.prefix_bytes / _BYTES_PER_TOKEN / (speed * _PROMPT_SPEEDUP)
        saved += _CONVERSATION_BONUS * answer if warmth.conversation else 0.0
        seconds -= min(saved, _MOST_BONUS * answer)
    return seconds
