"""Who else has a model's files and gives them away.

What a node fetches by itself: one model at a time, that the mesh calls for and that others say where to find.

What a node takes up for the mesh, and what it gives back: assignment on standby, fetches, demotion.

What follows for a node's models when its machine is its owner's for a while: given up, and taken up again.
"""

from collections.abc import Container, Iterable, Sequence

from mesh_llm.core.config import NodeConfig, YieldPolicy
from mesh_llm.core.placement.assignment import Assigned, known_models, wanted_order
from mesh_llm.core.placement.demand import Demotion, Usage, mesh_demand
from mesh_llm.core.placement.local_models import LocalModels
from mesh_llm.core.placement.serving import Origin
from mesh_llm.core.placement.standby import Situation, Standby
from mesh_llm.core.placement.yielding import Yielding
from mesh_llm.core.split.controller import Sharing
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import AnyEffect, FetchModel, Notice, NoticeLevel
from mesh_llm.core.types.errors import size
from mesh_llm.core.types.events import FetchEnded, LoadRequested, OwnerSensed
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions, ModelFacts, ModelStatus

_SHOWN = 2


def holders(members: Iterable[Member], name: ModelName, fingerprint: str) -> list[Member]:
    """Nodes that offer the very same file; those with the shortest way first. Doubted ones come last."""
    if not fingerprint:
        return []
    found = [
        member
        for member in members
        if member.announcement.shares
        and any((facts.name, facts.fingerprint) == (name, fingerprint) for facts in member.announcement.on_disk)
    ]
    return sorted(found, key=lambda member: (member.suspect, member.rtt_ms, member.announcement.node))


def shared_models(members: Iterable[Member]) -> set[ModelName]:
    """Names of models that somebody gives away."""
    return {
        facts.name
        for member in members
        if member.announcement.shares
        for facts in member.announcement.on_disk
        if facts.fingerprint
    }


def whence(found: Sequence[Member], facts: ModelFacts) -> str:
    """Where a model will be fetched, for people: the nodes that have it, else its source."""
    names = [member.announcement.name or member.announcement.node[:10] for member in found]
    if not names:
        return facts.source
    if len(names) > _SHOWN:
        return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


_MOST_FAILED = 256


class Fetches:
    """The fetch under way, and the models that could not be had."""

    def __init__(self) -> None:
        self.failed: set[ModelName] = set()
        self._current: ModelFacts | None = None
        self._whence = ""

    @property
    def busy(self) -> bool:
        """Whether something is being fetched."""
        return self._current is not None

    @property
    def coming(self) -> dict[ModelName, str]:
        """The model that will be served here once it has come, with what is to be said of it."""
        return {} if self._current is None else {self._current.name: f"it is being fetched from {self._whence}"}

    def begin(self, assigned: Assigned, members: Sequence[Member] = ()) -> list[AnyEffect]:
        """Fetch a model, having said so and from where: `members` that have it, else its source."""
        facts = self._current = assigned.facts
        self._whence = whence(holders(members, facts.name, facts.fingerprint), facts)
        amount = size(facts.size_bytes + facts.companion_bytes)
        text = f"Fetching {facts.name} ({amount}) from {self._whence} to serve it, because {assigned.why}."
        notice = Notice(level=NoticeLevel.INFO, code="model_fetching", text=text, about=facts.name)
        return [notice, FetchModel(model=facts.name, source=facts.source, fingerprint=facts.fingerprint)]

    def ended(self, event: FetchEnded, on_disk: Container[ModelName]) -> list[AnyEffect] | None:
        """A fetch ended: None if the model is here to be served; else what must be done."""
        if self._current is None or self._current.name != event.model:
            return []
        self._current = None
        problem = event.problem or ("" if event.model in on_disk else "what was found there is another model.")
        if not problem:
            return None
        if len(self.failed) >= _MOST_FAILED:
            # Names are peers' words. Which one is tried again does not matter.
            self.failed.discard(min(self.failed))
        self.failed.add(event.model)
        text = f"{event.model} could not be fetched: {problem}"
        return [Notice(level=NoticeLevel.WARNING, code="model_fetch_failed", text=text, about=event.model)]


