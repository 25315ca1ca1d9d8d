"""ggml's RPC protocol, versions 7 and 8: commands, sizes, and the small fixed messages.

A request is `u8 command | u64 size | payload`, a reply `u64 size | payload`, all little-endian and packed. Replies come
in the order of the requests that have one. Source: ggml/src/ggml-rpc/ggml-rpc.cpp of llama.cpp, protocols 7.0.0 and
8.0.0, and recorded connections.

REGISTER_PEER: builds of llama.cpp with peer transfers of their own tell a worker where its peers are.

Command 18 before protocol 7: u32 peer id, then `host:port` in 128 bytes, ended by zeros. The host names ports that mean
something on the host only; the tunnel puts the worker's own tunnel port for that peer in their place. From protocol 7
on there is no such command, and 18 means something else on 8, so nothing is touched there.

Cuts ggml RPC streams into messages: incremental, bounded, and without copying a tensor's data.

A request that fits is given whole; one that carries much tensor data is given as its head, then its data in parts as
they arrive. What is given are views of the fed bytes; they are good as long as they are held.
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

REQUEST_HEADER = struct.Struct("<BQ")
REPLY_HEADER = struct.Struct("<Q")
TENSOR_BYTES = 296
CAPABILITY_BYTES = 24
MAX_SOURCES = 10
MAX_PAYLOAD = 1 << 40
"""Bytes of any one message; a tensor's data is the largest."""

MAX_GRAPH = 32 << 20
"""Bytes of a serialized graph; one of 65,536 tensors takes 20 MB."""


class Command(IntEnum):
    """What a request asks for; the number travels."""

    ALLOC_BUFFER = 0
    GET_ALIGNMENT = 1
    GET_MAX_SIZE = 2
    BUFFER_GET_BASE = 3
    FREE_BUFFER = 4
    BUFFER_CLEAR = 5
    SET_TENSOR = 6
    SET_TENSOR_HASH = 7
    GET_TENSOR = 8
    COPY_TENSOR = 9
    GRAPH_COMPUTE = 10
    GET_DEVICE_MEMORY = 11
    INIT_TENSOR = 12
    GET_ALLOC_SIZE = 13
    HELLO = 14
    DEVICE_COUNT = 15
    GRAPH_RECOMPUTE = 16
    MEMSET_TENSOR = 17
    SET_TENSOR_2D = 18
    GET_TENSOR_2D = 19
    COMM_INIT = 20
    COMM_ALLREDUCE = 21
    COMM_FREE = 22


class Version(NamedTuple):
    """A protocol version, as HELLO tells it."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


V7 = Version(7, 0, 0)
V8 = Version(8, 0, 0)

CHECKED_VERSIONS = frozenset({V7, V8})
"""Versions whose operators and messages are known here. ggml's own rule is that a new operator raises the patch."""

SET_TENSOR_HEAD = TENSOR_BYTES + 9
"""Bytes before a SET_TENSOR's data: tensor, u8 cache flag, u64 offset."""

SET_TENSOR_2D_HEAD = TENSOR_BYTES + 32
"""Bytes before a SET_TENSOR_2D's data: tensor, u64 offset, size, copies, stride."""

ALLOC_SIZE_REQUEST = 4 + (1 + MAX_SOURCES) * TENSOR_BYTES

_EXACT: dict[int, int] = {
    Command.ALLOC_BUFFER: 12,
    Command.GET_ALIGNMENT: 4,
    Command.GET_MAX_SIZE: 4,
    Command.BUFFER_GET_BASE: 8,
    Command.FREE_BUFFER: 8,
    Command.BUFFER_CLEAR: 9,
    Command.SET_TENSOR_HASH: TENSOR_BYTES + 16,
    Command.GET_TENSOR: TENSOR_BYTES + 16,
    Command.COPY_TENSOR: 2 * TENSOR_BYTES,
    Command.GET_DEVICE_MEMORY: 4,
    Command.INIT_TENSOR: TENSOR_BYTES,
    Command.GET_ALLOC_SIZE: ALLOC_SIZE_REQUEST,
    Command.HELLO: CAPABILITY_BYTES,
    Command.DEVICE_COUNT: 0,
    Command.MEMSET_TENSOR: TENSOR_BYTES + 17,
}
_EXACT_SINCE_8: dict[int, int] = {
    Command.GRAPH_RECOMPUTE: 12,
    Command.GET_TENSOR_2D: TENSOR_BYTES + 32,
    Command.COMM_INIT: 80,
    Command.COMM_ALLREDUCE: 4 + TENSOR_BYTES,
    Command.COMM_FREE: 4,
}

