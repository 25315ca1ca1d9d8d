"""How fast models run or would run: predicted from the speeds of machines and links, and compared with answers."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from mesh_llm.core.node import Node
from mesh_llm.core.performance.calibration import PredictPrompt, PromptScore, PromptSpeed
from mesh_llm.core.performance.plan import PlanAnswer, PlanInput, PlanRequest, make_plan
from mesh_llm.core.performance.prediction import (
    Link,
    SplitSeconds,
    offload_seconds,
    per_second,
    prompt_seconds,
    solo_seconds,
)
from mesh_llm.core.performance.wire import choose_wire, wired_prompt_seconds, wired_seconds
from mesh_llm.core.placement.fit import launch_memory
from mesh_llm.core.placement.launches import Launch
from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.split.eligibility import Barred, Obstacle
from mesh_llm.core.split.outlook import candidate_of, would_be
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.core.types.ids import ModelName, NodeId, Term
from mesh_llm.core.types.model import LaunchOptions, ModelFacts, ModelStatus, Role, Speed, SplitLayout, Wire
from mesh_llm.core.types.model_settings import guesses_alone
from mesh_llm.daemon.link_meter import LinkMeter, Measured
from mesh_llm.daemon.model_fetcher import published_facts
from mesh_llm.daemon.model_registry import Machine, ModelRegistry
from mesh_llm.daemon.speed_meter import SpeedMeter
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
_RETRY_MEASURE_SECONDS = 20.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class _Forecast:
    """What a split model's speed is predicted from, before its first answer."""

    facts: ModelFacts
    layout: SplitLayout
    speeds: Mapping[NodeId, Speed]
    links: Mapping[tuple[NodeId, NodeId], Link]
    lag: float
    prompt_lag: float
    wire: Wire

    def token(self, context: int = 0) -> SplitSeconds | None:
        """Of one token, after `context` others."""
        return wired_seconds(self.facts, self.layout, self.speeds, self.links, self.wire, context)

    def prompt(self, tokens: int, cached: int = 0) -> SplitSeconds | None:
        """Of a prompt's new tokens, after `cached` others."""
        return wired_prompt_seconds(self.facts, self.layout, self.speeds, self.links, self.wire, tokens, cached)


