"""Builds what this node's engine lacks, in the background. Afterwards the node can do more, without a restart."""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.daemon.model_registry import Machine, lending_of, rpc_of
from mesh_llm.daemon.published_state import PublishedState
from mesh_llm.engine.installation import MANIFEST, build_directories
from mesh_llm.engine.process import Child, Command, python_module
from mesh_llm.engine.sources.embedded.install_main import FAILED, InstallStep
from mesh_llm.engine.sources.embedded.plugin import RPC
from mesh_llm.engine.spec import EngineInfo, EnginePart, PartState
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import current_supervision

_POLL_MS = 5_000
_WHAT = "the RPC plugin"

_log = structlog.get_logger(__name__)


class EngineSetup:
    """The parts of the engine that are built on this machine; at present only the RPC plugin, which splits models."""

    def __init__(
        self, machine: Machine, home: Home, post: Callable[[AnyEvent], None], published: PublishedState
    ) -> None:
        """A machine whose engine has no such parts builds nothing."""
        self._source = machine.source
        self._home = home
        self._post = post
        self._published = published
        self._supervision = current_supervision()
        self._building = False
        self.parts = machine.parts
        """As they are now, for people."""
        self.lending = machine.lending
        """As in Machine."""

    async def run(self) -> None:
        """Build the plugin unless it is there. What could not be built is taken up when somebody builds it."""
        part = next((one for one in self.parts if one.name == RPC), None)
        if part is None or part.state is PartState.READY:
            return
        if part.state is PartState.MISSING:
            part = await self._build(part)
        while part.state is not PartState.READY:
            self._explain(part)
            await self._changed()
            part = await self._look()

    async def _build(self, part: EnginePart) -> EnginePart:
        """Run the build. Returns what became of the plugin."""
        failed = part
        # A plugin that does not even start is built again.
        force = ("--force",) if part.path else ()
        argv, env = python_module("mesh_llm.engine.sources.embedded.install_main", str(self._home.cache), *force)

        def on_line(line: bytes) -> None:
            nonlocal failed
            with suppress(msgspec.MsgspecError):
                step = msgspec.json.decode(line, type=InstallStep)
                if step.step == FAILED:
                    failed = EnginePart(name=RPC, state=PartState.FAILED, text=step.text, hint=step.hint)
                elif step.step != "done":
                    self._show(EnginePart(name=RPC, state=PartState.BUILDING, text=step.text))

        try:
            child = await Child.spawn(Command(argv=argv, env=env), self._home.logs / "engine-install.log", on_line)
        except MeshError as error:
            return EnginePart(name=RPC, state=PartState.FAILED, text=error.message, hint=error.hint)
        try:
            code = await child.wait()
        finally:
            child.kill()
        _log.info("engine install ended", code=code)
        if code == 0:
            return await self._look()
        if failed.state is PartState.FAILED:
            return failed
        text = f"The RPC plugin was not built: {child.last_lines() or f'status {code}'}"
        return EnginePart(name=RPC, state=PartState.FAILED, text=text, hint="Run `mesh-llm engine install`.")

    async def _look(self) -> EnginePart:
        """Examine the engine again. If the plugin works, this node can split models from now on."""
        info = await self._source.info() if self._source is not None else EngineInfo(source="")
        part = next((one for one in info.parts if one.name == RPC), EnginePart(name=RPC, state=PartState.FAILED))
        if part.state is PartState.MISSING:
            part = msgspec.structs.replace(part, state=PartState.FAILED)
        if part.state is PartState.READY:
            self._show(part)
            self.lending = lending_of(info)
            self._post(rpc_of(info))
            self._supervision.forget(_WHAT)
            code, level = ("rpc_unconfined", NoticeLevel.WARNING) if info.not_lent else ("rpc_ready", NoticeLevel.INFO)
            text = info.not_lent or "The RPC plugin is built: this node can take part in split models."
            self._published.notices.add(Notice(level=level, code=code, text=text))
        return part

    def _explain(self, part: EnginePart) -> None:
        """Say why this node cannot split models: to its user, and to the others."""
        self._show(part)
        self._post(rpc_of(EngineInfo(source="", parts=(part,))))
        text = f"This node cannot take part in split models. {part.text} {part.hint}".strip()
        self._supervision.begin(_WHAT, text, "rpc_plugin_missing")

    async def _changed(self) -> None:
        """Return when a manifest changes: `mesh-llm engine install` has built something."""
        from watchfiles import Change, awatch  # pyright: ignore[reportUnknownVariableType]

        def is_manifest(_: Change, path: str) -> bool:
            return Path(path).name == MANIFEST

        places = [place for place in build_directories(self._home.cache) if await asyncio.to_thread(_made, place)]
        async for _ in awatch(*places, watch_filter=is_manifest, poll_delay_ms=_POLL_MS):
            return
        # Nowhere could it be built.
        await asyncio.Event().wait()

    def _show(self, part: EnginePart) -> None:
        self.parts = tuple(part if one.name == part.name else one for one in self.parts)
        if part.state is PartState.BUILDING:
            self._building = True
            self._published.engine_progress(part.text)
        elif part.state is PartState.FAILED and self._building:
            self._building = False
            self._published.engine_progress("the RPC plugin was not built", ended=True)
        else:
            self._published.changes.notify()


def _made(place: Path) -> bool:
    """Whether the directory is there; it is made if that is possible."""
    with suppress(OSError):
        place.mkdir(parents=True, exist_ok=True)
    return place.is_dir()
