"""Asks a running engine the few things that tell whether, and how, it can be used.

Tells an engine that is stuck from one that is slow, by a question that only its task queue can answer.

llama-server answers `/health` from a thread of its own, whatever its queue does. `/metrics` is a task of the queue
(`SERVER_TASK_TYPE_METRICS` in server-context.cpp). The pinned engine answers it also while it computes a batch; others
do so between two batches. Neither does while it samples, where a grammar can hold it for any time.

Runs engines as children: ready, or ended and why. Whether to start one again is not decided here.
"""

import asyncio
import os
import secrets
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import structlog

from mesh_llm.core.types.ports import EngineEnd
from mesh_llm.engine.confinement.policy import is_confined
from mesh_llm.engine.cpu import oom_kills
from mesh_llm.engine.process import Child, Command, Readiness, listening_port, log_name
from mesh_llm.engine.rpc_probe import ReservedPort, rpc_version
from mesh_llm.engine.sources.base import EngineSource
from mesh_llm.engine.spec import LOOPBACK, EngineSpec, RpcWorkerSpec
from mesh_llm.runtime.network import UNIX, open_address
from mesh_llm.runtime.private_dir import PrivateDirectory
from mesh_llm.runtime.supervision import TaskScope

_MAX_ANSWER = 4 * 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """Status and body of one GET."""

    status: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class ServerProperties:
    """What a llama-server says of itself: tokens per slot, slots, its build."""

    context: int
    slots: int
    build: str


class _GenerationSettings(msgspec.Struct):
    n_ctx: int = 0


class _Props(msgspec.Struct):
    default_generation_settings: _GenerationSettings = msgspec.field(default_factory=_GenerationSettings)
    total_slots: int = 0
    build_info: str = ""


