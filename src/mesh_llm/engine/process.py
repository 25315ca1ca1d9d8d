"""Child processes: commands, environments, logs, short-lived programs, and children that end with this process."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from io import FileIO
from pathlib import Path

import mesh_llm
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.supervision import TaskScope, WriteHealth

_NOT_INHERITED = ("LLAMA_", "GGML_", "MESH_LLM_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables of the parent that would change an engine's behaviour unseen (`LLAMA_ARG_HOST`), or are secrets."""

_INHERITED = ("GGML_VK_VISIBLE_DEVICES",)
"""Of those, what hides cards, as `CUDA_VISIBLE_DEVICES` does."""

_SECRET = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS)(?:_|$)"
)
"""Names of variables that are secrets of other programs: no engine needs them."""

# `listening on http://127.0.0.1:8080`; before 2025: `HTTP server is listening, hostname: 127.0.0.1, port: 8080, ...`
_LISTENING = re.compile(rb"listening(?: on (?:http://)?|, hostname: )127\.0\.0\.1(?::|, port: )(\d{1,5})\b")


class Readiness(StrEnum):
    """How to find out that a child is ready."""

    HTTP = "http"
    RPC = "rpc"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A child process to run.

    Attributes:
        argv: program and arguments.
        env: variables added to what is inherited.
        readiness: HTTP: `/health` answers 200. RPC: the HELLO handshake is answered.
        address: `host:port` or `unix:PATH`; empty if the child prints it.
        embeddings: whether it answers /v1/embeddings.
        key: what an HTTP server requires as `Authorization: Bearer`; empty for nothing.
        key_file: from where it reads that key at its start; None for no key.
        slot_socket: where it answers about its slots (`engine/slots.py`); None if it does not.
        saves_slots: its slots can be saved, if it has such a socket.
        speculates: it guesses tokens ahead, and can be switched if it has such a socket.
        keeps: beginnings of the names of variables that it inherits; empty for all but secrets.
        confined: it must run under a system call filter when it answers.
        stuck_seconds: seconds without an answer after which its task queue counts as stuck; 0: not watched.
        reference: an RPC server that computes on the processor with the pinned release's own kernels.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict[str, str])
    readiness: Readiness = Readiness.HTTP
    address: str = ""
    embeddings: bool = False
    key: str = field(default="", repr=False)
    key_file: Path | None = None
    slot_socket: Path | None = None
    saves_slots: bool = False
    speculates: bool = False
    keeps: tuple[str, ...] = ()
    confined: bool = False
    stuck_seconds: float = 0.0
    reference: bool = False


def child_environment(command: Command, parent: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a child: the parent's (default: this process's) without secrets and llama.cpp's options."""
    inherited = os.environ if parent is None else parent
    kept = {name: value for name, value in inherited.items() if _may_pass(name, command.keeps)}
    # For a backtrace llama.cpp starts gdb on itself, and a dying server hangs.
    return kept | {"GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"} | command.env


def _may_pass(name: str, keeps: tuple[str, ...]) -> bool:
    if name in _INHERITED:
        return True
    if name.startswith(_NOT_INHERITED) or _SECRET.search(name.upper()):
        return False
    return not keeps or name.startswith(keeps)


