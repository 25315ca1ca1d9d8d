"""Server-sent events."""

import pytest

from mesh_llm.wire.http.sse import SseError, SseEvent, SseParser

STREAM = (
    b"\xef\xbb\xbf: hello\n\n"
    b"data: one\n\n"
    b"event: delta\r\ndata: a\r\ndata:b\r\nid: 7\r\n\r\n"
    b"retry: 5\rdata\r\r"
    b"event: dropped\n\n"
    b"data: \xc3\xa9\n\n"
)
EVENTS = [
    SseEvent(data="one"),
    SseEvent(data="a\nb", event="delta", id="7"),
    SseEvent(data="", id="7"),
    SseEvent(data="é", id="7"),
]


@pytest.mark.parametrize("step", [1, 2, 3, 1000])
def test_events_do_not_depend_on_where_the_stream_is_cut(step: int):
    parser = SseParser()
    pieces = [STREAM[i : i + step] for i in range(0, len(STREAM), step)]
    assert [event for piece in pieces for event in parser.feed(piece)] == EVENTS
    assert not parser.inside


def test_inside_is_true_during_an_event():
    parser = SseParser()
    assert not parser.inside
    parser.feed(b"data: a")
    assert parser.inside
    parser.feed(b"\n")
    assert parser.inside
    assert parser.feed(b"\n") == [SseEvent(data="a")]
    assert not parser.inside


@pytest.mark.parametrize("piece", [b"x" * 50, b"data: " + b"x" * 50 + b"\n", b"data:\n"])
def test_an_event_is_bounded(piece: bytes):
    parser = SseParser(limit=200)

    def flood() -> None:
        for _ in range(300):
            parser.feed(piece)

    with pytest.raises(SseError, match="larger"):
        flood()


def test_text_must_be_utf_8():
    with pytest.raises(SseError, match="UTF-8"):
        SseParser().feed(b"data: \xff\n\n")
