"""What is loaded on this node, as those see it who want another model loaded.

It says what may be unloaded to make room, what is unloaded because nobody asks for it, and what this node can offer to
a model that somebody in the mesh asks for.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet

from mesh_llm.core.config import NodeConfig, OnDemandPolicy
from mesh_llm.core.placement.demand import Usage
from mesh_llm.core.placement.fit import context_bounds
from mesh_llm.core.placement.launches import Launch, LaunchOrder, Origin
from mesh_llm.core.placement.load_hosts import Place, speed_of
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.placement.offload import USEFUL_CONTEXT
from mesh_llm.core.placement.room import Contention, Resident, make_room
from mesh_llm.core.types.announcement import LoadOffer, Member
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus

DRAIN = 3600.0
"""Seconds for the requests at a model that is unloaded: none is cut."""
_LOAD_BYTES_PER_SECOND = 5e8
_START_SECONDS = 1.0
_MOST_TIMES = 256


class LoadTimes:
    """How long models take to load here: measured, or estimated from the others' sizes."""

    def __init__(self) -> None:
        self._seconds: dict[ModelName, float] = {}
        self._rate = _LOAD_BYTES_PER_SECOND

    def note(self, model: ModelName, size_bytes: int, seconds: float) -> None:
        """A load took so long."""
        self._seconds.pop(model, None)
        self._seconds[model] = seconds
        if len(self._seconds) > _MOST_TIMES:
            del self._seconds[next(iter(self._seconds))]
        if seconds > _START_SECONDS:
            self._rate = size_bytes / seconds

    def expected(self, model: ModelName, size_bytes: int) -> float:
        """Seconds of the next load."""
        known = self._seconds.get(model)
        return _START_SECONDS + size_bytes / max(1.0, self._rate) if known is None else known


