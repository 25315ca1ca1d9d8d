"""Fast paths for the generated Python glue of iroh's bindings: without them a stream moves 3 MB/s, and loses bytes.

The glue of release 1.2.0 (uniffi) copies every byte string into Rust in a Python loop, byte by byte, and takes every
result over the event loop, ready or not: two extra turns per call, and a window in which a cancelled `read()` has
taken bytes out of the stream that nobody will see. Here byte strings are copied by memmove, and a result that is ready
at the first poll is taken at once, so there is no such window.

This leans on names that are private to the generated module. It is therefore bound to the release it was written for,
and does nothing with any other. `tests/integration/test_net_fastpath.py` fails when a release stops needing it.
"""
# pyright: reportPrivateUsage=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownParameterType=false, reportMissingParameterType=false

import asyncio
import ctypes
import itertools
import struct
import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import iroh.iroh_ffi as ffi
import structlog

from mesh_llm.net import graveyard

WRITTEN_FOR = "1.2.0"
"""The only release of `iroh` that this patches."""

_log = structlog.get_logger(__name__)
_installed = False


def install() -> bool:
    """Patch the bindings, once per process; False where another release than `WRITTEN_FOR` is installed."""
    global _installed  # noqa: PLW0603 - a patch of a module is process-wide by nature
    if _installed:
        return True
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
    """Let no object of Rust be freed by the garbage collector itself: see net.graveyard."""
    for kind in list(vars(ffi).values()):
        if isinstance(kind, type) and {"__del__", "_uniffi_clone_handle"} <= vars(kind).keys():
            graveyard.take_over(kind)


def _copy_bytes_whole() -> None:
    """Replace the per-byte loops of the buffer builder, and give byte strings a path without a builder."""
    rust_buffer = ffi._UniffiRustBuffer
    call_status = ffi._UniffiRustCallStatus
    allocate = ffi._UniffiLib.ffi_iroh_ffi_rustbuffer_alloc
    free = ffi._UniffiLib.ffi_iroh_ffi_rustbuffer_free
    data_offset = rust_buffer.data.offset
    pointer = ctypes.c_void_p
    length_prefix = struct.Struct(">i")

    def address_of(buffer: Any) -> int:
        # Reading the pointer field through ctypes makes an object per access; this reads its bits.
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
    """One poll of a Rust future that has not been answered yet."""

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
            # The loop was closed: nobody waits any more.
            return

    def _resolve(self, code: int) -> None:
        if not self.future.done():
            self.future.set_result(code)


def _take_ready_results_at_once() -> None:
    """Replace the driver of Rust futures by one that needs no event loop where the first poll says ready."""
    ready = ffi._UNIFFI_RUST_FUTURE_POLL_READY
    call_with_error = ffi._uniffi_rust_call_with_error
    polls: dict[int, _Poll] = {}
    handles = itertools.count(1)

    def continue_poll(handle: int, code: int) -> None:
        poll = polls.pop(handle, None)
        if poll is not None:
            poll.answer(code)

    # Kept alive by the closure below for as long as the process runs: Rust may call it at any time.
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
                    # No await between ready and here: a cancelled call has either taken its result or left it there.
                    return lift(call_with_error(error_converter, ffi_complete, rust_future))
        finally:
            polls.pop(handle, None)
            if threading.get_ident() == thread:
                ffi_free(rust_future)
            else:
                # A coroutine that nobody awaits any more, closed by the garbage collector in a thread of Rust.
                graveyard.bury(ffi_free, rust_future)

    ffi._uniffi_rust_call_async = call
