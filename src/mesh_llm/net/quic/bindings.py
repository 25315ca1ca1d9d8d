"""What iroh's Python bindings lack: speed, safe destructors, calls that can be interrupted, and readable errors.

`install` patches the generated glue (uniffi) of iroh 1.2.0. It uses private names of the generated module, so it does
nothing with any other release; `tests/integration/test_net_fastpath.py` fails when a release no longer needs it.
"""

# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false

import asyncio
import ctypes
import itertools
import os
import re
import struct
import threading
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from importlib.metadata import version
from typing import Any, TypeVar

import iroh
import iroh.iroh_ffi as ffi
import structlog

from mesh_llm.net.streams import StreamResetError
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.mesh.frames import CloseCode

WRITTEN_FOR = "1.2.0"
"""The only release of `iroh` that this patches."""

_CODE = re.compile(r"(?:Reset|Stopped)\((\d+)\)")
_CLOSED_BY_PEER = re.compile(r"closed by peer: (?P<reason>.*) \(code (?P<code>\d+)\)", re.DOTALL)
_LOST = re.compile(r"ConnectionLost\((?P<how>\w+)")
_HOW = {
    "ApplicationClosed": "the other node closed it",
    "ConnectionClosed": "the other node closed it",
    "LocallyClosed": "this node closed it",
    "Reset": "the other node does not know it any more",
    "TimedOut": "the other node did not answer in time",
}
_FIRST_CAUSE = re.compile(r"Caused by:.*\n\s+(?P<cause>[^\n/]+)$", re.DOTALL)

T = TypeVar("T")

_log = structlog.get_logger(__name__)
_installed = False


def install() -> bool:
    """Patch the bindings, once per process; False if another release than `WRITTEN_FOR` is installed."""
    global _installed  # noqa: PLW0603 - a patch of a module is process-wide by nature
    if _installed:
        return True
    # With RUST_BACKTRACE, as developers set it, the library would keep a stack for its errors, which nobody sees. The
    # first one reads the debug symbols of all libraries: 60 MB that stay. Panics keep their stacks.
    os.environ.setdefault("RUST_LIB_BACKTRACE", "0")
    found = version("iroh")
    if found != WRITTEN_FOR:
        _log.warning("iroh runs without fast paths: streams will be slow", found=found, written_for=WRITTEN_FOR)
        return False
    _copy_bytes_whole()
    _take_ready_results_at_once()
    _free_on_the_loop()
    _installed = True
    return True


def _free_on_the_loop() -> None:
    """Free every object of Rust by `deferred_frees`."""
    for kind in list(vars(ffi).values()):
        if isinstance(kind, type) and {"__del__", "_uniffi_clone_handle"} <= vars(kind).keys():
            deferred_frees.take_over(kind)


def _copy_bytes_whole() -> None:
    """Copy byte strings by memmove: the glue copies byte by byte in Python, at 3 MB/s."""
    rust_buffer = ffi._UniffiRustBuffer
    call_status = ffi._UniffiRustCallStatus
    allocate = ffi._UniffiLib.ffi_iroh_ffi_rustbuffer_alloc
    free = ffi._UniffiLib.ffi_iroh_ffi_rustbuffer_free
    data_offset = rust_buffer.data.offset
    pointer = ctypes.c_void_p
    length_prefix = struct.Struct(">i")

    def address_of(buffer: Any) -> int:
        # Reading the pointer field through ctypes makes an object each time; this reads its bits.
        return pointer.from_address(ctypes.addressof(buffer) + data_offset).value or 0

    def write(builder: Any, value: Any) -> None:
        data = bytes(value)
        buffer = builder.rbuf
        if buffer.len + len(data) > buffer.capacity:
            buffer = builder.rbuf = rust_buffer.reserve(buffer, len(data))
        ctypes.memmove(address_of(buffer) + buffer.len, data, len(data))
        buffer.len += len(data)

    def pack_into(builder: Any, _size: int, layout: str, value: object) -> None:
        write(builder, struct.pack(layout, value))

    def lower(_converter: Any, value: Any) -> Any:
        data = bytes(value)
        status = call_status()
        buffer = allocate(len(data) + length_prefix.size, ctypes.byref(status))
        address = address_of(buffer)
        ctypes.memmove(address, length_prefix.pack(len(data)), length_prefix.size)
        ctypes.memmove(address + length_prefix.size, data, len(data))
        buffer.len = len(data) + length_prefix.size
        return buffer

    def lift(_converter: Any, buffer: Any) -> bytes:
        try:
            address = address_of(buffer)
            (length,) = length_prefix.unpack(ctypes.string_at(address, length_prefix.size))
            return ctypes.string_at(address + length_prefix.size, length)
        finally:
            free(buffer, ctypes.byref(call_status()))

    builder_class: Any = ffi._UniffiRustBufferBuilder
    builder_class.write = write
    builder_class._pack_into = pack_into
    bytes_converter: Any = ffi._UniffiFfiConverterBytes
    bytes_converter.lower = classmethod(lower)
    bytes_converter.lift = classmethod(lift)


