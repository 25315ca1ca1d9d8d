"""How long each doubted node has been doubted. Its models are used a little longer where nobody else serves them.

Targets that failed a request: not routed to for a while, longer each time, at once back after a new launch.

From what this node serves and what the others say to one routing snapshot.

Keeps the routing snapshot true: rebuilt when something changed, given out only when it routes differently.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.announcement import Member, Serving
from mesh_llm.core.types.events import TargetFailed
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelKind, ModelStatus


class Doubts:
    """Most doubts are unfounded, and end soon: a busy machine, a lost packet. A node that is dead is not waited for."""

    def __init__(self, grace: float) -> None:
        """`grace`: seconds for which a doubted node may still be used."""
        self._grace = grace
        self._since: dict[NodeId, float] = {}
        self._looked = float("-inf")

    def observe(self, members: Sequence[Member], now: float) -> None:
        """Take who is doubted now."""
        self._since = {
            member.announcement.node: self._since.get(member.announcement.node, now)
            for member in members
            if member.suspect
        }

    def given_up(self, node: NodeId, now: float) -> bool:
        """Whether a node has been doubted for too long to be used."""
        since = self._since.get(node)
        return since is not None and now >= since + self._grace

    def due(self, now: float) -> bool:
        """Whether a node's grace has ended since the last call."""
        ended = any(self._looked < since + self._grace <= now for since in self._since.values())
        self._looked = now
        return ended

    def deadline(self) -> float | None:
        """When the next grace ends that `due` has not seen the end of."""
        ends = (since + self._grace for since in self._since.values())
        return min((end for end in ends if end > self._looked), default=None)


_FORGET_AFTER = 120.0


class Life(msgspec.Struct, frozen=True):
    """Which launch of a model on a node is meant: an older one's failure says nothing about a newer one."""

    incarnation: Incarnation
    term: int


class _Block(msgspec.Struct, frozen=True):
    life: Life
    until: float
    seconds: float


class Blocks:
    """Remembers failed targets. Bounded by what is routed to: forgotten with time."""

    def __init__(self, first: float, most: float) -> None:
        """`first` and `most`: seconds of the first and the longest block."""
        self._first = first
        self._most = most
        self._blocks: dict[tuple[NodeId, ModelName], _Block] = {}
        self._looked = float("-inf")

    def add(self, node: NodeId, model: ModelName, life: Life, now: float) -> None:
        """A target failed. A repeated failure blocks for longer; one reported again within its block does not."""
        before = self._blocks.get((node, model))
        if before is not None and before.life == life and now < before.until:
            return
        again = before is not None and before.life == life and now - before.until < _FORGET_AFTER
        seconds = min(before.seconds * 2, self._most) if before is not None and again else self._first
        self._blocks[node, model] = _Block(life, now + seconds, seconds)

    def blocked(self, node: NodeId, model: ModelName, life: Life, now: float) -> bool:
        """Whether a target is not to be routed to."""
        block = self._blocks.get((node, model))
        return block is not None and block.life == life and now < block.until

    def due(self, now: float) -> bool:
        """Forget old blocks; True when one has ended since the last call, so that routes change."""
        if not self._blocks:
            return False
        ended = any(self._looked < block.until <= now for block in self._blocks.values())
        self._looked = now
        self._blocks = {key: block for key, block in self._blocks.items() if now - block.until < _FORGET_AFTER}
        return ended

    def deadline(self) -> float | None:
        """When the next block ends that `due` has not seen the end of."""
        return min((block.until for block in self._blocks.values() if block.until > self._looked), default=None)


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


_MOST_GONE = 256
"""Models that nobody has any more and whose time of creation is still known, in case they come back."""


