"""What the two ends of the RPC tunnel say to each other besides ggml's own messages.

On a tunnel stream, between ggml's requests:
- REFERENCE sets a tensor by the digest of its content.
- PUSH is a GET_TENSOR whose answer goes to another worker.
- WAIT is a SET_TENSOR whose data comes from another worker.
- ALLOC allocates a buffer and returns its address in one round trip.
- PACKED is a compressed graph, PACKED_SET a SET_TENSOR in fewer bytes (see `packing`).
- PACKED_GET is a GET_TENSOR whose answer may come in fewer bytes (see `activations`): its payload, then u8 format. The
  answer is u8 format, then the data; the format is the wanted one or F32.

On the control stream of a session: values in MessagePack, framed as in `wire.mesh.frames`.

On a push stream: `u64 counter | 16 byte tag | u56 size | u8 format | data`, little-endian. The size is of the unpacked
data, and the tag is of it. The receiver discards padding, which has counter 0 and a tag of zeros.
"""

import hashlib
import struct
from functools import partial
from typing import Annotated, NamedTuple

import msgspec

from mesh_llm.wire.codec import decode
from mesh_llm.wire.ggml_rpc.activations import Bytes, Format, read_format
from mesh_llm.wire.ggml_rpc.packing import GRAPH_BOUNDS, PACKED, PACKED_SET, SET_BOUNDS
from mesh_llm.wire.ggml_rpc.protocol import TENSOR_BYTES, SizeBounds

REFERENCE = 200
PUSH = 201
WAIT = 202
ALLOC = 203
PACKED_GET = 206

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
"""Most workers of one host at once. Worker numbers are below this."""

_Size = Annotated[int, msgspec.Meta(ge=0)]
"""A count or a number of bytes. MessagePack has no integers above 2^64 - 1."""

_WorkerNumber = Annotated[int, msgspec.Meta(ge=0, lt=MAX_PEERS)]

_REFERENCE = struct.Struct("<IIQQ4I")
_PUSH = struct.Struct("<Q16sH")
_WAIT = struct.Struct("<QQQ")
ALLOC_REPLY = struct.Struct("<QQQ")
"""Buffer, its size, its first address; all 0 if there is not enough memory."""

PUSH_HEADER = struct.Struct("<Q16sQ")
_FORMAT_SHIFT = 56
PADDING = 0
"""The counter of padding. Transfers count from 1."""

MAX_PADDING = 128 * 1024
"""Most bytes of padding at once."""


def _exactly(size: int) -> SizeBounds:
    return SizeBounds(size, size)


_GET_BYTES = TENSOR_BYTES + 16
_PUSH_BYTES = _GET_BYTES + _PUSH.size
_BOUNDS = {
    REFERENCE: _exactly(_REFERENCE.size),
    PUSH: SizeBounds(_PUSH_BYTES, _PUSH_BYTES + 1),
    PACKED_GET: _exactly(_GET_BYTES + 1),
    WAIT: _exactly(TENSOR_BYTES + _WAIT.size),
    ALLOC: _exactly(12),
    PACKED: GRAPH_BOUNDS,
    PACKED_SET: SET_BOUNDS,
}


def tunnel_bounds(command: int) -> SizeBounds | None:
    """Sizes of a tunnel request; None if the command is not one of the tunnel's."""
    return _BOUNDS.get(command)


class Reference(NamedTuple):
    """Set a tensor to the content with digest number `number` of those that the worker offered."""

    number: int
    type: int
    buffer: int
    data: int
    shape: tuple[int, int, int, int]

    def pack(self) -> bytes:
        """The request's payload."""
        return _REFERENCE.pack(self.number, self.type, self.buffer, self.data, *self.shape)

    @staticmethod
    def unpack(payload: memoryview) -> "Reference":
        """Read a payload of the right size."""
        number, kind, buffer, data, *shape = _REFERENCE.unpack(payload)
        return Reference(number, kind, buffer, data, (shape[0], shape[1], shape[2], shape[3]))