class Planner:
    """Measures, and lets the core predict."""

    def __init__(
        self,
        node: Node,
        registry: ModelRegistry,
        speeds: SpeedMeter,
        meter: LinkMeter,
        may_share: Callable[[NodeId], bool],
        changed: Callable[[], None],
    ) -> None:
        """`may_share`: whether another node's admission allows split models; `changed`: a new forecast exists."""
        self._node = node
        self._registry = registry
        self._speeds = speeds
        self._meter = meter
        self._may_share = may_share
        self._changed = changed
        self._forecasts: dict[tuple[str, SplitLayout], _Forecast | None] = {}
        self._prompts: dict[tuple[ModelName, Term], PromptScore] = {}
        self._alone: dict[tuple[ModelName, Term], float | None] = {}
        self._tried_at = 0.0
        self._scope = TaskScope("planner")
        self._forecasting = asyncio.Lock()

    async def close(self) -> None:
        """Stop measuring."""
        await self._scope.close()

    async def plan(self, model: str, context: int | None) -> PlanAnswer:
        """How a model would run if it were loaded now. Raises MeshError: see models.library.resolve."""
        node = self._node
        facts, here, fetch = await self._model(model)
        others = [member for member in node.members if member.announcement.role is not Role.CLIENT]
        speed = await self._speeds.speed()
        measured = await self._measure_links(others)
        experience = self._speeds.experience
        pace = None if experience is None else experience.slowdown(self._speeds.now, facts)
        me = PlanInput(
            node=node.config.node,
            name=node.names[node.config.node],
            memory_bytes=_own_memory(node, facts),
            rpc_version=node.capacity.rpc_version,
            has_file=here,
            gives=node.config.shares,
            speed=speed,
            alone=None if experience is None or pace is None else experience.paced(pace.factor),
            basis="" if pace is None else pace.basis,
            note="" if speed is not None else "its speed cannot be measured",
            host_bytes=_own_host_memory(node, facts),
            host_speed=node.capacity.host_speed if experience is None else experience.host,
            cards=max(1, len(node.capacity.devices)),
            on_processor=node.capacity.on_processor,
            barred=node.split.barred(facts, node.members),
            since=node.config.incarnation,
        )
        nodes = [me, *(self._planned(facts, member, measured.get(member.announcement.node)) for member in others)]
        own = node.options_for(facts.name)
        options = LaunchOptions(
            context=context or own.context,
            slots=own.slots,
            cache_type=own.cache_type,
            gpu_layers=own.gpu_layers,
            cpu_moe=own.cpu_moe,
        )
        split = node.config.split
        ask = PlanRequest(
            facts=facts,
            options=options,
            shares=split.shares,
            asked=split.asked,
            max_rtt_ms=split.max_rtt_ms,
            split_lag=1.0 if experience is None else experience.split_lag,
            split_prompt_lag=1.0 if experience is None else experience.split_prompt_lag,
            wire=split.wire,
            groups=split.groups,
            fetch=fetch,
        )
        return make_plan(ask, nodes, self._links(measured))

    async def _model(self, spec: str) -> tuple[ModelFacts, bool, str]:
        """The model's facts, whether its file is here, and its name for `mesh-llm download` if no node has it.

        It is looked for on this machine, in the mesh, in the catalogue, and on the hub, in this order.

        Raises:
            MeshError: see models.library.resolve and models.hub.
        """
        try:
            found = await asyncio.to_thread(self._registry.interpret, spec)
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
        """A model on the disks of other nodes, by its name or an unambiguous prefix."""
        there = {facts.name: facts for member in self._node.members for facts in member.announcement.on_disk}
        found = match(name, dict.fromkeys(there, ()))
        return None if isinstance(found, (NotFound, Ambiguous)) else there[found]

    def solo_speed(self, launch: Launch) -> float | None:
        """Predicted tokens per second of a model that this node serves alone. Observations do not change it."""
        key = (launch.model, launch.term)
        experience, facts = self._speeds.experience, launch.order.facts
        if key in self._alone or experience is None:
            return self._alone.get(key)
        pace = experience.slowdown(self._speeds.now, besides=facts)
        speed, offload = experience.speed.slowed(pace.factor), launch.order.plan.offload
        if offload is not None:
            return per_second(offload_seconds(facts, offload, speed, experience.host))
        return per_second(solo_seconds(facts, speed))

    def split_speed(self, facts: ModelFacts, layout: SplitLayout) -> float | None:
        """Predicted tokens per second of a split model that this node hosts; None until the links are measured."""
        key = (facts.name, layout)
        now = time.monotonic()
        if self._forecasts.get(key) is None and (key not in self._forecasts or now > self._tried_at + _RETRY_SECONDS):
            self._forecasts = {key: None}
            self._tried_at = now
            self._scope.spawn(self._forecast(facts, layout), "forecast")
        forecast = self._forecasts[key]
        seconds = None if forecast is None else forecast.token()
        return None if forecast is None or seconds is None else per_second(seconds.total(forecast.lag))

    def prompt_speed(self, model: str) -> PromptSpeed:
        """Of a model that this node serves or hosts. The prediction stays what it was before the first observation."""
        launch = next((one for one in self._node.launches if one.model == model), None)
        if launch is None:
            return PromptSpeed()
        known = self._prompts.get((launch.model, launch.term))
        return (known or PromptScore.before_any(self._foreseen_prompt(launch))).speed

    def _foreseen_prompt(self, launch: Launch) -> PredictPrompt:
        """The prediction of a model's prompts with what is known now."""
        facts, plan, experience = launch.order.facts, launch.order.plan, self._speeds.experience
        if plan.split is not None:
            forecast = self._forecasts.get((facts.name, plan.split))

            def together(tokens: int, cached: int) -> float | None:
                read = None if forecast is None else forecast.prompt(tokens, cached)
                return None if forecast is None or read is None else read.total(forecast.prompt_lag)

            return together
        if experience is None or (plan.offload is not None and plan.offload.divided(facts.layers)):
            return lambda _tokens, _cached: None
        speed = experience.paced(experience.slowdown(self._speeds.now, besides=facts).factor)
        return lambda tokens, cached: prompt_seconds(facts, speed, tokens, cached)

    def observed(self, launch: Launch, seconds: float, *, guessed: bool = False, context: int = 0) -> None:
        """A token of a model that this node serves or hosts took `seconds` after `context` others.

        Later predictions learn from it.

        An answer with guessed tokens says how often its text repeats itself, and nothing of the machine: it is learned
        from only where the engine always guesses.
        """
        facts, plan = launch.order.facts, launch.order.plan
        options = launch.order.options
        drafted = options.use_draft and (plan.draft is not None or options.draft is not None)
        drafted = drafted or guesses_alone(options.engine.speculation)
        if guessed and not drafted:
            return
        if plan.split is None:
            # The prediction stays what it was before the first observation.
            others = {key: speed for key, speed in self._alone.items() if key[0] != launch.model}
            self._alone = {(launch.model, launch.term): self.solo_speed(launch), **others}
            # On GPU and processor together it says nothing of either.
            if plan.offload is None or not plan.offload.divided(facts.layers):
                self._speeds.observed(facts, seconds, drafted=drafted, context=context)
        elif not drafted and self.split_speed(facts, plan.split) is not None:
            forecast = self._forecasts[facts.name, plan.split]
            predicted = None if forecast is None else forecast.token(context)
            if predicted is not None:
                self._speeds.observed_split(predicted, seconds)

    def observed_prompt(self, launch: Launch, tokens: int, seconds: float, cached: int = 0) -> None:
        """So many new tokens of a prompt, after `cached` others, were read in `seconds`, here or over a split."""
        facts, plan = launch.order.facts, launch.order.plan
        key = (launch.model, launch.term)
        score = self._prompts.get(key) or PromptScore.before_any(self._foreseen_prompt(launch))
        others = {other: score for other, score in self._prompts.items() if other[0] != launch.model}
        self._prompts = {**others, key: score.read(tokens, seconds, cached)}
        if plan.split is None:
            if plan.offload is None or not plan.offload.divided(facts.layers):
                self._speeds.observed_prompt(facts, tokens, seconds, cached)
            return
        forecast = self._forecasts.get((facts.name, plan.split))
        predicted = None if forecast is None else forecast.prompt(tokens, cached)
        if predicted is not None:
            self._speeds.observed_split_prompt(predicted, tokens, seconds)

    async def choose_wire(self, facts: ModelFacts, layout: SplitLayout) -> Wire | None:
        """How the activations of a split model that this node hosts shall travel; the forecast then counts on it.

        None where something of it cannot be measured.
        """
        key = (facts.name, layout)
        self._forecasts = {key: self._forecasts.get(key)}
        self._tried_at = time.monotonic()
        await self._forecast(facts, layout)
        forecast = self._forecasts.get(key)
        return None if forecast is None else forecast.wire

    def round_trips(self, layout: SplitLayout) -> tuple[float, ...]:
        """To the workers of a layout, in milliseconds, as the mesh measures them all the time; 0.0: not known."""
        known = {member.announcement.node: member.rtt_ms for member in self._node.members}
        return tuple(known.get(share.node, 0.0) for share in layout.workers)

    async def _forecast(self, facts: ModelFacts, layout: SplitLayout) -> None:
        # Two at once would slow each other down.
        async with self._forecasting:
            await self._measure_ring(facts, layout)

    async def _measure_ring(self, facts: ModelFacts, layout: SplitLayout) -> None:
        members = {member.announcement.node: member for member in self._node.members}
        workers = [members[share.node] for share in layout.workers if share.node in members]
        speed = await self._speeds.speed()
        measured = await self._measure_links(workers)
        speeds = {node: one.facts.speed for node, one in measured.items()}
        if speed is not None:
            speeds[self._node.config.node] = speed
        if (facts.name, layout) in self._forecasts:
            learned = self._speeds.experience
            lag, prompt_lag = (1.0, 1.0) if learned is None else (learned.split_lag, learned.split_prompt_lag)
            links = self._links(measured)
            before = self._forecasts[facts.name, layout]
            present = Wire() if before is None else before.wire
            wire = choose_wire(self._node.config.split.wire, facts, layout, speeds, links, present)
            found = _Forecast(facts, layout, speeds, links, lag, prompt_lag, wire)
            self._forecasts[facts.name, layout] = found if found.token() is not None else None
            self._changed()

    async def _measure_links(self, members: Sequence[Member]) -> dict[NodeId, Measured]:
        """Measure the links to the nearest members, one after the other, so that they do not slow each other down."""
        measured: dict[NodeId, Measured] = {}
        for member in sorted(members, key=lambda member: member.rtt_ms)[:_MOST_MEASURED]:
            announcement = member.announcement
            try:
                measured[announcement.node] = await self._meter.measure(announcement.node)
            except (ConnectionError, TimeoutError, MeshError) as error:
                _log.info("not measured", node=member.label, reason=str(error) or type(error).__name__)
        return measured

    def _planned(self, facts: ModelFacts, member: Member, measured: Measured | None) -> PlanInput:
        announcement = member.announcement
        speed = (
            measured.facts.speed if measured is not None and measured.facts.speed.known else announcement.capacity.speed
        )
        known = candidate_of(member, facts, silent=member.suspect)
        barred = would_be(member, known, facts).barred
        if barred is not None and barred.code == Obstacle.PENDING and not self._may_share(announcement.node):
            # An older version, which does not say what it offers.
            barred = Barred(Obstacle.SCOPE)
        has_file = any(one.name == facts.name and one.fingerprint == facts.fingerprint for one in announcement.on_disk)
        return PlanInput(
            node=announcement.node,
            name=member.label,
            memory_bytes=offered_bytes(facts, member, measured),
            rpc_version=announcement.capacity.rpc_version,
            has_file=has_file,
            gives=announcement.shares,
            speed=speed if speed.known else None,
            measured_tps=_runs_alone(facts, member),
            note="it did not answer a measurement" if measured is None else "",
            host_bytes=measured.facts.free_host_bytes if measured is not None else announcement.capacity.host_bytes,
            host_speed=announcement.capacity.host_speed,
            cards=max(1, len(announcement.capacity.devices)),
            on_processor=announcement.capacity.on_processor,
            barred=barred,
            since=announcement.incarnation,
            max_rtt_ms=announcement.split.max_rtt_ms if announcement.split is not None else 0.0,
        )

    def _links(self, measured: Mapping[NodeId, Measured]) -> dict[tuple[NodeId, NodeId], Link]:
        """The measured links from here, and the links between others from the round trips that they report."""
        here = self._node.config.node
        links = {(here, node): one.link for node, one in measured.items()}
        trips = {member.announcement.node: member.rtt_ms for member in self._node.members if member.rtt_ms}
        # The delay that programs add to a packet, seen on the links from here.
        extras = [one.link.one_way_seconds - trips[node] / 2e3 for node, one in measured.items() if node in trips]
        extra = sum(extras) / len(extras) if extras else _LEAST_ONE_WAY
        for node, one in measured.items():
            for other, milliseconds in one.facts.round_trips.items():
                if other in measured and other != node:
                    rate = min(one.link.bytes_per_second, measured[other].link.bytes_per_second)
                    way = max(_LEAST_ONE_WAY, milliseconds / 2e3 + extra)
                    links.setdefault((node, other), Link(one_way_seconds=way, bytes_per_second=rate))
        return links


