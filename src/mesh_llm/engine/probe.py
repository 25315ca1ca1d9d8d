"""Questions to a running engine: is it ready, what does it offer, does its task queue still move?

A llama-server is asked over HTTP, an rpc-server with the HELLO of ggml's RPC (llama.cpp: ggml/src/ggml-rpc).
"""

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import msgspec

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.engine.confinement.policy import UNCONFINED, is_confined
from mesh_llm.engine.process import Child, Command
from mesh_llm.engine.spec import LOOPBACK, RpcWorkerSpec
from mesh_llm.runtime.local_socket import PrivateDirectory
from mesh_llm.runtime.network import open_address

_MAX_ANSWER = 4 * 1024 * 1024

# llama-server


@dataclass(frozen=True, kw_only=True)
class HttpAnswer:
    """Status and body of one GET."""

    status: int
    body: bytes


@dataclass(frozen=True, kw_only=True)
class ServerProperties:
    """What a llama-server reports: tokens per slot, slots, its build."""

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

    None if there is no whole HTTP answer within `timeout` seconds.
    """
    return await _exchange(address, f"GET {path}", b"", timeout, key)


async def post(address: str, path: str, body: bytes, timeout: float = 5.0, key: str = "") -> HttpAnswer | None:
    """One POST of a JSON body; otherwise as `get`."""
    return await _exchange(address, f"POST {path}", body, timeout, key)


async def _exchange(address: str, what: str, body: bytes, timeout: float, key: str) -> HttpAnswer | None:
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    content = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    request = f"{what} HTTP/1.0\r\nHost: localhost\r\n{authorization}{content}Connection: close\r\n\r\n"
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await open_address(address)
            try:
                writer.write(request.encode() + body)
                answer = await _read_all(reader)
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return None
    head, separator, content_bytes = answer.partition(b"\r\n\r\n")
    words = head.split(b"\r\n", 1)[0].split()
    if not separator or len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        return None
    return HttpAnswer(status=int(words[1]), body=content_bytes)


async def _read_all(reader: asyncio.StreamReader) -> bytes:
    parts = bytearray()
    while len(parts) < _MAX_ANSWER and (data := await reader.read(65536)):
        parts += data
    return bytes(parts)


async def is_healthy(address: str, timeout: float = 2.0) -> bool:
    """True if `/health` answers 200: the model is loaded. 503 means that it is loading."""
    answer = await get(address, "/health", timeout)
    return answer is not None and answer.status == 200


async def properties(address: str, key: str = "") -> ServerProperties | None:
    """What `/props` says; None if the answer is no use."""
    answer = await get(address, "/props", key=key)
    if answer is None or answer.status != 200:
        return None
    try:
        props = msgspec.json.decode(answer.body, type=_Props)
    except UNREADABLE:
        return None
    return ServerProperties(
        context=props.default_generation_settings.n_ctx, slots=props.total_slots, build=props.build_info
    )


# The watchdog of a llama-server's task queue.
#
# `/health` is answered by a thread of its own, whatever the queue does. `/metrics` is a task of the queue
# (SERVER_TASK_TYPE_METRICS in server-context.cpp). The pinned engine answers it even while it computes a batch; others
# answer between two batches. None answers while it samples, and there a grammar can hold it for any time.

QUEUE_PATH = "/metrics"

FLOOR_TOKENS_PER_SECOND = 2.0
"""The slowest prompt that is waited for: a batch may block the queue as long as it takes at this speed."""
_LEAST_SECONDS = 300.0
_STEPS = 20
"""Into how many steps a limit is divided."""

Ask = Callable[[], asyncio.Task[object]]
Wait = Callable[[asyncio.Task[object] | None, float], Awaitable[None]]


def stuck_seconds(batch: int) -> float:
    """After how many seconds without an answer a queue counts as stuck, for prompt batches of `batch` tokens."""
    return max(_LEAST_SECONDS, batch / FLOOR_TOKENS_PER_SECOND)


async def wait_for(task: asyncio.Task[object] | None, seconds: float) -> None:
    """Wait for the end of a task, at most `seconds`; without a task exactly that long."""
    if task is None:
        await asyncio.sleep(seconds)
    else:
        await asyncio.wait({task}, timeout=seconds)


async def until_stuck(ask: Ask, limit: float, wait: Wait = wait_for) -> None:
    """Return once a question has waited for its answer for `limit` seconds. Raises what a question raises.

    The seconds are counted in steps: a pause of this process (Ctrl-Z, a machine that sleeps) counts as one step.
    Anything is an answer, also a refused connection: an engine that has ended is noticed elsewhere.
    """
    step = limit / _STEPS
    while True:
        await wait(None, step)
        question = ask()
        try:
            for _ in range(_STEPS):
                await wait(question, step)
                if question.done():
                    question.result()
                    break
            else:
                return
        finally:
            question.cancel()


# rpc-server

_HELLO = 14
_CAPABILITIES = 24
_LONGEST_REPLY = 256
_HELLO_SECONDS = 10.0

# Since protocol 4 the request carries capability bytes (all zero: no RDMA); before, it was empty.
_REQUESTS = (
    struct.pack("<BQ", _HELLO, _CAPABILITIES) + bytes(_CAPABILITIES),
    struct.pack("<BQ", _HELLO, 0),
)


async def rpc_version(endpoint: str, timeout: float = 5.0) -> str | None:
    """The protocol version of the RPC server at `unix:PATH` or `host:port`, as in `8.0.0`; None if none answers.

    The server serves one client at a time. While another is connected, this waits up to `timeout` seconds.
    """
    for request in _REQUESTS:
        try:
            async with asyncio.timeout(timeout):
                reader, writer = await open_address(endpoint)
                try:
                    writer.write(request)
                    (size,) = struct.unpack("<Q", await reader.readexactly(8))
                    if not 3 <= size <= _LONGEST_REPLY:
                        return None
                    reply = await reader.readexactly(size)
                finally:
                    writer.close()
        except asyncio.IncompleteReadError:
            continue
        except (OSError, TimeoutError):
            return None
        return f"{reply[0]}.{reply[1]}.{reply[2]}"
    return None


class ReservedPort:
    """A free loopback port, held until `release()` so that no other program gets it meanwhile.

    The socket is bound and does not listen. With SO_REUSEADDR on both sides, as ggml's RPC server has it, Linux lets
    the program that the port is for bind it as well. On other systems the port is released at once.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((LOOPBACK, 0))
        self.number: int = self._socket.getsockname()[1]
        if not sys.platform.startswith("linux"):
            self._socket.close()

    def release(self) -> None:
        """Release the port. Idempotent."""
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True, kw_only=True)
class RpcProbe:
    """The test of an RPC server.

    Attributes:
        address: `unix:PATH` or `host:port`; empty if it was not started.
        version: of its protocol; empty if it does not answer, or is not confined as it should be.
        problem: what is wrong with it; empty if nothing is.
        refusal: why it was not started, if it cannot be confined; else empty.
        crashed: it ended before it answered.
    """

    address: str = ""
    version: str = ""
    problem: str = ""
    refusal: str = ""
    crashed: bool = False