class RouteKeeper:
    """The snapshot, its version, the failed targets, and whether a rebuild is due."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._blocks = Blocks(config.timings.target_block, config.timings.target_block_most)
        self._doubts = Doubts(config.timings.doubt_grace)
        self._created: dict[ModelName, int] = {}
        self._learned: RoutingSnapshot | None = None
        self.snapshot = RoutingSnapshot(version=0, node=config.node)
        self.stale = True

    @property
    def learned(self) -> bool:
        """Whether a passive node has fetched a table."""
        return self._learned is not None

    def learn(self, snapshot: RoutingSnapshot) -> None:
        """Keep the table that a passive node fetched."""
        self._learned = snapshot
        self.stale = True

    def failed(self, node: NodeId, model: ModelName, life: Life, now: float) -> None:
        """Do not route to a target for a while."""
        self._blocks.add(node, model, life, now)
        self.stale = True

    def target_failed(self, event: TargetFailed, members: Sequence[Member], now: float) -> None:
        """A target of another node failed a request: do not route to that life of it for a while."""
        incarnation, term = Incarnation(0), event.term
        for member in members:
            if member.announcement.node == event.node:
                incarnation = member.announcement.incarnation
                terms = [one.term for one in member.announcement.serving if one.model == event.model]
                term = term or (terms[0] if terms else 0)
        if incarnation == 0 and term == 0:
            route = self.snapshot.models.get(event.model)
            term = next((one.term for one in route.targets if one.node == event.node), 0) if route else 0
        self.failed(event.node, event.model, Life(incarnation, term), now)

    def observe(self, members: Sequence[Member], now: float) -> None:
        """Other nodes' words or states changed."""
        self._doubts.observe(members, now)
        self.stale = True

    def deadline(self) -> float | None:
        """When a failed target may be tried again, or a doubted one is given up."""
        times = (self._blocks.deadline(), self._doubts.deadline())
        return min((time for time in times if time is not None), default=None)

    def due(self, now: float) -> bool:
        """Whether to rebuild now."""
        if self._blocks.due(now) | self._doubts.due(now):
            self.stale = True
        return self.stale

    def rebuild(
        self,
        *,
        own: Sequence[Serving],
        addresses: Mapping[ModelName, str],
        members: Sequence[Member],
        round_trips: Mapping[NodeId, float],
        on_disk: Mapping[ModelName, ModelFacts],
        wanted: Collection[ModelName],
        accepting: bool,
        now: float,
    ) -> RoutingSnapshot | None:
        """Return the new snapshot, or None if it routes as the one before."""
        self.stale = False
        me = self._config.node
        offers = [
            Offer(
                node=me,
                owner=self._config.name or me[:12],
                serving=serving,
                local=True,
                address=addresses.get(serving.model, ""),
                blocked=self._blocks.blocked(me, serving.model, self._life(serving.term), now),
            )
            for serving in own
        ]
        offers += remote_offers(members, lambda member, serving: self._member_blocked(member, serving, now))
        known = dict(on_disk)
        for member in members:
            for facts in member.announcement.on_disk:
                known.setdefault(facts.name, facts)
        snapshot = build(
            version=self.snapshot.version + 1,
            node=me,
            default=_default(own),
            offers=offers,
            known=known,
            wanted=wanted,
            created=lambda name: self._created.setdefault(name, int(self._config.epoch + now)),
            accepting=accepting,
            alive=frozenset(
                member.announcement.node
                for member in members
                if member.announcement.serving and not self._doubts.given_up(member.announcement.node, now)
            ),
        )
        self._forget_created(snapshot)
        if self._learned is not None:
            snapshot = self._with_learned(snapshot, self._learned, round_trips, now)
        if self.snapshot.version > 0 and same(snapshot, self.snapshot):
            return None
        self.snapshot = snapshot
        return snapshot

    def _forget_created(self, snapshot: RoutingSnapshot) -> None:
        """Forget when models that nobody has any more were first seen. Names are peers' words: a few are enough."""
        gone = [name for name in self._created if name not in snapshot.models]
        for name in gone[: max(0, len(gone) - _MOST_GONE)]:
            del self._created[name]

    def _with_learned(
        self, snapshot: RoutingSnapshot, table: RoutingSnapshot, round_trips: Mapping[NodeId, float], now: float
    ) -> RoutingSnapshot:
        models = dict(snapshot.models)
        for name, route in table.models.items():
            targets = tuple(
                msgspec.structs.replace(target, rtt_ms=round_trips.get(target.node, target.rtt_ms))
                for target in route.targets
                if target.node != self._config.node
                and not self._blocks.blocked(target.node, name, Life(Incarnation(0), target.term), now)
            )
            warm = any(target.status is ModelStatus.WARM for target in targets)
            status = route.status if warm or route.status is not ModelStatus.WARM else ModelStatus.LOADING
            reason = route.reason if status is route.status else "its host does not answer at the moment"
            models[name] = msgspec.structs.replace(route, targets=targets, status=status, reason=reason)
        return msgspec.structs.replace(
            snapshot, models=models, default=snapshot.default or table.default, alive=table.alive
        )

    def _life(self, term: int) -> Life:
        return Life(self._config.incarnation, term)

    def _member_blocked(self, member: Member, serving: Serving, now: float) -> bool:
        word = member.announcement
        life = Life(word.incarnation, serving.term)
        return self._doubts.given_up(word.node, now) or self._blocks.blocked(word.node, serving.model, life, now)


def _default(own: Sequence[Serving]) -> ModelName | None:
    """What a request without `model` means: the first model here, the first that is up if one is."""
    live = [serving for serving in own if serving.status in {ModelStatus.WARM, ModelStatus.LOADING}]
    return (live or list(own))[0].model if own else None
