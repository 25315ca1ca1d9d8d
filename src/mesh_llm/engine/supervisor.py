"""Runs engines as children: each becomes ready, or ends with a reason. Others decide whether to start one again."""

import asyncio
import os
import re
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog

from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine.confinement.policy import is_confined
from mesh_llm.engine.devices import oom_kills
from mesh_llm.engine.probe import (
    QUEUE_PATH,
    ReservedPort,
    get,
    is_healthy,
    properties,
    rpc_version,
    stuck_seconds,
    until_stuck,
)
from mesh_llm.engine.process import Child, Command, Readiness, listening_port, log_name
from mesh_llm.engine.slots import SlotControl
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.spec import LOOPBACK, EngineSpec, RpcWorkerSpec
from mesh_llm.runtime.local_socket import PrivateDirectory
from mesh_llm.runtime.network import UNIX
from mesh_llm.runtime.supervision import TaskScope

_HEALTH_INTERVAL = 0.05
"""Seconds between two looks at whether the engine is ready."""

_FROM_OUTSIDE = frozenset((signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM))
"""Signals that no engine sends to itself."""

_log = structlog.get_logger(__name__)

STOP_GRACE = 1.0
"""Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class EngineReadyInfo:
    """What a child offers that is ready.

    Attributes:
        address: `unix:PATH` in a private directory, or `host:port` on loopback.
        key: what an HTTP server requires as `Authorization: Bearer`; empty for nothing.
        context: tokens per slot, as the engine reports; 0 for an RPC worker.
        slots: requests worked on at once; 0 for an RPC worker.
        embeddings: whether it answers /v1/embeddings.
        rpc_version: protocol of an RPC worker; else empty.
        slot_control: its slots can be saved and restored; None if they cannot.
        speculation: switches its guesses on and off; None where it makes none, or cannot be switched.
    """

    address: str
    key: str = field(default="", repr=False)
    context: int = 0
    slots: int = 0
    embeddings: bool = False
    rpc_version: str = ""
    slot_control: SlotControl | None = None
    speculation: SlotControl | None = None


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a child ended.

    Attributes:
        code: exit status; negative for the signal that ended it.
        reason: its last lines, or what the signal means.
        never_ready: it ended before it was ready.
        asked: this node stopped it.
        out_of_memory: the system killed a process while it ran, because memory ran out.
        stuck: it was killed because its task queue gave no answer.
        refused: the memory that it asked for and did not get, as llama.cpp names it (`Vulkan0`, `CPU`); empty: none.
    """

    code: int
    reason: str
    never_ready: bool
    asked: bool
    out_of_memory: bool = False
    stuck: bool = False
    refused: str = ""

    @property
    def end(self) -> EngineEnd:
        """Whether the requests that it worked on may be the cause."""
        if self.asked or self.never_ready or self.code == 0:
            return EngineEnd.EXPLAINED
        if self.stuck:
            return EngineEnd.CRASHED
        if self.code == -signal.SIGKILL and self.out_of_memory:
            return EngineEnd.OUT_OF_MEMORY
        return EngineEnd.EXPLAINED if -self.code in _FROM_OUTSIDE else EngineEnd.CRASHED