async def get(address: str, path: str, timeout: float = 5.0, key: str = "") -> HttpAnswer | None:
    """One GET on a server at `unix:PATH` or `host:port`, with its key, at most 4 MiB.

    None when there is no whole HTTP answer within `timeout` seconds.
    """
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    request = f"GET {path} HTTP/1.0\r\nHost: localhost\r\n{authorization}Connection: close\r\n\r\n"
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await open_address(address)
            try:
                writer.write(request.encode())
                answer = await _read_all(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    head, separator, body = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split()
    if not separator or len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return None
    return HttpAnswer(status=int(words[1]), body=body)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    parts = bytearray()
    while len(parts) < _MAX_ANSWER and (data := await reader.read(65536)):
        parts += data
    return bytes(parts)


async def is_healthy(address: str, timeout: float = 2.0) -> bool:
    """True when `/health` says 200: loaded and answering. 503 means loading."""
    answer = await get(address, "/health", timeout)
    return answer is not None and answer.status == 200


async def properties(address: str, key: str = "") -> ServerProperties | None:
    """What `/props` says; None where it says nothing that can be used."""
    answer = await get(address, "/props", key=key)
    if answer is None or answer.status != 200:
        return None
    try:
        props = msgspec.json.decode(answer.body, type=_Props)
    except msgspec.MsgspecError:
        return None
    return ServerProperties(
        context=props.default_generation_settings.n_ctx, slots=props.total_slots, build=props.build_info
    )


QUEUE_PATH = "/metrics"

FLOOR_TOKENS_PER_SECOND = 2.0
"""The slowest prompt that is waited for: a batch may take the queue as long as it takes at this speed."""
_LEAST_SECONDS = 300.0
_PERIODS = 20
"""Into how many a limit is divided."""

Ask = Callable[[], asyncio.Task[object]]
Wait = Callable[[asyncio.Task[object] | None, float], Awaitable[None]]


def stuck_seconds(batch: int) -> float:
    """How long an engine's task queue may give no answer, for prompt batches of so many tokens."""
    return max(_LEAST_SECONDS, batch / FLOOR_TOKENS_PER_SECOND)


async def wait_for(task: asyncio.Task[object] | None, seconds: float) -> None:
    """Wait for the end of a task, at most that long; without a task exactly that long."""
    if task is None:
        await asyncio.sleep(seconds)
    else:
        await asyncio.wait({task}, timeout=seconds)


async def until_stuck(ask: Ask, limit: float, wait: Wait = wait_for) -> None:
    """Return once a question has waited for its answer for `limit` seconds.

    The seconds are counted in steps: a pause of this process (Ctrl-Z, a machine that sleeps) counts as one step. An
    answer of any kind, a refused connection too, is an answer: an engine that has gone ends by itself.
    """
    step = limit / _PERIODS
    while True:
        await wait(None, step)
        asked = ask()
        try:
            for _ in range(_PERIODS):
                await wait(asked, step)
                if asked.done():
                    break
            else:
                return
        finally:
            asked.cancel()


_HEALTH_INTERVAL = 0.05
"""Seconds between questions: neither `/health` nor a port tells by itself when it is there."""

_FROM_OUTSIDE = frozenset((signal.SIGHUP, signal.SIGINT, signal.SIGKILL, signal.SIGTERM))
"""Signals that no engine gives itself."""

_log = structlog.get_logger(__name__)

STOP_GRACE = 1.0
"""Seconds that a child has to end by itself."""


@dataclass(frozen=True, kw_only=True)
class EngineReadyInfo:
    """What a child that became ready offers.

    Attributes:
        address: `unix:PATH` in a private directory, or `host:port` on loopback.
        key: what an HTTP server demands as `Authorization: Bearer`; empty for nothing.
        context: tokens per slot, as the engine says; 0 for an RPC worker.
        slots: requests worked on at once; 0 for an RPC worker.
        embeddings: whether /v1/embeddings is answered.
        rpc_version: protocol of an RPC worker, else empty.
    """

    address: str
    key: str = field(default="", repr=False)
    context: int = 0
    slots: int = 0
    embeddings: bool = False
    rpc_version: str = ""


@dataclass(frozen=True, kw_only=True)
class Exit:
    """How a child ended.

    Attributes:
        code: exit status; negative for the signal that ended it.
        reason: its last lines, or what the signal means.
        never_ready: it ended before it could be used.
        asked: it was told to stop.
        out_of_memory: the system killed a process for want of memory while it ran.
        stuck: it was killed because its task queue gave no answer.
    """

    code: int
    reason: str
    never_ready: bool
    asked: bool
    out_of_memory: bool = False
    stuck: bool = False

    @property
    def end(self) -> EngineEnd:
        """Whether the requests that were on it may have ended it: not where somebody else did."""
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
        self._scope = TaskScope(f"engine {log_path.stem}", self._broke)
        self._asked = False
        self._kills = oom_kills()
        self._unusable = ""
        self._watchdog: asyncio.Task[object] | None = None
        self._stuck = False

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
        """Whether it is an RPC server that computes on the processor with the pinned release's own kernels."""
        return self._command.reference

    @property
    def socket(self) -> Path | None:
        """The Unix socket that it was told to listen on; None where it listens on a port."""
        path = self._command.address.removeprefix(UNIX)
        return None if path == self._command.address else Path(path)

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return self._child.running

    async def ready(self) -> EngineReadyInfo | Exit:
        """Wait until it can be used, or has ended before."""
        await asyncio.wait({self._preparing, self._end}, return_when=asyncio.FIRST_COMPLETED)
        if self.info is None:
            # Nobody can find out whether it is ready: it is of no use.
            self._child.kill()
        return self.info or await self.wait()

    async def wait(self) -> Exit:
        """Wait for its end."""
        return await asyncio.shield(self._end)

    async def stop(self, grace: float = STOP_GRACE) -> Exit:
        """End it: asked first, made to after `grace` seconds."""
        self._asked = True
        await self._child.stop(grace)
        return await self.wait()

    def kill(self) -> None:
        """End it at once, without waiting."""
        self._asked = True
        self._child.kill()

    def _broke(self, _error: BaseException) -> None:
        # Whether it is ready will never be known: whoever waits hears of its end instead.
        self._child.kill()

    def _on_line(self, line: bytes) -> None:
        if not self._address.done() and (port := listening_port(line)) is not None:
            self._address.set_result(f"{LOOPBACK}:{port}")

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
                self._unusable = "The RPC server was started and is not confined: it is not used."
                self._child.kill()
                return
            self.info = EngineReadyInfo(address=address, rpc_version=version)
            return
        key = self._command.key
        while not await is_healthy(address) or (props := await properties(address, key)) is None:
            await self._pause()
        # It was read, once, while the engine started.
        _drop(self._command.key_file)
        self.info = EngineReadyInfo(
            address=address,
            key=key,
            context=props.context,
            slots=props.slots,
            embeddings=self._command.embeddings,
        )
        if self._command.stuck_seconds:
            self._watchdog = self._scope.spawn(self._watch_queue(address, key), "watchdog")

    async def _watch_queue(self, address: str, key: str) -> None:
        limit = self._command.stuck_seconds

        def ask() -> asyncio.Task[object]:
            return self._scope.spawn(get(address, QUEUE_PATH, timeout=2 * limit, key=key), "question")

        await until_stuck(ask, limit)
        _log.warning("engine stuck", pid=self.pid, seconds=limit, log=str(self.log_path))
        self._stuck = True
        self._child.kill()

    async def _pause(self) -> None:
        await asyncio.wait({self._end}, timeout=_HEALTH_INTERVAL)


class Supervisor:
    """All engines of one daemon. Closing it leaves no child and no port."""

    def __init__(self, logs: Path, stuck: Callable[[int], float] = stuck_seconds) -> None:
        """`stuck`: how long a server's task queue may give no answer, by the tokens of its batch."""
        self._logs = logs
        self._stuck = stuck
        self._running: set[RunningEngine] = set()
        self._private: PrivateDirectory | None = None
        self._count = 0
        self._scope = TaskScope("engines")

    def log_path(self, name: str) -> Path:
        """Where a child of that name writes."""
        return self._logs / f"engine-{log_name(name)}.log"

    async def launch(self, command: Command, name: str) -> RunningEngine:
        """Start a child; returns as soon as it runs, which is before it is ready.

        Args:
            command: what to run.
            name: names its log, as in `engine-NAME.log`.

        Raises:
            MeshError: `engine_cannot_start`.
        """
        engine = RunningEngine(command, self.log_path(name))
        await engine.start()
        self._running.add(engine)
        self._scope.spawn(self._forget(engine), name)
        return engine

    async def server_command(self, source: EngineSource, spec: EngineSpec) -> Command:
        """The command of a server that only this user, and of its processes only those with its key, can ask.

        It listens on a Unix socket in a private directory where the engine can, else on loopback; it demands a key
        that is made here in any case.

        Raises:
            MeshError: `engine_without_rpc`, `engine_option_unknown`, `no_private_directory`.
        """
        key = secrets.token_urlsafe(32)
        place = self._place()
        key_file = place.with_suffix(".key")
        _write_key(key_file, key)
        try:
            command = await source.server(replace(spec, socket=place, key_file=key_file))
        except BaseException:
            _drop(key_file)
            raise
        return replace(command, key=key, key_file=key_file, stuck_seconds=self._stuck(spec.batch))

    async def launch_server(self, source: EngineSource, spec: EngineSpec, name: str) -> RunningEngine:
        """`server_command`, and `launch`. Raises MeshError as they do."""
        return await self.launch(await self.server_command(source, spec), name)

    def private(self) -> Path:
        """A directory that nobody else can enter; gone after `close`. Raises MeshError `no_private_directory`."""
        if self._private is None:
            self._private = PrivateDirectory()
        return self._private.path

    def _place(self) -> Path:
        self._count += 1
        return self.private() / f"{self._count}.sock"

    async def launch_rpc_worker(self, source: EngineSource, spec: RpcWorkerSpec, name: str) -> RunningEngine:
        """Start an RPC server on a private socket of its own and wait until it answers, or has ended.

        Raises:
            MeshError: `engine_without_rpc`, `rpc_unconfined`, `engine_cannot_start`, `no_private_directory`.
        """
        with ReservedPort() as port:
            command = await source.rpc_worker(replace(spec, socket=self._place(), port=port.number))
            engine = await self.launch(command, name)
            try:
                await engine.ready()
            except asyncio.CancelledError:
                engine.kill()
                raise
        return engine

    async def close(self, grace: float = STOP_GRACE) -> None:
        """Stop all children, side by side. Idempotent."""
        await asyncio.gather(*(engine.stop(grace) for engine in list(self._running)))
        await self._scope.close()
        if self._private is not None:
            self._private.close()
            self._private = None

    def kill(self) -> None:
        """End all children at once, without waiting: the second Ctrl-C."""
        for engine in self._running:
            engine.kill()

    async def _forget(self, engine: RunningEngine) -> None:
        await engine.wait()
        self._running.discard(engine)
        if engine.socket is not None:
            engine.socket.unlink(missing_ok=True)


def _write_key(path: Path, key: str) -> None:
    """A new file that only this user can read. Not synced to disk: it is read once, within seconds, and removed."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
        file.write(key)


def _drop(key_file: Path | None) -> None:
    if key_file is not None:
        key_file.unlink(missing_ok=True)


def _hint(number: int, *, started: bool) -> str:
    """What a death by a signal often means. A build made on another machine dies where it first computes."""
    if number == signal.SIGKILL:
        return " (out of memory?)"
    if number in {signal.SIGILL, signal.SIGSEGV} and not started:
        return " (llama.cpp built for another processor? Build it with GGML_NATIVE=OFF, or leave --bin-dir out)"
    return ""
