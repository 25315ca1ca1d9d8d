"""The host of a split model: it opens tunnels to the workers, shows loading, and reports which worker failed."""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mesh_llm.core.performance.wire import fixed_wire
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, SplitFailed
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import AUTO_WIRE, LaunchPlan, ModelFacts, SplitLayout, Wire
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.daemon.split_worker import SplitDisplay, WeightDigests, loaded, part_bytes
from mesh_llm.engine.confinement import policy
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.split.host.session import OPEN_SECONDS, OpenStream, SplitHost, WorkerError, WorkerTarget
from mesh_llm.split.host.tunnel import Pace
from mesh_llm.split.host.worker_info import AllocationSizes, SplitStats, WorkerStats, merged
from mesh_llm.split.weights import Weights
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.activations import Format, WireFormats
from mesh_llm.wire.ggml_rpc.tunnel import SESSION_BYTES, SplitStream
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType

_PROGRESS_SECONDS = 0.25


class LoadProgress:
    """How far one launch is loaded. `names`: of the workers in the tunnels' statistics."""

    def __init__(
        self,
        facts: ModelFacts,
        layout: SplitLayout,
        names: Mapping[str, NodeId],
        display: SplitDisplay,
    ) -> None:
        self._facts = facts
        self._layout = layout
        self._names = names
        self._display = display
        self._ready = asyncio.Event()
        self._shown = ""

    def opening(self) -> None:
        """The workers are being asked. Each reads its file if it never did."""
        asked = ", ".join(self._display.name_of(node) for node in self._names.values())
        self._show(f"{self._facts.name}: asking {asked}", ended=False)

    def ready(self) -> None:
        """The engine answers: all parts are loaded."""
        self._ready.set()

    async def loaded(self) -> None:
        """Wait until all parts are loaded."""
        await self._ready.wait()

    @property
    def ended(self) -> bool:
        """Whether all parts are loaded."""
        return self._ready.is_set()

    async def watch(self, stats: Callable[[], SplitStats]) -> None:
        """Show each change until all parts are loaded. Cancel it if the launch fails."""
        while not self._ready.is_set():
            self._show(f"loading {self._facts.name}: {self.line(stats())}", ended=False)
            await wait_for_event(self._ready, _PROGRESS_SECONDS)
        parts = [f"here {self._layout.host.layers} layers"]
        parts += [f"{self._display.name_of(share.node)} {share.layers}" for share in self._layout.workers]
        self._show(f"{self._facts.name} is loaded: {', '.join(parts)}", ended=True)

    def line(self, stats: SplitStats) -> str:
        """The workers with their percentages."""
        parts: list[str] = []
        for name, node in self._names.items():
            share = self._layout.share(node)
            expected = part_bytes(self._facts, share.layers if share is not None else 0)
            part = loaded(stats.workers.get(name, WorkerStats()), expected)
            parts.append(f"{self._display.name_of(node)} {100 * part:.0f} %")
        return ", ".join(parts)

    def _show(self, line: str, *, ended: bool) -> None:
        if line != self._shown:
            self._shown = line
            self._display.show(line, ended)


_DIGESTED_BYTES_PER_SECOND = 200e6
"""A lower bound. A worker reads its file once before the first session."""


@dataclass(frozen=True, eq=False)
class HostSession:
    """The open tunnels of one engine of a launch.

    Attributes:
        layout: who computes what.
        host: the tunnels.
        endpoints: the workers' addresses, for the engine.
        names: the workers' names in statistics and messages.
        tokens_before: tokens that the model had generated before.
        facts: the model.
        loading: shows how far it is loaded.
        model: its name.
        weights: its tensors on this disk.
        pool: what all engines that share the weights have in common; empty for one alone.
        all: the sessions of all engines of this launch that run now.
    """

    layout: SplitLayout
    host: SplitHost
    endpoints: tuple[str, ...]
    names: Mapping[str, NodeId]
    tokens_before: int
    facts: ModelFacts
    loading: LoadProgress
    weights: Weights | None = None
    pool: bytes = b""
    all: list["HostSession"] = field(default_factory=list["HostSession"])

    @property
    def stats(self) -> SplitStats:
        """The tunnels' statistics, of all engines."""
        return merged([session.host.stats() for session in self.all] or [self.host.stats()])

    @property
    def wire(self) -> Wire:
        """How activations travel, where all on their way know it; as they are where no worker does."""
        return wire_of(self.host.wire) if len(self.host.unable) < len(self.names) else Wire()

    @property
    def wire_text(self) -> str:
        """The same for people, with the reason where it is not what is wanted."""
        text = wire_of(self.host.wire).text
        if unable := self.host.unable:
            text += f"; f32 to and from {', '.join(unable)}: an older version of mesh-llm"
        if self.stats.total.unrounded:
            text += "; some as f32, because they are too large for f16"
        return text