async def probe_rpc_server(
    worker: Callable[[RpcWorkerSpec], Awaitable[Command]], spec: RpcWorkerSpec, broken: Callable[[str], str]
) -> RpcProbe:
    """Start the server of `worker(spec)`, ask for its version, and stop it. `broken` makes a sentence of a problem."""
    try:
        async with started_rpc_server(worker, spec) as server:
            return server if server.version else replace(server, problem=broken(server.problem))
    except MeshError as error:
        problem = f"{error.message} {error.hint}"
        return RpcProbe(problem=problem, refusal=problem if error.code == UNCONFINED else "")


@contextlib.asynccontextmanager
async def started_rpc_server(
    worker: Callable[[RpcWorkerSpec], Awaitable[Command]], spec: RpcWorkerSpec
) -> AsyncGenerator[RpcProbe]:
    """Run the server of `worker(spec)` while the block lasts. Raises MeshError, as `worker` does."""
    private = PrivateDirectory()
    try:
        with ReservedPort() as port:
            command = await worker(replace(spec, socket=private.path / "rpc.sock", port=port.number))
            child = await Child.spawn(command, None, lambda _: None)
            try:
                yield await _probe(child, command)
            finally:
                await child.stop(grace=0.5)
    finally:
        private.close()


async def _probe(child: Child, command: Command) -> RpcProbe:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_HELLO_SECONDS):
            while child.running:
                if version := await rpc_version(command.address):
                    if command.confined and not is_confined(child.pid):
                        return RpcProbe(address=command.address, problem="it was started and is not confined")
                    return RpcProbe(address=command.address, version=version)
                await child.ended_within(0.05)
    last = child.last_lines().strip().splitlines()[-1:]
    problem = last[0] if last else "it does not answer"
    return RpcProbe(address=command.address, problem=problem, crashed=not child.running)