class RunningEngine:
    """A started child. `ready()` and `wait()` may be awaited by any number, in any order."""

    def __init__(self, command: Command, log_path: Path) -> None:
        self._command = command
        self.log_path = log_path
        self.info: EngineReadyInfo | None = None
        self._address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        if command.address:
            self._address.set_result(command.address)
        self._scope = TaskScope(f"engine {log_path.stem}", lambda _: self._child.kill())
        self._asked = False
        self._kills = oom_kills()
        self._unusable = ""
        self._watchdog: asyncio.Task[object] | None = None
        self._stuck = False
        self._refused = ""

    async def start(self) -> None:
        """Start the child; once. Raises MeshError `engine_cannot_start`."""
        self._child = await Child.spawn(self._command, self.log_path, self._on_line)
        self._end = self._scope.spawn(self._watch(), "end")
        self._preparing = self._scope.spawn(self._prepare(), "ready")

    @property
    def pid(self) -> int:
        """Process id."""
        return self._child.pid

    @property
    def reference(self) -> bool:
        """Whether it is an RPC server that computes on the processor with the pinned release's kernels."""
        return self._command.reference

    @property
    def socket(self) -> Path | None:
        """The Unix socket that it listens on; None if it listens on a port."""
        path = self._command.address.removeprefix(UNIX)
        return None if path == self._command.address else Path(path)

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return self._child.running

    async def ready(self) -> EngineReadyInfo | Exit:
        """Wait until it is ready, or has ended."""
        await asyncio.wait({self._preparing, self._end}, return_when=asyncio.FIRST_COMPLETED)
        if self.info is None:
            # It ended, or a bug stopped `_prepare`.
            self._child.kill()
        return self.info or await self.wait()

    async def wait(self) -> Exit:
        """Wait for its end."""
        return await asyncio.shield(self._end)

    async def stop(self, grace: float = STOP_GRACE) -> Exit:
        """End it: SIGTERM first, SIGKILL after `grace` seconds."""
        self._asked = True
        await self._child.stop(grace)
        return await self.wait()

    def kill(self) -> None:
        """End it at once, without waiting."""
        self._asked = True
        self._child.kill()

    def _on_line(self, line: bytes) -> None:
        if not self._address.done() and (port := listening_port(line)) is not None:
            self._address.set_result(f"{LOOPBACK}:{port}")
        if self.info is None and not self._refused:
            self._refused = refused_memory(line.decode(errors="replace"))

    async def _watch(self) -> Exit:
        code = await self._child.wait()
        _drop(self._command.key_file)
        helpers = {self._preparing} if self._watchdog is None else {self._preparing, self._watchdog}
        for helper in helpers:
            helper.cancel()
        await asyncio.wait(helpers)
        return Exit(
            code=code,
            reason=self._reason(code),
            never_ready=self.info is None,
            asked=self._asked,
            out_of_memory=oom_kills() > self._kills,
            stuck=self._stuck,
            refused=self._refused or refused_memory(self._child.last_lines()),
        )

    def _reason(self, code: int) -> str:
        if self._unusable:
            return self._unusable
        if self._asked:
            return "stopped"
        lines = self._child.last_lines()
        if self._stuck:
            seconds = self._command.stuck_seconds
            shown = f"{seconds / 60:.0f} min" if seconds >= 60 else f"{seconds:g} s"
            return f"it was stuck: its task queue gave no answer for {shown}, so it was ended\n{lines}".strip()
        if code >= 0:
            return lines
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"ended by {name}{_hint(-code, started=self.info is not None)}\n{lines}".strip()

    async def _prepare(self) -> None:
        address = await self._address
        if self._command.readiness is Readiness.RPC:
            while (version := await rpc_version(address)) is None:
                await self._pause()
            if self._command.confined and not is_confined(self._child.pid):
                self._unusable = "The RPC server is not confined, so it is not used."
                self._child.kill()
                return
            self.info = EngineReadyInfo(address=address, rpc_version=version)
            return
        key = self._command.key
        while not await is_healthy(address) or (props := await properties(address, key)) is None:
            await self._pause()
        # The engine has read it.
        _drop(self._command.key_file)
        slots = self._command.slot_socket
        self.info = EngineReadyInfo(
            address=address,
            key=key,
            context=props.context,
            slots=props.slots,
            embeddings=self._command.embeddings,
            slot_control=SlotControl(slots, key) if slots is not None and self._command.saves_slots else None,
            speculation=SlotControl(slots, key) if slots is not None and self._command.speculates else None,
        )
        if self._command.stuck_seconds:
            self._watchdog = self._scope.supervise(lambda: self._watch_queue(address, key), "watchdog")

    async def _watch_queue(self, address: str, key: str) -> None:
        limit = self._command.stuck_seconds

        def ask() -> asyncio.Task[object]:
            question = get(address, QUEUE_PATH, timeout=2 * limit, key=key)
            # A failed question fails the watchdog, which is restarted; the engine goes on.
            return self._scope.spawn(question, "question", lambda _: None)

        await until_stuck(ask, limit)
        _log.warning("engine stuck", pid=self.pid, seconds=limit, log=str(self.log_path))
        self._stuck = True
        self._child.kill()

    async def _pause(self) -> None:
        await asyncio.wait({self._end}, timeout=_HEALTH_INTERVAL)


