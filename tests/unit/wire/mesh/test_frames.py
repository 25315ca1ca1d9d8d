import pytest

from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.frames import (
    MAX_HEADER,
    MAX_PARAMETERS,
    FrameBuffer,
    StreamHeader,
    StreamType,
    decode_header,
    encode_header,
    frame,
    known_type,
)


def only_frame(data: bytes, limit: int = MAX_HEADER) -> bytes:
    buffer = FrameBuffer()
    buffer.feed(data)
    payload = buffer.next(limit)
    assert isinstance(payload, bytes)
    assert len(buffer) == 0
    return payload


@pytest.mark.parametrize("kind", list(StreamType))
def test_header_of_every_type(kind: StreamType):
    assert decode_header(only_frame(encode_header(kind, b"parameters"))) == StreamHeader(kind, b"parameters")
    assert known_type(int(kind)) is kind


def test_bytes_on_the_wire():
    # Length 3; array of two: 5 (HTTP), empty bin.
    assert encode_header(StreamType.HTTP) == bytes.fromhex("00000004 92 05 c400".replace(" ", ""))


def test_longest_parameters_pass_and_longer_ones_do_not():
    longest = bytes(MAX_PARAMETERS)
    assert decode_header(only_frame(encode_header(StreamType.MODEL, longest))) == StreamHeader(
        StreamType.MODEL, longest
    )
    with pytest.raises(ValueError, match="at most"):
        encode_header(StreamType.MODEL, bytes(MAX_PARAMETERS + 1))


def test_frames_are_whole_wherever_the_bytes_are_cut():
    data = frame(b"first") + frame(b"") + frame(b"third") + b"raw"
    for size in range(1, len(data) + 1):
        buffer, found = FrameBuffer(), list[bytes]()
        for start in range(0, len(data), size):
            buffer.feed(data[start : start + size])
            while len(found) < 3 and isinstance(payload := buffer.next(100), bytes):
                found.append(payload)
        assert found == [b"first", b"", b"third"]
        assert buffer.rest() == b"raw"


def test_a_too_long_frame_is_refused_before_its_payload_arrives():
    buffer = FrameBuffer()
    buffer.feed((101).to_bytes(4, "big"))
    assert isinstance(buffer.next(100), Malformed)
    buffer = FrameBuffer()
    buffer.feed((100).to_bytes(4, "big"))
    assert buffer.next(100) is None


@pytest.mark.parametrize(
    "payload",
    [b"", b"\x90", b"\x92\xa1x\xc4\x00", b"\x92\xcd\x01\x00\xc4\x00", b"\xff", b"\x93\x05\xc4\x00" + b"\x91" * 4000],
)
def test_malformed_headers(payload: bytes):
    assert isinstance(decode_header(payload), Malformed)


def test_later_versions_may_add_elements():
    assert decode_header(b"\x93\x05\xc4\x00\x07") == StreamHeader(StreamType.HTTP)


def test_unknown_type_is_not_malformed():
    header = decode_header(b"\x92\x63\xc4\x00")
    assert header == StreamHeader(99)
    assert known_type(99) is None
