"""Builds what this node's engine lacks, in the background. Afterwards the node can do more, without a restart."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.daemon.accelerators import Devices, GpuPlan
from mesh_llm.daemon.model_registry import Machine, rpc_of
from mesh_llm.daemon.published_state import PublishedState
from mesh_llm.engine.accelerators.install_main import FAILED, InstallStep, install_command
from mesh_llm.engine.installation import MANIFEST, build_directories
from mesh_llm.engine.process import Child, Command
from mesh_llm.engine.sources.embedded import slot_library
from mesh_llm.engine.sources.embedded.plugin import RPC
from mesh_llm.engine.sources.embedded.slot_library import SLOTS
from mesh_llm.engine.spec import EngineInfo, EnginePart, PartState
from mesh_llm.models.library.library import builtin_path
from mesh_llm.models.library.watch import NO_TIMEOUT, WATCH_STEP_MS
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import current_supervision

_POLL_MS = 5_000
_LOST_SECONDS = 60.0
"""How often a GPU that was lost is looked for."""
_SHOWN_PERCENT = 10
"""A notice of progress comes each time the percent has risen by this much. The status has every percent."""
_STOP_SECONDS = 10.0
"""For the build's compilers to end and delete what is half-written."""
_RPC = "the RPC plugin"
_GPU = "the GPU"

_log = structlog.get_logger(__name__)


