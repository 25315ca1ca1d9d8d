"""Parameters of RPC and PUSH streams: which form of which split model they are for, before what the tunnel says."""

from typing import Annotated

import msgspec

from mesh_llm.wire.decoding import Malformed, decoded

_MAX_NAME = 256
_MAX_TERM = 2**53
_MAX_TUNNEL = 1024


class SplitStream(msgspec.Struct, frozen=True, array_like=True):
    """A stream's form of a group, and the tunnel's own parameters, opaque here."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=_MAX_NAME)]
    term: Annotated[int, msgspec.Meta(ge=0, le=_MAX_TERM)]
    tunnel: Annotated[bytes, msgspec.Meta(max_length=_MAX_TUNNEL)] = b""


_encode = msgspec.msgpack.Encoder().encode
_decoder = msgspec.msgpack.Decoder(SplitStream)


def encode_split_stream(stream: SplitStream) -> bytes:
    """As it travels in the stream's header."""
    return _encode(stream)


def decode_split_stream(parameters: bytes) -> SplitStream | Malformed:
    """The opposite."""
    return decoded(_decoder, parameters)
