"""Carries out StartEngine and StopEngine: a llama.cpp child process for each launch, reported to the core as events."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import structlog

from mesh_llm.api.slots import EngineSlots
from mesh_llm.api.upstream import Place
from mesh_llm.core.placement.fit import batch_tokens, cache_bytes
from mesh_llm.core.types.effects import Notice, NoticeLevel, StartEngine, StopEngine
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, EngineExited, EngineReady
from mesh_llm.core.types.ids import ModelName, Term
from mesh_llm.core.types.model import ModelFacts, ModelKind
from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.daemon.dispatch import Dispatch, DispatchedEngine
from mesh_llm.daemon.engine_groups import EngineGroup, Joined
from mesh_llm.daemon.launch_guesses import OWN_HEADS, LaunchGuesses, choose_guesses
from mesh_llm.daemon.model_registry import Machine
from mesh_llm.daemon.prompt_cache import SlotCaches
from mesh_llm.daemon.speculation import EngineGuessing
from mesh_llm.daemon.split_host import HostSession, SplitHostService, split_spec
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.spec import CPU_DEVICE, EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, Exit, RunningEngine, Supervisor
from mesh_llm.models.library.library import LocalModel
from mesh_llm.runtime.supervision import TaskScope, wait_for_event

_REASON_WAIT = 0.5
_END_WAIT = 2.0
"""The longest time between a broken connection to an engine and its exit."""
_BATCH = 2048
"""Tokens of a prompt in one batch: llama.cpp's default."""
_REMOTE = "RPC"
"""How llama.cpp names the memory of workers (ggml-rpc.cpp)."""

_log = structlog.get_logger(__name__)


@dataclass
class _Launch:
    """One term of one model.

    `launched` is set when `engine` is known, or when there will be none. `asked` is set when it is to stop. `broken`
    says why the tunnels of a split model ended. `ended` is set when the launch is over. `group`: of a split model with
    several engines, which are `members`; `engine` is the first one then.
    """

    term: Term
    engine: RunningEngine | None = None
    launched: asyncio.Event = field(default_factory=asyncio.Event)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: bool = False
    broken: str = ""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    stop: asyncio.Task[object] | None = None
    group: EngineGroup | None = None
    members: set[RunningEngine] = field(default_factory=set[RunningEngine])

    @property
    def engines(self) -> set[RunningEngine]:
        """All of its engines."""
        return self.members | ({self.engine} if self.engine is not None else set())


