"""What the mesh wants of this node's models: take one up, fetch it first where needed, give it up again.

`Assigner` and `Eviction` decide; the controller carries their decisions into fetches and launches.
"""

from collections.abc import Collection, Container, Iterable, Sequence
from typing import NamedTuple

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.assignment import Assigned, Assigner, PlacementInputs, known_models, wanted_order
from mesh_llm.core.placement.demand import Eviction, Usage, mesh_demand
from mesh_llm.core.placement.launches import Origin
from mesh_llm.core.placement.local_models import LocalModels
from mesh_llm.core.routing.circuit_breaker import SuspectGrace
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.types.announcement import Member, may_load
from mesh_llm.core.types.effects import AnyEffect, FetchModel, Notice, NoticeLevel
from mesh_llm.core.types.errors import listed, size
from mesh_llm.core.types.events import FetchEnded
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus

_MAX_NAMED = 2
_MAX_FAILED = 256


class PlacementController:
    """Keeps the node at what the mesh needs. Methods that return effects change launches and fetches."""

    def __init__(self, config: NodeConfig, models: LocalModels, split: SplitController, usage: Usage) -> None:
        self._config = config
        self._models = models
        self._split = split
        self._usage = usage
        self._assigner = Assigner(config.timings, joins=config.joins and not (config.wanted or config.brings))
        self._eviction = Eviction(config.timings)
        self._suspects = SuspectGrace(config.timings.doubt_grace)
        self._announced_reason = ""
        self._making_room: frozenset[ModelName] = frozenset()
        self._room_made_for: frozenset[NodeId] = frozenset()
        self.fetch = ModelFetch()
        self.known: frozenset[NodeId] | None = None
        """Members that are no strangers; None: nobody is one. What strangers want counts only if the user says so."""
        split.unobtainable = self.fetch.failed

    @property
    def waiting_reason(self) -> str:
        """Why a node that would serve has nothing to serve; else empty."""
        return self._assigner.waiting_reason

    def deadlines(self) -> tuple[float | None, ...]:
        """When to evaluate again though nothing happened."""
        return self._assigner.deadline(), self._eviction.deadline(), self._suspects.deadline()

    def wanted(self, members: Sequence[Member]) -> tuple[ModelName, ...]:
        """The models that users gave to the mesh with `--model`, in the same order on all nodes."""
        return wanted_order([self._models.wanted, *(member.announcement.wanted for member in members)])

    def observe(self, members: Sequence[Member], now: float) -> None:
        """See which nodes came and went."""
        self._suspects.observe(members, now)
        counted = self._counted(members, now)
        self._assigner.orphaned.observe(counted, now, self._strangers(counted))

    def pause(self) -> None:
        """Decide nothing: the node is stopping."""
        self._assigner.pause()
        self._eviction.pause()

    def evaluate(self, members: Sequence[Member], now: float, *, changed: bool) -> list[AnyEffect]:
        """Decide again, if something `changed` or a deadline has come."""
        if self._suspects.due(now):
            self.observe(members, now)
            changed = True
        members = self._counted(members, now)
        launches = self._models.launches
        # A node that was left alone takes more than one of the models that the others served.
        survives = not members and all(launch.order.origin is not Origin.USER for launch in launches)
        if not (launches.idle or survives):
            self._assigner.pause()
            return self._evict(members, now) if changed or _due(self._eviction.deadline(), now) else []
        self._eviction.pause()
        if self._split.busy or self._split.forming or self._making_room:
            self._assigner.pause()
            return []
        due = changed or _due(self._assigner.deadline(), now)
        # A node that was left alone serves what it has, although it is fetching: that may never end.
        return self._assign(members, now) if due and not (self.fetch.busy and members) else []

    def fetched(self, event: FetchEnded, now: float, *, stopping: bool) -> list[AnyEffect]:
        """A fetch ended: serve the model, unless the node serves something else by now."""
        effects = self.fetch.ended(event, self._models.on_disk)
        if effects:
            self._assigner.assign_another()
        busy = stopping or not self._models.launches.idle
        if effects is not None or busy or event.model in self._models.excluded:
            return effects or []
        return self._models.load(event.model, None, now, origin=Origin.MESH)

    def _counted(self, members: Sequence[Member], now: float) -> Sequence[Member]:
        """The members, or none where this node is alone: all of them have been suspect for too long to be used.

        They are not waited for until they are held for dead. With nobody to confirm that, it would take much longer.
        """
        alone = all(self._suspects.expired(member.announcement.node, now) for member in members)
        return () if alone else members

    def _strangers(self, members: Sequence[Member]) -> frozenset[NodeId]:
        """The members whose wishes do not count here: strangers, unless models are loaded for those."""
        if self.known is None or may_load(self._config.on_demand.scope, "stranger"):
            return frozenset()
        return frozenset(member.announcement.node for member in members).difference(self.known)

    def _assign(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        strangers, doubted = self._strangers(members), self.fetch.distrusted
        heeded = [member for member in members if member.announcement.node not in strangers]
        others = (
            facts
            for member in heeded
            for facts in member.announcement.on_disk
            if (facts.name, member.announcement.node) not in doubted
        )
        inputs = PlacementInputs(
            me=self._config.node,
            members=members,
            on_disk=self._models.on_disk,
            known=known_models(others) | self._models.on_disk,
            wanted=self.wanted(heeded) if self._models.launches.idle else (),
            demand=self._demand(heeded, now),
            excluded=self._models.excluded.union(
                self.fetch.unobtainable(members),
                self._split.asked(members),
                (launch.model for launch in self._models.launches),
                self._models.resting,
                () if self._models.group_model is None else (self._models.group_model,),
            ),
            fits=self._models.fits,
            memory_bytes=self._models.free_bytes,
            can_fetch=self._config.can_fetch and not self.fetch.busy,
            offered=offered_models(members, doubted),
            strangers=strangers,
        )
        assigned = self._assigner.evaluate(inputs, now)
        if assigned is None or (self._split.helps and not assigned.unserved):
            return self._report_waiting()
        name = assigned.facts.name
        if name not in self._models.on_disk:
            return self.fetch.begin(assigned, members)
        text = f"Serving {name}, because {assigned.why}."
        notice = Notice(level=NoticeLevel.INFO, code="model_assigned", text=text, about=name)
        return [notice, *self._models.load(name, None, now, origin=Origin.MESH)]

    def _report_waiting(self) -> list[AnyEffect]:
        """Report once for each reason why a joining node, or one that was left alone, has nothing."""
        why = self.waiting_reason
        if why == self._announced_reason:
            return []
        self._announced_reason = why
        if not why:
            return []
        return [Notice(level=NoticeLevel.INFO, code="standing_by", text=f"Standing by: {why}.")]

    def make_room(self, now: float) -> list[AnyEffect]:
        """Give up what the mesh asked for where the group of this user's model lacks just that memory.

        To be called when the group has evaluated. It is done once for the same nodes: their layers may not divide so.
        """
        launches, outlook = self._models.launches, self._split.group.outlook
        if self._making_room:
            self._making_room = frozenset(name for name in self._making_room if launches.get(name) is not None)
            return []
        if outlook is None or outlook.model != self._models.group_model:
            return []
        spare = [
            launch
            for launch in launches
            if launch.order.origin is not Origin.USER
            and launch.model != outlook.model
            and launch.status in {ModelStatus.WARM, ModelStatus.LOADING}
        ]
        nodes = frozenset(one.node for one in outlook.taking_part)
        enough = outlook.have_bytes + sum(one.reserved_bytes for one in spare) >= outlook.need_bytes
        if not (spare and enough) or nodes == self._room_made_for or self._config.node not in nodes:
            return []
        self._making_room, self._room_made_for = frozenset(one.model for one in spare), nodes
        why = f"its memory is needed for {outlook.model}"
        drain = self._config.timings.demotion_drain
        return [effect for one in spare for effect in launches.drop(one.model, drain, now, why)]

    def _evict(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        evictable = self._usage.evictable(self._models.launches)
        model = self._eviction.evaluate(self._config.node, evictable, members, self._demand(members, now), now)
        if model is None:
            return []
        why = "nobody asked for it here for a while, and others serve it"
        notice = Notice(level=NoticeLevel.INFO, code="model_given_up", text=f"Giving {model} up: {why}.", about=model)
        return [notice, *self._models.launches.drop(model, self._config.timings.demotion_drain, now, why)]

    def _demand(self, members: Sequence[Member], now: float) -> dict[str, float]:
        return mesh_demand(self._usage.demand.rates(now), (member.announcement.demand for member in members))


class _Failure(NamedTuple):
    """A fetch that failed: which file, and the nodes that offered it, each in one life."""

    fingerprint: str
    offers: frozenset[tuple[NodeId, Incarnation]]


class ModelFetch:
    """The fetch in progress, and the models whose fetch failed.

    A failed one is tried again when a node offers it that did not offer it before: another one, or one that came back.
    """

    def __init__(self) -> None:
        self.distrusted: frozenset[tuple[ModelName, NodeId]] = frozenset()
        """Models on hosts of which they are not fetched."""
        self.failed: dict[ModelName, _Failure] = {}
        self._current: ModelFacts | None = None
        self._source = ""
        self._offers: frozenset[tuple[NodeId, Incarnation]] = frozenset()

    @property
    def busy(self) -> bool:
        """Whether a model is being fetched."""
        return self._current is not None

    @property
    def pending(self) -> dict[ModelName, str]:
        """The model that will be served here once it has been fetched, with a text for people."""
        return {} if self._current is None else {self._current.name: f"it is being fetched from {self._source}"}

    def unobtainable(self, members: Iterable[Member]) -> set[ModelName]:
        """The models whose fetch failed and that are not tried again."""
        found = set(self.failed)
        for member in members if found else ():
            announced = member.announcement
            for facts in announced.on_disk if announced.shares else ():
                failure = self.failed.get(facts.name)
                if failure is None or failure.fingerprint != facts.fingerprint or not facts.fingerprint:
                    continue
                if (facts.name, announced.node) in self.distrusted:
                    continue
                if (announced.node, announced.incarnation) not in failure.offers:
                    found.discard(facts.name)
        return found

    def begin(self, assigned: Assigned, members: Sequence[Member] = ()) -> list[AnyEffect]:
        """Fetch a model from `members` that have it, else from its source."""
        facts = self._current = assigned.facts
        sources = file_sources(members, facts.name, facts.fingerprint, self.distrusted)
        self._source = describe_source(sources, facts)
        self._offers = frozenset((one.announcement.node, one.announcement.incarnation) for one in sources)
        amount = size(facts.size_bytes + facts.companion_bytes)
        text = f"Fetching {facts.name} ({amount}) from {self._source} to serve it, because {assigned.why}."
        notice = Notice(level=NoticeLevel.INFO, code="model_fetching", text=text, about=facts.name)
        return [notice, FetchModel(model=facts.name, source=facts.source, fingerprint=facts.fingerprint)]

    def ended(self, event: FetchEnded, on_disk: Container[ModelName]) -> list[AnyEffect] | None:
        """A fetch ended. None: the model is here to be served; else the effects that follow."""
        if self._current is None or self._current.name != event.model:
            return []
        fingerprint, self._current = self._current.fingerprint, None
        problem = event.problem or ("" if event.model in on_disk else "what was found there is another model.")
        if not problem:
            return None
        if len(self.failed) >= _MAX_FAILED:
            # Peers choose the names, so their number is bounded. Which one is tried again does not matter.
            del self.failed[min(self.failed)]
        self.failed[event.model] = _Failure(fingerprint, self._offers)
        text = f"{event.model} could not be fetched: {problem}"
        return [Notice(level=NoticeLevel.WARNING, code="model_fetch_failed", text=text, about=event.model)]


def file_sources(
    members: Iterable[Member], name: ModelName, fingerprint: str, distrusted: Collection[tuple[ModelName, NodeId]] = ()
) -> list[Member]:
    """Nodes that give exactly this file: the shortest round trip first, suspect ones last; none that is distrusted."""
    if not fingerprint:
        return []
    found = [
        member
        for member in members
        if member.announcement.shares
        and (name, member.announcement.node) not in distrusted
        and any((facts.name, facts.fingerprint) == (name, fingerprint) for facts in member.announcement.on_disk)
    ]
    return sorted(found, key=lambda member: (member.suspect, member.rtt_ms, member.announcement.node))


def offered_models(members: Iterable[Member], distrusted: Collection[tuple[ModelName, NodeId]] = ()) -> set[ModelName]:
    """Names of the models whose files some node gives that is not distrusted for them."""
    return {
        facts.name
        for member in members
        if member.announcement.shares
        for facts in member.announcement.on_disk
        if facts.fingerprint and (facts.name, member.announcement.node) not in distrusted
    }


def describe_source(found: Sequence[Member], facts: ModelFacts) -> str:
    """Where a model comes from, for people: the nodes that have it, else its source."""
    return listed([member.label for member in found], _MAX_NAMED) or facts.source


def _due(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now
