"""Models on demand: a request waits for a model, one node loads it, and what is idle is unloaded for it.

The node where requests wait chooses the node that loads (`load_hosts`), and asks it as long as they wait. That node
checks for itself, makes room (`residents`, `room`), and loads. All nodes choose alike, so that a model that is asked
for at several nodes is loaded once. What nobody asks for any more is unloaded after a while.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from mesh_llm.core.config import NodeConfig, OnDemandPolicy
from mesh_llm.core.placement.assignment import Assigned
from mesh_llm.core.placement.controller import ModelFetch, offered_models
from mesh_llm.core.placement.demand import Usage
from mesh_llm.core.placement.launches import Origin
from mesh_llm.core.placement.load_hosts import Refusals, place_of, rank_places
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.placement.offload import Pools, plan_launch
from mesh_llm.core.placement.residents import DRAIN, Residents
from mesh_llm.core.placement.room import Resident, make_room
from mesh_llm.core.placement.split_loads import SplitLoads
from mesh_llm.core.routing.ranking import Awaited
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.split.outlook import Outlook
from mesh_llm.core.types.announcement import LoadOffer, Member, may_load
from mesh_llm.core.types.effects import AnyEffect, AskForLoad, EndAsk, Notice, NoticeLevel
from mesh_llm.core.types.events import LoadAnswered, ModelAwaited
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchPlan, ModelFacts, ModelStatus, Role

_RANK_AGAIN = 0.5
_GRACE = 3.0
"""Seconds for which a node is looked for though none seems to have the memory, and for which a host that failed a
request and is alive is waited for: it gets requests again after `Timings.target_block`."""
_LOOK_ELSEWHERE = 5.0
"""Seconds after which another node is looked for while a model waits for memory here."""
_PATIENCE = 12.0
"""Seconds after which another node is looked for while the one that was asked does not begin to load."""
_MOST_AWAITED = 256
"""Models for which requests of other nodes are noted. Those of this node's own clients the API bounds."""
_MOST_OF_ASKER = 64
"""Models for which one other node's requests are noted: a node that asks for many must not keep others out."""
_NOBODY = "no node of the mesh that loads models when they are asked for has its file and the memory for it"


@dataclass
class _Entry:
    """A model for which requests wait.

    Attributes:
        model: its name.
        since: when the first of them came.
        askers: who waits, and how many requests.
        asked: the node that is to load it, this one or another that was asked.
        asked_at: since when.
        ranked_at: when a node was last looked for.
        answered_at: when another node last said that it has loaded it.
        by_user: this node's user asked for it to be loaded here.
        state: what becomes of them.
    """

    model: ModelName
    since: float
    askers: dict[NodeId, ModelAwaited] = field(default_factory=dict[NodeId, ModelAwaited])
    asked: NodeId | None = None
    asked_at: float = 0.0
    ranked_at: float = float("-inf")
    answered_at: float = float("-inf")
    by_user: bool = False
    state: Awaited = field(default_factory=Awaited)

    @property
    def members(self) -> Collection[NodeId]:
        """Those of the askers that are members of the mesh. A passive node is none."""
        return [node for node, one in self.askers.items() if one.standing == "member"]

    @property
    def here(self) -> bool:
        """Whether somebody wants it loaded on this node, and on no other."""
        return self.by_user or any(one.here for one in self.askers.values())