class Push(NamedTuple):
    """A GET_TENSOR whose answer goes to worker number `peer`, marked with `counter` and `tag`.

    `wanted`: how it travels, if that can keep it. A byte behind the rest names it, unless it is F32.
    """

    get: memoryview
    counter: int
    tag: bytes
    peer: int
    wanted: Format = Format.F32

    def pack(self) -> bytes:
        """The request's payload."""
        wanted = bytes((self.wanted,)) if self.wanted is not Format.F32 else b""
        return bytes(self.get) + _PUSH.pack(self.counter, self.tag, self.peer) + wanted

    @staticmethod
    def unpack(payload: memoryview) -> "Push":
        """Read a payload of the right size. Raises FrameError."""
        wanted = read_format(payload[_PUSH_BYTES]) if len(payload) > _PUSH_BYTES else Format.F32
        counter, tag, peer = _PUSH.unpack_from(payload, _GET_BYTES)
        return Push(payload[:_GET_BYTES], counter, tag, peer, wanted)


class PackedGet(NamedTuple):
    """A GET_TENSOR whose answer may come in the wanted format."""

    get: memoryview
    wanted: Format

    def pack(self) -> bytes:
        """The request's payload."""
        return bytes(self.get) + bytes((self.wanted,))

    @staticmethod
    def unpack(payload: memoryview) -> "PackedGet":
        """Read a payload of the right size. Raises FrameError."""
        return PackedGet(payload[:_GET_BYTES], read_format(payload[_GET_BYTES]))


def push_header(counter: int, tag: bytes, size: int, kind: Format = Format.F32) -> bytes:
    """What comes before `size` bytes of data on a push stream, which travel in a format."""
    return PUSH_HEADER.pack(counter, tag, size | kind << _FORMAT_SHIFT)


def read_push_header(head: Bytes) -> tuple[int, bytes, int, Format]:
    """Counter, tag, size and format of what comes next on a push stream. Raises FrameError."""
    counter, tag, size = PUSH_HEADER.unpack(head)
    return counter, tag, size & ((1 << _FORMAT_SHIFT) - 1), read_format(size >> _FORMAT_SHIFT)


class Wait(NamedTuple):
    """A SET_TENSOR of `size` bytes at `offset` whose data another worker pushes, marked with `counter`."""

    tensor: memoryview
    offset: int
    size: int
    counter: int

    def pack(self) -> bytes:
        """The request's payload."""
        return bytes(self.tensor) + _WAIT.pack(self.offset, self.size, self.counter)

    @staticmethod
    def unpack(payload: memoryview) -> "Wait":
        """Read a payload of the right size."""
        return Wait(payload[:TENSOR_BYTES], *_WAIT.unpack_from(payload, TENSOR_BYTES))


def push_tag(key: bytes, counter: int, size: int) -> bytes:
    """Proves that the host allowed this transfer to the session with this secret `key`."""
    return hashlib.blake2b(struct.pack("<QQ", counter, size), key=key, digest_size=TAG_BYTES).digest()


_MAX_NAME = 256
_MAX_TERM = 2**53
_MAX_TUNNEL = 1024


class SplitStream(msgspec.Struct, frozen=True, array_like=True):
    """Parameters of an RPC or PUSH stream.

    Attributes:
        model: the split model.
        term: of the group that serves it.
        tunnel: a TunnelStream's bytes.
    """

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_NAME)]
    term: Annotated[int, msgspec.Meta(ge=0, le=_MAX_TERM)]
    tunnel: Annotated[bytes, msgspec.Meta(max_length=_MAX_TUNNEL)] = b""


class TunnelStream(msgspec.Struct, frozen=True, array_like=True):
    """The tunnel's parameters of an RPC or PUSH stream.

    Attributes:
        session: that it belongs to.
        control: it is the session's control stream.
        pool: of a control stream: sessions of one host with the same pool run at once, and share weights. Empty: it
            runs alone.
    """

    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    control: bool = False
    pool: Annotated[bytes, msgspec.Meta(max_length=SESSION_BYTES)] = b""


