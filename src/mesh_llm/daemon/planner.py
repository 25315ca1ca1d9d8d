"""Answers `mesh-llm plan`, and says of running models how fast they were expected to be.

What a daemon needs to say how fast things will be: this machine's speed, the ways to others, and the planner.
"""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack

import structlog

from mesh_llm.core.node import Node
from mesh_llm.core.performance.plan import PlanAnswer, PlanAsk, Planned, make_plan
from mesh_llm.core.performance.prediction import Link, SplitSeconds, per_second, solo_seconds, split_seconds
from mesh_llm.core.placement.fit import launch_memory
from mesh_llm.core.placement.launches import Launch
from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.core.types.ids import ModelName, NodeId, Term
from mesh_llm.core.types.model import LaunchOptions, ModelFacts, ModelStatus, Role, Speed, SplitLayout
from mesh_llm.daemon.model_fetcher import published_facts
from mesh_llm.daemon.model_registry import Machine, Shelf
from mesh_llm.daemon.performance import LinkMeter, Measured, SpeedMeter
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.models.library.library import LocalModel
from mesh_llm.models.library.resolve import looks_like_path
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.streams import Facts

_LEAST_ONE_WAY = 0.0002
_MOST_MEASURED = 16
_RETRY_SECONDS = 20.0

_log = structlog.get_logger(__name__)


