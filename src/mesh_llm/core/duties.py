"""What a node takes up for the mesh, and what it gives back: assignment on standby, fetches, demotion."""

from collections.abc import Sequence

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.demand import mesh_demand
from mesh_llm.core.demotion import Demotion
from mesh_llm.core.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.events import FetchEnded
from mesh_llm.core.fetches import Fetches
from mesh_llm.core.holders import shared_models
from mesh_llm.core.ids import ModelName
from mesh_llm.core.local_models import LocalModels
from mesh_llm.core.member import Member
from mesh_llm.core.placement import known_models, wanted_order
from mesh_llm.core.serving import Origin
from mesh_llm.core.sharing import Sharing
from mesh_llm.core.standby import Situation, Standby
from mesh_llm.core.usage import Usage


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
