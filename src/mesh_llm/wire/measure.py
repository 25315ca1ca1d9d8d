"""MEASURE streams: what a node says of its speed and of its distances, and messages to take the time of.

The asker's header is empty. Then frames go both ways, each answering one of the asker's: the first answer is a `Facts`;
after that a frame comes back as it is where its first byte is `ECHO`, and else one byte of it, so that only the way
there counts.
"""

from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core.ids import NodeId
from mesh_llm.core.speed import Speed
from mesh_llm.wire.announced_speed import WireSpeed, speed_in, speed_out
from mesh_llm.wire.decoding import Malformed, decoded
from mesh_llm.wire.signing import Key

ECHO = 1
SINK = 2
MAX_FRAME = 256 * 1024
"""Bytes of one message."""

MAX_MESSAGES = 64
"""Of one stream, the first included."""

MAX_ROUND_TRIPS = 64
_MAX_MILLISECONDS = 1e6

_Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_MILLISECONDS)]


class _Distance(msgspec.Struct, frozen=True, array_like=True):
    node: Key
    milliseconds: _Milliseconds


class _Facts(msgspec.Struct, frozen=True, array_like=True):
    speed: WireSpeed = WireSpeed()
    round_trips: Annotated[tuple[_Distance, ...], msgspec.Meta(max_length=MAX_ROUND_TRIPS)] = ()
    free_bytes: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    takes: bool = True


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What a node knows of itself.

    Attributes:
        speed: its own.
        round_trips: milliseconds to others and back.
        free_bytes: memory that a further model could take.
        takes: it takes layers of a model that is not on its disk (not with `--no-fetch`).
    """

    speed: Speed = Speed()
    round_trips: dict[NodeId, float] = {}
    free_bytes: int = 0
    takes: bool = True


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(_Facts)


def encode_facts(facts: Facts) -> bytes:
    """As it travels."""
    nearest = sorted(facts.round_trips.items(), key=lambda item: (item[1], item[0]))[:MAX_ROUND_TRIPS]
    distances = tuple(_Distance(bytes.fromhex(node), min(value, _MAX_MILLISECONDS)) for node, value in nearest)
    return _encode(_Facts(speed_out(facts.speed), distances, max(0, facts.free_bytes), facts.takes))


def decode_facts(payload: bytes) -> Facts | Malformed:
    """The opposite."""
    wire = decoded(_decoder, payload)
    if isinstance(wire, Malformed):
        return wire
    return Facts(
        speed=speed_in(wire.speed),
        round_trips={NodeId(entry.node.hex()): entry.milliseconds for entry in wire.round_trips},
        free_bytes=wire.free_bytes,
        takes=wire.takes,
    )