class Planner:
    """Measures at the edges, and lets the core think."""

    def __init__(
        self,
        node: Node,
        shelf: Shelf,
        speeds: SpeedMeter,
        meter: LinkMeter,
        may_share: Callable[[NodeId], bool],
        changed: Callable[[], None],
    ) -> None:
        """`may_share`: whether another node's admission lets it share models; `changed`: a forecast is there now."""
        self._node = node
        self._shelf = shelf
        self._speeds = speeds
        self._meter = meter
        self._may_share = may_share
        self._changed = changed
        self._forecasts: dict[tuple[str, SplitLayout], SplitSeconds | None] = {}
        self._split_lag = 1.0
        self._alone: dict[tuple[ModelName, Term], float | None] = {}
        self._tried_at = 0.0
        self._scope = TaskScope("planner")

    async def close(self) -> None:
        """Stop measuring."""
        await self._scope.close()

    async def plan(self, model: str, context: int | None) -> PlanAnswer:
        """What would become of a model here and now. Satisfies core.console_ports.Planner."""
        node = self._node
        facts, here, fetch = await self._model(model)
        others = [member for member in node.members if member.announcement.role is not Role.CLIENT]
        speed = await self._speeds.speed()
        heard = await self._hear(others)
        learned = self._speeds.experience
        pace = None if learned is None else learned.pace(self._speeds.now, facts)
        me = Planned(
            node=node.config.node,
            name=node.config.name,
            memory_bytes=_own_memory(node, facts),
            rpc_version=node.capacity.rpc_version,
            has_file=here,
            gives=node.config.shares,
            speed=speed,
            alone=None if learned is None or pace is None else learned.speed.slowed(pace.factor),
            basis="" if pace is None else pace.basis,
            note="" if speed is not None else "its speed cannot be measured",
        )
        nodes = [me, *(self._planned(facts, member, heard.get(member.announcement.node)) for member in others)]
        options = LaunchOptions(
            context=context or node.config.options.context,
            slots=node.config.options.slots,
            cache_type=node.config.options.cache_type,
        )
        split = node.config.split
        ask = PlanAsk(
            facts=facts,
            options=options,
            shares=split.shares,
            asked=split.asked,
            max_rtt_ms=split.max_rtt_ms,
            split_lag=1.0 if learned is None else learned.split_lag,
            fetch=fetch,
        )
        return make_plan(ask, nodes, self._links(heard))

    async def _model(self, spec: str) -> tuple[ModelFacts, bool, str]:
        """What is asked for, whether its file is here, and where nobody has it what `mesh-llm download` calls it.

        Looked for on this machine, in the mesh, in the catalogue, and on the hub, in this order.

        Raises:
            MeshError: see models.want and models.hub.
        """
        try:
            found = await asyncio.to_thread(self._shelf.interpret, spec)
        except MeshError as error:
            if error.code != "model_not_found" or looks_like_path(spec):
                raise
            facts = self._among_members(spec)
            if facts is None:
                raise
            return facts, False, ""
        if isinstance(found, LocalModel):
            return found.facts, True, ""
        facts = await published_facts(found)
        elsewhere = self._among_members(facts.name)
        if elsewhere is not None:
            return elsewhere, False, ""
        return facts, False, found.entry.name if found.entry is not None else str(found.ref)

    def _among_members(self, name: str) -> ModelFacts | None:
        """A model that other nodes have on their disks, by name or by a unique beginning of it."""
        there = {facts.name: facts for member in self._node.members for facts in member.announcement.on_disk}
        found = match(name, dict.fromkeys(there, ()))
        return None if isinstance(found, (NotFound, Ambiguous)) else there[found]

    def solo_speed(self, launch: Launch) -> float | None:
        """Tokens per second of a model that this node serves alone, as foreseen before its first answer."""
        key = (launch.model, launch.term)
        learned, facts = self._speeds.experience, launch.order.facts
        if key in self._alone or learned is None:
            return self._alone.get(key)
        pace = learned.pace(self._speeds.now, besides=facts)
        return per_second(solo_seconds(facts, learned.speed.slowed(pace.factor)))

    def split_speed(self, facts: ModelFacts, layout: SplitLayout) -> float | None:
        """The same of a model that this node hosts; measured in the background the first time, and None until then."""
        key = (facts.name, layout)
        now = time.monotonic()
        if self._forecasts.get(key) is None and (key not in self._forecasts or now > self._tried_at + _RETRY_SECONDS):
            self._forecasts = {key: None}
            self._tried_at = now
            self._scope.spawn(self._foresee(facts, layout), "forecast")
        forecast = self._forecasts[key]
        return None if forecast is None else per_second(forecast.total(self._split_lag))

    def came(self, launch: Launch, seconds: float) -> None:
        """A token of a model that this node serves, or hosts, took so long: what is foreseen next learns from it."""
        facts, plan = launch.order.facts, launch.order.plan
        options = launch.order.options
        drafted = options.use_draft and (plan.draft is not None or options.draft is not None)
        if plan.split is None:
            # From here on it is known, and what was foreseen stays what it was.
            others = {key: told for key, told in self._alone.items() if key[0] != launch.model}
            self._alone = {(launch.model, launch.term): self.solo_speed(launch), **others}
            self._speeds.observed(facts, seconds, drafted=drafted)
        elif not drafted and self.split_speed(facts, plan.split) is not None:
            forecast = self._forecasts[facts.name, plan.split]
            if forecast is not None:
                self._speeds.observed_split(forecast, seconds)

    async def _foresee(self, facts: ModelFacts, layout: SplitLayout) -> None:
        members = {member.announcement.node: member for member in self._node.members}
        workers = [members[share.node] for share in layout.workers if share.node in members]
        speed = await self._speeds.speed()
        heard = await self._hear(workers)
        speeds = {node: one.facts.speed for node, one in heard.items()}
        if speed is not None:
            speeds[self._node.config.node] = speed
        seconds = split_seconds(facts, layout, speeds, self._links(heard))
        if (facts.name, layout) in self._forecasts:
            learned = self._speeds.experience
            self._split_lag = 1.0 if learned is None else learned.split_lag
            self._forecasts[facts.name, layout] = seconds
            self._changed()

    async def _hear(self, members: Sequence[Member]) -> dict[NodeId, Measured]:
        """The ways to the nearest ones: one after the other, so that they do not slow each other down."""
        heard: dict[NodeId, Measured] = {}
        for member in sorted(members, key=lambda member: member.rtt_ms)[:_MOST_MEASURED]:
            word = member.announcement
            try:
                heard[word.node] = await self._meter.measure(word.node)
            except (ConnectionError, TimeoutError, MeshError) as error:
                _log.info("not measured", node=word.name, reason=str(error) or type(error).__name__)
        return heard

    def _planned(self, facts: ModelFacts, member: Member, heard: Measured | None) -> Planned:
        word = member.announcement
        speed = heard.facts.speed if heard is not None and heard.facts.speed.known else word.capacity.speed
        shares = self._may_share(word.node)
        note = "its invite does not let it share models: join by one with the scope split" if not shares else ""
        has_file = any(one.name == facts.name and one.fingerprint == facts.fingerprint for one in word.on_disk)
        if heard is None:
            note = "it did not answer a measurement"
        elif shares and not has_file and not heard.facts.takes:
            shares, note = False, "it lacks the file, and takes no models from others (--no-fetch)"
        return Planned(
            node=word.node,
            name=word.name or word.node[:10],
            memory_bytes=_offered(facts, member, heard),
            rpc_version=word.capacity.rpc_version if shares else "",
            has_file=has_file,
            gives=word.shares,
            speed=speed if speed.known else None,
            measured_tps=_runs_alone(facts, member),
            note=note,
        )

    def _links(self, heard: Mapping[NodeId, Measured]) -> dict[tuple[NodeId, NodeId], Link]:
        """The ways from here as measured; those among others from what they know of each other."""
        here = self._node.config.node
        links = {(here, node): one.link for node, one in heard.items()}
        trips = {member.announcement.node: member.rtt_ms for member in self._node.members if member.rtt_ms}
        # What programs add to a packet's way, seen on the ways from here.
        extras = [one.link.one_way_seconds - trips[node] / 2e3 for node, one in heard.items() if node in trips]
        extra = sum(extras) / len(extras) if extras else _LEAST_ONE_WAY
        for node, one in heard.items():
            for other, milliseconds in one.facts.round_trips.items():
                if other in heard and other != node:
                    rate = min(one.link.bytes_per_second, heard[other].link.bytes_per_second)
                    way = max(_LEAST_ONE_WAY, milliseconds / 2e3 + extra)
                    links.setdefault((node, other), Link(one_way_seconds=way, bytes_per_second=rate))
        return links


