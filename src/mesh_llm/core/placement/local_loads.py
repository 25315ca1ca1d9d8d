"""This node loads a model that requests wait for: it makes room, fetches the file, or begins to split the model."""

from collections.abc import Callable, Collection, Sequence

from mesh_llm.core.placement.assignment import Assigned
from mesh_llm.core.placement.controller import ModelFetch
from mesh_llm.core.placement.launches import Origin
from mesh_llm.core.placement.load_view import NOBODY, RANK_AGAIN, TO_SPLIT, AwaitedModel, LoadView
from mesh_llm.core.placement.local_models import LoadRefused
from mesh_llm.core.placement.residents import DRAIN
from mesh_llm.core.placement.room import Resident, make_room
from mesh_llm.core.routing.ranking import Awaited
from mesh_llm.core.trust.circle import owner_of
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.types.errors import listed
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts, ModelStatus

_CIRCLE = (
    "it fits this node only together with others, and nodes outside the request's circle could become its workers: "
)
_MOST_NAMED = 3


class LocalLoads:
    """Loads here what requests wait for. Methods that return effects change launches and fetches."""

    def __init__(self, view: LoadView, fetch: ModelFetch) -> None:
        self._view = view
        self._fetch = fetch
        self._config = view.config
        self._models = view.models
        self._residents = view.residents
        self._splits = view.splits

    def is_here(self, entry: AwaitedModel) -> bool:
        """Whether the model is warm or loading on this node."""
        launch = self._models.launches.get(entry.model)
        if launch is None or launch.announced_status not in {ModelStatus.WARM, ModelStatus.LOADING}:
            return False
        if launch.status is ModelStatus.WARM:
            entry.state = Awaited(text="it answers here")
        else:
            entry.state = Awaited(
                text="it is loading here", ready_at=launch.since + self._residents.load_seconds(launch)
            )
        return True

    def load(self, entry: AwaitedModel, before: ModelName | None) -> tuple[list[AnyEffect], bool]:
        """Load a model here. Also returns whether it waits for memory; `before`: the model that does so already."""
        models, model = self._models, entry.model
        facts, launch = self._view.known(model), models.launches.get(model)
        problem = self._view.barred(model, facts)
        if problem or facts is None:
            return self._refuse(entry, problem), False
        if launch is not None:
            entry.state = Awaited(text="it is unloaded first, and then loaded again")
            return [], True
        residents, leaving = list(self._residents.candidates(entry.askers.keys())), self._residents.leaving()
        best = self._residents.check(facts, [*leaving, *(one.model for one in residents)])
        if isinstance(best, LoadRefused):
            return self._split_or_refuse(entry, facts, best, residents, before)
        if before is not None:
            entry.state = Awaited(text=f"it waits, because {before} came first and waits for memory")
            return [], True
        if self._residents.good(self._residents.check(facts, ()), best):
            return self._begin(entry, facts), False
        if self._residents.good(self._residents.check(facts, leaving), best):
            text = f"it waits until {listed(leaving)} has answered its last requests"
            entry.state = Awaited(
                text=text, ready_at=self._view.now + self._residents.times.expected(model, facts.size_bytes)
            )
            return [], True

        def fits(chosen: Collection[ModelName]) -> bool:
            return self._residents.good(self._residents.check(facts, [*leaving, *chosen]), best)

        effects, free = self._make_room(entry, facts, residents, fits)
        # Where no engine ran, its memory is free at once.
        if free and self._residents.good(self._residents.check(facts, ()), best):
            return [*effects, *self._begin(entry, facts)], False
        return effects, True

    def _make_room(
        self,
        entry: AwaitedModel,
        facts: ModelFacts,
        residents: Sequence[Resident],
        fits: Callable[[Collection[ModelName]], bool],
    ) -> tuple[list[AnyEffect], bool]:
        """Unload what is idle for a model, or wait for its turn. Also returns whether it was unloaded.

        `fits`: whether the model can be loaded once these are unloaded; with all `residents` it can.
        """
        models, model = self._models, entry.model
        seconds = self._residents.times.expected(model, facts.size_bytes)
        contention = self._residents.contention
        contention.wanted(model, seconds, self._view.now)
        room = make_room(residents, fits, self._config.on_demand, self._view.now, contention.turns(self._view.now))
        if room is None:
            return self._refuse(entry, NOBODY), False
        names = listed(room.models)
        if room.at > self._view.now:
            self._view.wake(room.at)
            text = f"it takes turns with {names}, because there is no room for both; its turn comes next"
            entry.state = Awaited(text=text, ready_at=room.at + seconds)
            return [], False
        entry.state = Awaited(text=f"{names} is unloaded to make room", ready_at=self._view.now + seconds)
        effects: list[AnyEffect] = []
        for name in room.models:
            who = "you want served here" if entry.by_user else "a request asks for"
            text = f"Unloading {name}: its memory is needed for {model}, which {who}."
            effects.append(Notice(level=NoticeLevel.INFO, code="model_unloaded", text=text, about=name))
            effects += models.rest(name, DRAIN, self._view.now, f"its memory is needed for {model}")
            contention.unloaded(name, self._view.now)
        return effects, True

    def _begin(self, entry: AwaitedModel, facts: ModelFacts) -> list[AnyEffect]:
        """Load a model that fits now; fetch it first where it is not here."""
        model = entry.model
        if entry.by_user:
            self._models.resting[model] = Origin.USER
        if model in self._models.on_disk:
            seconds = self._residents.times.expected(model, facts.size_bytes)
            entry.state = Awaited(text="it is loading here", ready_at=self._view.now + seconds)
            who = "you asked for it" if entry.by_user else "a request asks for it"
            text = f"Loading {model}, because {who}."
            notice = Notice(level=NoticeLevel.INFO, code="model_demanded", text=text, about=model)
            return [notice, *self._models.take_up(model, self._view.now)]
        if self._fetch.busy:
            pending = self._fetch.pending
            where = pending.get(model) or f"it is fetched after {listed(tuple(pending))}"
            entry.state = Awaited(text=where)
            return []
        if model in self._fetch.unobtainable(self._view.members):
            return self._refuse(entry, "its file could not be fetched")
        assigned = Assigned(facts=facts, why="a request asks for it", unserved=True)
        effects = self._fetch.begin(assigned, self._view.members)
        entry.state = Awaited(text=self._fetch.pending.get(model, ""))
        return effects

    def _refuse(self, entry: AwaitedModel, why: str) -> list[AnyEffect]:
        """This node does not load it. Its own requests may find another node."""
        me = self._config.node
        self._view.note_refusal(entry.model, me, why, self._view.now)
        if entry.asked == me:
            entry.asked = None
        effects: list[AnyEffect] = []
        if entry.by_user:
            text = f"{entry.model} is not loaded: {why}."
            effects.append(Notice(level=NoticeLevel.ERROR, code="does_not_fit", text=text, about=entry.model))
            entry.by_user = False
        anywhere = any(not one.here for one in entry.askers.values())
        entry.state = Awaited(problem_here=why, text=entry.state.text if anywhere else "")
        self._view.wake(self._view.now + RANK_AGAIN if anywhere else self._view.now + self._config.on_demand.refused)
        return effects

    def _split_or_refuse(
        self,
        entry: AwaitedModel,
        facts: ModelFacts,
        refused: LoadRefused,
        residents: Sequence[Resident],
        before: ModelName | None,
    ) -> tuple[list[AnyEffect], bool]:
        """A model that fits no node alone may be split, where nodes that can do that have the memory together.

        What is idle here is unloaded for it. What is not known yet is waited for. Only what the facts exclude is
        refused. Also returns whether it waits for memory of this node.
        """
        models, splits, model = self._models, self._splits, entry.model
        if not splits.can_begin(model, refused):
            return self._refuse(entry, self._view.too_big(facts, refused)), False
        if not entry.by_user and (outside := self._outsiders(entry)):
            return self._refuse(entry, f"{_CIRCLE}{listed(outside)}"), False
        chance = splits.chance(facts)
        if entry.by_user or chance.ready:
            entry.state = Awaited(text="it is about to be split over several nodes")
            self._view.wake(splits.wakes())
            if models.group_model == model:
                return [], False
            now = self._view.now
            return models.load(model, None, now) if entry.by_user else splits.begin(model, now), False
        leaving, idle = self._residents.leaving(), [one.model for one in residents]
        if leaving and splits.chance(facts, leaving).ready:
            entry.state = Awaited(text=f"it waits until {listed(leaving)} has answered its last requests")
            return [], True
        best = splits.chance(facts, [*leaving, *idle])
        if best.ready:
            return self._make_room_to_split(entry, facts, residents, before)
        waits_for = chance.waits_for or best.waits_for
        if waits_for or not splits.still(entry.since, entry.members):
            self._view.wake(splits.wakes())
            entry.state = Awaited(text=f"{TO_SPLIT}: {waits_for or 'there may be news of the other nodes'}")
            return [], False
        splits.end(model)
        return self._refuse(entry, self._view.too_big(facts, refused, best.outlook)), False

    def _make_room_to_split(
        self, entry: AwaitedModel, facts: ModelFacts, residents: Sequence[Resident], before: ModelName | None
    ) -> tuple[list[AnyEffect], bool]:
        """Unload what is idle here, so that this node can give enough to a model that is split."""
        splits, leaving = self._splits, self._residents.leaving()
        if before is not None:
            entry.state = Awaited(text=f"it waits, because {before} came first and waits for memory")
            return [], True

        def fits(chosen: Collection[ModelName]) -> bool:
            return splits.chance(facts, [*leaving, *chosen]).ready

        effects, free = self._make_room(entry, facts, residents, fits)
        if free and splits.chance(facts).ready:
            return [*effects, *splits.begin(entry.model, self._view.now)], False
        return effects, True

    def _outsiders(self, entry: AwaitedModel) -> tuple[str, ...]:
        """The names of nodes that may take part in a split model, and must not see a prompt that waits; not all.

        All nodes elect the host and the workers alike, so that the election cannot know one request's circle.
        """
        if entry.circle is None:
            return ()
        now = self._config.epoch + self._view.now
        owners = {one.announcement.node: one.announcement.ownership for one in self._view.members}
        known = {node: ownership for node, ownership in owners.items() if ownership is not None}
        nodes = [one for one in self._view.members if self._splits.may_take_part(one)]
        outside = [one.label for one in nodes if owner_of(one.announcement.node, known, now) not in entry.circle]
        shown = (
            outside if len(outside) <= _MOST_NAMED else [*outside[:_MOST_NAMED], f"{len(outside) - _MOST_NAMED} more"]
        )
        return tuple(shown)