class _Poll:
    """One poll of a Rust future without an answer yet."""

    __slots__ = ("code", "future", "inside", "loop", "thread")

    def __init__(self, loop: asyncio.AbstractEventLoop, thread: int) -> None:
        self.loop = loop
        self.future: asyncio.Future[int] = loop.create_future()
        self.thread = thread
        self.inside = True
        self.code: int | None = None

    def answer(self, code: int) -> None:
        """Called by Rust: during the poll itself, or later from one of its threads."""
        if self.inside and self.thread == threading.get_ident():
            self.code = code
            return
        try:
            self.loop.call_soon_threadsafe(self._resolve, code)
        except RuntimeError:
            # The loop was closed: nothing waits any more.
            return

    def _resolve(self, code: int) -> None:
        if not self.future.done():
            self.future.set_result(code)


def _take_ready_results_at_once() -> None:
    """Replace the driver of Rust futures by one that takes a result at once if the first poll is ready.

    The original takes two turns of the event loop for every call. In between, a cancelled `read()` has taken bytes
    from the stream that no caller gets.
    """
    ready = ffi._UNIFFI_RUST_FUTURE_POLL_READY
    call_with_error = ffi._uniffi_rust_call_with_error
    polls: dict[int, _Poll] = {}
    handles = itertools.count(1)

    def continue_poll(handle: int, code: int) -> None:
        poll = polls.pop(handle, None)
        if poll is not None:
            poll.answer(code)

    # Kept alive by the closure below until the process ends: Rust may call it at any time.
    callback = ffi._UNIFFI_RUST_FUTURE_CONTINUATION_CALLBACK(continue_poll)

    async def call(
        rust_future: Any,
        ffi_poll: Callable[..., None],
        ffi_complete: Any,
        ffi_free: Callable[..., None],
        lift: Callable[[Any], Any],
        error_converter: Any,
    ) -> Any:
        handle = 0
        thread = threading.get_ident()
        try:
            loop = asyncio.get_running_loop()
            while True:
                handle = next(handles)
                polls[handle] = poll = _Poll(loop, thread)
                ffi_poll(rust_future, callback, handle)
                poll.inside = False
                code = poll.code
                if code is None:
                    code = await poll.future
                if code == ready:
                    # No await between ready and here: a cancelled call has either taken its result or left it.
                    return lift(call_with_error(error_converter, ffi_complete, rust_future))
        finally:
            polls.pop(handle, None)
            if threading.get_ident() == thread:
                ffi_free(rust_future)
            else:
                # An abandoned coroutine, closed by the garbage collector in a thread of Rust.
                deferred_frees.free(ffi_free, rust_future)

    ffi._uniffi_rust_call_async = call


class DeferredFrees:
    """Frees objects of Rust on the event loop, never where the garbage collector runs.

    The collector runs in any thread that allocates, also within Rust's callbacks. These come from threads of iroh that
    may hold a connection's lock; freeing a stream there needs the same lock, and the process would stand still. A peer
    could cause that by resetting many streams. The collector also has no order: a stream could be freed before the
    wrapper that still wants to reset it. Here the wrappers' callbacks run first.

    There is one, `deferred_frees`, for the process. The methods are safe in `__del__` and from any thread.
    """

    def __init__(self) -> None:
        self._callbacks: deque[Callable[[], object]] = deque()
        self._objects: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._scheduled = False
        self._running = False

    @property
    def pending(self) -> bool:
        """Whether anything waits."""
        return bool(self._callbacks or self._objects)

    def use(self, loop: asyncio.AbstractEventLoop) -> None:
        """Free on this loop from now on."""
        self._loop = loop
        self._scheduled = False
        self._schedule()

    def before(self, callback: Callable[[], object]) -> None:
        """Call this on the event loop before anything is freed. Keeps alive what it refers to."""
        self._callbacks.append(callback)
        self._schedule()

    def free(self, free: Callable[[Any], None], what: Any) -> None:
        """Call `free(what)` on the event loop, later."""
        self._objects.append((free, what))
        self._schedule()

    def take_over(self, kind: Any) -> None:
        """Free the objects of a class of the bindings here instead of in their `__del__`."""
        free = kind.__del__
        # Held here: when the interpreter ends, this module's names are gone before the last of such objects.
        frees = self

        def __del__(self: Any) -> None:  # noqa: N807 - it becomes the class's
            frees.free(free, self)

        kind.__del__ = __del__

    def run(self) -> None:
        """Free everything that waits; on the event loop's thread."""
        self._scheduled = False
        # A callback makes calls into Rust; nothing may be freed below it.
        if self._running:
            return
        self._running = True
        try:
            while self._callbacks or self._objects:
                if self._callbacks:
                    self._callbacks.popleft()()
                else:
                    free, what = self._objects.popleft()
                    free(what)
        finally:
            self._running = False

    def _schedule(self) -> None:
        # Twice does no harm, so no lock is needed: this thread could hold it already.
        if self._scheduled or self._loop is None:
            return
        self._scheduled = True
        try:
            self._loop.call_soon_threadsafe(self.run)
        except RuntimeError:
            # That loop has ended; `use` of the next one frees this too.
            self._scheduled = False


