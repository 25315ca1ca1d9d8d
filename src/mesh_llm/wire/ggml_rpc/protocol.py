"""ggml's RPC protocol, versions 7 and 8: commands, sizes, and the small fixed messages.

A request is `u8 command | u64 size | payload`, a reply `u64 size | payload`, all little-endian and packed. Replies come
in the order of the requests that have one. Source: ggml/src/ggml-rpc/ggml-rpc.cpp of llama.cpp, protocols 7.0.0 and
8.0.0, and recorded connections.
"""

import struct
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
