"""Random bytes as frames and values: decoders return a value, and buffers stay within their limit."""

from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.admission import AdmitRequest, Admitted, Refused, decode_admit_reply, decode_admit_request
from mesh_llm.wire.mesh.frames import MAX_HEADER, FrameBuffer, StreamHeader, decode_header
from mesh_llm.wire.mesh.routes import (
    RoutesRequest,
    RoutesUnchanged,
    RouteTable,
    decode_routes_reply,
    decode_routes_request,
)

LIMIT = 64


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_frame_buffer_never_raises_and_never_holds_more_than_it_must(pieces: list[bytes]):
    buffer = FrameBuffer()
    for piece in pieces:
        buffer.feed(piece)
        while isinstance(payload := buffer.next(LIMIT), bytes):
            assert len(payload) <= LIMIT
        if isinstance(payload, Malformed):
            return
        assert len(buffer) < 4 + LIMIT


@given(st.lists(st.binary(max_size=LIMIT), max_size=10), st.integers(1, 30))
def test_frames_round_trip(payloads: list[bytes], size: int):
    data = b"".join(len(payload).to_bytes(4, "big") + payload for payload in payloads)
    buffer, found = FrameBuffer(), list[bytes]()
    for start in range(0, len(data), size):
        buffer.feed(data[start : start + size])
        while isinstance(payload := buffer.next(LIMIT), bytes):
            found.append(payload)
    assert found == payloads
    assert len(buffer) == 0


@given(st.binary(max_size=MAX_HEADER))
def test_decoders_never_raise(data: bytes):
    assert isinstance(decode_header(data), StreamHeader | Malformed)
    assert isinstance(decode_admit_request(data), AdmitRequest | Malformed)
    assert isinstance(decode_admit_reply(data), Admitted | Refused | Malformed)
    assert isinstance(decode_routes_request(data), RoutesRequest | Malformed)
    assert isinstance(decode_routes_reply(data), RouteTable | RoutesUnchanged | Malformed)
