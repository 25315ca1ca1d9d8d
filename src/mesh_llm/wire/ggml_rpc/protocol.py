"""ggml's RPC protocol, versions 7 and 8: commands, sizes, small messages, and parsers of both directions.

A request is `u8 command | u64 size | payload`, a reply `u64 size | payload`, all little-endian and packed. Replies come
in the order of the requests that have one. Source: ggml/src/ggml-rpc/ggml-rpc.cpp of llama.cpp, protocols 7.0.0 and
8.0.0, and recorded connections.

The parsers are incremental and bounded, and do not copy a tensor's data: they return views of the bytes that they were
fed. A small request is returned whole; a request with much tensor data as its head, then the data in parts.
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
"""Most bytes of a message; a tensor's data is the largest."""

MAX_GRAPH = 32 << 20
"""Most bytes of a serialized graph; one of 65,536 tensors takes 20 MB."""


class Command(IntEnum):
    """A request's command. The numbers are part of the protocol."""

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
    """A protocol version, as in the answer to HELLO."""

    major: int
    minor: int
    patch: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


V7 = Version(7, 0, 0)
V8 = Version(8, 0, 0)

CHECKED_VERSIONS = frozenset({V7, V8})
"""Versions whose operators and messages this package knows. In ggml a new operator raises the patch number."""

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
"""Bytes of each reply, except those to GET_TENSOR and GET_TENSOR_2D, which have the requested size."""


class SizeBounds(NamedTuple):
    """Least and most bytes of a payload."""

    least: int
    most: int


def request_bounds(command: int, version: Version) -> SizeBounds | None:
    """The allowed sizes of a request's payload; None if that version has no such command."""
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
    """HELLO without capabilities, such as RDMA."""
    return request(Command.HELLO, bytes(CAPABILITY_BYTES))


def hello_reply(version: Version) -> bytes:
    """The payload of the answer to HELLO, without capabilities."""
    return bytes((*version, 0)) + bytes(CAPABILITY_BYTES)


def parse_hello_reply(payload: bytes) -> Version:
    """The version in the answer to HELLO. Raises ValueError if the payload is too short."""
    if len(payload) < 3:
        raise ValueError(f"a HELLO of {len(payload)} bytes")
    return Version(payload[0], payload[1], payload[2])


def parse_version(text: str) -> Version:
    """The inverse of `str(version)`. Raises ValueError."""
    major, minor, patch = (int(part) for part in text.split("."))
    return Version(major, minor, patch)


REGISTER_PEER = 18
"""In builds of llama.cpp with peer transfers of their own, before protocol 7: names another worker to a worker.

Payload: u32 peer id, then `host:port` in 128 bytes, padded with zeros. The port exists on the host only, so the tunnel
replaces it by the worker's own tunnel port for that peer. Protocol 7 has no such command; in protocol 8, 18 is another.
"""
REGISTER_PEER_BYTES = 132

_LAYOUT = struct.Struct("<I128s")
_LAST_MAJOR = 6


def is_register_peer(command: int, version: Version) -> bool:
    """Whether a command is REGISTER_PEER in the version that HELLO returned."""
    return command == REGISTER_PEER and version.major <= _LAST_MAJOR


def rewrite_peer(payload: bytes | memoryview, tunnels: Mapping[str, str]) -> bytes:
    """A REGISTER_PEER payload with its endpoint replaced by the one in `tunnels`.

    Raises:
        ValueError: the payload is malformed, or its endpoint is not in `tunnels`.
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
"""Requests with tensor data of up to this many bytes are returned whole: those of a token all are."""

_HEAD = REQUEST_HEADER.size
_DATA_HEADS = {Command.SET_TENSOR: SET_TENSOR_HEAD, Command.SET_TENSOR_2D: SET_TENSOR_2D_HEAD}

Bounds = Callable[[int], SizeBounds | None]
"""The allowed sizes of a command's payload; None refuses the command."""


class FrameError(Exception):
    """The stream violates the protocol, so the rest cannot be read. The text is a clause."""


@dataclass(frozen=True, slots=True)
class Request:
    """A whole request. `frame` includes the header, `payload` does not."""

    command: int
    frame: memoryview

    @property
    def payload(self) -> memoryview:
        """The payload."""
        return self.frame[_HEAD:]


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request with much data; `size` bytes of data follow in parts."""

    command: int
    frame: memoryview
    size: int

    @property
    def payload(self) -> memoryview:
        """The fixed part of the payload: the tensor and its arguments."""
        return self.frame[_HEAD:]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a request's data; `last`: the request ends with it."""

    data: memoryview
    last: bool


Piece = Request | Head | Part


class RequestParser:
    """Parses the requests of one connection."""

    def __init__(self, bounds: Bounds, whole: int = WHOLE) -> None:
        self._bounds = bounds
        self._whole = whole
        self._buffer = bytearray()
        self._needed = 0
        self._left = 0

    @property
    def idle(self) -> bool:
        """Whether no request has begun, so that the stream may end."""
        return not self._left and not self._buffer

    @property
    def missing(self) -> int:
        """Missing bytes of a request that has begun and is returned whole; else 0."""
        return self._needed - len(self._buffer) if self._buffer else 0

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Parse received bytes. Raises FrameError; then the parser cannot be used any more."""
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
        """The request at the start of the view; None if more bytes are needed."""
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
    """A part of a reply. The first one includes the header.

    Attributes:
        frame: the received bytes.
        payload: the same without the header.
        size: bytes of the whole payload.
        first: the reply begins here.
        last: the reply ends here.
    """

    frame: memoryview
    payload: memoryview
    size: int
    first: bool
    last: bool


class ReplyParser:
    """Parses the replies of one connection, in parts as they arrive. `limit`: most bytes of a reply."""

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
        """Missing bytes of a reply that has begun; 0 otherwise, or if its size is not known yet."""
        return self._left

    def feed(self, data: bytes) -> Iterator[ReplyPart]:
        """Parse received bytes. Raises FrameError."""
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
