"""A node's decisions: every event goes into `Node.handle`, every effect comes out.

Each part decides about one thing: membership, placement, split, yielding, routing, listing. The node gives each event
to the part that it concerns, then lets all parts evaluate what follows from it, and announces what changed.
"""

from collections.abc import Mapping, Sequence

from msgspec.structs import replace

from mesh_llm.core.announcement_builder import AnnouncementBuilder, AnnouncementThrottle, Parts
from mesh_llm.core.config import NodeConfig
from mesh_llm.core.listing.publisher import ListingPublisher
from mesh_llm.core.member_cache import MemberCache, Peers
from mesh_llm.core.membership.membership import Membership
from mesh_llm.core.placement.controller import PlacementController
from mesh_llm.core.placement.demand import Usage
from mesh_llm.core.placement.launches import Launch
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.placement.on_demand import OnDemand
from mesh_llm.core.placement.yield_controller import YieldController
from mesh_llm.core.routing.circuit_breaker import LaunchId
from mesh_llm.core.routing.ranking import RoutingSnapshot
from mesh_llm.core.routing.table import RoutingTable
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.split.outlook import Outlook
from mesh_llm.core.trust.circle import without_distrusted
from mesh_llm.core.trust.corrections import Correction, describe
from mesh_llm.core.types.announcement import Member, Serving
from mesh_llm.core.types.effects import AnyEffect, Finished, Notice, NoticeLevel, SetRoutes
from mesh_llm.core.types.events import (
    AddressesChanged,
    AdmissionEnded,
    AnswersTimed,
    AnyEvent,
    CapacityChanged,
    ClientsCounted,
    ContextRefused,
    CorrectionsForgotten,
    DropRequested,
    EngineExited,
    EngineReady,
    FetchEnded,
    HostsDistrusted,
    ListingOutcome,
    LoadAnswered,
    LoadRequested,
    MessageReceived,
    ModelAwaited,
    ModelsChanged,
    ModelUnavailable,
    OwnerSensed,
    OwnershipChanged,
    PartRefused,
    PathChanged,
    PeerConnected,
    PeerLost,
    PromptTaken,
    PublishRequested,
    Readmitted,
    RejoinFailed,
    RevocationLearned,
    RoutesLearned,
    RpcChanged,
    ScopeLimited,
    SendFailed,
    SettingsChanged,
    SpeedMeasured,
    SplitFailed,
    SplitScope,
    StandingsKnown,
    Started,
    StopRequested,
    TargetFailed,
    Tick,
    TrafficSampled,
    UserWarned,
)
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Capacity, LaunchOptions, LaunchPlan, ModelFacts, ModelStatus, Role
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.core.types.ports import RandomSource

_REFUSED_AGAIN = 2
"""So often a worker that does not give the memory that it announces is used; then its group does without it."""
_OFTEN_NO_NEWS = (MessageReceived, Tick)
"""Events after which nothing is evaluated unless the members changed or a time has come: most gossip brings no news."""


