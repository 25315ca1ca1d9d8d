"""Models on demand: a request waits for a model, one node loads it, and what is idle is unloaded for it.

The node where requests wait chooses the node that loads (`load_hosts`), and asks it as long as they wait. That node
checks for itself, makes room (`residents`, `room`), and loads (`local_loads`). All nodes choose alike, so that a model
that is asked for at several nodes is loaded once. What nobody asks for any more is unloaded after a while.
"""

from collections.abc import Mapping, Sequence

from mesh_llm.core.config import NodeConfig, OnDemandPolicy
from mesh_llm.core.placement.controller import ModelFetch, offered_models
from mesh_llm.core.placement.demand import Usage
from mesh_llm.core.placement.load_hosts import place_of, rank_places
from mesh_llm.core.placement.load_view import NOBODY, RANK_AGAIN, TO_SPLIT, AwaitedModel, LoadView
from mesh_llm.core.placement.local_loads import LocalLoads
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.placement.offload import Pools
from mesh_llm.core.routing.ranking import Awaited
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.types.announcement import LoadOffer, Member, may_load
from mesh_llm.core.types.effects import AnyEffect, AskForLoad, EndAsk
from mesh_llm.core.types.errors import listed
from mesh_llm.core.types.events import LoadAnswered, ModelAwaited
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus, Role

_GRACE = 3.0
"""Seconds for which a node is looked for though none seems to have the memory, and for which a host that failed a
request and is alive is waited for: it gets requests again after `Timings.target_block`."""
_RETURNS = 10.0
"""Seconds for which a model of the mesh that requests do not load is waited for: until its loss has been noticed, and
its host, or the next one, says that it loads it."""
_LOOK_ELSEWHERE = 5.0
"""Seconds after which another node is looked for while a model waits for memory here."""
_PATIENCE = 12.0
"""Seconds after which another node is looked for while the one that was asked does not begin to load."""
_MOST_AWAITED = 256
"""Models for which requests of other nodes are noted. Those of this node's own clients the API bounds."""
_MOST_OF_ASKER = 64
"""Models for which one other node's requests are noted: a node that asks for many must not keep others out."""


