"""Runs a short-lived program and keeps what it says."""

import asyncio
import contextlib
import os
from dataclasses import dataclass, field

from mesh_llm.engine.command import Command, child_environment


@dataclass(frozen=True, kw_only=True)
class Captured:
    """How a program ended (None: not at all in time, or it could not be started) and what it printed."""

    code: int | None
    stdout: bytes = b""
    stderr: bytes = b""
    argv: tuple[str, ...] = field(default=())

    def last_lines(self, count: int = 3) -> str:
        """The end of what it printed on standard error, or else on standard output."""
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
    try:
        async with asyncio.timeout(timeout):
            stdout, stderr = await process.communicate()
    except TimeoutError:
        return Captured(code=None, stderr=f"no end within {timeout:.0f} s".encode(), argv=argv)
    finally:
        # Nobody may be left behind: neither after a time-out nor when the caller was cancelled.
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            await process.wait()
    return Captured(code=process.returncode, stdout=stdout, stderr=stderr, argv=argv)