class Engines:
    """All engine launches of this daemon."""

    def __init__(
        self,
        machine: Machine,
        supervisor: Supervisor,
        traffic: TrafficMeter,
        post: Callable[[AnyEvent], None],
        splits: SplitHostService | None = None,
        notify: Callable[[Notice], None] = lambda _: None,
    ) -> None:
        """`splits` opens the tunnels of split models; `notify` shows a notice to the user.

        `caches`, set afterwards, saves the prompt caches of slots.

        On a machine without an engine source, launches end at once.
        """
        self._machine = machine
        self._supervisor = supervisor
        self._traffic = traffic
        self._post = post
        self._splits = splits
        self._notify = notify
        self.caches: SlotCaches | None = None
        self.guessing = EngineGuessing()
        traffic.observe_end = self.guessing.ended
        self._launches: dict[ModelName, _Launch] = {}
        self._ends: dict[ModelName, tuple[Term, EngineEnd]] = {}
        self._keys: dict[str, str] = {}
        self._dispatches: dict[str, Dispatch] = {}
        self._unfit: set[ModelName] = set()
        self._scope = TaskScope("launches")

    def start(self, effect: StartEngine) -> None:
        """Launch; EngineReady and EngineExited follow."""
        launch = _Launch(effect.term)
        self._launches[effect.plan.model] = launch
        self._scope.spawn(self._live(effect, launch), f"{effect.plan.model}#{effect.term}")

    def stop(self, effect: StopEngine) -> None:
        """Let requests finish for a while, then stop. A second call sets a new time limit. EngineExited follows."""
        launch = self._launches.get(effect.model)
        if launch is None or launch.term != effect.term:
            return
        launch.stopping = True
        launch.asked.set()
        if launch.stop is not None:
            launch.stop.cancel()
        launch.stop = self._scope.spawn(self._stop(effect, launch), f"stop {effect.model}#{effect.term}")

    async def end_of(self, model: str, term: int) -> EngineEnd:
        """How a launch ended; waits `_END_WAIT` if it has not."""
        name = ModelName(model)
        launch = self._launches.get(name)
        if launch is not None and launch.term == term and not await wait_for_event(launch.ended, _END_WAIT):
            return EngineEnd.RUNNING
        last, end = self._ends.get(name, (0, EngineEnd.EXPLAINED))
        return end if last == term else EngineEnd.EXPLAINED

    def key_of(self, address: str) -> str:
        """The API key of the engine at an address. It stays out of the core, whose events are journalled."""
        return self._keys.get(address, "")

    def place(self, address: str, path: str, body: bytes) -> Place:
        """The engine that gets a request for the launch at an address, and the slot there."""
        found = self._dispatches.get(address)
        return Place(address, _nothing) if found is None or not found.engines else found.place(path, body)

    def slots(self, address: str) -> Sequence[EngineSlots]:
        """The engines of the launch at an address, if several are to serve it as one; else none."""
        found = self._dispatches.get(address)
        return () if found is None else found.numbered

    async def close(self) -> None:
        """Stop watching. The supervisor ends the child processes."""
        await self._scope.close()
        await self.guessing.close()

    async def _live(self, effect: StartEngine, launch: _Launch) -> None:
        model, term = effect.plan.model, effect.term
        try:
            ended = await self._run(effect, launch)
        except MeshError as error:
            ended = _failed(str(error))
        except OSError as error:
            # No file descriptors or no port left: the launch failed as if the engine had failed.
            _log.exception("launch failed", model=model, term=term)
            ended = _failed(f"this node could not start it: {error.strerror or error}")
        except Exception:  # noqa: BLE001 - the engine's boundary: after any failure, its memory must not stay reserved
            _log.exception("launch failed", model=model, term=term)
            ended = _failed("this node failed to start it. This is a fault in mesh-llm: see mesh-llm logs")
        finally:
            launch.launched.set()
        for engine in launch.engines:
            if engine.running:
                engine.kill()
                await engine.wait()
        if self._launches.get(model) is launch:
            del self._launches[model]
        self._ends[model] = (term, EngineEnd.EXPLAINED if launch.stopping or launch.broken else ended.end)
        launch.ended.set()
        _log.info("engine ended", model=model, term=term, code=ended.code, asked=ended.asked)
        self._post(
            EngineExited(
                model=model,
                term=term,
                code=ended.code,
                reason=ended.reason,
                never_ready=ended.never_ready,
                out_of_memory=self._short(ended),
            )
        )

    def _short(self, ended: Exit) -> bool:
        """Whether the devices' memory was too little. Main memory beside a GPU's is another matter, and a worker's."""
        cpu_only = not self._machine.accelerators
        own = bool(ended.refused) and not ended.refused.startswith(_REMOTE)
        return own and (cpu_only or not ended.refused.startswith(CPU_DEVICE))

    async def _run(self, effect: StartEngine, launch: _Launch) -> Exit:
        if self._machine.source is None:
            raise MeshError(code="engine_missing", message="This node runs no engine.", status=503)
        source, spec = self._machine.source, self.spec(effect)
        self._say_instead(effect)
        if effect.plan.split is None or self._splits is None:
            return await self._serve(source, effect, launch, spec)
        session = await self._opened(self._splits, effect, spec, launch)
        if session is None:
            return Exit(code=0, reason="stopped", never_ready=True, asked=True)
        if session.pool and session.host.pools:
            return await self._run_group(_GroupLaunch(source, effect, launch, spec, self._splits), session)
        if effect.plan.split.groups > 1:
            # A worker of another version cannot share weights: all slots are in one engine.
            one = msgspec.structs.replace(effect.plan.split, groups=1)
            plan = msgspec.structs.replace(effect.plan, split=one)
            spec = self.spec(msgspec.structs.replace(effect, plan=plan))
        broken = self._scope.spawn(self._broken(self._splits, session, effect, launch), "tunnels")
        try:
            ended = await self._serve(
                source, effect, launch, split_spec(spec, session, self._machine.accelerators), session.loading.ready
            )
            if not ended.asked:
                # A lost tunnel ends the engine too, and is the better explanation.
                await asyncio.wait({broken}, timeout=_REASON_WAIT)
            if ended.refused.startswith(_REMOTE) and not launch.broken:
                # The worker sees it too, and offers less from now on.
                return replace(ended, reason="the device of a worker gave too little memory for its layers")
            return replace(ended, reason=launch.broken, asked=False) if launch.broken else ended
        finally:
            broken.cancel()
            await self._splits.close(session)

    async def _run_group(self, group: "_GroupLaunch", session: HostSession) -> Exit:
        """Several engines over one split model, each with its part of the slots."""
        effect, launch, splits = group.effect, group.launch, group.splits
        model, term = effect.plan.model, effect.term
        first = session
        address = ""

        def post(info: EngineReadyInfo) -> None:
            # The core knows all of them by the address of the one that answered first.
            nonlocal address
            if not address:
                address = info.address
                self._dispatches[address] = engines.dispatch
            self._post(
                EngineReady(
                    model=model,
                    term=term,
                    address=address,
                    context=info.context,
                    slots=engines.slots,
                    embeddings=info.embeddings,
                )
            )

        async def run(begins: bool, joined: Joined) -> Exit:
            return await self._run_member(group, first if begins else await splits.open_another(first), joined)

        engines = launch.group = EngineGroup(
            model, session.layout.groups, run, lambda: post(engines.engines[0].info), lambda: launch.stopping
        )
        try:
            ended = await engines.run(post)
        finally:
            self._dispatches.pop(address, None)
        return replace(ended, reason=launch.broken, asked=False) if launch.broken else ended

    async def _run_member(self, group: "_GroupLaunch", session: HostSession, joined: Joined) -> Exit:
        """One of several engines, with tunnels of its own, until its end."""
        effect, launch, splits = group.effect, group.launch, group.splits
        spec = split_spec(group.spec, session, self._machine.accelerators)
        broken = self._scope.spawn(splits.broken(session, effect.plan.model), "tunnels")
        engine: RunningEngine | None = None
        try:
            command = await self._supervisor.server_command(group.source, spec)
            if launch.stopping:
                return Exit(code=0, reason="stopped", never_ready=True, asked=True)
            engine = await self._supervisor.launch(command, effect.plan.model)
            launch.engine = launch.engine or engine
            launch.members.add(engine)
            launch.launched.set()
            _log.info("engine started", model=effect.plan.model, term=effect.term, pid=engine.pid, engines="several")

            def ready(info: EngineReadyInfo) -> None:
                self._watch_slots(effect, spec, info)
                joined(DispatchedEngine(info))

            ended = await self._follow(engine, broken, session, ready)
            if not ended.asked and not launch.stopping:
                # A lost tunnel ends the engine too, and is the better explanation.
                await asyncio.wait({broken}, timeout=_REASON_WAIT)
            launch.broken = str(broken.result()) if broken.done() and not launch.stopping else ""
            return ended
        finally:
            broken.cancel()
            if engine is not None:
                if engine.running:
                    engine.kill()
                    await engine.wait()
                launch.members.discard(engine)
                if engine.info is not None:
                    self._unwatch_slots(effect, engine.info)
            await splits.close(session)

    async def _follow(
        self,
        engine: RunningEngine,
        broken: asyncio.Task[object],
        session: HostSession,
        ready: Callable[[EngineReadyInfo], None],
    ) -> Exit:
        """Wait for an engine's end, and end it when its tunnels have ended."""

        async def kill() -> None:
            await asyncio.wait({broken})
            engine.kill()

        killing = self._scope.spawn(kill(), "lost tunnels")
        try:
            outcome = await engine.ready()
            if isinstance(outcome, Exit):
                return outcome
            session.loading.ready()
            self._keys[outcome.address] = outcome.key
            ready(outcome)
            try:
                return await engine.wait()
            finally:
                self._keys.pop(outcome.address, None)
        finally:
            killing.cancel()

    async def _opened(
        self, splits: SplitHostService, effect: StartEngine, spec: EngineSpec, launch: _Launch
    ) -> HostSession | None:
        """The tunnels to all workers; None if the launch was stopped meanwhile. Raises MeshError."""

        async def try_open() -> HostSession | MeshError:
            try:
                return await splits.open(
                    effect.plan, spec.model, self._facts(effect), self._traffic.tokens(effect.plan.model)
                )
            except MeshError as error:
                return error

        opening = self._scope.spawn(try_open(), "open tunnels")
        stopped = self._scope.spawn(launch.asked.wait(), "stopped")
        try:
            await asyncio.wait({opening, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                return None
            outcome: HostSession | MeshError = opening.result()
            if isinstance(outcome, MeshError):
                raise outcome
            return outcome
        finally:
            opening.cancel()
            stopped.cancel()

    async def _broken(
        self, splits: SplitHostService, session: HostSession, effect: StartEngine, launch: _Launch
    ) -> None:
        error = await splits.broken(session, effect.plan.model)
        if not launch.stopping:
            launch.broken = str(error)
        if launch.engine is not None:
            launch.engine.kill()

    async def _serve(
        self,
        source: EngineSource,
        effect: StartEngine,
        launch: _Launch,
        spec: EngineSpec,
        ready: Callable[[], None] = lambda: None,
    ) -> Exit:
        model, term = effect.plan.model, effect.term
        command = await self._supervisor.server_command(source, spec)
        if launch.stopping:
            return Exit(code=0, reason="stopped", never_ready=True, asked=True)
        engine = launch.engine = await self._supervisor.launch(command, model)
        launch.launched.set()
        _log.info("engine started", model=model, term=term, pid=engine.pid)
        outcome = await engine.ready()
        if isinstance(outcome, Exit):
            if self._heads_fail(effect, launch, spec, outcome):
                # The tunnels of a split model have ended with the engine: the core starts it again.
                alone = effect.plan.split is None
                return await self._serve(source, effect, launch, self.spec(effect), ready) if alone else outcome
            guessed = spec.mmproj is not None and effect.plan.split is None
            if not guessed or launch.stopping or outcome.asked or outcome.refused:
                return outcome
            self._set_aside(model, spec.mmproj, outcome)
            return await self._serve(source, effect, launch, replace(spec, mmproj=None), ready)
        ready()
        self._keys[outcome.address] = outcome.key
        self._dispatches[outcome.address] = Dispatch(model, [DispatchedEngine(outcome)])
        self._post(
            EngineReady(
                model=model,
                term=term,
                address=outcome.address,
                context=outcome.context,
                slots=outcome.slots,
                embeddings=outcome.embeddings,
            )
        )
        self._watch_slots(effect, spec, outcome)
        ran = spec.unswitched if outcome.speculation is None else spec
        self.guessing.opened(model, term, outcome.speculation, kind=ran.speculation_type, auto=spec.while_it_pays)
        try:
            return await engine.wait()
        finally:
            self._keys.pop(outcome.address, None)
            self._dispatches.pop(outcome.address, None)
            self.guessing.closed(model, term)
            self._unwatch_slots(effect, outcome)

    def _watch_slots(self, effect: StartEngine, spec: EngineSpec, info: EngineReadyInfo) -> None:
        """Save what is in the engine's slots from now on."""
        model = self._machine.registry.find(effect.plan.model)
        if self.caches is None or model is None:
            return
        files = (*model.paths, *(() if spec.mmproj is None else (spec.mmproj,)))
        context = effect.plan.context
        token_bytes = cache_bytes(model.facts, context, 1, effect.plan.cache_type) // context
        self.caches.opened(effect.plan.model, effect.term, spec, files, token_bytes, info)

    def _unwatch_slots(self, effect: StartEngine, info: EngineReadyInfo) -> None:
        if self.caches is not None:
            self.caches.closed(effect.plan.model, effect.term, info.address)

    def _set_aside(self, model: ModelName, projector: Path | None, ended: Exit) -> None:
        """The engine did not start with the projector that lies beside the model: start it without."""
        _log.warning("projector set aside", model=model, projector=str(projector), reason=ended.reason)
        self._machine.registry.drop_projector(model)
        text = f"{model} did not start with the projector {projector}, so it is served without: no images."
        self._notify(Notice(level=NoticeLevel.WARNING, code="projector_unfit", text=text, about=model))

    async def _stop(self, effect: StopEngine, launch: _Launch) -> None:
        await launch.launched.wait()
        if launch.engine is None:
            return
        try:
            async with asyncio.timeout(effect.drain_seconds):
                await self._traffic.idle(effect.model)
        except TimeoutError:
            _log.info("requests cut", model=effect.model, term=effect.term, after=effect.drain_seconds)
        if self.caches is not None:
            await self.caches.save(effect.model, effect.term)
        await asyncio.gather(*(engine.stop() for engine in launch.engines))

    def _guesses(self, effect: StartEngine, model: LocalModel) -> LaunchGuesses:
        return choose_guesses(effect, model, self._machine, unfit=model.name in self._unfit)

    def _say_instead(self, effect: StartEngine) -> None:
        """Tell the user where a model does not guess as they said."""
        model = self._machine.registry.find(effect.plan.model)
        guesses = None if model is None else self._guesses(effect, model)
        if guesses is not None and guesses.instead:
            about = effect.plan.model
            self._notify(Notice(level=NoticeLevel.WARNING, code="spec_instead", text=guesses.instead, about=about))

    def _heads_fail(self, effect: StartEngine, launch: _Launch, spec: EngineSpec, ended: Exit) -> bool:
        """Whether an engine that was to guess by the model's own heads did not start: the next one has others."""
        own = spec.speculation == OWN_HEADS and spec.draft is None
        if not own or launch.stopping or launch.broken or ended.asked or ended.refused:
            return False
        _log.warning("own heads set aside", model=effect.plan.model, reason=ended.reason)
        self._unfit.add(effect.plan.model)
        self._say_instead(effect)
        return True

    def _facts(self, effect: StartEngine) -> ModelFacts:
        model = self._machine.registry.find(effect.plan.model)
        if model is None:
            raise _gone(effect.plan.model)
        return model.facts

    def spec(self, effect: StartEngine) -> EngineSpec:
        """The engine's command line for a launch. Raises MeshError `model_gone` if the model's file is gone."""
        plan, options = effect.plan, effect.options
        model = self._machine.registry.find(plan.model)
        if model is None:
            raise _gone(plan.model)
        pieces = 0 if plan.split is None else plan.split.micro_batch
        groups = 1 if plan.split is None else plan.split.groups
        slots = plan.slots // groups
        batch = pieces or batch_tokens(model.facts, plan.context)
        offload, chosen = plan.offload, options.engine
        guesses = self._guesses(effect, model)
        return EngineSpec(
            model=model.path,
            alias=plan.model,
            context=plan.context,
            slots=slots,
            draft=guesses.draft,
            draft_max=guesses.most,
            devices=(CPU_DEVICE,) if offload is not None and not offload.gpu_layers else self._machine.devices,
            # llama.cpp counts the output layer as the last one.
            gpu_layers=None if offload is None else offload.gpu_layers + min(1, offload.gpu_layers),
            cpu_moe=0 if offload is None else offload.cpu_moe,
            cache_type=plan.cache_type,
            mmproj=model.projector if options.use_projector else None,
            sampling=chosen.sampling,
            speculation=guesses.kind,
            while_it_pays=guesses.while_it_pays,
            mtp_layers=guesses.here,
            chat_template=chosen.chat_template,
            reasoning_budget=chosen.reasoning_budget,
            environment=chosen.environment,
            more=chosen.engine_args,
            pooling=_pooling(model.facts),
            # llama.cpp requires a multiple of the slots.
            micro_batch=-(-batch // slots) * slots if model.facts.one_batch else batch,
            batch=max(_BATCH, batch + slots),
        )


@dataclass(frozen=True)
class _GroupLaunch:
    """What all engines of a launch have in common."""

    source: EngineSource
    effect: StartEngine
    launch: _Launch
    spec: EngineSpec
    splits: SplitHostService


def _nothing() -> None:
    return None


def _failed(reason: str) -> Exit:
    return Exit(code=1, reason=reason, never_ready=True, asked=False)


def _pooling(facts: ModelFacts) -> str:
    """The engine's pooling: as the file says; `mean` if it says nothing, and for chat models that also embed."""
    if facts.kind is ModelKind.RERANK:
        return "rank"
    own = facts.pooling if facts.kind is ModelKind.EMBEDDING else ""
    return "mean" if own in {"", "none"} else own


def _gone(model: ModelName) -> MeshError:
    return MeshError(
        code="model_gone",
        message=f"The file of {model} is not there any more.",
        hint="Put it back, or drop the model.",
        status=404,
    )