class Open(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """Host to worker: begin a session.

    Attributes:
        rpc: the protocol version of the host's engine.
        key: secret for the tags of transfers to this worker.
        sketch: the first 8 bytes of the digest of each tensor that the host may send, concatenated.
        takes_padding: the host accepts Padding.
    """

    rpc: Annotated[str, msgspec.Meta(max_length=32)]
    key: Annotated[bytes, msgspec.Meta(min_length=KEY_BYTES, max_length=KEY_BYTES)]
    sketch: Annotated[bytes, msgspec.Meta(max_length=SKETCH_BYTES * MAX_DIGESTS)] = b""
    takes_padding: bool = False


class DeviceFacts(msgspec.Struct, frozen=True, array_like=True):
    """What an rpc-server reports of one device, in bytes."""

    alignment: _Size
    max_size: _Size
    free: _Size
    total: _Size


class Opened(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Worker to host: the session is open.

    Attributes:
        rpc: the protocol version of the worker's rpc-server.
        devices: in the rpc-server's order.
        digests: concatenated digests of the sketched tensors that the worker has. The whole digest proves it.
        limit: bytes that the session may allocate.
        unpacks: the worker accepts PACKED graphs.
        takes_padding: the worker accepts padding on its push streams.
        unpacks_sets: the worker accepts PACKED_SET.
        pools: the worker runs further sessions of the same pool beside this one.
        formats: of activations, beside F32, that the worker reads and writes: a bit for each.
    """

    rpc: Annotated[str, msgspec.Meta(max_length=32)]
    devices: Annotated[tuple[DeviceFacts, ...], msgspec.Meta(max_length=64)]
    digests: Annotated[bytes, msgspec.Meta(max_length=DIGEST_BYTES * MAX_DIGESTS)] = b""
    limit: _Size = 0
    unpacks: bool = False
    takes_padding: bool = False
    unpacks_sets: bool = False
    pools: bool = False
    formats: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0


class Peer(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """Host to worker: try to reach worker number `index`, which accepts transfers (`takes_padding`: also padding)."""

    index: _WorkerNumber
    address: Annotated[str, msgspec.Meta(max_length=256)]
    session: Annotated[bytes, msgspec.Meta(min_length=SESSION_BYTES, max_length=SESSION_BYTES)]
    takes_padding: bool = False


class PeerState(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Worker to host: whether it reaches worker number `index`."""

    index: _WorkerNumber
    reachable: bool
    reason: Annotated[str, msgspec.Meta(max_length=512)] = ""


class Undelivered(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """A transfer that did not reach its worker: the sender gives it to the host, the host to the receiver.

    `data` is a view of the received message, because a copy would double the memory.
    """

    peer: _WorkerNumber
    counter: _Size
    tag: Annotated[bytes, msgspec.Meta(min_length=TAG_BYTES, max_length=TAG_BYTES)]
    data: Annotated[memoryview, msgspec.Meta(max_length=MAX_PUSH)]


class LoadedFromDisk(msgspec.Struct, frozen=True, array_like=True, tag=6):
    """Worker to host: how many bytes of weights the worker has taken from its own disk so far."""

    bytes: _Size


class Ended(msgspec.Struct, frozen=True, array_like=True, tag=7):
    """Worker to host: the session is over, and why."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    message: Annotated[str, msgspec.Meta(max_length=2048)]
    hint: Annotated[str, msgspec.Meta(max_length=2048)] = ""


class Padding(msgspec.Struct, frozen=True, array_like=True, tag=8):
    """Worker to host: bytes without a meaning, which keep the congestion window open."""

    data: Annotated[bytes, msgspec.Meta(max_length=MAX_PADDING)]


ToWorker = Open | Peer | Undelivered
ToHost = Opened | PeerState | Undelivered | LoadedFromDisk | Ended | Padding

decode_to_worker = partial(decode, msgspec.msgpack.Decoder(Open | Peer | Undelivered))
decode_to_host = partial(
    decode, msgspec.msgpack.Decoder(Opened | PeerState | Undelivered | LoadedFromDisk | Ended | Padding)
)
decode_split_stream = partial(decode, msgspec.msgpack.Decoder(SplitStream))
decode_tunnel_stream = partial(decode, msgspec.msgpack.Decoder(TunnelStream))


def pieces(data: bytes, size: int) -> list[bytes]:
    """Cut data into pieces of `size` bytes; an incomplete last one is dropped."""
    return [data[at : at + size] for at in range(0, len(data) - len(data) % size, size)]
