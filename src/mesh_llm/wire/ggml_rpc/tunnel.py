"""What two halves of the RPC tunnel say to each other beside ggml's own messages.

On a tunnel stream, between ggml's requests: REFERENCE names a tensor's content instead of sending it, PUSH has a
tensor's content sent to another worker, WAIT is a SET_TENSOR whose data comes from there, ALLOC asks for a buffer and
its address at once, PACKED is a graph in fewer bytes. On a control stream, one per session: values in MessagePack,
framed as in `wire.frames`. On a push stream: `u64 counter | 16 byte tag | u64 size | data`, little-endian; counter 0
and a tag of zeros is filling, which is thrown away.
"""

import hashlib
import struct
from typing import Annotated, NamedTuple

import msgspec

from mesh_llm.wire.ggml_rpc.protocol import TENSOR_BYTES, SizeBounds
from mesh_llm.wire.ggml_rpc.tensors import BOUNDS as PACKED_BOUNDS
from mesh_llm.wire.ggml_rpc.tensors import PACKED
from mesh_llm.wire.mesh.frames import Malformed, decoded

REFERENCE = 200
PUSH = 201
WAIT = 202
ALLOC = 203

DIGEST_BYTES = 32
SKETCH_BYTES = 8
TAG_BYTES = 16
KEY_BYTES = 32
SESSION_BYTES = 16
MAX_PUSH = 64 << 20
"""Bytes of one pushed tensor; 512 tokens of the widest models take 32 MiB. Larger ones go through the host."""

MAX_CONTROL_FRAME = MAX_PUSH + 4096
MAX_DIGESTS = 65_536
MAX_PEERS = 64
"""Workers of one host at once; each is named by a number below this."""

_Size = Annotated[int, msgspec.Meta(ge=0)]
"""A count or a number of bytes. MessagePack has no integers above 2^64 - 1."""

_Number = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PEERS)]
"""Of a worker."""

_REFERENCE = struct.Struct("<IIQQ4I")
_PUSH = struct.Struct("<Q16sH")
_WAIT = struct.Struct("<QQQ")
ALLOC_REPLY = struct.Struct("<QQQ")
"""Buffer, its size, its first address; all 0 where there is not enough memory."""

PUSH_HEADER = struct.Struct("<Q16sQ")
FILLING = 0
"""The counter of a push that carries nothing. Transfers count from 1."""

MAX_FILLING = 128 * 1024
"""Bytes of filling at once."""

_BOUNDS = {
    REFERENCE: _REFERENCE.size,
    PUSH: TENSOR_BYTES + 16 + _PUSH.size,
    WAIT: TENSOR_BYTES + _WAIT.size,
    ALLOC: 12,
}


def tunnel_bounds(command: int) -> SizeBounds | None:
    """Sizes of the tunnel's own requests; None for any other."""
    if command == PACKED:
        return PACKED_BOUNDS
    size = _BOUNDS.get(command)
    return None if size is None else SizeBounds(size, size)


class Reference(NamedTuple):
    """Fill a tensor with the content whose digest has number `number` among those that the worker offered."""

    number: int
    type: int
    buffer: int
    data: int
    shape: tuple[int, int, int, int]

    def pack(self) -> bytes:
        """The payload."""
        return _REFERENCE.pack(self.number, self.type, self.buffer, self.data, *self.shape)

    @staticmethod
    def unpack(payload: memoryview) -> "Reference":
        """Read a payload of the right size."""
        number, kind, buffer, data, *shape = _REFERENCE.unpack(payload)
        return Reference(number, kind, buffer, data, (shape[0], shape[1], shape[2], shape[3]))


class Push(NamedTuple):
    """A GET_TENSOR whose answer goes to worker number `peer`, under `counter` and `tag`."""

    get: memoryview
    counter: int
    tag: bytes
    peer: int

    def pack(self) -> bytes:
        """The payload."""
        return bytes(self.get) + _PUSH.pack(self.counter, self.tag, self.peer)

    @staticmethod
    def unpack(payload: memoryview) -> "Push":
        """Read a payload of the right size."""
        return Push(payload[: TENSOR_BYTES + 16], *_PUSH.unpack_from(payload, TENSOR_BYTES + 16))


class Wait(NamedTuple):
    """A SET_TENSOR of `size` bytes at `offset` whose data comes from another worker under `counter`."""

    tensor: memoryview
    offset: int
    size: int
    counter: int

    def pack(self) -> bytes:
        """The payload."""
        return bytes(self.tensor) + _WAIT.pack(self.offset, self.size, self.counter)

    @staticmethod
    def unpack(payload: memoryview) -> "Wait":
        """Read a payload of the right size."""
        return Wait(payload[:TENSOR_BYTES], *_WAIT.unpack_from(payload, TENSOR_BYTES))


