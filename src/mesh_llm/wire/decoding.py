"""MessagePack from strangers: whatever the bytes are, the answer is a value."""

from typing import TypeVar

import msgspec

T = TypeVar("T")


class Malformed(msgspec.Struct, frozen=True):
    """Bytes that are not what they should be."""

    reason: str


def decoded(decoder: msgspec.msgpack.Decoder[T], data: bytes) -> T | Malformed:
    """Decode, or say why not.

    Besides its own errors msgspec raises UnicodeDecodeError on text that is not UTF-8, and RecursionError where a
    later version's element, which is skipped, is nested too deep.
    """
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        return Malformed(str(error)[:200])