class Duties:
    """Between `Standby` and `Demotion`, which decide, and the launches. Each method returns what must be done now."""

    def __init__(self, config: NodeConfig, models: LocalModels, sharing: Sharing, usage: Usage) -> None:
        self._config = config
        self._models = models
        self._sharing = sharing
        self._usage = usage
        self._fetches = Fetches()
        sharing.unobtainable = self._fetches.failed
        self._standby = Standby(config.timings, joins=config.joins and not (config.wanted or config.brings))
        self._demotion = Demotion(config.timings)

    @property
    def coming(self) -> dict[ModelName, str]:
        """The models that are being fetched, with a word on each."""
        return self._fetches.coming

    @property
    def waiting_because(self) -> str:
        """Why a node that would serve has nothing to serve; empty where that is not so."""
        return self._standby.waiting_because

    def deadlines(self) -> tuple[float | None, float | None]:
        """When to look again though nothing happened."""
        return self._standby.deadline(), self._demotion.deadline()

    def wanted(self, members: Sequence[Member]) -> tuple[ModelName, ...]:
        """What the mesh's users asked for by `--model`, in one order for all nodes."""
        return wanted_order([self._models.wanted, *(member.announcement.wanted for member in members)])

    def observe(self, members: Sequence[Member], now: float) -> None:
        """See who came and went."""
        self._standby.losses.observe(members, now)

    def rest(self) -> None:
        """Take nothing up any more: the node is on its way out."""
        self._standby.rest()
        self._demotion.rest()

    def fetched(self, event: FetchEnded, now: float, *, stopping: bool) -> list[AnyEffect]:
        """A fetch ended: serve what came, unless something else is served by now."""
        effects = self._fetches.ended(event, self._models.on_disk)
        if effects:
            self._standby.again()
        busy = stopping or not self._models.launches.idle
        if effects is not None or busy or event.model in self._models.excluded:
            return effects or []
        return self._models.load(event.model, None, now, origin=Origin.MESH)

    def look(self, members: Sequence[Member], now: float, *, changed: bool) -> list[AnyEffect]:
        """Decide again, if something `changed` or it is time."""
        if not self._models.launches.idle:
            self._standby.rest()
            due = changed or _due(self._demotion.deadline(), now)
            return self._stand_back(members, now) if due else []
        self._demotion.rest()
        if self._sharing.busy:
            self._standby.rest()
            return []
        due = changed or _due(self._standby.deadline(), now)
        return self._stand_by(members, now) if due and not self._fetches.busy else []

    def _stand_by(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        others = (facts for member in members for facts in member.announcement.on_disk)
        situation = Situation(
            me=self._config.node,
            members=members,
            on_disk=self._models.on_disk,
            known=known_models(others) | self._models.on_disk,
            wanted=self.wanted(members),
            demand=self._demand(members, now),
            excluded=self._models.excluded | self._fetches.failed | self._sharing.asked(members),
            fits=self._models.fits,
            memory_bytes=self._models.free_bytes,
            can_fetch=self._config.can_fetch,
            shared=shared_models(members),
        )
        assigned = self._standby.look(situation, now)
        if assigned is not None and (assigned.unserved or not self._sharing.helps):
            name = assigned.facts.name
            if name not in self._models.on_disk:
                return self._fetches.begin(assigned, members)
            text = f"Serving {name}, because {assigned.why}."
            notice = Notice(level=NoticeLevel.INFO, code="model_assigned", text=text, about=name)
            return [notice, *self._models.load(name, None, now, origin=Origin.MESH)]
        return self._standby.tell()

    def _stand_back(self, members: Sequence[Member], now: float) -> list[AnyEffect]:
        held = self._usage.given_up_first(self._models.launches)
        model = self._demotion.look(self._config.node, held, members, self._demand(members, now), now)
        if model is None:
            return []
        why = "nobody asked for it here for a while, and others serve it"
        notice = Notice(level=NoticeLevel.INFO, code="model_given_up", text=f"Giving {model} up: {why}.", about=model)
        return [notice, *self._models.launches.drop(model, self._config.timings.demotion_drain, now, why)]

    def _demand(self, members: Sequence[Member], now: float) -> dict[str, float]:
        return mesh_demand(self._usage.demand.rates(now), (member.announcement.demand for member in members))


def _due(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now


class Owner:
    """Between `Yielding`, which decides, and the launches. Each method returns what must be done now."""

    def __init__(self, policy: YieldPolicy, models: LocalModels, sharing: Sharing) -> None:
        self._policy = policy
        self._yielding = Yielding(policy)
        self._models = models
        self._sharing = sharing
        self._held: dict[ModelName, tuple[LaunchOptions | None, Origin]] = {}

    @property
    def because(self) -> str:
        """Why the machine is its owner's at present: nothing is served or lent meanwhile. Empty: it is not."""
        return self._yielding.because

    def deadline(self) -> float | None:
        """When to look again, if nothing happens before."""
        return self._yielding.deadline()

    def sense(self, event: OwnerSensed, now: float) -> None:
        """What the owner does has changed."""
        self._yielding.sense(event, now)

    def look(self, now: float) -> list[AnyEffect]:
        """Give the machine back, or take up again what was served before, where it is time."""
        if not self._yielding.look(now):
            return []
        return self._give_back(now) if self.because else self._take_up(now)

    def keep(self, event: LoadRequested) -> list[AnyEffect]:
        """A user wants a model meanwhile: it is served later."""
        self._held[event.model] = (event.options, Origin.USER)
        text = f"{event.model} will be served here once the machine is free: {self.because}."
        return [Notice(level=NoticeLevel.WARNING, code="model_later", text=text, about=event.model)]

    def forget(self, model: ModelName) -> None:
        """A user drops a model: it is not taken up again."""
        self._held.pop(model, None)

    def _give_back(self, now: float) -> list[AnyEffect]:
        why = f"the machine is its owner's: {self.because}"
        text = f"Giving the machine back to its owner: {self.because}. Answers under way have {self._policy.drain:g} s."
        effects: list[AnyEffect] = [Notice(level=NoticeLevel.INFO, code="yielding", text=text)]
        effects += self._sharing.stop()
        for launch in list(self._models.launches):
            if launch.status is ModelStatus.FAILED:
                continue
            # A model that is split is taken up again by the group.
            if launch.order.plan.split is None and launch.model != self._models.seed:
                self._held[launch.model] = (launch.order.options, launch.order.origin)
            effects += self._models.launches.drop(launch.model, self._policy.drain, now, why)
        return effects

    def _take_up(self, now: float) -> list[AnyEffect]:
        held, self._held = self._held, {}
        text = "The machine is free again" + (f": serving {', '.join(held)}." if held else ".")
        effects: list[AnyEffect] = [Notice(level=NoticeLevel.INFO, code="yield_over", text=text)]
        for model, (options, origin) in held.items():
            effects += self._models.load(model, options, now, origin=origin)
        return effects
