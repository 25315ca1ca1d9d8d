"""How streams follow each other on a TLS connection, and what offers and requests look like."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.transport import (
    END_PIECE,
    MAX_PIECE,
    MAX_TICKETS,
    MAX_TRANSPORT_FRAME,
    Ending,
    PieceParser,
    TransportOffer,
    TransportRequest,
    decode_offer,
    decode_request,
    piece_head,
    reset_piece,
)

Event = bytes | Ending

events = st.lists(
    st.one_of(st.binary(min_size=1, max_size=40), st.just(Ending(None)), st.builds(Ending, code=st.integers(0, 255))),
    max_size=12,
)


def written(event: Event) -> bytes:
    if isinstance(event, bytes):
        return piece_head(len(event)) + event
    return END_PIECE if event.code is None else reset_piece(event.code)


def merged(found: list[Event]) -> list[Event]:
    """Bytes that follow each other are one piece: how they were cut does not count."""
    out: list[Event] = []
    for event in found:
        if isinstance(event, bytes) and out and isinstance(out[-1], bytes):
            out[-1] += event
        else:
            out.append(event)
    return out


@given(events, st.lists(st.integers(1, 30), max_size=60))
def test_what_was_written_is_read_however_it_is_cut(wanted: list[Event], cuts: list[int]) -> None:
    data = b"".join(map(written, wanted))
    parser, found, at = PieceParser(), list[Event](), 0
    for cut in [*cuts, len(data)]:
        got = parser.feed(data[at : at + cut])
        assert not isinstance(got, Malformed)
        assert all(event != b"" for event in got)
        found += got
        at += cut
    assert merged(found) == merged(wanted)


@given(st.lists(st.binary(min_size=1, max_size=60), max_size=20))
def test_any_bytes_are_events_or_malformed(chunks: list[bytes]) -> None:
    parser, size = PieceParser(), 0
    for chunk in chunks:
        got = parser.feed(chunk)
        if isinstance(got, Malformed):
            return
        size += sum(len(event) for event in got if isinstance(event, bytes))
    assert size <= sum(map(len, chunks))


def test_a_piece_over_the_limit_is_malformed_before_its_bytes_come() -> None:
    assert isinstance(PieceParser().feed((MAX_PIECE + 1).to_bytes(4, "big")), Malformed)
    assert PieceParser().feed(piece_head(MAX_PIECE)) == []


@pytest.mark.parametrize("length", [0, -1, MAX_PIECE + 1])
def test_no_piece_of_another_length_is_written(length: int) -> None:
    with pytest.raises(ValueError, match="a piece"):
        piece_head(length)


def test_no_code_beyond_a_byte_is_written() -> None:
    with pytest.raises(ValueError, match="code"):
        reset_piece(256)


def test_offers_and_requests() -> None:
    offer = TransportOffer((4000, 0), bytes(32), (b"t" * 32,) * MAX_TICKETS, "")
    assert decode_offer(encode(offer)) == offer
    assert len(encode(offer)) <= MAX_TRANSPORT_FRAME
    assert decode_request(encode(TransportRequest(3))) == TransportRequest(3)


@pytest.mark.parametrize(
    "offer",
    [
        ((70000, 0), bytes(32), (), ""),
        ((4000, 0), bytes(31), (), ""),
        ((4000, 0), bytes(32), (b"short",), ""),
        ((4000, 0), bytes(32), (bytes(32),) * (MAX_TICKETS + 1), ""),
        ((4000, 0), bytes(32), (), "two\nlines"),
        ((4000,), bytes(32), (), ""),
    ],
)
def test_a_wrong_offer_is_malformed(offer: tuple[object, ...]) -> None:
    assert isinstance(decode_offer(encode(offer)), Malformed)


@given(st.binary(max_size=200))
def test_any_bytes_are_an_offer_or_malformed(data: bytes) -> None:
    assert isinstance(decode_offer(data), TransportOffer | Malformed)
    assert isinstance(decode_request(data), TransportRequest | Malformed)


def test_too_many_tickets_cannot_be_asked_for() -> None:
    assert isinstance(decode_request(encode((MAX_TICKETS + 1,))), Malformed)
