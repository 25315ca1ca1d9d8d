"""A program that a test runs, with all that it starts: what it prints, how it ends, and whether anything is left.

Everything that descends from it carries a variable in its environment, so its children are found even when they have
a session of their own and their parent is gone.
"""

import asyncio
import contextlib
import itertools
import os
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import psutil
from tests.netlab.lab import NetLab

_MARK = "LC_RUN_BY_TEST"
"""RPC servers inherit few variables; those of the locale are among them."""
_numbers = itertools.count(1)


class EndedEarlyError(AssertionError):
    """The program ended while the test was waiting for it to say something."""


class Process:
    """One started program. Use `await Process.start(...)`, and `await close()` or `async with`, always."""

    def __init__(self, name: str, mark: str, transport: asyncio.SubprocessTransport, output: "_Output") -> None:
        self.name = name
        self.pid = transport.get_pid()
        self._mark = mark
        self._transport = transport
        self._output = output

    @classmethod
    async def start(
        cls,
        argv: Sequence[str | os.PathLike[str]],
        *,
        lab: NetLab | None = None,
        host: int = 0,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        name: str = "",
    ) -> Self:
        """Start `argv` here or on a lab's host; `env` is the whole environment, by default this process's own.

        It has a session of its own, so that Ctrl-C at the test does not reach it, and no input.
        """
        command = [os.fspath(word) for word in argv]
        mark = f"{os.getpid()}.{next(_numbers)}"
        transport, output = await asyncio.get_running_loop().subprocess_exec(
            _Output,
            *(command if lab is None else lab.command(host, command)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**(os.environ if env is None else env), _MARK: mark},
            cwd=cwd,
            start_new_session=True,
        )
        return cls(name or Path(command[0]).name, mark, transport, output)

    # What it says

    @property
    def lines(self) -> list[str]:
        """The complete lines of its output so far, standard error included."""
        return self._output.lines

    @property
    def text(self) -> str:
        """The output so far."""
        return "\n".join([*self.lines, self._output.pending.decode(errors="replace")])

    async def line(self, pattern: str, timeout: float = 60.0, *, after: int = 0) -> re.Match[str]:
        """The first line, from number `after` on, in which `pattern` is found; waits for it.

        Raises EndedEarlyError when the program ends without it, AssertionError when `timeout` seconds pass.
        """
        expression = re.compile(pattern)

        def found() -> re.Match[str] | None:
            return next((match for line in self.lines[after:] if (match := expression.search(line))), None)

        await self._until(lambda: found() is not None or self._output.closed, timeout, f"says {pattern!r}")
        match = found()
        if match is None:
            status = await self.ended()
            raise EndedEarlyError(f"{self.name} ended with {status} before it said {pattern!r}{self._report()}")
        return match

    def stop_reading(self) -> None:
        """Close this end of its output, as `head` does when it has enough."""
        pipe = self._transport.get_pipe_transport(1)
        assert pipe is not None
        pipe.close()

    # Its end

    @property
    def status(self) -> int | None:
        """How it ended, as of `subprocess` (-9 for SIGKILL); None while it runs."""
        return self._transport.get_returncode()

    async def ended(self, timeout: float = 30.0) -> int:
        """Wait until it has ended; the exit status. Raises AssertionError when `timeout` seconds pass."""
        await self._until(lambda: self.status is not None, timeout, "ends")
        assert self.status is not None
        return self.status

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the program itself, if it still runs."""
        if self.status is None:
            self._transport.send_signal(number)

    async def kill(self) -> None:
        """SIGKILL to the program itself; what it started is left to end as it should."""
        self.signal(signal.SIGKILL)
        await self.ended()

    def freeze(self) -> None:
        """SIGSTOP to the program and all that it started: a machine that hangs."""
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()

    def thaw(self) -> None:
        """Undo `freeze`."""
        for member in self.family():
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    # What it started

    def family(self) -> list[psutil.Process]:
        """Every process that descends from this one, itself included, that is alive; zombies are not."""
        return [process for process in psutil.process_iter() if self._is_family(process)]

    async def gone(self, timeout: float = 10.0) -> None:
        """Wait until nothing that descends from it is alive; AssertionError naming what is left after `timeout` s."""
        deadline = time.monotonic() + timeout
        while family := self.family():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                left = ", ".join(_described(process) for process in family)
                raise AssertionError(f"{self.name} left running: {left}{self._report()}")
            await asyncio.to_thread(_wait_for_ends, family, remaining)

    async def close(self) -> None:
        """Kill it with all that it started, and let go of it. Doing it twice is allowed."""
        while family := self.family():
            for member in family:
                try:
                    member.kill()
                except psutil.NoSuchProcess:
                    continue
            await asyncio.to_thread(_wait_for_ends, family, 10.0)
        await self.ended()
        self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def _is_family(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(_MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            return False  # ended in the meantime, or somebody else's

    async def _until(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    await self._output.wait_for_change()
        except TimeoutError:
            raise AssertionError(f"{timeout:g} s passed before {self.name} {what}{self._report()}") from None

    def _report(self) -> str:
        tail = self.lines[-60:]
        return f"; its last {len(tail)} lines:\n" + "\n".join(f"  | {line}" for line in tail)


class _Output(asyncio.SubprocessProtocol):
    """Collects lines, and wakes whoever waits at each change: more output, its end, the process's end."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.pending = b""
        self.closed = False
        self._changed = asyncio.get_running_loop().create_future()

    async def wait_for_change(self) -> None:
        await asyncio.shield(self._changed)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        *complete, self.pending = (self.pending + data).split(b"\n")
        self.lines += [line.decode(errors="replace") for line in complete]
        self._wake()

    def process_exited(self) -> None:
        self._wake()

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        if self.pending:
            self.lines.append(self.pending.decode(errors="replace"))
            self.pending = b""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        waiting, self._changed = self._changed, asyncio.get_running_loop().create_future()
        waiting.set_result(None)


def _wait_for_ends(processes: list[psutil.Process], timeout: float) -> None:
    """Wait until all have ended. Not until they are reaped: orphans are init's, and some take a second for it."""
    if sys.platform != "linux":
        psutil.wait_procs(processes, timeout)
        return
    deadline = time.monotonic() + timeout
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            descriptor = os.pidfd_open(process.pid)
            try:
                ended = select.poll()
                ended.register(descriptor, select.POLLIN)
                ended.poll(max(0.0, deadline - time.monotonic()) * 1000)
            finally:
                os.close(descriptor)


def words_of(process: psutil.Process) -> list[str]:
    """The command line of a process; empty if it has ended."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def _described(process: psutil.Process) -> str:
    try:
        return f"{' '.join(process.cmdline())[:200]} ({process.pid})"
    except psutil.Error:
        return str(process.pid)