def _own_memory(node: Node, facts: ModelFacts) -> int:
    """This node's memory for a model, including what the model uses now, computed for another host or not."""
    mine = sum(launch.reserved_bytes for launch in node.launches if launch.model == facts.name)
    lending = node.split.lending
    if lending is not None and lending.model == facts.name:
        mine += lending.memory_bytes
    return node.free_bytes + mine


def _own_host_memory(node: Node, facts: ModelFacts) -> int:
    """The same of main memory beside a GPU's."""
    mine = sum(launch.reserved_host_bytes for launch in node.launches if launch.model == facts.name)
    return node.free_host_bytes + mine


def offered_bytes(facts: ModelFacts, member: Member, measured: Measured | None) -> int:
    """The memory that another node offers: as announced for this model, else what it reports as free."""
    announcement = member.announcement
    if announcement.split is not None and announcement.split.model == facts.name:
        return announcement.split.memory_bytes
    # Only what runs takes memory: one that waits, or failed, is announced too.
    mine = sum(
        launch_memory(facts, one.context, one.slots).total
        for one in announcement.serving
        if one.model == facts.name and one.status in {ModelStatus.WARM, ModelStatus.LOADING} and one.context
    )
    if measured is not None:
        return measured.facts.free_bytes + mine
    return max(
        0,
        announcement.capacity.memory_bytes
        - sum(one.size_bytes for one in announcement.serving if one.model != facts.name),
    )


