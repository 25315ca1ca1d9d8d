"""The routing snapshot, and what a request reads from it: the order of a model's targets, and the node's health.

Snapshots are immutable: readers need no lock and no await.
"""

from collections.abc import Mapping, Sequence
from enum import StrEnum
from zlib import crc32

import msgspec

from mesh_llm.core.trust.corrections import Correction
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelKind, ModelStatus


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One place that serves a model.

    Attributes:
        node: serves the model.
        local: True for this node's own engine.
        address: `host:port` of the local engine; empty for a remote one.
        status: only WARM ones are routed to.
        slots: requests that it answers at once.
        context: tokens per slot there.
        load: its requests in flight over its slots, as it last announced (0.0 idle, 1.0 full).
        tokens_per_second: measured generation speed per request; 0.0 unknown.
        rtt_ms: round trip to it; 0.0 for local.
        term: number of the launch on that node.
        workers: other nodes that compute layers of it there, and so see activations.
        slow_prompts: tokens per second at which it reads prompts, where this node saw that it is slower than foretold;
            else 0.0.
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
    workers: tuple[NodeId, ...] = ()
    slow_prompts: float = 0.0


class ModelRoute(msgspec.Struct, frozen=True, kw_only=True):
    """A model that the mesh knows, served or not.

    Attributes:
        name: as served.
        status: best state of its targets; COLD when the model is known and no node serves it.
        targets: the nodes that serve it, or are about to.
        context: tokens per request that every warm target can take.
        size_bytes: weights.
        reason: why it is not warm (last lines of a crash, `need 55.0 GB, have 51.5 GB`); of a warm one, why it has less
            context than its options ask for.
        aliases: further exact names, such as the file stem.
        owner: name or id of the first host; shown as `owned_by`.
        created: UNIX seconds at which this node learned of the model.
        embeddings: whether every warm target answers /v1/embeddings.
        kind: chat, embedding, rerank and so on.
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


class Awaited(msgspec.Struct, frozen=True, kw_only=True):
    """What becomes of the requests that wait for a model.

    Attributes:
        text: what happens, as a clause for people.
        problem: why no node loads it, as a sentence; empty: it is on its way.
        problem_here: the same of this node, for requests that other nodes sent here.
        ready_at: when it should answer, on the node's clock; None: nobody can say.
    """

    text: str = ""
    problem: str = ""
    problem_here: str = ""
    ready_at: float | None = None


class RoutingSnapshot(msgspec.Struct, frozen=True, kw_only=True):
    """All routes at one moment.

    Attributes:
        version: rises with every change.
        node: the node whose view this is.
        default: the model of a request without `model`; None where this node serves nothing.
        models: by served name.
        accepting: False while draining: new requests get 503.
        alive: other nodes with at least one model in any state that are not taken for dead. Some of them may get no
            requests at present.
        awaited: what becomes of the requests that wait for models, by model.
        resting: this node has unloaded a model that it loads again when somebody asks for it.
        owners: whose nodes the targets and their workers are, as verified.
        corrections: what hosts announce and this node does not count on; the routes have the corrected figures. This is
            this node's own view, and no other node learns of it.
        distrusted: models on hosts that this node's clients are not sent to: their answers were not the model's. It is
            this node's own judgement, and no other node learns of it.
    """

    version: int
    node: NodeId
    default: ModelName | None = None
    models: Mapping[ModelName, ModelRoute] = {}
    accepting: bool = True
    alive: frozenset[NodeId] = frozenset()
    awaited: Mapping[ModelName, Awaited] = {}
    resting: bool = False
    owners: Mapping[NodeId, Ownership] = {}
    corrections: tuple[Correction, ...] = ()
    distrusted: frozenset[tuple[ModelName, NodeId]] = frozenset()


class HealthState(StrEnum):
    """Whether a node's API can answer."""

    READY = "ready"
    LOADING = "loading"
    WAITING = "waiting"
    """Nothing loads: a model waits for memory, for a file or for the mesh, or there is none."""
    FAILED = "failed"
    STOPPING = "stopping"


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `/health`. `reason` says why the node is not ready."""

    state: HealthState
    reason: str = ""


def health(snapshot: RoutingSnapshot) -> Health:
    """The state of the node's default model or, without one, the best state in the mesh."""
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
    if snapshot.resting and ModelStatus.LOADING not in by_status:
        return Health(state=HealthState.READY)
    waiting = next(iter(by_status.values()), None)
    state = HealthState.LOADING if ModelStatus.LOADING in by_status else HealthState.WAITING
    return Health(state=state, reason=(waiting.reason if waiting else "") or "no model is ready yet")


class Warmth(msgspec.Struct, frozen=True, kw_only=True):
    """How much of a prompt a node's KV cache probably holds.

    Attributes:
        prefix_bytes: length of the longest prefix of this prompt that was sent to the node.
        conversation: the prefix reaches past the system prompt, which many requests share, into this conversation.
    """

    prefix_bytes: int
    conversation: bool = False


TYPICAL_TOKENS = 128.0
"""Targets are compared by the time of an answer of this length."""
_DEFAULT_SPEED = 20.0
_PROMPT_SPEEDUP = 10.0
_BYTES_PER_TOKEN = 4.0
_CONVERSATION_BONUS = 0.5
_MAX_BONUS = 3.0
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
    """Order the warm targets of a route by the estimated time of a typical answer, shortest first.

    The estimate in seconds: generation at the measured speed, slowed by the requests that share the engine and more
    by those that queue, plus round trips, minus the prompt processing that a warm cache saves. A cached conversation
    counts for half an answer more, so that it stays with its host while that has room. The bonus is bounded, so that
    a free host always comes before an overloaded one.

    Args:
        route: the model.
        in_flight: requests from this node at each target now; newer than the targets' announced load.
        warmth: what the targets' caches hold of this prompt.
        local_only: leave out remote targets (for a request that came from another node).
        salt: differs between requests, so that equal targets take turns.
        prompt_tokens: estimated length of the prompt. Targets with less context come last, the largest context first.
    """
    targets = [t for t in route.targets if t.status is ModelStatus.WARM and (t.local or not local_only)]
    if len(targets) <= 1:
        return targets
    fallback = typical_speed(targets)
    warmth = warmth or {}

    def order(target: Target) -> tuple[int, float, int]:
        if 0 < target.context <= prompt_tokens:
            return 1, -float(target.context), 0
        warm = warmth.get(target.node)
        seconds = expected_seconds(target, in_flight.get(target.node, 0), warm, fallback)
        if target.slow_prompts:
            cached = warm.prefix_bytes / _BYTES_PER_TOKEN if warm is not None else 0.0
            usual = (target.tokens_per_second or fallback) * _PROMPT_SPEEDUP
            seconds += max(0.0, prompt_tokens - cached) * max(0.0, 1.0 / target.slow_prompts - 1.0 / usual)
        return 0, seconds, crc32(f"{salt}/{target.node}".encode())

    return sorted(targets, key=order)


def typical_speed(targets: Sequence[Target]) -> float:
    """Tokens per second to assume where none was measured: the mean of the measured targets."""
    known = [target.tokens_per_second for target in targets if target.tokens_per_second > 0.0]
    return sum(known) / len(known) if known else _DEFAULT_SPEED


def expected_seconds(target: Target, in_flight: int, warmth: Warmth | None, fallback_speed: float) -> float:
    """Seconds of a typical answer at a target, as described at `rank`. `fallback_speed`: where none was measured."""
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
        seconds -= min(saved, _MAX_BONUS * answer)
    return seconds
