"""One child process: its output into a log, its end as a value, and its death with ours."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import structlog

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.command import Command, child_environment
from mesh_llm.engine.log_file import LogFile, Tail
from mesh_llm.runtime.tasks import TaskScope

_log = structlog.get_logger(__name__)

_GUARD = Path(__file__).with_name("guard.py")
_LAST_OUTPUT_SECONDS = 0.5

OnLine = Callable[[bytes], None]


class Child:
    """A process group that dies with this process. Its output goes to a log, and line by line to `on_line`."""

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
            MeshError: `engine_cannot_start`, when the system cannot start processes.
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
                # Its own group: Ctrl-C on a terminal is for the daemon, which then stops its children in order.
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
        """The process, and its group."""
        return self._process.pid

    @property
    def running(self) -> bool:
        """False once it has ended."""
        return not self._end.done()

    def last_lines(self) -> str:
        """The end of its output."""
        return self._tail.text()

    async def wait(self) -> int:
        """Wait for the end, and all output: the exit status, negative for a signal. Any number may wait."""
        return await asyncio.shield(self._end)

    async def ended_within(self, seconds: float) -> bool:
        """Wait for the end, but no longer than that; True when it has ended."""
        await asyncio.wait({self._end}, timeout=seconds)
        return self._end.done()

    async def stop(self, grace: float = 1.0) -> int:
        """Ask it to end; after `grace` seconds, or once nobody waits any more, make it. Returns the exit status."""
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
        """End the whole group at once. Never waits, never raises."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        # Once the process was waited for, its number may belong to another.
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
