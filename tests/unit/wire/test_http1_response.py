"""Reading responses: framing, keep-alive, and everything that could be read in two ways."""

import pytest

from mesh_llm.wire.http.http1 import END, Http1Error, Http1Limits, ResponseHead, ResponseParser

OK = b"HTTP/1.1 200 OK\r\n"


def read(data: bytes, *, step: int = 0) -> tuple[ResponseParser, ResponseHead, bytes, bool]:
    """Parse all of `data`, `step` bytes at a time; return parser, head, body and whether the end was seen."""
    parser = ResponseParser()
    pieces = [data[i : i + step] for i in range(0, len(data), step)] if step else [data]
    events = [event for piece in pieces for event in parser.feed(piece)]
    head = events[0]
    assert isinstance(head, ResponseHead)
    body = b"".join(event for event in events if isinstance(event, bytes))
    return parser, head, body, END in events


@pytest.mark.parametrize("step", [0, 1, 7])
def test_by_length(step: int):
    parser, head, body, ended = read(OK + b"Content-Length: 3\r\nX-A: b\r\n\r\nabc", step=step)
    assert (head.status, head.length, head.headers) == (200, 3, ((b"content-length", b"3"), (b"x-a", b"b")))
    assert (body, ended, parser.keep_alive, parser.complete) == (b"abc", True, True, True)


@pytest.mark.parametrize("step", [0, 1, 7])
def test_in_chunks_with_extensions_and_a_trailer(step: int):
    data = OK + b"Transfer-Encoding: chunked\r\n\r\n3;x=1\r\nabc\r\n2\r\nde\r\n0\r\nX: y\r\n\r\n"
    parser, head, body, ended = read(data, step=step)
    assert (head.length, head.headers) == (None, ((b"transfer-encoding", b"chunked"),))
    assert (body, ended, parser.keep_alive) == (b"abcde", True, True)


def test_up_to_the_connections_end():
    parser, head, body, ended = read(OK + b"\r\nabc")
    assert (head.length, body, ended) == (None, b"abc", False)
    assert parser.eof() == [END]
    assert not parser.keep_alive


def test_connection_close_is_heard():
    parser, *_ = read(OK + b"Connection: close\r\nContent-Length: 0\r\n\r\n")
    assert parser.complete
    assert not parser.keep_alive


def test_http_1_0_closes_by_default():
    parser, *_ = read(b"HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n")
    assert not parser.keep_alive


@pytest.mark.parametrize("status", [204, 304])
def test_some_statuses_have_no_body(status: int):
    parser, head, body, ended = read(b"HTTP/1.1 %d X\r\n\r\n" % status)
    assert (head.length, body, ended, parser.keep_alive) == (0, b"", True, True)


def test_interim_responses_are_skipped():
    data = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK + b"Content-Length: 1\r\n\r\na"
    _, head, body, ended = read(data)
    assert (head.status, head.headers, body, ended) == (200, ((b"content-length", b"1"),), b"a", True)


def test_bytes_after_the_end_forbid_reuse():
    parser, _, body, ended = read(OK + b"Content-Length: 1\r\n\r\naHTTP/1.1 200 OK\r\n")
    assert (body, ended, parser.surplus, parser.keep_alive) == (b"a", True, True, False)
    late, *_ = read(OK + b"Content-Length: 1\r\n\r\na")
    assert late.keep_alive
    assert late.feed(b"x") == []
    assert not late.keep_alive


@pytest.mark.parametrize(
    "head",
    [
        OK + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        OK + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\n",
        OK + b"Content-Length: 3, 3\r\n\r\n",
        OK + b"Content-Length: +3\r\n\r\n",
        OK + b"Content-Length: -3\r\n\r\n",
        OK + b"Content-Length: \r\n\r\n",
        OK + b"Content-Length: 99999999999999999999999\r\n\r\n",
        OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n",
        OK + b"Transfer-Encoding: gzip\r\n\r\n",
        OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
        OK + b"A: b\r\n c\r\n\r\n",
        OK + b"A : b\r\n\r\n",
        OK + b"A: b\x00\r\n\r\n",
        b"HTTP/1.1 200 OK\nContent-Length: 3\n\n",
        b"HTTP/2.0 200 OK\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        b"HTTP/1.1 20 OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 9,
    ],
)
def test_what_could_be_read_in_two_ways_is_refused(head: bytes):
    parser = ResponseParser()
    with pytest.raises(Http1Error):
        parser.feed(head)
    with pytest.raises(Http1Error):
        parser.feed(b"more")


def test_a_bad_chunk_size_is_refused():
    for size in (b"zz", b"-1", b"3 ", b"fffffffffffffffffff"):
        parser = ResponseParser()
        with pytest.raises(Http1Error):
            parser.feed(OK + b"Transfer-Encoding: chunked\r\n\r\n" + size + b"\r\nabc\r\n0\r\n\r\n")


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (OK + b"X: ", b"a" * 100),
        (OK, b"A: b\r\n"),
        (b"HTTP/1.1 200 ", b"O" * 100),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"a" * 100),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"A: b\r\n"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n3;", b"x" * 100),
    ],
)
def test_heads_and_trailers_are_bounded(start: bytes, piece: bytes):
    parser = ResponseParser(Http1Limits(head_bytes=4096))
    parser.feed(start)

    def flood() -> None:
        for _ in range(1000):
            parser.feed(piece)

    with pytest.raises(Http1Error, match=r"too (large|many)"):
        flood()


def test_an_early_end_is_an_error():
    for data in (b"", b"HTTP/1.1 2", OK + b"Content-Length: 3\r\n\r\nab", OK + b"Transfer-Encoding: chunked\r\n\r\n"):
        parser = ResponseParser()
        parser.feed(data)
        with pytest.raises(Http1Error, match="ended within"):
            parser.eof()
