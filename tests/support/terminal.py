"""A program on a terminal of its own, as a person has it: what is drawn, keys, Ctrl-C, the window's size."""

import asyncio
import contextlib
import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[()][0-9A-Za-z]|[=>78])")


class Terminal:
    """Made by `on_terminal`."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self._process = process
        self._master = master
        self._received = bytearray()
        self._changed = asyncio.Event()
        self._open = True
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 65536)
        except OSError:
            data = b""
        if data:
            self._received += data
        else:
            self._open = False
            asyncio.get_running_loop().remove_reader(self._master)
        self._changed.set()

    @property
    def raw(self) -> str:
        """All that was written to the terminal."""
        return self._received.decode("utf-8", "replace")

    @property
    def text(self) -> str:
        """The same without control sequences."""
        return _SEQUENCE.sub("", self.raw)

    def mark(self) -> int:
        """Where the text ends now: for `until(..., after=)`."""
        return len(self.text)

    async def until(self, pattern: str, timeout: float = 60.0, *, after: int = 0) -> None:
        """Wait until the text from `after` on matches."""
        expression = re.compile(pattern, re.DOTALL)
        await self._wait(lambda: expression.search(self.text[after:]) is not None, timeout, f"shows {pattern!r}")

    def type(self, text: str) -> None:
        """Press keys; `\\x03` is Ctrl-C, `\\x04` Ctrl-D, `\\r` Enter."""
        os.write(self._master, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        """Change the window's size."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._process.send_signal(signal.SIGWINCH)

    def echoes(self) -> bool:
        """Whether keys are shown as they are pressed: the terminal's usual state."""
        return bool(termios.tcgetattr(self._master)[3] & termios.ECHO)

    async def ended(self, timeout: float = 30.0) -> int:
        """Wait until the program has ended; its exit status."""
        await self._wait(lambda: not self._open, timeout, "ends")
        return await asyncio.to_thread(self._process.wait, timeout)

    async def _wait(self, condition: Callable[[], bool], timeout: float, what: str) -> None:
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    if not self._open and not condition():
                        raise AssertionError(f"it ended before it {what}:\n{self.text[-4000:]}")
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"{timeout:g} s passed, and it never {what}:\n{self.text[-4000:]}") from None

    async def close(self) -> None:
        """End it in whatever way works."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._open:
            asyncio.get_running_loop().remove_reader(self._master)
        await asyncio.to_thread(self._process.wait, 10)
        os.close(self._master)


@contextlib.asynccontextmanager
async def on_terminal(
    argv: Sequence[str | os.PathLike[str]],
    *,
    env: Mapping[str, str],
    cwd: Path | None = None,
    columns: int = 120,
    rows: int = 40,
) -> AsyncGenerator[Terminal]:
    """Run a program on a terminal; `env` is its whole environment."""
    terminal = Terminal(*_start([os.fspath(word) for word in argv], env, cwd, (columns, rows)))
    try:
        yield terminal
    finally:
        await terminal.close()


_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Makes its input the terminal that Ctrl-C comes from, and becomes the program."""


def _start(
    argv: Sequence[str], env: Mapping[str, str], cwd: Path | None, window: tuple[int, int]
) -> tuple[subprocess.Popen[bytes], int]:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", window[1], window[0], 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, *argv],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**env, "TERM": "xterm-256color"},
        cwd=cwd,
        start_new_session=True,
    )
    os.close(slave)
    return process, master