def push_tag(key: bytes, counter: int, size: int) -> bytes:
    """What proves that the host allowed this one transfer to the session that has `key`."""
    return hashlib.blake2b(struct.pack("<QQ", counter, size), key=key, digest_size=TAG_BYTES).digest()


class StreamIs(msgspec.Struct, frozen=True, array_like=True):
    """Parameters of an RPC or PUSH stream: the session it belongs to, and whether it is the one that controls it."""

    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    control: bool = False


class Open(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Host: begin a session.

    Attributes:
        rpc: the protocol version of the host's engine.
        key: secret of the transfers to this worker.
        sketch: the first 8 bytes of the digest of each tensor that the host may send, joined.
        fills: the host takes Filling.
    """

    rpc: Annotated[str, msgspec.Meta(max_length=32)]
    key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    sketch: Annotated[bytes, msgspec.Meta(max_length=SKETCH_BYTES * MAX_DIGESTS)] = b""
    fills: bool = False


class DeviceFacts(msgspec.Struct, frozen=True, array_like=True):
    """What an rpc-server says of one device and does not change. Bytes throughout."""

    alignment: _Size
    max_size: _Size
    free: _Size
    total: _Size


class Opened(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Worker: the session is open.

    Attributes:
        rpc: the protocol version of the worker's rpc-server.
        devices: in its order.
        digests: whole digests, joined, of what the sketch names and the worker has: knowing them proves it.
        limit: bytes that the session may allocate.
        unpacks: graphs may come packed.
        fills: filling may come on its push streams.
    """

    rpc: Annotated[str, msgspec.Meta(max_length=32)]
    devices: Annotated[tuple[DeviceFacts, ...], msgspec.Meta(max_length=64)]
    digests: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES * MAX_DIGESTS)] = b""
    limit: _Size = 0
    unpacks: bool = False
    fills: bool = False


class Peer(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Host: worker number `index` takes transfers (`fills`: and filling) at `address` for `session`; try it."""

    index: _Number
    address: Annotated[str, msgspec.Meta(max_length=256)]
    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    fills: bool = False


class PeerState(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Worker: whether worker number `index` can be reached."""

    index: _Number
    reachable: bool
    reason: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Undelivered(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A transfer that did not reach its worker: from the sender to the host, and from there to the receiver.

    `data` is a view of the message that it came in: a copy would double what it takes up.
    """

    peer: _Number
    counter: _Size
    tag: Annotated[bytes, msgspec.Meta(min_length=TAG_BYTES, max_length=TAG_BYTES)]
    data: Annotated[memoryview, msgspec.Meta(max_length=MAX_PUSH)]


class Filled(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Worker: so many bytes of weights came from its own disk so far."""

    bytes: _Size


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Worker: the session is over, and why."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    message: Annotated[str, msgspec.Meta(max_length=2048)]
    hint: Annotated[str, msgspec.Meta(max_length=2048)] = ""


class Filling(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Worker: nothing, in so many bytes; see split.window."""

    data: Annotated[bytes, msgspec.Meta(max_length=MAX_FILLING)]


ToWorker = Open | Peer | Undelivered
ToHost = Opened | PeerState | Undelivered | Filled | Ended | Filling

_encode = msgspec.msgpack.Encoder().encode
_to_worker: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_to_host: msgspec.msgpack.Decoder[ToHost] = msgspec.msgpack.Decoder(ToHost)
_stream = msgspec.msgpack.Decoder(StreamIs)


def encode(value: ToWorker | ToHost | StreamIs) -> bytes:
    """A value's bytes, without the frame."""
    return _encode(value)


def decode_to_worker(payload: bytes) -> ToWorker | Malformed:
    """What a host said."""
    return decoded(_to_worker, payload)


def decode_to_host(payload: bytes) -> ToHost | Malformed:
    """What a worker said."""
    return decoded(_to_host, payload)


def decode_stream(parameters: bytes) -> StreamIs | Malformed:
    """What a stream is for."""
    return decoded(_stream, parameters)


def joined(data: bytes, size: int) -> list[bytes]:
    """Cut what was joined from pieces of `size` bytes; a rest is dropped."""
    return [data[at : at + size] for at in range(0, len(data) - len(data) % size, size)]
