"""The sanitised rpc-server of tools/sanitized as a child process, one connection after the other over its pipes."""

import os
import re
import select
import signal
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.wire.ggml_rpc.protocol import REPLY_HEADER, REPLY_SIZES, Command, has_reply, hello_request, request

ROOT = Path(__file__).parents[2]
BUILDS = ROOT / ".venv" / "sanitized"
"""Where `make sanitized-rpc` puts the programs, one folder for each variant."""

VARIANTS = ("wheel", "generic")
"""Kernels as the wheel has them (AVX2), and those in plain C."""

SUPPRESSIONS = ROOT / "tools" / "sanitized" / "suppressions.txt"

SILENT_SECONDS = 120.0
"""A batch of small graphs takes milliseconds: a runner that says nothing for so long hangs."""

_MARK = (1 << 64) - 1
_END = struct.Struct("<QBQ")
_FRAME = re.compile(r"#\d+ 0x[0-9a-f]+ (?:in )?(\S.*)")
_OWN_FRAMES = ("_", "std::", "raise", "abort", "gsignal", "ggml_abort")
"""Where the report of a fault begins that is not the kernel's own: the sanitizer, C's library, a vector instruction."""

_BAD_ACCESS = ("use-after-poison", "unknown-crash", "SEGV", "BUS", "heap-buffer-overflow", "negative-size-param")
"""One fault, as chance places the tensors: behind a buffer on its last page, or where nothing is mapped."""


def program(variant: str) -> Path:
    """The runner of a variant, whether it is built or not."""
    return BUILDS / variant / "runner"


