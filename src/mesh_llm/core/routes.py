"""From what this node serves and what the others say to one routing snapshot."""

from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec

from mesh_llm.core.announcement import Serving
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts, ModelKind, ModelStatus
from mesh_llm.core.routing import ModelRoute, RoutingSnapshot, Target

_BEST = (ModelStatus.WARM, ModelStatus.LOADING, ModelStatus.STOPPING, ModelStatus.FAILED, ModelStatus.COLD)
_ROUTED = {ModelStatus.WARM, ModelStatus.LOADING}


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one node, this or another.

    Attributes:
        node: who serves it.
        owner: name for people.
        serving: its state there.
        local: True for this node.
        address: `host:port` of the local engine once warm.
        rtt_ms: round trip; 0.0 for local.
        suspect: the node is doubted: routed to only if nobody else serves the model.
        blocked: it failed a request a moment ago, or was doubted for too long: not routed to.
    """

    node: NodeId
    owner: str
    serving: Serving
    local: bool = False
    address: str = ""
    rtt_ms: float = 0.0
    suspect: bool = False
    blocked: bool = False


def remote_offers(members: Iterable[Member], blocked: Callable[[Member, Serving], bool]) -> list[Offer]:
    """What the other nodes serve."""
    return [
        Offer(
            node=member.announcement.node,
            owner=member.announcement.name or member.announcement.node[:12],
            serving=serving,
            rtt_ms=member.rtt_ms,
            suspect=member.suspect,
            blocked=blocked(member, serving),
        )
        for member in members
        for serving in member.announcement.serving
    ]


def build(
    *,
    version: int,
    node: NodeId,
    default: ModelName | None,
    offers: Iterable[Offer],
    known: Mapping[ModelName, ModelFacts],
    wanted: Collection[ModelName],
    created: Callable[[ModelName], int],
    accepting: bool,
    alive: frozenset[NodeId] = frozenset(),
) -> RoutingSnapshot:
    """Make the snapshot. `known`: models on anybody's disk; `wanted`: those the mesh was seeded with."""
    by_model: dict[ModelName, list[Offer]] = {name: [] for name in sorted({*known, *wanted})}
    for offer in offers:
        by_model.setdefault(offer.serving.model, []).append(offer)
    return RoutingSnapshot(
        version=version,
        node=node,
        default=default,
        models={name: _route(name, by_model[name], known.get(name), created(name)) for name in sorted(by_model)},
        accepting=accepting,
        alive=alive,
    )


def _route(name: ModelName, offers: list[Offer], facts: ModelFacts | None, created: int) -> ModelRoute:
    offers.sort(key=lambda offer: (not offer.local, offer.node))
    usable = [offer for offer in offers if not offer.blocked and offer.serving.status in _ROUTED]
    warm = [offer for offer in usable if offer.serving.status is ModelStatus.WARM]
    trusted = [offer for offer in warm if not offer.suspect]
    if trusted:
        usable = [offer for offer in usable if not offer.suspect]
        warm = trusted
    status = _status(offers, warm)
    sizes = [offer.serving.size_bytes for offer in offers]
    return ModelRoute(
        name=name,
        status=status,
        targets=tuple(_target(offer) for offer in usable),
        context=min((offer.serving.context for offer in warm), default=0),
        size_bytes=max([facts.size_bytes if facts else 0, *sizes]),
        reason="" if warm else _reason(offers, status),
        aliases=tuple(sorted({alias for offer in offers for alias in offer.serving.aliases} - {name})),
        owner=(warm or usable or offers)[0].owner if offers else "",
        created=created,
        embeddings=all(offer.serving.embeddings for offer in warm),
        kind=(warm or offers)[0].serving.kind if offers else facts.kind if facts else ModelKind.CHAT,
    )


def _status(offers: list[Offer], warm: list[Offer]) -> ModelStatus:
    if warm:
        return ModelStatus.WARM
    states = {offer.serving.status for offer in offers}
    if ModelStatus.WARM in states:
        # Warm, but blocked for a moment: it is asked to come back later, as while loading.
        return ModelStatus.LOADING
    return next((status for status in _BEST if status in states), ModelStatus.COLD)


def _reason(offers: list[Offer], status: ModelStatus) -> str:
    if any(offer.blocked and offer.serving.status is ModelStatus.WARM for offer in offers):
        return "its host does not answer at the moment"
    return next((offer.serving.reason for offer in offers if offer.serving.status is status), "")


def _target(offer: Offer) -> Target:
    serving = offer.serving
    return Target(
        node=offer.node,
        local=offer.local,
        address=offer.address,
        status=serving.status,
        slots=serving.slots,
        context=serving.context,
        load=load(serving),
        tokens_per_second=serving.tokens_per_second,
        rtt_ms=0.0 if offer.local else offer.rtt_ms,
        term=serving.term,
    )


def load(serving: Serving) -> float:
    """In-flight requests over slots, in quarters: finer steps would change routes with every request."""
    return min(4.0, round(4.0 * serving.in_flight / max(1, serving.slots)) / 4.0)


def same(one: RoutingSnapshot, other: RoutingSnapshot) -> bool:
    """Whether two snapshots route alike, whatever their versions."""
    return (one.node, one.default, one.accepting, one.alive, one.models) == (
        other.node,
        other.default,
        other.accepting,
        other.alive,
        other.models,
    )
