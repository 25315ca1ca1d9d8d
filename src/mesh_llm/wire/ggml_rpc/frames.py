"""Cuts ggml RPC streams into messages: incremental, bounded, and without copying a tensor's data.

A request that fits is given whole; one that carries much tensor data is given as its head, then its data in parts as
they arrive. What is given are views of the fed bytes; they are good as long as they are held.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from mesh_llm.wire.ggml_rpc.protocol import (
    REPLY_HEADER,
    REQUEST_HEADER,
    SET_TENSOR_2D_HEAD,
    SET_TENSOR_HEAD,
    Command,
    SizeBounds,
    streams,
)

WHOLE = 32 * 1024
"""Requests with tensor data of up to this many bytes are given whole: all of a token's are."""

_HEAD = REQUEST_HEADER.size
_DATA_HEADS = {Command.SET_TENSOR: SET_TENSOR_HEAD, Command.SET_TENSOR_2D: SET_TENSOR_2D_HEAD}

Bounds = Callable[[int], SizeBounds | None]
"""Sizes that a command's payload may have; None refuses the command."""


class FrameError(Exception):
    """The stream is not what it should be; nothing after it can be read. The text says why, in one clause."""


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request. `frame` is all of it, `payload` what follows its header."""

    command: int
    frame: memoryview

    @property
    def payload(self) -> memoryview:
        """The payload."""
        return self.frame[_HEAD:]


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of a request with much data; `size` bytes of data follow in parts."""

    command: int
    frame: memoryview
    size: int

    @property
    def payload(self) -> memoryview:
        """The payload's fixed beginning: the tensor, and what goes with it."""
        return self.frame[_HEAD:]


@dataclass(frozen=True, slots=True)
class Part:
    """Some of a request's data; `last` ends it."""

    data: memoryview
    last: bool


Piece = Request | Head | Part


class RequestParser:
    """The requests of one connection."""

    def __init__(self, bounds: Bounds, whole: int = WHOLE) -> None:
        self._bounds = bounds
        self._whole = whole
        self._buffer = bytearray()
        self._needed = 0
        self._left = 0

    @property
    def idle(self) -> bool:
        """Whether the stream may end here: no request has begun."""
        return not self._left and not self._buffer

    @property
    def missing(self) -> int:
        """Bytes that are missing of a request that has begun and is taken whole; 0 otherwise."""
        return self._needed - len(self._buffer) if self._buffer else 0

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Take what came. Raises FrameError; then the parser is of no more use."""
        if self._buffer:
            self._buffer += data
            if len(self._buffer) < self._needed:
                return
            data = bytes(self._buffer)
            self._buffer.clear()
        view = memoryview(data)
        position = 0
        while position < len(view):
            if self._left:
                part = view[position : position + self._left]
                position += len(part)
                self._left -= len(part)
                yield Part(part, last=not self._left)
                continue
            piece = self._next(view[position:])
            if piece is None:
                self._buffer += view[position:]
                return
            position += len(piece.frame)
            yield piece

    def _next(self, view: memoryview) -> Request | Head | None:
        """The request that begins at the view's start; None where more bytes are needed."""
        if len(view) < _HEAD:
            self._needed = _HEAD
            return None
        command, size = REQUEST_HEADER.unpack_from(view)
        bounds = self._bounds(command)
        if bounds is None:
            raise FrameError(f"unknown or forbidden command {command}")
        if not bounds.least <= size <= bounds.most:
            raise FrameError(f"command {command} with {size} bytes, not {bounds.least} to {bounds.most}")
        parted = size > self._whole and streams(command)
        needed = _HEAD + (_DATA_HEADS[Command(command)] if parted else size)
        if len(view) < needed:
            self._needed = needed
            return None
        if not parted:
            return Request(command, view[:needed])
        self._left = size - (needed - _HEAD)
        return Head(command, view[:needed], self._left)


@dataclass(frozen=True, slots=True)
class ReplyPart:
    """Some of a reply, its header included in the first part.

    Attributes:
        frame: the bytes as they came.
        payload: those that are not header.
        size: bytes of the whole payload.
        first: it begins here.
        last: it ends here.
    """

    frame: memoryview
    payload: memoryview
    size: int
    first: bool
    last: bool


class ReplyParser:
    """The replies of one connection, in parts as they arrive; `limit` bounds each one's size."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._header = b""
        self._size = 0
        self._left = 0

    @property
    def idle(self) -> bool:
        """Whether no reply has begun."""
        return not self._left and not self._header

    @property
    def missing(self) -> int:
        """Bytes that are missing of the reply that has begun; 0 otherwise, or where its size has not come."""
        return self._left

    def feed(self, data: bytes) -> Iterator[ReplyPart]:
        """Take what came. Raises FrameError."""
        if self._header:
            data = self._header + data
            self._header = b""
        view = memoryview(data)
        position = 0
        while position < len(view):
            if self._left:
                part = view[position : position + self._left]
                position += len(part)
                self._left -= len(part)
                yield ReplyPart(part, part, self._size, first=False, last=not self._left)
                continue
            if len(view) - position < REPLY_HEADER.size:
                self._header = bytes(view[position:])
                return
            (self._size,) = REPLY_HEADER.unpack_from(view, position)
            if self._size > self._limit:
                raise FrameError(f"a reply of {self._size} bytes, more than {self._limit}")
            end = min(len(view), position + REPLY_HEADER.size + self._size)
            frame = view[position:end]
            payload = frame[REPLY_HEADER.size :]
            position = end
            self._left = self._size - len(payload)
            yield ReplyPart(frame, payload, self._size, first=True, last=not self._left)