class OnDemand:
    """Loads and unloads models by demand. Methods that return effects change launches and fetches."""

    def __init__(
        self, config: NodeConfig, models: LocalModels, usage: Usage, fetch: ModelFetch, split: SplitController
    ) -> None:
        self._config = config
        self._models = models
        self._usage = usage
        self._entries: dict[ModelName, AwaitedModel] = {}
        self._view = LoadView(config, models, usage, split)
        self._here = LocalLoads(self._view, fetch)
        self._splits = self._view.splits
        self.residents = self._view.residents
        """What is loaded here, and what becomes of it."""
        self.relay: NodeId | None = None
        """The node whose routes this passive node follows: it asks the mesh."""
        self.distrusted: frozenset[tuple[ModelName, NodeId]] = frozenset()
        """Models on hosts that this node does not ask to load them."""

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
                entry = self._entries[event.model] = AwaitedModel(event.model, now)
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

    def _notes(self, event: ModelAwaited, entry: AwaitedModel | None) -> bool:
        """Whether another node's requests for a model are noted, or there are too many."""
        if entry is not None and event.asker in entry.askers:
            return True
        asked = sum(event.asker in one.askers for one in self._entries.values())
        return asked < _MOST_OF_ASKER and (entry is not None or len(self._entries) < _MOST_AWAITED)

    def load(self, model: ModelName, now: float) -> None:
        """This node's user asks for a model for which room must be made: it is loaded as if a request asked for it."""
        self._models.refused.pop(model, None)
        self._models.dropped.discard(model)
        self._entries.setdefault(model, AwaitedModel(model, now)).by_user = True

    def forget(self, model: ModelName) -> None:
        """This node's user does not want a model any more. Requests that wait for it stay."""
        entry = self._entries.get(model)
        if entry is not None:
            self._end_user(entry)

    def _end_user(self, entry: AwaitedModel) -> None:
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
            self._view.note_refusal(event.model, event.node, event.problem, now, event.retry_after)

    def deadline(self) -> float | None:
        """When to evaluate again though nothing happened."""
        return self._view.deadline

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
        self._view.observe(members, self._entries.keys(), now, refusal)
        effects: list[AnyEffect] = []
        before: ModelName | None = None
        for entry in sorted(self._entries.values(), key=lambda one: (one.since, one.model)):
            if entry.model in warm and not entry.here:
                entry.state = Awaited(text="it answers")
                effects += self._end_ask(entry)
                continue
            waits = False
            if self._here.is_here(entry):
                effects += self._end_ask(entry)
                self._end_user(entry)
            elif self._config.role is Role.CLIENT:
                if entry.here:
                    entry.state = Awaited(problem_here=_PASSIVE)
                else:
                    effects += self._ask(entry, self.relay)
            elif not entry.by_user and not any(
                may_load(self.policy.scope, one.standing) for one in entry.askers.values()
            ):
                strangers = all(one.standing == "stranger" for one in entry.askers.values())
                fewer = _NOT_FOR_STRANGERS if strangers else "models are loaded on demand for fewer nodes than this one"
                why = fewer if self.policy.scope != "off" else _OFF
                text = "" if entry.here else self._comes_anyway(entry)
                entry.state = Awaited(text=text, problem="" if text else why, problem_here=why)
            elif entry.here:
                more, waits = self._here.load(entry, before)
                effects += more
            else:
                more, waits = self._place(entry, before)
                effects += more
            if not (entry.askers or entry.by_user):
                # It was refused.
                self._entries.pop(entry.model, None)
            before = entry.model if waits and before is None else before
        if not refusal:
            unloaded, due = self.residents.unload_idle()
            effects += unloaded
            if due is not None:
                self._view.wake(due)
        return effects

    def _is_soon_back(self, entry: AwaitedModel) -> bool:
        """Whether another node serves the model, and gets requests in a moment."""
        if self._view.now < entry.answered_at + RANK_AGAIN:
            # The routes say so in a moment.
            self._view.wake(entry.answered_at + RANK_AGAIN)
            return True
        if self._view.now < entry.since + _GRACE and any(
            self._serves(member, entry.model) for member in self._trusted(entry)
        ):
            # A second copy may have to be fetched, and would answer from then on.
            self._view.wake(entry.since + _GRACE)
            entry.state = Awaited(text="its host failed a request, and is asked again in a moment")
            return True
        return False

    def _comes_anyway(self, entry: AwaitedModel) -> str:
        """What to wait for where these requests load nothing; empty: nobody is about to serve the model."""
        for member in self._trusted(entry):
            if self._loading(member, entry.model):
                return f"it is loading on {member.label}"
        if self._is_soon_back(entry):
            return entry.state.text
        lists = [self._models.wanted, *(member.announcement.wanted for member in self._view.members)]
        if (
            self._view.now < entry.since + _RETURNS
            and entry.model not in self._models.dropped
            and any(entry.model in wanted for wanted in lists)
        ):
            self._view.wake(entry.since + _RETURNS)
            return "its host is gone or starts again, and is waited for"
        return ""

    def _place(self, entry: AwaitedModel, before: ModelName | None) -> tuple[list[AnyEffect], bool]:
        """Choose the node that loads a model, and let it."""
        me = self._config.node
        if self._is_soon_back(entry):
            return [], False
        if entry.asked == me:
            if self._view.now < entry.ranked_at + _LOOK_ELSEWHERE:
                return self._here.load(entry, before)
            entry.asked = None
        elif entry.asked is not None:
            member, trusted = self._view.member(entry.asked), (entry.model, entry.asked) not in self.distrusted
            if member is not None and not member.suspect and trusted:
                self._watch(entry, member)
                return self._look_elsewhere(entry, member), False
            if trusted:
                self._view.note_refusal(entry.model, entry.asked, "it does not answer", self._view.now)
        effects = self._end_ask(entry)
        for member in self._trusted(entry):
            if (
                self._loading(member, entry.model)
                and (entry.model, member.announcement.node) not in self._view.refusals
            ):
                return [*effects, *self._ask(entry, member.announcement.node)], False
        if self._view.now < entry.ranked_at + RANK_AGAIN and entry.state.problem:
            self._view.wake(entry.ranked_at + RANK_AGAIN)
            return effects, False
        entry.ranked_at = self._view.now
        chosen = next(iter(self._ranked(entry)), None) or self._split_host(entry)
        if chosen is None:
            self._find_none(entry)
            return effects, False
        if chosen == me:
            entry.asked = me
            more, waits = self._here.load(entry, before)
            return [*effects, *more], waits
        return [*effects, *self._ask(entry, chosen)], False

    def _find_none(self, entry: AwaitedModel) -> None:
        """No node is found: wait for what is not known yet, or say why none loads the model."""
        facts, why = self._view.known(entry.model), self._why_not(entry)
        waits_for = ""
        if why.startswith(NOBODY) and facts is not None:
            chance = self._splits.chance_elsewhere(facts)
            if chance.waits_for:
                waits_for = f"{TO_SPLIT}: {chance.waits_for}"
            elif not self._splits.still(entry.since, entry.members):
                # What is known of the other nodes may be late.
                waits_for = "a node is looked for"
            elif chance.outlook is not None and self._view.fits_nowhere_alone(entry.model):
                why = f"it fits no node alone. Split over several nodes, {self._splits.short(chance.outlook)}"
        if waits_for:
            self._view.wake(self._view.now + RANK_AGAIN)
            entry.state = Awaited(text=waits_for, problem_here=entry.state.problem_here)
        else:
            entry.state = Awaited(problem=why, problem_here=entry.state.problem_here)

    def _look_elsewhere(self, entry: AwaitedModel, member: Member) -> list[AnyEffect]:
        """Ask another node, where the one that was asked does not load for long and another has room now."""
        if self._loading(member, entry.model):
            return []
        due = max(entry.asked_at + _PATIENCE, entry.ranked_at + _LOOK_ELSEWHERE)
        if self._view.now < due:
            self._view.wake(due)
            return []
        entry.ranked_at = self._view.now
        self._view.wake(self._view.now + _LOOK_ELSEWHERE)
        chosen = next(iter(self._ranked(entry)), None)
        if chosen is None or chosen in {entry.asked, self._config.node} or not self._has_room(chosen, entry.model):
            # At another full node it would wait again, and lose its place in the first one's turns.
            return []
        return self._ask(entry, chosen)

    def _has_room(self, node: NodeId, model: ModelName) -> bool:
        """Whether a model fits on another node beside all that is loaded there."""
        facts = self._view.known(model)
        member = self._view.member(node)
        place = place_of(member) if member is not None else None
        if facts is None or place is None:
            return False
        free = Pools(device=place.offer.free_bytes, host=place.offer.free_host_bytes, cards=place.cards)
        return self._view.fits(facts, free)

    def _ranked(self, entry: AwaitedModel) -> Sequence[NodeId]:
        facts = self._view.known(entry.model)
        if facts is None:
            return ()
        for_clients = self._for_clients(entry)
        places = [
            place
            for member in self._trusted(entry)
            if (place := place_of(member)) is not None
            and (entry.model, place.node) not in self._view.refusals
            and (place.offer.clients or not for_clients)
        ]
        me = self._config.node
        if (
            not self._view.refusal
            and entry.model not in self._models.excluded
            and (entry.model, me) not in self._view.refusals
        ):
            places.append(self.residents.place())
        shared = entry.model in offered_models(self._trusted(entry))
        return rank_places(facts, places, shared=shared, fits=self._view.fits, demand=self.residents.demand)

    def _trusted(self, entry: AwaitedModel) -> Sequence[Member]:
        """The other nodes without those that this node distrusts for a model."""
        if not self.distrusted:
            return self._view.members
        return [one for one in self._view.members if (entry.model, one.announcement.node) not in self.distrusted]

    def _why_not(self, entry: AwaitedModel) -> str:
        """Why no node loads a model: this one's reason if it has the file, else another's."""
        model, models = entry.model, self._models
        if model in models.on_disk:
            facts = models.on_disk[model]
            barred = self._view.barred(model, facts)
            movable = [launch.model for launch in models.launches if self.residents.movable(launch)]
            best = self.residents.check(facts, [*self.residents.leaving(), *movable])
            if barred:
                return barred
            if isinstance(best, LoadRefused):
                return self._view.refusals.why(model, self._config.node) or self._view.too_big(facts, best)
        reasons = self._view.refusals.of(model)
        if not reasons:
            doubted = [one.label for one in self._view.members if (model, one.announcement.node) in self.distrusted]
            return NOBODY + (_DOUBTED.format(listed(doubted)) if doubted else "")
        node, why = reasons[0]
        member = self._view.member(node)
        who = member.label if member is not None else node[:10]
        return why if node == self._config.node else f"{who} does not load it: {why}"

    # Another node loads.

    def _ask(self, entry: AwaitedModel, node: NodeId | None) -> list[AnyEffect]:
        if node is None:
            entry.state = Awaited(problem="no node of the mesh answers at the moment")
            return []
        if entry.asked == node:
            return []
        if (entry.model, node) in self._view.refusals:
            entry.state = Awaited(problem=self._view.refusals.why(entry.model, node))
            return []
        effects = self._end_ask(entry)
        entry.asked, entry.asked_at = node, self._view.now
        member = self._view.member(node)
        if member is not None:
            self._watch(entry, member)
        else:
            entry.state = Awaited(text="the mesh was asked to load it")
        return [*effects, AskForLoad(node=node, model=entry.model, for_clients=self._for_clients(entry))]

    def _watch(self, entry: AwaitedModel, member: Member) -> None:
        """Say how far another node is."""
        seconds = max(
            (one.load_seconds for one in member.announcement.serving if one.model == entry.model), default=0.0
        )
        loading = self._loading(member, entry.model)
        facts = self._view.known(entry.model)
        seconds = seconds or self.residents.times.expected(entry.model, facts.size_bytes if facts is not None else 0)
        text = f"it is loading on {member.label}" if loading else f"{member.label} was asked to load it"
        place = place_of(member)
        if not loading and facts is not None and place is not None and not self._view.fits(facts, place.room):
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

    def _end_ask(self, entry: AwaitedModel) -> list[AnyEffect]:
        asked, entry.asked = entry.asked, None
        if asked is None or asked == self._config.node:
            return []
        return [EndAsk(node=asked, model=entry.model)]

    def _for_clients(self, entry: AwaitedModel) -> bool:
        return all(one.standing == "client" for one in entry.askers.values())

    def _split_host(self, entry: AwaitedModel) -> NodeId | None:
        """The node that begins to split a model that fits no node alone: it has the file. None: nobody can."""
        model, me, facts, splits = entry.model, self._config.node, self._view.known(entry.model), self._splits
        if facts is None:
            return None
        if (
            model in self._models.on_disk
            and (model, me) not in self._view.refusals
            and not self._view.barred(model, facts)
        ):
            idle = [one.model for one in self.residents.candidates(entry.askers.keys())]
            without = [*self.residents.leaving(), *idle]
            best = self.residents.check(facts, without)
            perhaps = isinstance(best, LoadRefused) and splits.can_begin(model, best)
            if perhaps and (splits.chance(facts, without).possible or not splits.still(entry.since, entry.members)):
                return me
        hosts = [
            (offer.memory_bytes if (offer := member.announcement.offer) is not None else 0, place.node)
            for member in self._trusted(entry)
            if (place := place_of(member)) is not None
            and model in place.on_disk
            and splits.may_host(member)
            and (model, place.node) not in self._view.refusals
            and (place.offer.clients or not self._for_clients(entry))
        ]
        return max(hosts)[1] if hosts and splits.chance_elsewhere(facts).possible else None


_PASSIVE = "this node loads no models, because it is a client"
_DOUBTED = "; {} is not asked, because its answers were not those of that model (mesh-llm trust list)"
_NOT_FOR_STRANGERS = "no models are loaded or fetched for nodes that came by a public listing (--on-demand)"
_OFF = "it is not loaded on demand here (--on-demand off)"
_NOT_FOR_ALL = "that node loads no models for who asks (--on-demand)"
