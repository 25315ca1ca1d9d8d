"""Keeps the routing snapshot true: rebuilt when something changed, given out only when it routes differently."""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from mesh_llm.core.announcement import Serving
from mesh_llm.core.blocks import Blocks, Life
from mesh_llm.core.config import NodeConfig
from mesh_llm.core.doubts import Doubts
from mesh_llm.core.events import TargetFailed
from mesh_llm.core.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts, ModelStatus
from mesh_llm.core.routes import Offer, build, remote_offers, same
from mesh_llm.core.routing import RoutingSnapshot

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