def python_module(module: str, *arguments: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The argv and environment that run a module of this package, from wherever it was imported."""
    root = str(Path(mesh_llm.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (root, inherited) if part)
    return (sys.executable, "-P", "-m", module, *arguments), {"PYTHONPATH": path}


def listening_port(line: bytes) -> int | None:
    """The port in a line of a llama-server's output; None for any other line."""
    match = _LISTENING.search(line)
    return int(match[1]) if match else None


# A short-lived program


@dataclass(frozen=True, kw_only=True)
class Captured:
    """What a program printed, and its exit status; None if it did not end in time, or could not be started.

    Of one that did not end in time, `stdout` is what it had printed by then.
    """

    code: int | None
    stdout: bytes = b""
    stderr: bytes = b""
    argv: tuple[str, ...] = field(default=())

    def last_lines(self, count: int = 3) -> str:
        """Its last lines on standard error, or else on standard output."""
        text = (self.stderr.strip() or self.stdout).decode(errors="replace")
        return "\n".join([line for line in text.splitlines() if line.strip()][-count:])


async def run(argv: tuple[str, ...], env: dict[str, str], timeout: float) -> Captured:
    """Run `argv` for at most `timeout` seconds, without standard input."""
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=child_environment(Command(argv=argv, env=env)),
            start_new_session=True,
        )
    except OSError as error:
        return Captured(code=None, stderr=str(error.strerror).encode(), argv=argv)
    stdout, stderr = bytearray(), bytearray()
    try:
        async with asyncio.timeout(timeout):
            await asyncio.gather(_collect(process.stdout, stdout), _collect(process.stderr, stderr))
            await process.wait()
    except TimeoutError:
        late = f"it did not end within {timeout:.0f} s".encode()
        return Captured(code=None, stdout=bytes(stdout), stderr=late, argv=argv)
    finally:
        # Leave no process behind, neither after a time-out nor when the caller was cancelled.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
    return Captured(code=process.returncode, stdout=bytes(stdout), stderr=bytes(stderr), argv=argv)


async def _collect(stream: asyncio.StreamReader | None, into: bytearray) -> None:
    """Read a stream to its end. What was read by then is there even if this is cancelled."""
    while stream is not None and (data := await stream.read(1 << 16)):
        into += data


# The output of a child: on disk, and its last lines in memory

_ANSI = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_LONGEST_LINE = 2000

MAX_BYTES = 4 * 1024 * 1024
BACKUPS = 2


def log_name(name: str) -> str:
    """A file name for the log of something that a user or a model has named."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._")[:80] or "engine"


class LogFile:
    """Appends bytes to `path`. At `max_bytes` it becomes `path.1`, and so on up to `backups`.

    Writing never raises: what cannot be written (full disk, no descriptors) is dropped, and a line says so later.
    """

    def __init__(
        self, path: Path, max_bytes: int = MAX_BYTES, backups: int = BACKUPS, *, must_open: bool = False
    ) -> None:
        """`must_open`: raise OSError if it cannot be opened now; otherwise each write tries again."""
        self.path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._file: FileIO | None = None
        self._size = 0
        self._closed = False
        self._dropped = 0
        self._torn = False
        self._health = WriteHealth(f"the log {path.name}", "Its lines are lost meanwhile.")
        try:
            self._open()
        except OSError as error:
            if must_open:
                raise
            self._health.failed(error)

    def write(self, data: bytes) -> None:
        """Append. The files together never exceed `max_bytes * (backups + 1)`."""
        for start in range(0, len(data), self._max_bytes):
            part = data[start : start + self._max_bytes]
            try:
                self._write(part)
            except OSError as error:
                self._dropped += len(part)
                self._health.failed(error)
            else:
                self._health.wrote()

    def close(self) -> None:
        """Idempotent."""
        self._closed = True
        self._health.close()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, part: bytes) -> None:
        if self._closed:
            return
        file = self._file or self._open()
        if self._size and self._size + len(part) > self._max_bytes:
            file = self._rotate(file)
        if self._dropped:
            start = "\n" if self._torn else ""
            self._append(file, f"{start}--- {self._dropped} bytes could not be written here\n".encode())
            self._dropped, self._torn = 0, False
        self._append(file, part)

    def _append(self, file: FileIO, data: bytes) -> None:
        view = memoryview(data)
        while view:
            count = file.write(view) or 0
            self._size += count
            view = view[count:]
            # A nearly full disk may take a part of a line.
            self._torn = bool(view)

    def _open(self) -> FileIO:
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self._file = FileIO(self.path, "ab")
        self._size = file.seek(0, 2)
        return file

    def _rotate(self, file: FileIO) -> FileIO:
        file.close()
        self._file = None
        for number in range(self._backups, 0, -1):
            older = self._numbered(number)
            newer = self.path if number == 1 else self._numbered(number - 1)
            if newer.exists():
                newer.replace(older)
        return self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}")


class Tail:
    """The last lines of a byte stream, as text without terminal colours."""

    def __init__(self, lines: int = 40) -> None:
        self._lines: deque[str] = deque(maxlen=lines)
        self._partial = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Take bytes. Returns the lines that they complete."""
        *whole, rest = (self._partial + data).split(b"\n")
        # A line that never ends must not grow without bound.
        self._partial = rest[-_LONGEST_LINE:]
        for line in whole:
            self._keep(line)
        return whole

    def finish(self) -> None:
        """The stream has ended: keep its unfinished line."""
        self._keep(self._partial)
        self._partial = b""

    def text(self, lines: int = 12) -> str:
        """The last non-empty lines."""
        return "\n".join(list(self._lines)[-lines:])

    def _keep(self, line: bytes) -> None:
        text = _ANSI.sub("", line[:_LONGEST_LINE].decode(errors="replace")).rstrip()
        if text:
            self._lines.append(text)