class OnDemand:
    """Loads and unloads models by demand. Methods that return effects change launches and fetches."""

    def __init__(
        self, config: NodeConfig, models: LocalModels, usage: Usage, fetch: ModelFetch, split: SplitController
    ) -> None:
        self._config = config
        self._models = models
        self._usage = usage
        self._fetch = fetch
        self._entries: dict[ModelName, _Entry] = {}
        self._refusals = Refusals()
        self._deadline: float | None = None
        self._members: Sequence[Member] = ()
        self._by_node: Mapping[NodeId, Member] = {}
        self._now = 0.0
        self._refusal = ""
        self._splits = SplitLoads(config, models, split)
        self.residents = Residents(config, models, usage)
        """What is loaded here, and what becomes of it."""
        self.relay: NodeId | None = None
        """The node whose routes this passive node follows: it asks the mesh."""

    @property
    def policy(self) -> OnDemandPolicy:
        """The node's rules."""
        return self._config.on_demand

    # What happens.

    def awaited(self, event: ModelAwaited, now: float) -> list[AnyEffect]:
        """Requests wait for a model, or do not wait any more."""
        entry = self._entries.get(event.model)
        if event.count > 0:
            if event.asker != self._config.node and not self._notes(event, entry):
                return []
            if entry is None:
                entry = self._entries[event.model] = _Entry(event.model, now)
            entry.askers[event.asker] = event
            return []
        if entry is None:
            return []
        if self._models.launches.get(event.model) is not None:
            # They come to its engine now.
            self._usage.touch(event.model, now)
        entry.askers.pop(event.asker, None)
        if entry.askers or entry.by_user:
            return []
        del self._entries[event.model]
        self._splits.end(event.model)
        return self._end_ask(entry)

    def _notes(self, event: ModelAwaited, entry: _Entry | None) -> bool:
        """Whether another node's requests for a model are noted, or there are too many."""
        if entry is not None and event.asker in entry.askers:
            return True
        asked = sum(event.asker in one.askers for one in self._entries.values())
        return asked < _MOST_OF_ASKER and (entry is not None or len(self._entries) < _MOST_AWAITED)

    def load(self, model: ModelName, now: float) -> None:
        """This node's user asks for a model for which room must be made: it is loaded as if a request asked for it."""
        self._models.refused.pop(model, None)
        self._models.dropped.discard(model)
        self._entries.setdefault(model, _Entry(model, now)).by_user = True

    def forget(self, model: ModelName) -> None:
        """This node's user does not want a model any more. Requests that wait for it stay."""
        entry = self._entries.get(model)
        if entry is not None:
            self._end_user(entry)

    def _end_user(self, entry: _Entry) -> None:
        entry.by_user = False
        if not entry.askers:
            self._entries.pop(entry.model, None)

    def answered(self, event: LoadAnswered, now: float) -> None:
        """Another node has loaded a model, or will not."""
        entry = self._entries.get(event.model)
        if entry is not None and entry.asked == event.node:
            entry.asked = None
            entry.answered_at = float("-inf") if event.problem else now
        if event.problem:
            self._note_refusal(event.model, event.node, event.problem, now, event.retry_after)

    def _note_refusal(self, model: ModelName, node: NodeId, why: str, now: float, seconds: float = 0.0) -> None:
        """A node does not load a model: it is not asked again before something has changed, or time has passed.

        A passive node sees nothing that could change: the node that it asks remembers for it.
        """
        split = self._fits_nowhere_alone(model)
        seconds = 0.0 if self._config.role is Role.CLIENT else max(seconds, self.policy.refused)
        facts = self._refusal_facts(model, node, split)
        self._refusals.add(model, node, why, now, now + seconds, facts, split=split)

    def _refusal_facts(self, model: ModelName, node: NodeId, split: bool) -> Hashable:
        """What a node's answer is built on, as far as it is known here. `split`: other nodes' memory counts, too."""
        others = self._splits.facts if split else None
        if node == self._config.node:
            statuses = tuple((one.model, one.status) for one in self._models.launches)
            mine = (model in self._models.on_disk, model in self._models.excluded, self._refusal, statuses)
            return (mine, self.residents.offer(), others)
        member = self._member(node)
        if member is None:
            return others
        announced = member.announcement
        statuses = tuple((one.model, one.status) for one in announced.serving)
        has = any(one.name == model for one in announced.on_disk)
        return (announced.incarnation, member.suspect, has, statuses, announced.loads, announced.offer, others)

    def _member(self, node: NodeId | None) -> Member | None:
        return self._by_node.get(node) if node is not None else None

    def _fits_nowhere_alone(self, model: ModelName) -> bool:
        """Whether no node could load a model alone, whatever it unloads: then it may be split."""
        facts = self._known(model)
        if facts is None:
            return False
        places = [place for member in self._members if (place := place_of(member)) is not None]
        return not rank_places(facts, [*places, self.residents.place()], shared=True, fits=self._fits)

    def deadline(self) -> float | None:
        """When to evaluate again though nothing happened."""
        return self._deadline

    @property
    def state(self) -> Mapping[ModelName, Awaited]:
        """What becomes of the requests that wait."""
        return {entry.model: entry.state for entry in self._entries.values()}

    @property
    def waiting(self) -> Mapping[ModelName, int]:
        """How many requests wait for each model, here and at the nodes that ask this one."""
        return {entry.model: sum(one.count for one in entry.askers.values()) for entry in self._entries.values()}

    def offer(self, refusal: str = "") -> LoadOffer | None:
        """What this node offers to models that other nodes ask for. `refusal`: why it loads none at present, if so."""
        if self.policy.scope not in {"members", "clients"} or refusal or self._config.role is Role.CLIENT:
            return None
        return self.residents.offer()

    # What follows.

    def evaluate(
        self, members: Sequence[Member], warm: frozenset[ModelName], now: float, *, refusal: str = ""
    ) -> list[AnyEffect]:
        """Decide again.

        Args:
            members: the other nodes.
            warm: of the models that are waited for, those that some node answers for.
            now: the time.
            refusal: why this node loads nothing at present, as a clause; empty: it does.
        """
        if members is not self._members:
            self._by_node = {one.announcement.node: one for one in members}
        self._members, self._now, self._refusal = members, now, refusal
        self.residents.observe(members, self._entries.keys(), now)
        self._splits.observe(members, now)
        self._deadline = None
        self._refusals.update(self._refusal_facts, now)
        effects: list[AnyEffect] = []
        before: ModelName | None = None
        for entry in sorted(self._entries.values(), key=lambda one: (one.since, one.model)):
            if entry.model in warm and not entry.here:
                entry.state = Awaited(text="it answers")
                effects += self._end_ask(entry)
                continue
            waits = False
            if self._is_here(entry):
                effects += self._end_ask(entry)
                self._end_user(entry)
            elif self._config.role is Role.CLIENT:
                effects += self._ask(entry, self.relay)
            elif not entry.by_user and not any(
                may_load(self.policy.scope, one.standing) for one in entry.askers.values()
            ):
                why = (
                    "models are loaded on demand for fewer nodes than this one" if self.policy.scope != "off" else _OFF
                )
                entry.state = Awaited(problem=why, problem_here=why)
            elif entry.here:
                more, waits = self._load_here(entry, before)
                effects += more
            else:
                more, waits = self._place(entry, before)
                effects += more
            before = entry.model if waits and before is None else before
        if not refusal:
            unloaded, due = self.residents.unload_idle()
            effects += unloaded
            if due is not None:
                self._wake(due)
        return effects

    def _is_here(self, entry: _Entry) -> bool:
        """Whether the model is warm or loading on this node."""
        launch = self._models.launches.get(entry.model)
        if launch is None or launch.announced_status not in {ModelStatus.WARM, ModelStatus.LOADING}:
            return False
        if launch.status is ModelStatus.WARM:
            entry.state = Awaited(text="it answers here")
        else:
            entry.state = Awaited(
                text="it is loading here", ready_at=launch.since + self.residents.load_seconds(launch)
            )
        return True

    def _is_soon_back(self, entry: _Entry) -> bool:
        """Whether another node serves the model, and gets requests in a moment."""
        if self._now < entry.answered_at + _RANK_AGAIN:
            # The routes say so in a moment.
            self._wake(entry.answered_at + _RANK_AGAIN)
            return True
        if self._now < entry.since + _GRACE and any(self._serves(member, entry.model) for member in self._members):
            # A second copy may have to be fetched, and would answer from then on.
            self._wake(entry.since + _GRACE)
            entry.state = Awaited(text="its host failed a request, and is asked again in a moment")
            return True
        return False

    def _place(self, entry: _Entry, before: ModelName | None) -> tuple[list[AnyEffect], bool]:
        """Choose the node that loads a model, and let it."""
        me = self._config.node
        if self._is_soon_back(entry):
            return [], False
        if entry.asked == me:
            if self._now < entry.ranked_at + _LOOK_ELSEWHERE:
                return self._load_here(entry, before)
            entry.asked = None
        elif entry.asked is not None:
            member = self._member(entry.asked)
            if member is not None and not member.suspect:
                self._watch(entry, member)
                return self._look_elsewhere(entry, member), False
            self._note_refusal(entry.model, entry.asked, "it does not answer", self._now)
        effects = self._end_ask(entry)
        for member in self._members:
            if self._loading(member, entry.model) and (entry.model, member.announcement.node) not in self._refusals:
                return [*effects, *self._ask(entry, member.announcement.node)], False
        if self._now < entry.ranked_at + _RANK_AGAIN and entry.state.problem:
            self._wake(entry.ranked_at + _RANK_AGAIN)
            return effects, False
        entry.ranked_at = self._now
        chosen = next(iter(self._ranked(entry)), None) or self._split_host(entry)
        if chosen is None:
            self._find_none(entry)
            return effects, False
        if chosen == me:
            entry.asked = me
            more, waits = self._load_here(entry, before)
            return [*effects, *more], waits
        return [*effects, *self._ask(entry, chosen)], False

    def _find_none(self, entry: _Entry) -> None:
        """No node is found: wait for what is not known yet, or say why none loads the model."""
        facts, why = self._known(entry.model), self._why_not(entry)
        waits_for = ""
        if why == _NOBODY and facts is not None:
            chance = self._splits.chance_elsewhere(facts)
            if chance.waits_for:
                waits_for = f"{_TO_SPLIT}: {chance.waits_for}"
            elif not self._splits.still(entry.since, entry.members):
                # What is known of the other nodes may be late.
                waits_for = "a node is looked for"
            elif chance.outlook is not None and self._fits_nowhere_alone(entry.model):
                why = f"it fits no node alone. Split over several nodes, {self._splits.short(chance.outlook)}"
        if waits_for:
            self._wake(self._now + _RANK_AGAIN)
            entry.state = Awaited(text=waits_for, problem_here=entry.state.problem_here)
        else:
            entry.state = Awaited(problem=why, problem_here=entry.state.problem_here)

    def _look_elsewhere(self, entry: _Entry, member: Member) -> list[AnyEffect]:
        """Ask another node, where the one that was asked does not load for long and another has room now."""
        if self._loading(member, entry.model):
            return []
        due = max(entry.asked_at + _PATIENCE, entry.ranked_at + _LOOK_ELSEWHERE)
        if self._now < due:
            self._wake(due)
            return []
        entry.ranked_at = self._now
        self._wake(self._now + _LOOK_ELSEWHERE)
        chosen = next(iter(self._ranked(entry)), None)
        if chosen is None or chosen in {entry.asked, self._config.node} or not self._has_room(chosen, entry.model):
            # At another full node it would wait again, and lose its place in the first one's turns.
            return []
        return self._ask(entry, chosen)

    def _has_room(self, node: NodeId, model: ModelName) -> bool:
        """Whether a model fits on another node beside all that is loaded there."""
        facts = self._known(model)
        member = self._member(node)
        place = place_of(member) if member is not None else None
        if facts is None or place is None:
            return False
        free = Pools(device=place.offer.free_bytes, host=place.offer.free_host_bytes, cards=place.cards)
        return self._fits(facts, free)

    def _ranked(self, entry: _Entry) -> Sequence[NodeId]:
        facts = self._known(entry.model)
        if facts is None:
            return ()
        for_clients = self._for_clients(entry)
        places = [
            place
            for member in self._members
            if (place := place_of(member)) is not None
            and (entry.model, place.node) not in self._refusals
            and (place.offer.clients or not for_clients)
        ]
        me = self._config.node
        if not self._refusal and entry.model not in self._models.excluded and (entry.model, me) not in self._refusals:
            places.append(self.residents.place())
        shared = entry.model in offered_models(self._members)
        return rank_places(facts, places, shared=shared, fits=self._fits, demand=self.residents.demand)

    def _fits(self, facts: ModelFacts, pools: Pools) -> bool:
        return isinstance(plan_launch(facts, pools, self._models.options_for(facts.name)), LaunchPlan)

    def _known(self, model: ModelName) -> ModelFacts | None:
        """The model, as this node or another one has it; else as the catalogue has it."""
        own = self._models.on_disk.get(model)
        if own is not None:
            return own
        others = (one for member in self._members for one in member.announcement.on_disk if one.name == model)
        return next(others, None) or next((one for one in self.policy.catalogue if one.name == model), None)

    def _why_not(self, entry: _Entry) -> str:
        """Why no node loads a model: this one's reason if it has the file, else another's."""
        model, models = entry.model, self._models
        if model in models.on_disk:
            facts = models.on_disk[model]
            barred = self._barred(model, facts)
            movable = [launch.model for launch in models.launches if self.residents.movable(launch)]
            best = self.residents.check(facts, [*self.residents.leaving(), *movable])
            if barred:
                return barred
            if isinstance(best, LoadRefused):
                return self._refusals.why(model, self._config.node) or self._too_big(facts, best)
        reasons = self._refusals.of(model)
        if not reasons:
            return _NOBODY
        node, why = reasons[0]
        member = self._member(node)
        who = member.label if member is not None else node[:10]
        return why if node == self._config.node else f"{who} does not load it: {why}"

    def _too_big(self, facts: ModelFacts, refused: LoadRefused, outlook: Outlook | None = None) -> str:
        """Why a model whose file is here is loaded neither here nor on several nodes together."""
        pinned = [launch.model for launch in self._models.launches if self.residents.is_pinned(launch.model)]
        text = refused.message.rstrip(".") + (f"; {_listed(pinned)} is pinned and stays" if pinned else "")
        if refused.code != "does_not_fit":
            return text
        return self._splits.why_not(facts, text, outlook)

    # Another node loads.

    def _ask(self, entry: _Entry, node: NodeId | None) -> list[AnyEffect]:
        if node is None:
            entry.state = Awaited(problem="no node of the mesh answers at the moment")
            return []
        if entry.asked == node:
            return []
        if (entry.model, node) in self._refusals:
            entry.state = Awaited(problem=self._refusals.why(entry.model, node))
            return []
        effects = self._end_ask(entry)
        entry.asked, entry.asked_at = node, self._now
        member = self._member(node)
        if member is not None:
            self._watch(entry, member)
        else:
            entry.state = Awaited(text="the mesh was asked to load it")
        return [*effects, AskForLoad(node=node, model=entry.model, for_clients=self._for_clients(entry))]

    def _watch(self, entry: _Entry, member: Member) -> None:
        """Say how far another node is."""
        seconds = max(
            (one.load_seconds for one in member.announcement.serving if one.model == entry.model), default=0.0
        )
        loading = self._loading(member, entry.model)
        facts = self._known(entry.model)
        seconds = seconds or self.residents.times.expected(entry.model, facts.size_bytes if facts is not None else 0)
        text = f"it is loading on {member.label}" if loading else f"{member.label} was asked to load it"
        place = place_of(member)
        if not loading and facts is not None and place is not None and not self._fits(facts, place.room):
            waits_for = self._splits.chance_elsewhere(facts).waits_for
            text = f"{member.label} was asked to split it over several nodes"
            text += f", and waits: {waits_for}" if waits_for else ""
        entry.state = Awaited(text=text, ready_at=entry.asked_at + seconds, problem_here=entry.state.problem_here)

    @staticmethod
    def _serves(member: Member, model: ModelName, status: ModelStatus = ModelStatus.WARM) -> bool:
        serving = member.announcement.serving
        return not member.suspect and any(one.model == model and one.status is status for one in serving)

    def _loading(self, member: Member, model: ModelName) -> bool:
        return self._serves(member, model, ModelStatus.LOADING)

    def _end_ask(self, entry: _Entry) -> list[AnyEffect]:
        asked, entry.asked = entry.asked, None
        if asked is None or asked == self._config.node:
            return []
        return [EndAsk(node=asked, model=entry.model)]

    def _for_clients(self, entry: _Entry) -> bool:
        return all(one.standing == "client" for one in entry.askers.values())

    # This node loads.

    def _load_here(self, entry: _Entry, before: ModelName | None) -> tuple[list[AnyEffect], bool]:
        """Load a model here. Also returns whether it waits for memory; `before`: the model that does so already."""
        models, model = self._models, entry.model
        facts, launch = self._known(model), models.launches.get(model)
        problem = self._barred(model, facts)
        if problem or facts is None:
            return self._refuse(entry, problem), False
        if launch is not None:
            entry.state = Awaited(text="it is unloaded first, and then loaded again")
            return [], True
        residents, leaving = list(self.residents.candidates(entry.askers.keys())), self.residents.leaving()
        best = self.residents.check(facts, [*leaving, *(one.model for one in residents)])
        if isinstance(best, LoadRefused):
            return self._split_or_refuse(entry, facts, best, residents, before)
        if before is not None:
            entry.state = Awaited(text=f"it waits, because {before} came first and waits for memory")
            return [], True
        if self.residents.good(self.residents.check(facts, ()), best):
            return self._begin(entry, facts), False
        if self.residents.good(self.residents.check(facts, leaving), best):
            text = f"it waits until {_listed(leaving)} has answered its last requests"
            entry.state = Awaited(
                text=text, ready_at=self._now + self.residents.times.expected(model, facts.size_bytes)
            )
            return [], True

        def fits(chosen: Collection[ModelName]) -> bool:
            return self.residents.good(self.residents.check(facts, [*leaving, *chosen]), best)

        effects, free = self._make_room(entry, facts, residents, fits)
        # Where no engine ran, its memory is free at once.
        if free and self.residents.good(self.residents.check(facts, ()), best):
            return [*effects, *self._begin(entry, facts)], False
        return effects, True

    def _barred(self, model: ModelName, facts: ModelFacts | None) -> str:
        """Why a model is not loaded here, whatever else is; empty: it may be."""
        if self._refusal:
            return self._refusal
        if model in self._models.excluded:
            launch = self._models.launches.get(model)
            dropped = f"it was dropped there; to serve it again: mesh-llm load {model}"
            return (self._models.refused.get(model) or (launch.reason if launch is not None else dropped)).rstrip(".")
        return _NOBODY if facts is None else ""

    def _make_room(
        self,
        entry: _Entry,
        facts: ModelFacts,
        residents: Sequence[Resident],
        fits: Callable[[Collection[ModelName]], bool],
    ) -> tuple[list[AnyEffect], bool]:
        """Unload what is idle for a model, or wait for its turn. Also returns whether it was unloaded.

        `fits`: whether the model can be loaded once these are unloaded; with all `residents` it can.
        """
        models, model = self._models, entry.model
        seconds = self.residents.times.expected(model, facts.size_bytes)
        contention = self.residents.contention
        contention.wanted(model, seconds, self._now)
        room = make_room(residents, fits, self.policy, self._now, contention.turns(self._now))
        if room is None:
            return self._refuse(entry, _NOBODY), False
        names = _listed(room.models)
        if room.at > self._now:
            self._wake(room.at)
            text = f"it takes turns with {names}, because there is no room for both; its turn comes next"
            entry.state = Awaited(text=text, ready_at=room.at + seconds)
            return [], False
        entry.state = Awaited(text=f"{names} is unloaded to make room", ready_at=self._now + seconds)
        effects: list[AnyEffect] = []
        for name in room.models:
            who = "you want served here" if entry.by_user else "a request asks for"
            text = f"Unloading {name}: its memory is needed for {model}, which {who}."
            effects.append(Notice(level=NoticeLevel.INFO, code="model_unloaded", text=text, about=name))
            effects += models.rest(name, DRAIN, self._now, f"its memory is needed for {model}")
            contention.unloaded(name, self._now)
        return effects, True

    def _begin(self, entry: _Entry, facts: ModelFacts) -> list[AnyEffect]:
        """Load a model that fits now; fetch it first where it is not here."""
        model = entry.model
        if entry.by_user:
            self._models.resting[model] = Origin.USER
        if model in self._models.on_disk:
            seconds = self.residents.times.expected(model, facts.size_bytes)
            entry.state = Awaited(text="it is loading here", ready_at=self._now + seconds)
            who = "you asked for it" if entry.by_user else "a request asks for it"
            text = f"Loading {model}, because {who}."
            notice = Notice(level=NoticeLevel.INFO, code="model_demanded", text=text, about=model)
            return [notice, *self._models.take_up(model, self._now)]
        if self._fetch.busy:
            pending = self._fetch.pending
            where = pending.get(model) or f"it is fetched after {_listed(tuple(pending))}"
            entry.state = Awaited(text=where)
            return []
        if model in self._fetch.unobtainable(self._members):
            return self._refuse(entry, "its file could not be fetched")
        assigned = Assigned(facts=facts, why="a request asks for it", unserved=True)
        effects = self._fetch.begin(assigned, self._members)
        entry.state = Awaited(text=self._fetch.pending.get(model, ""))
        return effects

    def _refuse(self, entry: _Entry, why: str) -> list[AnyEffect]:
        """This node does not load it. Its own requests may find another node."""
        me = self._config.node
        self._note_refusal(entry.model, me, why, self._now)
        if entry.asked == me:
            entry.asked = None
        effects: list[AnyEffect] = []
        if entry.by_user:
            text = f"{entry.model} is not loaded: {why}."
            effects.append(Notice(level=NoticeLevel.ERROR, code="does_not_fit", text=text, about=entry.model))
            self._end_user(entry)
        anywhere = any(not one.here for one in entry.askers.values())
        entry.state = Awaited(problem_here=why, text=entry.state.text if anywhere else "")
        self._wake(self._now + _RANK_AGAIN if anywhere else self._now + self.policy.refused)
        return effects

    def _split_or_refuse(
        self,
        entry: _Entry,
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
            return self._refuse(entry, self._too_big(facts, refused)), False
        chance = splits.chance(facts)
        if entry.by_user or chance.ready:
            entry.state = Awaited(text="it is about to be split over several nodes")
            self._wake(splits.wakes())
            if models.group_model == model:
                return [], False
            return models.load(model, None, self._now) if entry.by_user else splits.begin(model, self._now), False
        leaving, idle = self.residents.leaving(), [one.model for one in residents]
        if leaving and splits.chance(facts, leaving).ready:
            entry.state = Awaited(text=f"it waits until {_listed(leaving)} has answered its last requests")
            return [], True
        best = splits.chance(facts, [*leaving, *idle])
        if best.ready:
            return self._make_room_to_split(entry, facts, residents, before)
        waits_for = chance.waits_for or best.waits_for
        if waits_for or not splits.still(entry.since, entry.members):
            self._wake(splits.wakes())
            entry.state = Awaited(text=f"{_TO_SPLIT}: {waits_for or 'there may be news of the other nodes'}")
            return [], False
        splits.end(model)
        return self._refuse(entry, self._too_big(facts, refused, best.outlook)), False

    def _make_room_to_split(
        self, entry: _Entry, facts: ModelFacts, residents: Sequence[Resident], before: ModelName | None
    ) -> tuple[list[AnyEffect], bool]:
        """Unload what is idle here, so that this node can give enough to a model that is split."""
        splits, leaving = self._splits, self.residents.leaving()
        if before is not None:
            entry.state = Awaited(text=f"it waits, because {before} came first and waits for memory")
            return [], True

        def fits(chosen: Collection[ModelName]) -> bool:
            return splits.chance(facts, [*leaving, *chosen]).ready

        effects, free = self._make_room(entry, facts, residents, fits)
        if free and splits.chance(facts).ready:
            return [*effects, *splits.begin(entry.model, self._now)], False
        return effects, True

    def _split_host(self, entry: _Entry) -> NodeId | None:
        """The node that begins to split a model that fits no node alone: it has the file. None: nobody can."""
        model, me, facts, splits = entry.model, self._config.node, self._known(entry.model), self._splits
        if facts is None:
            return None
        if model in self._models.on_disk and (model, me) not in self._refusals and not self._barred(model, facts):
            idle = [one.model for one in self.residents.candidates(entry.askers.keys())]
            without = [*self.residents.leaving(), *idle]
            best = self.residents.check(facts, without)
            perhaps = isinstance(best, LoadRefused) and splits.can_begin(model, best)
            if perhaps and (splits.chance(facts, without).possible or not splits.still(entry.since, entry.members)):
                return me
        hosts = [
            (offer.memory_bytes if (offer := member.announcement.offer) is not None else 0, place.node)
            for member in self._members
            if (place := place_of(member)) is not None
            and model in place.on_disk
            and splits.may_host(member)
            and (model, place.node) not in self._refusals
            and (place.offer.clients or not self._for_clients(entry))
        ]
        return max(hosts)[1] if hosts and splits.chance_elsewhere(facts).possible else None

    def _wake(self, time: float) -> None:
        self._deadline = time if self._deadline is None else min(self._deadline, time)


_OFF = "it is not loaded on demand here (--on-demand off)"
_TO_SPLIT = "it waits to be split over several nodes"
_NOT_FOR_ALL = "that node loads no models for who asks (--on-demand)"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