class Supervisor:
    """All engines of one daemon. `close` leaves no child and no port behind."""

    def __init__(self, logs: Path, stuck: Callable[[int], float] = stuck_seconds, *, saves_slots: bool = False) -> None:
        """`stuck`: seconds without an answer after which a server's queue counts as stuck, by the size of its batch.

        `saves_slots`: engines that can do so give access to their slots.
        """
        self._saves_slots = saves_slots
        self._logs = logs
        self._stuck = stuck
        self._running: set[RunningEngine] = set()
        self._private: PrivateDirectory | None = None
        self._count = 0
        self._scope = TaskScope("engines")

    def log_path(self, name: str) -> Path:
        """The log of a child."""
        return self._logs / f"engine-{log_name(name)}.log"

    async def launch(self, command: Command, name: str) -> RunningEngine:
        """Start a child. Returns when it runs, before it is ready.

        Args:
            command: what to run.
            name: for its log, `engine-NAME.log`.

        Raises:
            MeshError: `engine_cannot_start`.
        """
        engine = RunningEngine(command, self.log_path(name))
        await engine.start()
        self._running.add(engine)
        self._scope.spawn(self._forget(engine), name)
        return engine

    async def server_command(self, source: EngineSource, spec: EngineSpec) -> Command:
        """The command of a server that only this user can reach, and only with a key that is made here.

        It listens on a Unix socket in a private directory if the engine can do that, else on loopback.

        Raises:
            MeshError: `engine_without_rpc`, `engine_option_unknown`, `no_private_directory`.
        """
        key = secrets.token_urlsafe(32)
        socket = self._socket_path()
        key_file = socket.with_suffix(".key")
        _write_key(key_file, key)
        try:
            slots = socket.with_suffix(".slots") if self._saves_slots or spec.speculation_type else None
            command = await source.server(replace(spec, socket=socket, key_file=key_file, slot_socket=slots))
        except BaseException:
            _drop(key_file)
            raise
        return replace(command, key=key, key_file=key_file, stuck_seconds=self._stuck(spec.batch))

    def private(self) -> Path:
        """A directory that only this user can enter; `close` removes it. Raises MeshError `no_private_directory`."""
        if self._private is None:
            self._private = PrivateDirectory()
        return self._private.path

    def _socket_path(self) -> Path:
        self._count += 1
        return self.private() / f"{self._count}.sock"

    async def launch_rpc_worker(self, source: EngineSource, spec: RpcWorkerSpec, name: str) -> RunningEngine:
        """Start an RPC server on a private socket, and wait until it answers or has ended.

        Raises:
            MeshError: `engine_without_rpc`, `rpc_unconfined`, `engine_cannot_start`, `no_private_directory`.
        """
        with ReservedPort() as port:
            command = await source.rpc_worker(replace(spec, socket=self._socket_path(), port=port.number))
            engine = await self.launch(command, name)
            try:
                await engine.ready()
            except asyncio.CancelledError:
                engine.kill()
                raise
        return engine

    async def close(self, grace: float = STOP_GRACE) -> None:
        """Stop all children at once. Idempotent."""
        await asyncio.gather(*(engine.stop(grace) for engine in list(self._running)))
        await self._scope.close()
        if self._private is not None:
            self._private.close()
            self._private = None

    def kill(self) -> None:
        """End all children without waiting: for the second Ctrl-C."""
        for engine in self._running:
            engine.kill()

    async def _forget(self, engine: RunningEngine) -> None:
        try:
            await engine.wait()
        finally:
            self._running.discard(engine)
            if engine.socket is not None:
                engine.socket.unlink(missing_ok=True)
                engine.socket.with_suffix(".slots").unlink(missing_ok=True)


_REFUSED = re.compile(
    r"(?:unable|failed) to allocate (?P<buffer>\S+) buffer|failed to allocate (?:compute \w+ buffers|buffer)"
    r"|cudaMalloc failed: out of memory|out of memory|OutOfDeviceMemory",
    re.IGNORECASE,
)


def refused_memory(text: str) -> str:
    """The memory that llama.cpp says it did not get, as in `CUDA0`; `device` where it names none; empty: no such line.

    Sources: llama-model.cpp, llama-kv-cache.cpp, llama-context.cpp, ggml-backend.cpp, ggml-alloc.c, ggml-cuda.cu,
    ggml-vulkan-buffers.cpp.
    """
    match = _REFUSED.search(text)
    return "" if match is None else match["buffer"] or "device"


def _write_key(path: Path, key: str) -> None:
    """Create a file that only this user can read. Not synced: it is read once, within seconds, and removed."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(key)


def _drop(key_file: Path | None) -> None:
    if key_file is not None:
        key_file.unlink(missing_ok=True)


def _hint(number: int, *, started: bool) -> str:
    """The likely cause of a death by a signal. A build from another machine dies where it first computes."""
    if number == signal.SIGKILL:
        return " (out of memory?)"
    if number in {signal.SIGILL, signal.SIGSEGV} and not started:
        return " (llama.cpp built for another processor? Build it with GGML_NATIVE=OFF, or leave --bin-dir out)"
    return ""