def _runs_alone(facts: ModelFacts, member: Member) -> float:
    """Tokens per second of a model that another node serves alone, as it announced."""
    announcement = member.announcement
    if announcement.split is not None and announcement.split.model == facts.name:
        return 0.0
    warm = (one for one in announcement.serving if one.model == facts.name and one.status is ModelStatus.WARM)
    return next((one.tokens_per_second for one in warm), 0.0)


class PerformanceServices:
    """Measures this machine and the ways to others, predicts the speed of models, and answers `mesh-llm plan`."""

    def __init__(
        self,
        net: MeshNet,
        node: Node,
        machine: Machine,
        home: Home,
        post: Callable[[AnyEvent], None],
        changed: Callable[[], None],
    ) -> None:
        """`changed`: called when the status has a new prediction."""
        self._speeds = SpeedMeter(home, machine, post)

        def facts(speed: Speed) -> Facts:
            trips = {member.announcement.node: member.rtt_ms for member in node.members if member.rtt_ms}
            return Facts(
                speed=speed,
                round_trips=trips,
                free_bytes=node.free_bytes,
                takes=node.config.can_fetch,
                free_host_bytes=node.free_host_bytes,
                host_speed=node.capacity.host_speed,
            )

        meter = LinkMeter(net, self._speeds, facts)
        if machine.source is not None:
            meter.register()

        def may_share(other: NodeId) -> bool:
            scope = net.scope_of(other)
            return scope is not None and scope >= Scope.SPLIT

        self.measure_link = meter.measure
        self._node = node
        self._planner = Planner(node, machine.registry, self._speeds, meter, may_share, changed)
        self.plan = self._planner.plan
        self.solo_speed = self._planner.solo_speed
        self.devices_changed = self._speeds.devices_changed
        self.split_speed = self._planner.split_speed
        self.choose_wire = self._planner.choose_wire
        self.round_trips = self._planner.round_trips
        self.prompt_speed = self._planner.prompt_speed

    def begin(self, traffic: TrafficMeter) -> None:
        """Report the speed to the core, measure it at rest, and learn from the answers of this node's engines."""
        self._speeds.begin(traffic.busy)
        traffic.observe = self._observe
        traffic.observe_prompt = self._observe_prompt

    async def close(self) -> None:
        """Stop measuring, and save what was experience."""
        await self._planner.close()
        await self._speeds.close()

    def _observe(self, model: str, tokens: int, seconds: float, guessed: int, context: int) -> None:
        """An answer of this node's own engine took so long, alone on the machine."""
        launch = next((one for one in self._node.launches if one.model == model), None)
        if launch is not None:
            self._planner.observed(launch, seconds / tokens, guessed=guessed > 0, context=context)

    def _observe_prompt(self, model: str, tokens: int, seconds: float, cached: int) -> None:
        """A prompt was read by this node's own engine, alone on the machine."""
        launch = next((one for one in self._node.launches if one.model == model), None)
        if launch is not None:
            self._planner.observed_prompt(launch, tokens, seconds, cached)