def formats_of(wire: Wire) -> WireFormats:
    """As the tunnels take it."""
    return WireFormats(Format[wire.prompts.upper()], Format[wire.tokens.upper()])


def wire_of(formats: WireFormats) -> Wire:
    """As the core takes it."""
    prompts, tokens = (fixed_wire(kind.name.lower()) or Wire() for kind in formats)
    return Wire(prompts=prompts.prompts, tokens=tokens.tokens)


ChooseWire = Callable[[ModelFacts, SplitLayout], Awaitable[Wire | None]]
"""How activations shall travel with `auto`, by the links as they are measured now; None: that is not known."""

_LOOK_SECONDS = 10.0
_LINKS_SECONDS = 900.0
"""After this time links are measured again, if nothing seems to have changed. That takes some megabytes on each."""

_MOVED, _MOVED_MS = 2.0, 1.0
"""A link has changed if its round trip is so many times as long or as short, by so much at least."""


async def _as_it_is(_facts: ModelFacts, _layout: SplitLayout) -> Wire | None:
    return None


async def _at_once(_model: ModelName) -> None:
    """Nobody asks."""


async def _look() -> None:
    await asyncio.sleep(_LOOK_SECONDS)


def links_changed(before: Sequence[float], now: Sequence[float]) -> bool:
    """Whether the round trips of a split model's links, in milliseconds, say that one is another link now.

    0.0: not known.
    """
    pairs = [(one, other) for one, other in zip(before, now, strict=True) if one and other]
    return any(abs(a - b) >= _MOVED_MS and max(a, b) >= _MOVED * min(a, b) for a, b in pairs)


@dataclass(frozen=True, slots=True)
class WireControl:
    """How activations travel.

    Attributes:
        setting: a WireFormat or `auto`.
        choose: decides with `auto`.
        notify: takes what the user should know.
        round_trips: to the workers of a layout, in milliseconds; 0.0: not known.
        quiet: waits until nobody asks a model: links are measured then, and formats change.
        look: waits until it is time to see whether links have changed.
    """

    setting: str = AUTO_WIRE
    choose: ChooseWire = _as_it_is
    notify: Callable[[Notice], object] = lambda _: None
    round_trips: Callable[[SplitLayout], Sequence[float]] = lambda _: ()
    quiet: Callable[[ModelName], Awaitable[None]] = _at_once
    look: Callable[[], Awaitable[None]] = _look


_ROUNDED = "Answers may differ from those with --wire f32."