class Residents:
    """The loaded models of this node, as those see them who want another one loaded.

    Attributes:
        times: how long loads take here.
        contention: whether models come back soon after they were unloaded here.
    """

    def __init__(self, config: NodeConfig, models: LocalModels, usage: Usage) -> None:
        self._config = config
        self._models = models
        self._usage = usage
        self._members: Sequence[Member] = ()
        self._awaited: Collection[ModelName] = ()
        self._now = 0.0
        self.times = LoadTimes()
        self.contention = Contention(config.on_demand)

    @property
    def policy(self) -> OnDemandPolicy:
        """The node's rules."""
        return self._config.on_demand

    def observe(self, members: Sequence[Member], awaited: Collection[ModelName], now: float) -> None:
        """Take what else counts: the other nodes, the models for which requests wait, and the time."""
        self._members, self._awaited, self._now = members, awaited, now

    def is_pinned(self, model: ModelName) -> bool:
        """Whether a model is never unloaded unasked: by `--pin`, or by its own settings."""
        folded = model.casefold()
        by_name = any(name.casefold() == folded for name in self.policy.pinned)
        return by_name or self._models.settings_of(model).pin

    def load_seconds(self, launch: Launch) -> float:
        """How long a model's load takes here."""
        return self.times.expected(launch.model, launch.order.facts.size_bytes)

    # What makes room.

    def room_for(self, facts: ModelFacts, *, pinned: bool = False) -> tuple[ModelName, ...]:
        """What would be unloaded for a model that does not fit beside it, now or later.

        Empty: it fits, or does not fit even then. `pinned`: also what is not unloaded unasked.
        """
        leaving = self.leaving()
        if self._models.launches.get(facts.name) is not None or not isinstance(self.check(facts, leaving), LoadRefused):
            return ()
        residents = list(self.candidates((), pinned=pinned))
        best = self.check(facts, [*leaving, *(one.model for one in residents)])
        if isinstance(best, LoadRefused):
            return ()
        room = make_room(
            residents,
            lambda chosen: self.good(self.check(facts, [*leaving, *chosen]), best),
            self.policy,
            self._now,
            self.contention.turns(self._now),
        )
        return room.models if room is not None else ()

    def check(self, facts: ModelFacts, without: Sequence[ModelName]) -> LaunchOrder | LoadRefused:
        """A launch of a model here, as if others were not."""
        return self._models.check(facts.name, None, facts=facts, without=without)

    def good(self, order: LaunchOrder | LoadRefused, best: LaunchOrder) -> bool:
        """Whether a launch is as good as can be had: not squeezed into little memory where idle models could go."""
        if isinstance(order, LoadRefused):
            return False
        useful = min(USEFUL_CONTEXT, context_bounds(order.facts, order.options)[1])
        if order.plan.context < min(useful, best.plan.context):
            return False
        layers = order.facts.layers
        divided, unavoidable = (
            one.plan.offload is not None and one.plan.offload.divided(layers) for one in (order, best)
        )
        return unavoidable or not divided

    def leaving(self) -> tuple[ModelName, ...]:
        """What is being unloaded, and not loaded again."""
        return tuple(
            launch.model
            for launch in self._models.launches
            if launch.status is ModelStatus.STOPPING and launch.next_order is None
        )

    def candidates(self, askers: Collection[NodeId], *, pinned: bool = False) -> Iterable[Resident]:
        """What may be unloaded for a model that these nodes ask for, now or later."""
        usage = self._usage
        for launch in self._models.launches:
            if not self.movable(launch, pinned=pinned):
                continue
            loading = launch.status is ModelStatus.LOADING
            seconds = self.load_seconds(launch)
            since = max(self._now, launch.since + seconds) if loading else launch.since
            yield Resident(
                model=launch.model,
                since=since,
                last_used=usage.last_used(launch.model, since),
                busy=loading or launch.model in self._awaited or bool(usage.in_flight.get(launch.model)),
                load_seconds=seconds,
                min_lifetime=self._models.settings_of(launch.model).min_lifetime,
                needed=self._needed(launch.model, askers),
            )

    def movable(self, launch: Launch, *, pinned: bool = False) -> bool:
        """Whether a model may ever be unloaded to make room; `pinned`: by a user also what is pinned.

        A split model only where requests at this node began to split it. Else other nodes would form its group again.
        """
        if self.is_pinned(launch.model) and not pinned:
            return False
        began_here = self._models.group_model == launch.model and launch.order.origin is Origin.DEMAND
        if launch.order.plan.split is not None and not began_here:
            return False
        return launch.status in {ModelStatus.WARM, ModelStatus.LOADING}

    def _needed(self, model: ModelName, askers: Collection[NodeId]) -> bool:
        """Whether this is a model's last host, and others ask for it than those who wait for the new one."""
        asking = {self._config.node} if self._usage.demand.rates(self._now).get(model) else set[NodeId]()
        for member in self._members:
            if any(one.model == model and one.status is ModelStatus.WARM for one in member.announcement.serving):
                return False
            if member.announcement.demand.get(model):
                asking.add(member.announcement.node)
        return not asking <= frozenset(askers)

    # What nobody asks for.

    def unload_at(self, launch: Launch) -> float | None:
        """When a warm model is unloaded if no request comes; None: not at all."""
        ttl = self._ttl(launch)
        if not ttl or launch.status is not ModelStatus.WARM:
            return None
        return max(launch.since, self._usage.last_used(launch.model, launch.since)) + ttl

    def unload_idle(self) -> tuple[list[AnyEffect], float | None]:
        """Unload what nobody asked for. Also returns when the next model may be due."""
        next_due: float | None = None
        effects: list[AnyEffect] = []
        for launch in list(self._models.launches):
            due = self.unload_at(launch)
            if due is None or self._usage.in_flight.get(launch.model):
                continue
            if due > self._now:
                next_due = due if next_due is None else min(next_due, due)
                continue
            why = f"nobody asked for it for {_span(self._ttl(launch))}"
            text = f"Unloading {launch.model}: {why}."
            effects.append(Notice(level=NoticeLevel.INFO, code="model_unloaded", text=text, about=launch.model))
            effects += self._models.rest(launch.model, DRAIN, self._now, why)
        return effects, next_due

    def _ttl(self, launch: Launch) -> float:
        """Seconds without a request after which a model is unloaded; 0.0: never."""
        own, policy = self._models.settings_of(launch.model).ttl, self.policy
        if not self.movable(launch):
            return 0.0
        if own is not None:
            return own
        if launch.order.origin is Origin.MESH:
            return 0.0
        if policy.ttl is not None:
            return policy.ttl
        return policy.idle if launch.order.origin is Origin.DEMAND else 0.0

    # What it offers.

    def offer(self) -> LoadOffer:
        """What this node could give to further models."""
        models = self._models
        leaving = self.leaving()
        spare = [launch for launch in models.launches if self.movable(launch) or launch.model in leaving]
        free, free_host = models.free_bytes, models.free_host_bytes
        return LoadOffer(
            clients=self.policy.scope == "clients",
            free_bytes=free,
            room_bytes=free + sum(one.reserved_bytes for one in spare),
            free_host_bytes=free_host,
            room_host_bytes=free_host + sum(one.reserved_host_bytes for one in spare),
            fetches=self._config.can_fetch,
            hub=self.policy.hub,
        )

    def place(self) -> Place:
        """This node as a place for a further model."""
        idle = [
            launch
            for launch in self._models.launches
            if self.movable(launch) and not self._usage.in_flight.get(launch.model)
        ]
        offer, capacity = self.offer(), self._models.capacity
        # As the other nodes estimate it, so that all choose alike.
        idle_bytes = sum(one.order.facts.size_bytes for one in idle if one.status is ModelStatus.WARM)
        return Place(
            node=self._config.node,
            offer=offer,
            idle_bytes=min(offer.room_bytes, offer.free_bytes + idle_bytes),
            on_disk=self._models.on_disk.keys(),
            speed=speed_of(capacity),
            cards=max(1, len(capacity.devices)),
            residents={
                one.model: one.order.facts.size_bytes for one in self._models.launches if one.status is ModelStatus.WARM
            },
        )

    def demand(self, models: AbstractSet[ModelName]) -> Mapping[ModelName, float]:
        """Requests a minute for each of these models, over the whole mesh."""
        own = self._usage.demand.rates(self._now)
        total = {model: own.get(model, 0.0) for model in models}
        for member in self._members:
            announced = member.announcement.demand
            for model in models & announced.keys():
                total[model] += announced[model]
        return total


def _span(seconds: float) -> str:
    return f"{seconds / 60:g} min" if seconds >= 60 else f"{seconds:g} s"