class Node:
    """One node: only `handle` mutates, `deadline` says when a Tick is due. Same seed and events, same effects."""

    def __init__(self, config: NodeConfig, rng: RandomSource, peers: Peers | None = None) -> None:
        """`peers` replaces an active node's own membership; a passive node has none."""
        self.config = config
        if peers is None and config.role is not Role.CLIENT:
            peers = Membership(config.node, config.mesh, config.incarnation, config.pace, rng)
        self._peers = peers
        self._cache = MemberCache(peers, config)
        self._models = LocalModels(config)
        self._split = SplitController(config, self._models)
        self._usage = Usage(config.timings.demand_time_constant)
        self._placement = PlacementController(config, self._models, self._split, self._usage)
        self._on_demand = OnDemand(config, self._models, self._usage, self._placement.fetch, self._split)
        self._yielding = YieldController(config.yields, self._models, self._split)
        self._routes = RoutingTable(config)
        self._listing = ListingPublisher(config)
        self._announcement = AnnouncementBuilder(
            config,
            Parts(
                self._models, self._usage, self._split, self._placement, self._on_demand, self._yielding, self._listing
            ),
        )
        self._throttle = AnnouncementThrottle(config.timings)
        self._started = False
        self._changed = False
        self._stop_by: float | None = None
        self._drain_until = float("-inf")
        self._finished = False
        self._settled = True
        """Decisions were evaluated since their deadline was computed: nothing else moves it."""
        self._decides_at: float | None = None

    # What happens.

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Take one event at `now` (seconds, never falling) and return what must be done."""
        if self._finished:
            return []
        effects = self._apply(event, now)
        quiet = isinstance(event, _OFTEN_NO_NEWS) and not self._changed
        if quiet and not _due(_earliest(self._cache.deadline(), self._own_deadline()), now):
            return effects
        effects += self._settle(now)
        self._settled = True
        return effects

    def _apply(self, event: AnyEvent, now: float) -> list[AnyEffect]:  # noqa: C901, PLR0911, PLR0912 - flat
        match event:
            case Tick() | MessageReceived() | PeerLost() | SendFailed() | RejoinFailed() | RevocationLearned():
                return self._to_peers(event, now)
            case AdmissionEnded() | Readmitted() | ScopeLimited():
                return self._to_peers(event, now)
            case UserWarned():
                level = NoticeLevel.ERROR if event.serious else NoticeLevel.WARNING
                return [Notice(level=level, code=event.code, text=event.text, about=event.about)]
            case PeerConnected() | PathChanged():
                self._cache.set_round_trip(event.node, event.rtt_ms)
                return self._to_peers(event, now)
            case TargetFailed():
                return self._target_failed(event, now)
            case ContextRefused():
                return self._corrected(self._routes.refused_context(event, self.members, now))
            case PromptTaken():
                self._routes.took_prompt(event, self.members)
                return []
            case CorrectionsForgotten():
                self._routes.forget_corrections(event.node, event.model)
                return []
            case AnswersTimed():
                self._routes.timed(event, self.members, self._models.on_disk, now)
                return []
            case _:
                self._changed = True
        match event:
            case Started():
                return self._begin(event, now)
            case ModelsChanged():
                self._models.know(event.on_disk, event.drafts)
            case AddressesChanged():
                self._announcement.addresses, self._announcement.relay = event.addresses, event.relay
            case EngineReady():
                return self._engine_ready(event, now)
            case EngineExited():
                return self._models.exited(event, now)
            case SpeedMeasured():
                self._models.capacity = replace(self._models.capacity, speed=event.speed, host_speed=event.host_speed)
            case CapacityChanged():
                return self._models.use_devices(event, now)
            case FetchEnded():
                return self._placement.fetched(event, now, stopping=self.stopping or bool(self._yielding.reason))
            case LoadRequested():
                return self._load(event, now)
            case ModelUnavailable():
                return self._models.unavailable(event)
            case DropRequested():
                self._yielding.forget(event.model)
                self._on_demand.forget(event.model)
                return self._models.drop(event, now)
            case ModelAwaited():
                return self._on_demand.awaited(event, now)
            case LoadAnswered():
                self._on_demand.answered(event, now)
                self._routes.grant(event, self.members, now)
            case StopRequested():
                return self._stop(event, now)
            case TrafficSampled():
                self._usage.sample(event, now)
            case OwnerSensed():
                self._yielding.sense(event, now)
            case OwnershipChanged():
                self._announcement.ownership = self._routes.ownership = event.ownership
            case SplitScope():
                self._split.scope, self._split.admitted = event, True
            case SettingsChanged():
                return self._models.use_settings(event, now)
            case RpcChanged():
                return self._models.share(event, now)
            case SplitFailed():
                return self._part_failed(event, now)
            case PartRefused():
                return self._models.part_refused(event)
            case PublishRequested() | ListingOutcome() | ClientsCounted():
                return self._listing.handle(event)
            case HostsDistrusted():
                self._distrust(frozenset(event.hosts))
            case StandingsKnown():
                self._placement.known = event.members
            case RoutesLearned():
                self._on_demand.relay = event.source
                self._routes.learn(event.snapshot)
        return []

    def _distrust(self, hosts: frozenset[tuple[ModelName, NodeId]]) -> None:
        """Choose none of these hosts for these models from now on, whatever is chosen here, and all others again."""
        self._routes.distrust(hosts)
        self._on_demand.distrusted = hosts
        self._placement.fetch.distrusted = hosts
        self._split.distrusted = hosts

    def _begin(self, event: Started, now: float) -> list[AnyEffect]:
        self._started = True
        self._models.capacity = event.capacity
        self._models.know(event.on_disk, event.drafts)
        self._announcement.addresses, self._announcement.relay = event.addresses, event.relay
        if self.stopping or self.config.role is Role.CLIENT or not self._models.wanted:
            return []
        return self._load(LoadRequested(model=self._models.wanted[0]), now)

    def _engine_ready(self, event: EngineReady, now: float) -> list[AnyEffect]:
        launch = self._models.launches.get(event.model)
        since = launch.since if launch is not None else now
        effects = self._models.launches.ready(event, now)
        if launch is not None and effects:
            self._on_demand.residents.times.note(launch.model, launch.order.facts.size_bytes, now - since)
        return effects

    def _load(self, event: LoadRequested, now: float) -> list[AnyEffect]:
        if self.stopping:
            return []
        if self._yielding.reason:
            return self._yielding.hold(event)
        facts = self._models.on_disk.get(event.model)
        if event.options is None and facts is not None and self.makes_room(facts):
            self._on_demand.load(event.model, now)
            return []
        return self._models.load(event.model, event.options, now)

    def _part_failed(self, event: SplitFailed, now: float) -> list[AnyEffect]:
        """A worker failed. One that refused memory is believed once: it announces less itself, unless it lies."""
        if not event.memory_bytes:
            return self._split.failed(event.node, event.model, event.reason, self.members, now)
        made = self._routes.part_failed(event, self.members, now)
        if made is None or made.times < _REFUSED_AGAIN:
            return self._corrected(made)
        failed = self._split.failed(event.node, event.model, event.reason, self.members, now)
        return [*self._corrected(made), *failed]

    def _corrected(self, made: Correction | None) -> list[AnyEffect]:
        """Say that this node counts on less than a host announces."""
        if made is None:
            return []
        name = self.names.get(made.node, made.node[:10])
        text = f"{describe(made, name)}. This node counts on less from now on; no other node learns of it."
        return [Notice(level=NoticeLevel.WARNING, code="host_corrected", text=text, about=made.node)]

    def _target_failed(self, event: TargetFailed, now: float) -> list[AnyEffect]:
        if event.node == self.config.node:
            launch = self._models.launches.get(event.model)
            split = launch.order.plan.split if launch is not None else None
            if split is not None and split.groups > 1:
                # Another engine may take the request: the daemon says when one of them has ended.
                return []
            life = LaunchId(self.config.incarnation, event.term or (launch.term if launch else 0))
            self._routes.block(event.node, event.model, life, now)
            return []
        self._routes.target_failed(event, self.members, now)
        return self._to_peers(event, now)

    def _stop(self, event: StopRequested, now: float) -> list[AnyEffect]:
        self._drain_until = now + event.drain_seconds
        self._stop_by = self._drain_until + self.config.timings.stop_grace
        return [*self._models.launches.stop_all(event.drain_seconds, now), *self._split.stop()]

    def _to_peers(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        return self._peers.handle(event, now) if self._peers is not None else []

    # What follows from it.

    def _settle(self, now: float) -> list[AnyEffect]:
        """Let every part evaluate its decisions, then route, list and announce what changed."""
        retried = self._models.launches.retryable(now)
        effects = self._models.due(now, self._usage.in_flight, paused=bool(self._yielding.reason))
        self._changed |= bool(retried)
        refreshed = self._cache.refresh(now)
        effects += self._decide(now, refreshed=refreshed)
        if effects:
            self._changed = True
        effects += self._reroute(now)
        effects += self._list(now, refreshed=refreshed)
        effects += self._announce(now)
        self._changed = False
        return effects + self._finish(now)

    def _decide(self, now: float, *, refreshed: bool) -> list[AnyEffect]:
        if refreshed:
            self._placement.observe(self.members, now)
            self._routes.observe(self.members, now)
        if self.stopping:
            self._placement.pause()
        effects = [] if self.stopping else self._yielding.evaluate(now)
        effects += self._load_on_demand(now, changed=refreshed or self._changed or bool(effects))
        if not self._started or self.stopping or self._peers is None or self._yielding.reason:
            return effects
        self._changed |= bool(effects)
        effects += self._placement.evaluate(self.members, now, changed=refreshed or self._changed)
        if refreshed or self._changed or _due(self._split.group.deadline(), now):
            effects += self._split.evaluate(self.members, now)
            effects += self._placement.make_room(now)
            self._changed |= self._split.changed
        return effects

    def _load_on_demand(self, now: float, *, changed: bool) -> list[AnyEffect]:
        if not self._started or self.stopping or not (changed or _due(self._on_demand.deadline(), now)):
            return []
        snapshot = self._routes.snapshot
        routes = [snapshot.models[name] for name in self._on_demand.waiting if name in snapshot.models]
        warm = frozenset(one.name for one in routes if without_distrusted(one, snapshot).status is ModelStatus.WARM)
        reason = f"the machine is its owner's: {self._yielding.reason}" if self._yielding.reason else ""
        state = self._on_demand.state
        effects = self._on_demand.evaluate(self.members, warm, now, refusal=reason)
        self._changed |= bool(effects) or state != self._on_demand.state
        return effects

    def _reroute(self, now: float) -> list[AnyEffect]:
        if self._changed:
            self._routes.stale = True
        if not self._routes.due(now):
            return []
        snapshot = self._routes.rebuild(
            own=self.serving,
            addresses={launch.model: launch.address for launch in self._models.launches},
            members=self.members,
            round_trips=self._cache.round_trips,
            on_disk=self._models.on_disk,
            wanted=self._placement.wanted(self.members),
            accepting=not self.stopping,
            now=now,
            awaited=self._on_demand.state,
            resting=bool(self._models.resting),
            workers={
                launch.model: tuple(share.node for share in launch.order.plan.split.workers)
                for launch in self._models.launches
                if launch.order.plan.split is not None
            },
        )
        return [] if snapshot is None else [SetRoutes(snapshot=snapshot)]

    def _announce(self, now: float) -> list[AnyEffect]:
        if self._peers is None or not self._started:
            return []
        if not self._changed and not _due(self._throttle.deadline(), now):
            return []
        announcement = self._throttle.consider(self._announcement.build(self.role, now), now, at_once=self.stopping)
        return [] if announcement is None else self._peers.publish(announcement, now)

    def _list(self, now: float, *, refreshed: bool) -> list[AnyEffect]:
        if self._peers is None or not self._started:
            return []
        if not refreshed and not self._changed and not _due(self._listing.deadline(), now):
            return []
        return self._listing.evaluate(
            self._announcement.build(self.role, now), self.members, now, stopping=self.stopping
        )

    def _finish(self, now: float) -> list[AnyEffect]:
        answering = self._usage.open > 0 and now < self._drain_until
        if self._stop_by is None or ((answering or self._models.launches.running) and now < self._stop_by):
            return []
        self._finished = True
        leaving = self._peers.leave(now) if self._peers is not None else []
        return [*leaving, Finished()]

    def deadline(self) -> float | None:
        """When a Tick is due; None: only an event changes anything. May lie in the past."""
        if self._finished:
            return None
        peers = self._peers.deadline() if self._peers is not None else None
        return _earliest(self._own_deadline(), self._cache.deadline(), peers)

    def _own_deadline(self) -> float | None:
        """When something is to be decided though neither the members nor anything else changes."""
        if self._settled:
            self._settled = False
            self._decides_at = _earliest(
                self._models.launches.deadline(),
                self._routes.deadline(),
                self._throttle.deadline(),
                *(() if self._yielding.reason or self.stopping else self._placement.deadlines()),
                self._split.group.deadline(),
                self._yielding.deadline() if not self.stopping else None,
                self._listing.deadline(),
                self._on_demand.deadline() if not self.stopping else None,
                self._stop_deadline(),
            )
        return self._decides_at

    def _stop_deadline(self) -> float | None:
        if self._stop_by is None:
            return None
        return self._stop_by if self._models.launches.running else self._drain_until

    # State for readers.

    @property
    def snapshot(self) -> RoutingSnapshot:
        """The present routes."""
        return self._routes.snapshot

    @property
    def members(self) -> Sequence[Member]:
        """The other nodes that are not dead, as decisions see them."""
        return self._cache.members

    @property
    def names(self) -> Mapping[NodeId, str]:
        """What people call this node and the members, in every list and message."""
        return self._cache.names

    @property
    def synced(self) -> bool:
        """Whether another node has sent what the mesh has. Before that, the mesh may have more than is known here."""
        return self._peers.synced if self._peers is not None else self._routes.learned

    @property
    def launches(self) -> tuple[Launch, ...]:
        """The models launched here. Read only."""
        return tuple(self._models.launches)

    @property
    def serving(self) -> tuple[Serving, ...]:
        """The models here, as announced."""
        return self._announcement.serving()

    @property
    def speeds(self) -> Mapping[str, float]:
        """Tokens per second of one request at the models here, by name. Announced rounded to one digit."""
        return self._usage.speeds

    @property
    def waiting(self) -> Mapping[ModelName, int]:
        """How many requests wait here for models to be loaded."""
        return self._on_demand.waiting

    def is_pinned(self, model: ModelName) -> bool:
        """Whether a model is never unloaded here unasked."""
        return self._on_demand.residents.is_pinned(model)

    def room_for(self, facts: ModelFacts, *, pinned: bool = False) -> tuple[ModelName, ...]:
        """The models that must be unloaded here for one that does not fit beside them; empty if that does not help.

        `pinned`: also those that only a user unloads.
        """
        return self._on_demand.residents.room_for(facts, pinned=pinned)

    def makes_room(self, facts: ModelFacts) -> bool:
        """Whether models are unloaded for one that a user wants and that does not fit beside them."""
        return self._on_demand.policy.scope != "off" and bool(self._on_demand.residents.room_for(facts))

    def unload_at(self, launch: Launch) -> float | None:
        """When a model is unloaded here if no request comes; None: not at all."""
        return self._on_demand.residents.unload_at(launch)

    @property
    def can_split(self) -> bool:
        """Whether this node can share models, or will once its engine's plugin is built."""
        return self._models.shareable

    @property
    def split(self) -> SplitController:
        """Its part in a split model. Read only."""
        return self._split

    def options_for(self, model: ModelName) -> LaunchOptions:
        """What a launch of a model is made with, unless a user says otherwise for that launch."""
        return self._models.options_for(model)

    def settings_of(self, model: ModelName) -> ModelSettings:
        """What the user set for one model."""
        return self._models.settings_of(model)

    @property
    def listing(self) -> ListingPublisher:
        """Its part in listing the mesh. Read only."""
        return self._listing

    @property
    def capacity(self) -> Capacity:
        """What this node offers."""
        return self._models.capacity

    @property
    def free_bytes(self) -> int:
        """Memory that a further model could take."""
        return self._models.free_bytes

    @property
    def free_host_bytes(self) -> int:
        """Main memory that a further model could take beside a GPU's."""
        return self._models.free_host_bytes

    @property
    def on_disk(self) -> Mapping[ModelName, ModelFacts]:
        """The models that this node could load."""
        return self._models.on_disk

    @property
    def role(self) -> Role:
        """What this node does at present."""
        if self.config.role is Role.CLIENT:
            return Role.CLIENT
        idle = self._models.launches.idle and not self._split.busy
        return Role.STANDBY if self._started and idle else Role.SERVE

    @property
    def waiting_reason(self) -> str:
        """Why a node that would serve serves nothing; else empty."""
        return self._yielding.reason or self._placement.waiting_reason

    @property
    def yield_reason(self) -> str:
        """Why the node yields to the machine's owner and serves nothing; else empty."""
        return self._yielding.reason

    @property
    def stopping(self) -> bool:
        """Whether the node is stopping."""
        return self._stop_by is not None

    @property
    def finished(self) -> bool:
        """Whether everything has stopped."""
        return self._finished

    def split_prospect(self, facts: ModelFacts) -> Outlook | None:
        """What would keep a model, whose file is here, from being shared with other nodes; None: nothing."""
        return self._split.prospect(facts, self.members)

    def check_load(
        self, model: ModelName, options: LaunchOptions | None = None, facts: ModelFacts | None = None
    ) -> LaunchPlan | LoadRefused:
        """What a LoadRequested would do now, without doing it. `facts`: of a model that the node does not know yet."""
        order = self._models.check(model, options, facts=facts)
        return order if isinstance(order, LoadRefused) else order.plan


def _earliest(*times: float | None) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _due(deadline: float | None, now: float) -> bool:
    return deadline is not None and deadline <= now