class SplitHostService:
    """The split models that this node hosts, one at a time."""

    def __init__(
        self,
        net: MeshNet,
        digests: WeightDigests,
        post: Callable[[AnyEvent], None],
        display: SplitDisplay,
        pace: Pace,
        sockets: Callable[[], Awaitable[Path | None]],
    ) -> None:
        """`pace` limits sent weights. `sockets`: the directory of the tunnels' Unix sockets, None for ports."""
        self._net = net
        self._digests = digests
        self._post = post
        self._display = display
        self._pace = pace
        self._sockets = sockets
        self.wire = WireControl()
        """How activations travel; set once links can be measured."""
        self._scope = TaskScope("split loading")
        self._watching: list[asyncio.Task[object]] = []
        self._sizes: dict[NodeId, AllocationSizes] = {}
        self._push = True
        self.session: HostSession | None = None

    async def open(self, plan: LaunchPlan, path: Path, facts: ModelFacts, tokens: int) -> HostSession:
        """Begin a session with every worker of a split plan. `tokens`: generated by the model so far.

        Raises MeshError; the worker that failed is reported to the core.
        """
        model, layout = plan.model, plan.split
        if layout is None:
            raise ValueError(f"{model} is not split")
        weights = await self._digests.index(path)
        pool = secrets.token_bytes(SESSION_BYTES) if layout.groups > 1 else b""
        wire = formats_of(fixed_wire(self.wire.setting) or Wire())
        host = SplitHost(rpc=layout.rpc_version, weights=weights, push=self._push, pool=pool, wire=wire)
        names: dict[str, NodeId] = {}
        for share in layout.workers:
            name = f"{self._display.name_of(share.node)} ({share.node[:8]})"
            names[name if name not in names else f"{self._display.name_of(share.node)} ({share.node})"] = share.node
        targets = self._targets(names, model, layout.term)
        loading = LoadProgress(facts, layout, names, self._display)
        loading.opening()
        size = sum(share.memory_bytes for share in layout.shares)
        patience = OPEN_SECONDS + size / _DIGESTED_BYTES_PER_SECOND
        try:
            endpoints = await host.start(targets, timeout=patience, sockets=await self._sockets())
        except MeshError as error:
            self._blame(model, layout, error.worker if isinstance(error, WorkerError) else None, error)
            raise
        except (asyncio.CancelledError, OSError):
            await host.close()
            raise
        session = HostSession(layout, host, endpoints, names, tokens, facts, loading, weights, pool)
        self.session = session
        session.all.append(session)
        self._watching = [
            self._scope.spawn(loading.watch(host.stats), "watch"),
            self._scope.spawn(self._settle_wire(session, model), "wire"),
        ]
        return session

    async def open_another(self, session: HostSession) -> HostSession:
        """One more session with the same workers, for an engine that shares the weights of those that have loaded.

        Raises MeshError. No worker is reported for that: the others go on with it.
        """
        layout = session.layout
        host = SplitHost(
            rpc=layout.rpc_version, weights=session.weights, push=self._push, pool=session.pool, wire=session.host.wire
        )
        targets = self._targets(session.names, session.facts.name, layout.term)
        try:
            endpoints = await host.start(targets, sockets=await self._sockets())
        except (asyncio.CancelledError, OSError):
            await host.close()
            raise
        another = replace(session, host=host, endpoints=endpoints)
        session.all.append(another)
        # It may have been chosen meanwhile.
        host.use(session.host.wire)
        return another

    def _targets(self, names: Mapping[str, NodeId], model: ModelName, term: int) -> list[WorkerTarget]:
        return [
            WorkerTarget(
                name=name,
                address=node,
                open_stream=self._opener(node, model, term),
                sizes=self._sizes.setdefault(node, AllocationSizes()),
                pace=self._pace,
            )
            for name, node in names.items()
        ]

    def wire_of(self, model: ModelName) -> str:
        """How the activations of a model that is split here travel, in words; empty for other models."""
        session = self.session
        return session.wire.text if session is not None and session.facts.name == model else ""

    async def _settle_wire(self, session: HostSession, model: ModelName) -> None:
        """Choose with `auto`, and tell the user of what is not as they would expect it.

        Links are measured when the weights are there: before, these are on the way.
        """
        await session.loading.loaded()
        level, why = NoticeLevel.INFO, f"{model}: "
        if fixed_wire(self.wire.setting) is None:
            wire = await self.wire.choose(session.facts, session.layout) or Wire()
            for one in session.all:
                one.host.use(formats_of(wire))
            why = f"A link between the nodes of {model} is slow: "
        text = f"{why}activations travel as {session.wire_text}. "
        if session.host.unable:
            level, text = NoticeLevel.WARNING, f"{text}Install the same version on all nodes. "
        if any(session.host.wire):
            self.wire.notify(Notice(level=level, code="split_wire", text=text + _ROUNDED, about=model))
        if fixed_wire(self.wire.setting) is None:
            await self._follow_links(session, model)

    async def _follow_links(self, session: HostSession, model: ModelName) -> None:
        """Choose again when links have changed, as when a laptop goes from a cable to Wi-Fi; between two requests.

        Each message says its format, so both ends need not agree before.
        """
        control, layout = self.wire, session.layout
        seen, measured = control.round_trips(layout), time.monotonic()
        while True:
            await control.look()
            now = control.round_trips(layout)
            if not links_changed(seen, now) and time.monotonic() - measured < _LINKS_SECONDS:
                continue
            await control.quiet(model)
            seen, measured = now, time.monotonic()
            wire = await control.choose(session.facts, layout)
            if wire is None or not session.all or formats_of(wire) == session.all[0].host.wire:
                continue
            await control.quiet(model)
            for one in session.all:
                one.host.use(formats_of(wire))
            present = session.all[0]
            text = f"The links between the nodes of {model} have changed: activations travel as {present.wire_text}. "
            text += _ROUNDED if any(present.host.wire) else "Answers are those of --wire f32 again."
            control.notify(Notice(level=NoticeLevel.INFO, code="split_wire", text=text, about=model))

    async def broken(self, session: HostSession, model: ModelName) -> MeshError:
        """Wait until a session cannot continue, and report the failed worker to the core. Returns the reason."""
        end = await session.host.ended()
        if end.push_failed:
            self._push = False
        self._blame(model, session.layout, end.worker, end.error)
        return end.error

    async def close(self, session: HostSession) -> None:
        """End a session."""
        if session in session.all:
            session.all.remove(session)
        if self.session is session:
            # Others over the same workers go on.
            self.session = session.all[0] if session.all else None
            for task in self._watching if not session.all else ():
                task.cancel()
        self._note_memory(session)
        await session.host.close()
        await self._digests.keep()

    async def stop(self) -> None:
        """Stop showing progress."""
        await self._scope.close()

    def _note_memory(self, session: HostSession) -> None:
        """Report the workers that did not give the memory of their part, and so computed nothing."""
        for name, done in session.host.stats().workers.items():
            share = session.layout.share(session.names[name]) if name in session.names else None
            if done.refused and share is not None:
                reason = "it did not give the memory that it offers"
                self._post(
                    SplitFailed(
                        node=share.node,
                        model=session.facts.name,
                        reason=reason,
                        memory_bytes=share.memory_bytes,
                    )
                )

    def _blame(self, model: ModelName, layout: SplitLayout, worker: int | None, error: MeshError) -> None:
        """Report the failed worker to the core, by its number: a worker may have written the error's text."""
        if worker is not None:
            node = layout.workers[worker].node
            self._post(SplitFailed(node=node, model=model, reason=error.message[:300]))

    def _opener(self, node: NodeId, model: ModelName, term: int) -> OpenStream:
        async def open_stream(tunnel: bytes) -> ByteStream:
            header = encode(SplitStream(model=model, term=term, tunnel=tunnel))
            return await self._net.open(node, StreamType.RPC, header, scope=Scope.SPLIT)

        return open_stream