class EngineSetup:
    """The parts of the engine that are built on this machine: the RPC plugin, which splits models, and the GPU's."""

    def __init__(
        self,
        machine: Machine,
        home: Home,
        post: Callable[[AnyEvent], None],
        published: PublishedState,
        devices: Devices,
        plan: GpuPlan,
    ) -> None:
        """A machine whose engine has no such parts builds nothing. `plan`: about its GPU."""
        self._machine = machine
        self._home = home
        self._post = post
        self._published = published
        self._devices = devices
        self._plan = plan
        self._supervision = current_supervision()
        self._building: dict[str, str] = {}
        """The step that was told last, by part."""
        self._suspected = asyncio.Event()
        self._shares = machine.rpc.rpc_version != ""
        self.parts = machine.parts
        """As they are now, for people."""

    async def run(self) -> None:
        """Build what is missing. Then take up what somebody builds, and devices that go away and come back."""
        if self._machine.source is None:
            return
        rpc = self._part(RPC)
        if rpc is not None and rpc.state is PartState.MISSING:
            # A plugin that does not even start is built again.
            await self._provide(RPC, *(("--force",) if rpc.path else ()))
        elif rpc is not None:
            self._examine_rpc(rpc)
        if await self._lacks_slots():
            await self._provide(SLOTS)
        if self._plan.part:
            tiny = builtin_path("tiny")
            await self._provide(self._plan.part, *(() if tiny is None else ("--model", str(tiny))))
        elif self._plan.problem:
            self._supervision.begin(_GPU, self._plan.problem, "device_unused")
        while True:
            await self._changed()
            await self._look()

    async def _lacks_slots(self) -> bool:
        """Whether what saves prompt caches can be built here: the RPC plugin's build has left the source."""
        if self._part(SLOTS) is None:
            return False
        return (await asyncio.to_thread(slot_library.status, self._home.cache)).state is PartState.MISSING

    def suspect(self) -> None:
        """An engine ended unasked: look whether its devices are still there."""
        if self._machine.accelerators:
            self._suspected.set()

    async def _provide(self, name: str, *options: str) -> None:
        """Build a part, and use it. If that fails, show the reason and keep it in the status."""
        failed = await self._build(name, *options)
        if failed is None:
            await self._look()
            return
        self._show(failed)
        if name == RPC:
            self._examine_rpc(failed)
        elif name != SLOTS:
            text = f"The GPU is not used, and the processor serves. {failed.text} {failed.hint}".strip()
            self._supervision.begin(_GPU, text, "device_unused")

    async def _build(self, name: str, *options: str) -> EnginePart | None:
        """Run the build. Returns the part if it failed, with the reason."""
        failed: EnginePart | None = None
        argv, env = install_command(self._home.cache, name, *options)

        def on_line(line: bytes) -> None:
            nonlocal failed
            with suppress(*UNREADABLE):
                step = msgspec.json.decode(line, type=InstallStep)
                if step.step == FAILED:
                    failed = EnginePart(name=name, state=PartState.FAILED, text=step.text, hint=step.hint)
                elif step.step != "done":
                    self._show_step(name, step)

        try:
            child = await Child.spawn(Command(argv=argv, env=env), self._home.logs / "engine-install.log", on_line)
        except MeshError as error:
            return EnginePart(name=name, state=PartState.FAILED, text=error.message, hint=error.hint)
        try:
            code = await child.wait()
        finally:
            if child.running:
                await asyncio.shield(child.stop(_STOP_SECONDS))
        _log.info("engine install ended", part=name, code=code)
        if code == 0:
            return None
        text = f"The {_title(name)} was not built: {child.last_lines() or f'status {code}'}"
        hint = "Run `mesh-llm engine install`."
        return failed or EnginePart(name=name, state=PartState.FAILED, text=text, hint=hint)

    async def _look(self) -> None:
        """Examine the engine again, and use what it can do now."""
        source = self._machine.source
        info = await source.info() if source is not None else EngineInfo(source="")
        notice = await self._devices.use(info)
        # What was not built in the first place is not built now either.
        self.parts = tuple(
            msgspec.structs.replace(part, state=PartState.FAILED) if part.state is PartState.MISSING else part
            for part in info.parts
        )
        self._published.changes.notify()
        rpc = self._part(RPC)
        if rpc is not None:
            self._examine_rpc(rpc, info)
        if notice is not None:
            self._published.notices.add(notice)
        if self._devices.lost:
            text = f"{', '.join(self._devices.lost)} is not there any more, and the processor serves."
            problems = [problem for problem in info.problems if "so the processor serves" in problem]
            self._supervision.begin(_GPU, " ".join((text, *problems)), "device_lost_still")
        elif self._machine.accelerators:
            self._supervision.forget(_GPU)

    def _examine_rpc(self, part: EnginePart, info: EngineInfo | None = None) -> None:
        """Tell this node's user and the others whether this node can split models, where that has changed."""
        if part.state is PartState.FAILED:
            self._shares = False
            self._post(rpc_of(EngineInfo(source="", parts=(part,))))
            text = f"This node cannot take part in split models. {part.text} {part.hint}".strip()
            self._supervision.begin(_RPC, text, "rpc_plugin_missing")
        elif part.state is PartState.READY and info is not None:
            self._supervision.forget(_RPC)
            if self._shares:
                return
            self._shares = True
            self._post(rpc_of(info))
            code, level = ("rpc_unconfined", NoticeLevel.WARNING) if info.not_lent else ("rpc_ready", NoticeLevel.INFO)
            text = info.not_lent or "The RPC plugin is built: this node can take part in split models."
            self._published.notices.add(Notice(level=level, code=code, text=text))

    async def _changed(self) -> None:
        """Return when a manifest changes, as `mesh-llm engine install` does it, or when devices may have changed."""
        from watchfiles import Change, awatch  # pyright: ignore[reportUnknownVariableType]

        def is_manifest(_: Change, path: str) -> bool:
            return Path(path).name == MANIFEST

        places = [place for place in build_directories(self._home.cache) if await asyncio.to_thread(_made, place)]
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOST_SECONDS if self._devices.lost else None):
                if places:
                    stop = self._suspected
                    async for _ in awatch(
                        *places,
                        watch_filter=is_manifest,
                        step=WATCH_STEP_MS,
                        rust_timeout=NO_TIMEOUT,
                        poll_delay_ms=_POLL_MS,
                        stop_event=stop,
                    ):
                        return
                await self._suspected.wait()
        self._suspected.clear()

    def _part(self, name: str) -> EnginePart | None:
        return next((one for one in self.parts if one.name == name), None)

    def _show_step(self, name: str, step: InstallStep) -> None:
        """Show a step of a build; of a compilation, only some of the percents."""
        self._show(EnginePart(name=name, state=PartState.BUILDING, text=step.text, percent=step.percent))
        if name == SLOTS:
            # Five seconds, and nobody waits for it.
            return
        shown = step.step if step.percent is None else f"{step.step} {step.percent // _SHOWN_PERCENT}"
        if self._building.get(name) != shown:
            self._building[name] = shown
            self._published.engine_progress(_stage(name), step.text)

    def _show(self, part: EnginePart) -> None:
        others = tuple(one for one in self.parts if one.name != part.name)
        self.parts = (part, *others) if part.name == RPC else (*others, part)
        if part.state is PartState.FAILED and self._building.pop(part.name, ""):
            self._published.engine_progress(_stage(part.name), f"the {_title(part.name)} was not built", ended=True)
        self._published.changes.notify()


def _stage(name: str) -> str:
    return "plugin" if name == RPC else "gpu"


def _title(name: str) -> str:
    return {RPC: "RPC plugin", SLOTS: "library for prompt caches"}.get(name, f"{name} plugin")


def _made(place: Path) -> bool:
    """Whether the directory is there; it is made if that is possible."""
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    return place.is_dir()