def _own_memory(node: Node, facts: ModelFacts) -> int:
    """What this node would have for a model, if it serves it already without that."""
    mine = sum(launch.reserved_bytes for launch in node.launches if launch.model == facts.name)
    return node.free_bytes + mine


def _offered(facts: ModelFacts, member: Member, heard: Measured | None) -> int:
    """What another node offers: by its own word on this very model, else what it says to have left."""
    word = member.announcement
    if word.split is not None and word.split.model == facts.name:
        return word.split.memory_bytes
    mine = sum(launch_memory(facts, one.context, one.slots).total for one in word.serving if one.model == facts.name)
    if heard is not None:
        return heard.facts.free_bytes + mine
    return max(0, word.capacity.memory_bytes - sum(one.size_bytes for one in word.serving if one.model != facts.name))


def _runs_alone(facts: ModelFacts, member: Member) -> float:
    """Tokens per second of a model that another node serves undivided, by its own word."""
    word = member.announcement
    if word.split is not None and word.split.model == facts.name:
        return 0.0
    warm = (one for one in word.serving if one.model == facts.name and one.status is ModelStatus.WARM)
    return next((one.tokens_per_second for one in warm), 0.0)


class Foresight:
    """Made before the mesh is started; ended by the stack."""

    def __init__(
        self,
        net: MeshNet,
        node: Node,
        machine: Machine,
        home: Home,
        post: Callable[[AnyEvent], None],
        changed: Callable[[], None],
        stack: AsyncExitStack,
    ) -> None:
        """`changed`: the status would say something new."""
        self._speeds = SpeedMeter(home, machine, post)

        def facts(speed: Speed) -> Facts:
            trips = {member.announcement.node: member.rtt_ms for member in node.members if member.rtt_ms}
            takes = node.config.can_fetch
            return Facts(speed=speed, round_trips=trips, free_bytes=node.free_bytes, takes=takes)

        meter = LinkMeter(net, self._speeds, facts)

        def may_share(other: NodeId) -> bool:
            scope = net.scope_of(other)
            return scope is not None and scope >= Scope.SPLIT

        self._node = node
        self.planner = Planner(node, machine.shelf, self._speeds, meter, may_share, changed)
        stack.push_async_callback(self._speeds.close)
        stack.push_async_callback(self.planner.close)
        if machine.source is not None:
            meter.register()

    def begin(self, traffic: TrafficMeter) -> None:
        """The core may be told; from now on what comes is learned from."""
        self._speeds.begin(traffic.busy)
        traffic.observe = self._came

    def _came(self, model: str, tokens: int, seconds: float) -> None:
        """An answer of this node's own engine took so long, and had the machine for itself."""
        launch = next((one for one in self._node.launches if one.model == model), None)
        if launch is not None:
            self.planner.came(launch, seconds / tokens)