deferred_frees = DeferredFrees()


class InterruptibleCall:
    """One call into iroh at a time, which another task can end: `interrupt()` makes it raise where it is awaited.

    While a read or write is pending, the bindings hold a lock on that side of the stream: `stop()` and `reset()` would
    wait for it, perhaps for ever. So the pending call must end first, and at once.
    """

    __slots__ = ("_coroutine", "_failure", "_waiter")

    def __init__(self) -> None:
        self._coroutine: Coroutine[Any, Any, Any] | None = None
        self._waiter: Any = None
        self._failure: BaseException | None = None

    @types.coroutine
    def run(self, coroutine: Coroutine[Any, Any, T]) -> Generator[Any, None, T]:
        """Await `coroutine` so that it can be interrupted. Raises RuntimeError while another call is pending."""
        if self._coroutine is not None:
            coroutine.close()
            raise RuntimeError("two calls at once on one side of a stream")
        self._coroutine = coroutine
        try:
            step = coroutine.send
            argument: Any = None
            while True:
                try:
                    self._waiter = step(argument)
                except StopIteration as end:
                    return end.value
                try:
                    argument = yield self._waiter
                    step = coroutine.send
                except BaseException as error:
                    # Cancellation, mostly. If the call was interrupted as well, its coroutine is closed already.
                    if self._failure is not None:
                        raise
                    argument, step = error, coroutine.throw
                if self._failure is not None:
                    raise self._failure
        finally:
            self._coroutine = self._waiter = self._failure = None

    def interrupt(self, failure: Exception) -> None:
        """End the pending call, if any, before this returns; its task gets `failure` on its next turn."""
        coroutine, waiter = self._coroutine, self._waiter
        if coroutine is None or waiter is None or self._failure is not None:
            return
        self._failure = failure
        coroutine.close()
        if not waiter.done():
            waiter.set_result(None)


def finish_now(coroutine: Coroutine[Any, Any, object], scope: TaskScope, name: str) -> None:
    """Run a call that is normally ready at once; if not, `scope` runs the rest. Result and errors are dropped."""
    waiting = _Stepped(coroutine)
    if waiting.step():
        return
    try:
        scope.spawn(waiting.rest(), name)
    except RuntimeError:
        # The scope is closed, and so is the connection.
        waiting.close()


class _Stepped:
    """A coroutine that takes its first step outside of a task."""

    def __init__(self, coroutine: Coroutine[Any, Any, object]) -> None:
        self._coroutine = coroutine
        self._waiter: Any = None

    def step(self) -> bool:
        """Take the first step; returns whether the coroutine ended."""
        try:
            self._waiter = self._coroutine.send(None)
        except (StopIteration, iroh.IrohError):
            return True
        return False

    async def rest(self) -> None:
        try:
            await self._continue()
        except iroh.IrohError:
            return

    @types.coroutine
    def _continue(self) -> Generator[Any, None, None]:
        yield self._waiter
        yield from self._coroutine  # pyright: ignore[reportGeneralTypeIssues, reportReturnType]

    def close(self) -> None:
        self._coroutine.close()


def reason_of(error: iroh.IrohError) -> str:
    """An error in one line for messages. `str(IrohError)` is empty: kind and message are methods."""
    message = error.message().strip()
    lost = _LOST.search(message)
    if lost:
        return _HOW.get(lost["how"], "the connection broke")
    cause = _FIRST_CAUSE.search(message)
    line = cause["cause"].strip() if cause else message.splitlines()[0]
    return line.split(" (/")[0] or error.kind().name.lower()


def stream_failure(error: iroh.IrohError) -> ConnectionError:
    """The error of a read or write as a ConnectionError, which ByteStream promises."""
    code = _CODE.fullmatch(error.message())
    if code:
        return StreamResetError(int(code[1]))
    return ConnectionResetError(reason_of(error))


def close_reason(text: str | None) -> tuple[str, CloseCode | None]:
    """The words and the peer's code in `Connection.close_reason()`; None if this version knows no such code."""
    if text is None:
        return "connection lost", None
    match = _CLOSED_BY_PEER.fullmatch(text.strip())
    if match is None:
        return text.strip() or "connection lost", None
    words = match["reason"] or "closed by the peer"
    try:
        return words, CloseCode(int(match["code"]))
    except ValueError:
        return words, None