# A child that runs until it is stopped

_GUARD = Path(__file__).with_name("guard.py")
_LAST_OUTPUT_SECONDS = 0.5

OnLine = Callable[[bytes], None]


class Child:
    """A process group that ends with this process. Its output goes to a log, and line by line to `on_line`."""

    def __init__(self, process: asyncio.subprocess.Process, log: LogFile | None, on_line: OnLine) -> None:
        self._process = process
        self._log = log
        self._tail = Tail()
        self._on_line = on_line
        self._scope = TaskScope(f"child {process.pid}", lambda _: self.kill())
        self._end = self._scope.spawn(self._watch(), "watch")

    @classmethod
    async def spawn(cls, command: Command, log_path: Path | None, on_line: OnLine) -> "Child":
        """Start `command`, with a log on disk unless `log_path` is None.

        Raises:
            MeshError: `engine_cannot_start`, if the system cannot start the process.
        """
        watch_stdin = not sys.platform.startswith("linux")
        guard = (sys.executable, "-I", "-S", str(_GUARD), "--parent", str(os.getpid()), "--")
        try:
            process = await asyncio.create_subprocess_exec(
                *guard,
                *command.argv,
                stdin=asyncio.subprocess.PIPE if watch_stdin else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env=child_environment(command),
                # Its own group: Ctrl-C on a terminal goes only to the daemon, which then stops its children in order.
                start_new_session=True,
            )
        except OSError as error:
            raise MeshError(
                code="engine_cannot_start",
                message=f"{command.argv[0]} could not be started: {error.strerror}.",
                hint="Run `mesh-llm doctor`.",
                status=503,
            ) from error
        child = cls(process, LogFile(log_path) if log_path is not None else None, on_line)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        child._write(f"--- {now} pid {process.pid}: {' '.join(command.argv)}\n".encode())
        return child

    @property
    def pid(self) -> int:
        """The process, and the leader of its group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return not self._end.done()

    def last_lines(self) -> str:
        """Its last lines of output."""
        return self._tail.text()

    async def wait(self) -> int:
        """Wait for the end, and for all output. Returns the exit status, negative for a signal. Any number may wait."""
        return await asyncio.shield(self._end)

    async def ended_within(self, seconds: float) -> bool:
        """Wait for the end, at most `seconds`; True if it has ended."""
        await asyncio.wait({self._end}, timeout=seconds)
        return self._end.done()

    async def stop(self, grace: float = 1.0) -> int:
        """SIGTERM, then SIGKILL after `grace` seconds or if this is cancelled. Returns the exit status."""
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()
        except asyncio.CancelledError:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL to the whole group. Never waits, never raises."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # After the process was waited for, its number may belong to another one.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    async def _watch(self) -> int:
        reading = self._scope.spawn(self._read(), "output")
        try:
            code = await self._process.wait()
            # A grandchild may hold the pipe open longer than the process lives.
            await asyncio.wait({reading}, timeout=_LAST_OUTPUT_SECONDS)
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            self._tail.finish()
            if self._log is not None:
                self._log.close()
        return code

    def _write(self, data: bytes) -> None:
        if self._log is not None:
            self._log.write(data)

    async def _read(self) -> None:
        output = self._process.stdout
        if output is None:
            raise RuntimeError("child was started without a pipe")
        while data := await output.read(65536):
            self._write(data)
            for line in self._tail.feed(data):
                self._on_line(line)