REPLY_SIZES: dict[int, int] = {
    Command.ALLOC_BUFFER: 16,
    Command.GET_ALIGNMENT: 8,
    Command.GET_MAX_SIZE: 8,
    Command.BUFFER_GET_BASE: 8,
    Command.SET_TENSOR_HASH: 1,
    Command.COPY_TENSOR: 1,
    Command.GET_DEVICE_MEMORY: 16,
    Command.GET_ALLOC_SIZE: 8,
    Command.HELLO: 4 + CAPABILITY_BYTES,
    Command.DEVICE_COUNT: 4,
    Command.COMM_INIT: 1,
}
"""Bytes of each reply. GET_TENSOR and GET_TENSOR_2D are answered with as many as were asked for."""


class SizeBounds(NamedTuple):
    """Least and most bytes of a payload."""

    least: int
    most: int


def request_bounds(command: int, version: Version) -> SizeBounds | None:
    """How large a request's payload may be; None: there is no such command in that version."""
    size = _EXACT.get(command)
    if size is None and version.major >= V8.major:
        size = _EXACT_SINCE_8.get(command)
    if size is not None:
        return SizeBounds(size, size)
    if command == Command.SET_TENSOR:
        return SizeBounds(SET_TENSOR_HEAD, MAX_PAYLOAD)
    if command == Command.GRAPH_COMPUTE:
        return SizeBounds(12, MAX_GRAPH)
    if version.major >= V8.major:
        return SizeBounds(SET_TENSOR_2D_HEAD, MAX_PAYLOAD) if command == Command.SET_TENSOR_2D else None
    return SizeBounds(4, 4) if command == Command.GRAPH_RECOMPUTE else None


def streams(command: int) -> bool:
    """Whether a request carries tensor data of any length after a fixed head."""
    return command in {Command.SET_TENSOR, Command.SET_TENSOR_2D}


def has_reply(command: int) -> bool:
    """Whether a request of this kind is answered."""
    return command in REPLY_SIZES or command in {Command.GET_TENSOR, Command.GET_TENSOR_2D}


def request(command: int, payload: bytes = b"") -> bytes:
    """A whole request."""
    return REQUEST_HEADER.pack(command, len(payload)) + payload


def reply(payload: bytes) -> bytes:
    """A whole reply."""
    return REPLY_HEADER.pack(len(payload)) + payload


def hello_request() -> bytes:
    """HELLO without capabilities: no RDMA."""
    return request(Command.HELLO, bytes(CAPABILITY_BYTES))


def hello_reply(version: Version) -> bytes:
    """The payload of HELLO's answer, without capabilities."""
    return bytes((*version, 0)) + bytes(CAPABILITY_BYTES)


def parse_hello_reply(payload: bytes) -> Version:
    """The version in HELLO's answer. Raises ValueError where it is shorter than one."""
    if len(payload) < 3:
        raise ValueError(f"a HELLO of {len(payload)} bytes")
    return Version(payload[0], payload[1], payload[2])


def parse_version(text: str) -> Version:
    """The inverse of `str(version)`. Raises ValueError."""
    major, minor, patch = (int(part) for part in text.split("."))
    return Version(major, minor, patch)


REGISTER_PEER = 18
REGISTER_PEER_BYTES = 132

_LAYOUT = struct.Struct("<I128s")
_LAST_MAJOR = 6


def is_register_peer(command: int, version: Version) -> bool:
    """Whether a request is one, by what HELLO told."""
    return command == REGISTER_PEER and version.major <= _LAST_MAJOR


def rewrite(payload: bytes | memoryview, tunnels: Mapping[str, str]) -> bytes:
    """The payload with the endpoint that `tunnels` has for the named one.

    Raises:
        ValueError: it is not such a payload, or leads to a peer that is not in this group.
    """
    if len(payload) != REGISTER_PEER_BYTES:
        raise ValueError(f"REGISTER_PEER with {len(payload)} bytes, not {REGISTER_PEER_BYTES}")
    peer, field = _LAYOUT.unpack(payload)
    name, zero, _ = field.partition(b"\0")
    try:
        endpoint = name.decode("ascii")
    except UnicodeDecodeError:
        raise ValueError("REGISTER_PEER with an endpoint that is not ASCII") from None
    if not zero or endpoint not in tunnels:
        raise ValueError(f"REGISTER_PEER names {endpoint!r}, which is no peer of this group")
    target = tunnels[endpoint].encode("ascii")
    if len(target) >= 128:
        raise ValueError("a tunnel's endpoint is longer than 127 bytes")
    return _LAYOUT.pack(peer, target)


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