def split_spec(spec: EngineSpec, session: HostSession, accelerators: int) -> EngineSpec:
    """The engine's command line for a session: whole layers for each device, the output layer here.

    llama.cpp divides the layers that it offloads over all devices in order, with the output layer as one more at the
    end. So shares in whole layers are exact. RPC devices come before local ones. Without local accelerators fewer
    layers are offloaded, and the first layers stay with the processor.

    Args:
        spec: of the whole model.
        session: the open tunnels.
        accelerators: local devices other than the processor.
    """
    shares: list[float] = []
    for share, devices in zip(session.layout.workers, session.host.devices, strict=True):
        shares += _spread(share.layers, max(1, devices))
    if accelerators:
        here = _spread(session.layout.host.layers + 1, accelerators)
        return replace(spec, rpc=session.endpoints, tensor_split=(*shares, *here), gpu_layers=None)
    # Guesses must not cross the network: the output layer is counted with the layers that guess.
    here = spec.mtp_layers + 1 if spec.mtp_layers else 0
    _take(shares, spec.mtp_layers)
    shares[-1] += 0 if here else 1
    return replace(
        spec,
        rpc=session.endpoints,
        tensor_split=tuple(shares),
        gpu_layers=int(sum(shares)) + here,
        # With layers on two kinds of devices, llama.cpp would not fuse the operators of recurrent layers.
        host_layers=0 if session.facts.state_bytes else session.layout.host.layers,
        output_on_host=True,
    )


def _take(shares: list[float], layers: int) -> None:
    """Take so many layers from the last devices."""
    for place in reversed(range(len(shares))):
        taken = min(shares[place], float(layers))
        shares[place] -= taken
        layers -= int(taken)


def _spread(layers: int, devices: int) -> list[float]:
    """Whole layers for the devices of one machine. The first devices get the remainder."""
    each, rest = divmod(layers, devices)
    return [float(each + (1 if place < rest else 0)) for place in range(devices)]


async def tunnel_sockets(supervisor: Supervisor, cache: Path) -> Path | None:
    """The directory of the tunnels' Unix sockets; None if an engine cannot be made to connect to them."""
    try:
        await asyncio.to_thread(policy.provide_library, cache)
    except MeshError:
        return None
    return supervisor.private()