class RunnerDiedError(Exception):
    """A sanitizer spoke up, or the process ended otherwise.

    Attributes:
        status: exit status, negative for a signal; None: it hung and was killed.
        report: its standard error since the connection began.
    """

    def __init__(self, status: int | None, report: str) -> None:
        super().__init__(f"the runner hung: {report[-300:]}" if status is None else f"the runner ended with {status}")
        self.status = status
        self.report = report

    @property
    def summary(self) -> str:
        """What happened and where, in one line: the same for two reports of one cause."""
        kind = f"status {self.status}"
        for line in self.report.splitlines():
            for pattern in (r"ERROR: AddressSanitizer: ([\w-]+)", r"(\S+: runtime error: .*)", r"(\S+: GGML_ASSERT.*)"):
                if found := re.search(pattern, line):
                    kind = found[1].rpartition("/")[2] if "/" in found[1] else found[1]
                    break
            else:
                continue
            break
        if self.status is None:
            kind = "hang"
        elif kind in _BAD_ACCESS:
            kind = "bad access"
        kind = re.sub(r"0x[0-9a-f]+|\b\d{4,}\b", "N", kind)
        return f"{kind} in {' < '.join(self.frames[:3]) or 'unknown'}"

    @property
    def frames(self) -> list[str]:
        """The functions of the first stack that is given, innermost first, without those of the sanitizer."""
        names: list[str] = []
        for line in self.report.splitlines():
            found = _FRAME.search(line)
            if found is None:
                if names:
                    break
                continue
            name = re.split(r"[ (<]", found[1])[0]
            if not name.startswith(_OWN_FRAMES):
                names.append(name)
        return names


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection ended.

    Attributes:
        closed: the rpc-server closed it: it refused a request that the firewall let pass.
        graphs: graphs that this process computed so far.
        replies: the payloads of all replies, in order.
    """

    closed: bool
    graphs: int
    replies: tuple[bytes, ...]


class Runner:
    """One process; a context manager. Not for two users at once."""

    def __init__(self, variant: str = "wheel", silent: float = SILENT_SECONDS) -> None:
        self.variant = variant
        self._silent = silent
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed in `close`
        self._process: subprocess.Popen[bytes] | None = None
        self._out = bytearray()
        self._in = bytearray()
        self._replies: list[bytes] = []
        self._owed = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def begin(self, threads: int) -> None:
        """Begin a connection whose graphs are computed by so many threads. Starts the process where there is none."""
        if self._process is None:
            self._start()
        self._errors.seek(0)
        self._errors.truncate()
        self._replies.clear()
        self._owed = 0
        self._out += bytes((threads,))
        self.send(hello_request())
        self._take(REPLY_SIZES[Command.HELLO])

    def allocate(self, sizes: Sequence[int]) -> list[Buffer]:
        """Buffers of these sizes. Raises RunnerDiedError; where the server closed the connection, gives back none."""
        for _ in range(self._owed):
            if not self._answered():
                return []
        self._owed = 0
        self.send(b"".join(request(Command.ALLOC_BUFFER, struct.pack("<IQ", 0, size)) for size in sizes))
        named: list[tuple[int, int]] = []
        for _ in sizes:
            if not self._answered():
                return []
            named.append(struct.unpack("<QQ", self._replies.pop()))
        self.send(b"".join(request(Command.BUFFER_GET_BASE, struct.pack("<Q", pointer)) for pointer, _ in named))
        bases = [struct.unpack("<Q", self._take(8))[0] for _ in sizes]
        return [Buffer(pointer, base, size) for (pointer, size), base in zip(named, bases, strict=True)]

    def ask(self, command: int, payload: bytes) -> None:
        """Queue a request. `end` gives back what is answered."""
        self.send(request(command, payload))
        self._owed += has_reply(command)

    def send(self, frames: bytes | bytearray) -> None:
        """Queue bytes of the RPC stream."""
        if frames:
            self._out += struct.pack("<I", len(frames))
            self._out += frames

    def end(self) -> Ending:
        """End the connection, and wait until all of it was computed. Raises RunnerDiedError."""
        self._out += bytes(4)
        while self._answered():
            pass
        self._need(_END.size)
        _, closed, graphs = _END.unpack_from(self._in)
        del self._in[: _END.size]
        # Where the server closed the connection, it says so before it has seen the end.
        self._need(0)
        return Ending(bool(closed), graphs, tuple(self._replies))

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            self._reap(process)
        self._errors.close()

    def _start(self) -> None:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "GGML_NO_BACKTRACE": "1",
            # The test machine has fewer cores than threads: a spinning thread would hold up the one that it waits for.
            "OMP_WAIT_POLICY": "passive",
            "ASAN_OPTIONS": "detect_leaks=0:handle_abort=1:allocator_may_return_null=1:quarantine_size_mb=32"
            ":detect_stack_use_after_return=0:fast_unwind_on_fatal=0",
            "UBSAN_OPTIONS": f"halt_on_error=1:print_stacktrace=1:suppressions={SUPPRESSIONS}",
        }
        self._process = subprocess.Popen(
            [program(self.variant)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            bufsize=0,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdin.fileno(), False)
        self._out.clear()
        self._in.clear()

    def _answered(self) -> bool:
        """Take the next reply, whatever it is; False at the connection's end."""
        self._need(REPLY_HEADER.size)
        (size,) = REPLY_HEADER.unpack_from(self._in)
        if size == _MARK:
            return False
        self._replies.append(self._take(size))
        return True

    def _take(self, size: int) -> bytes:
        """The next reply's payload."""
        self._need(REPLY_HEADER.size + size)
        (told,) = REPLY_HEADER.unpack_from(self._in)
        if told != size:
            raise RuntimeError(f"the rpc-server answered with {told} bytes, not {size}")
        payload = bytes(self._in[REPLY_HEADER.size : REPLY_HEADER.size + size])
        del self._in[: REPLY_HEADER.size + size]
        return payload

    def _need(self, size: int) -> None:
        """Write what is queued, and read until so many bytes are there."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("a connection was not begun")
        reads, writes = process.stdout.fileno(), process.stdin.fileno()
        while len(self._in) < size or self._out:
            ready, writable, _ = select.select([reads], [writes] if self._out else [], [], self._silent)
            if not ready and not writable:
                raise self._hung(process)
            if ready:
                data = os.read(reads, 1 << 20)
                if not data:
                    raise self._died(process)
                self._in += data
            if writable:
                try:
                    written = os.write(writes, self._out)
                except BlockingIOError:
                    continue
                except BrokenPipeError:
                    raise self._died(process) from None
                del self._out[:written]

    def _died(self, process: subprocess.Popen[bytes]) -> RunnerDiedError:
        return RunnerDiedError(self._reap(process), self._report())

    def _hung(self, process: subprocess.Popen[bytes]) -> RunnerDiedError:
        # The sanitizer writes the stack of the main thread when it is aborted.
        process.send_signal(signal.SIGABRT)
        self._reap(process)
        return RunnerDiedError(None, self._report())

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        self._process = None
        try:
            status = process.wait(self._silent)
        except subprocess.TimeoutExpired:
            process.kill()
            status = process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()
        self._out.clear()
        self._in.clear()
        return status

    def _report(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")
