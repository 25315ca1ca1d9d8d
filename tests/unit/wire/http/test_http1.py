"""Hosts and origins, heads, requests and responses: written, read, and refused."""

import pytest

from mesh_llm.wire.http.http1 import (
    END,
    LAST_CHUNK,
    Headers,
    Http1Error,
    Http1Limits,
    RequestHead,
    RequestParser,
    ResponseHead,
    ResponseParser,
    chunk,
    end_to_end,
    header,
    hint_bytes,
    host_of,
    is_loopback_address,
    is_loopback_name,
    request_bytes,
    response_bytes,
    split_authority,
    split_origin,
    unbracketed,
)


def test_a_request_says_its_own_length_and_host():
    head = request_bytes("POST", "/v1/x?a=b", "127.0.0.1:80", [(b"accept", b"*/*")], 12)
    assert head == b"POST /v1/x?a=b HTTP/1.1\r\nhost: 127.0.0.1:80\r\ncontent-length: 12\r\naccept: */*\r\n\r\n"


def test_a_get_without_a_body_has_no_length():
    assert b"content-length" not in request_bytes("GET", "/props", "mesh", (), 0)


def test_an_empty_post_has_length_zero():
    assert b"content-length: 0\r\n" in request_bytes("POST", "/", "mesh", (), 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"x", b"a\r\nb: c"),
        (b"x", b"a\nb"),
        (b"x", b"a\x00"),
        (b"x\r\ny", b"a"),
        (b"x y", b"a"),
        (b"x:", b"a"),
        (b"", b"a"),
        (b"Content-Length", b"5"),
        (b"transfer-encoding", b"chunked"),
        (b"Connection", b"x"),
        (b"host", b"evil"),
    ],
)
def test_a_header_cannot_break_out(name: bytes, value: bytes):
    with pytest.raises(Http1Error):
        request_bytes("GET", "/", "mesh", [(name, value)], 0)
    with pytest.raises(Http1Error):
        response_bytes(200, [(name, value)], 0)


@pytest.mark.parametrize(
    ("method", "target", "host"),
    [
        ("GET /x", "/", "mesh"),
        ("get", "/", "mesh"),
        ("GET", "x", "mesh"),
        ("GET", "/a b", "mesh"),
        ("GET", "/a\r\nx: y", "mesh"),
        ("GET", "/ä", "mesh"),
        ("GET", "/", "mesh\r\nx: y"),
        ("GET", "/", ""),
        ("GET", "/", "a/b"),
    ],
)
def test_a_request_line_cannot_break_out(method: str, target: str, host: str):
    with pytest.raises(Http1Error):
        request_bytes(method, target, host, (), 0)


def test_responses_are_framed_by_length_or_in_chunks():
    assert response_bytes(200, [(b"a", b"b")], 3) == (
        b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\na: b\r\n\r\n"
    )
    assert b"transfer-encoding: chunked\r\n" in response_bytes(200, (), None)
    assert b"content-length" not in response_bytes(204, (), 0)
    with pytest.raises(Http1Error):
        response_bytes(101, (), 0)


def test_an_empty_chunk_is_never_written():
    assert chunk(b"") == b""
    assert chunk(b"abc" * 6) == b"12\r\n" + b"abc" * 6 + b"\r\n"
    assert LAST_CHUNK == b"0\r\n\r\n"


def test_hop_by_hop_headers_end_here():
    headers = [
        (b"connection", b"keep-alive, X-Secret"),
        (b"keep-alive", b"timeout=5"),
        (b"x-secret", b"1"),
        (b"transfer-encoding", b"chunked"),
        (b"content-type", b"text/plain"),
        (b"content-length", b"3"),
    ]
    assert end_to_end(headers) == [(b"content-type", b"text/plain"), (b"content-length", b"3")]


def test_header_gives_the_first_value():
    assert header([(b"a", b"1"), (b"a", b"2")], b"a") == b"1"
    assert header([], b"a") is None


@pytest.mark.parametrize("text", ["localhost", "LOCALHOST:9337", "127.0.0.1:1", "[::1]", "[::1]:65535"])
def test_names_of_this_machine(text: str) -> None:
    assert is_loopback_name(host_of(text))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "localhost:",
        "localhost:x",
        "localhost:80:evil.example",
        "localhost:80@evil.example",
        "localhost:65536",
        "localhost.",
        "localhost/",
        "localhost ",
        "user@localhost",
        "[::1]evil.example",
        "[::1]:80evil",
        "[::1",
        "::1",
        "127.0.0.1.evil.example",
        "127.1",
        "0.0.0.0",
        "loc\u0430lhost",
        "localhost:\u0663",
    ],
)
def test_other_names_are_not_loopback(text: str) -> None:
    assert not is_loopback_name(host_of(text))


def test_parts() -> None:
    assert split_authority("Mesh.Example:8443") == ("mesh.example", 8443)
    assert split_authority("[2001:DB8::1]") == ("[2001:db8::1]", None)
    assert split_origin("https://mesh.example") == ("https", "mesh.example", 443)
    assert split_origin("HTTP://[::1]:80") == ("http", "[::1]", 80)
    for none in ("null", "file://", "ftp://a", "https://", "https://a/", "https://a b", "mesh.example"):
        assert split_origin(none) is None


@pytest.mark.parametrize(
    ("address", "expected"), [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True),
                              ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("box", False)],
)  # fmt: skip
def test_loopback(address: str, *, expected: bool) -> None:
    assert is_loopback_address(address) is expected


def test_an_address_to_bind_needs_no_brackets() -> None:
    assert [unbracketed(text) for text in ("[::1]", "::1", "127.0.0.1", "[::1")] == ["::1", "::1", "127.0.0.1", "[::1"]


def test_a_request_with_a_body():
    events = RequestParser().feed(b"POST /v1/x?y=1 HTTP/1.1\r\nHost: mesh\r\nContent-Length: 3\r\n\r\nabc")
    assert events == [
        RequestHead(
            method="POST",
            target="/v1/x?y=1",
            headers=((b"host", b"mesh"), (b"content-length", b"3")),
            length=3,
        ),
        b"abc",
        END,
    ]


def test_chunks_and_no_body():
    head, *rest = RequestParser().feed(b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n")
    assert isinstance(head, RequestHead)
    assert head.length is None
    assert rest == [b"a", END]
    assert RequestParser().feed(b"GET / HTTP/1.1\r\n\r\n")[1:] == [END]


@pytest.mark.parametrize(
    "data",
    [
        b"GET http://a/b HTTP/1.1\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n\r\n",
        b"GET / HTTP/0.9\r\n\r\n",
        b"GET / HTTP/2.0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /\x80 HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nUpgrade: h2c\r\nConnection: upgrade\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 3\r\n\r\n",
        b"BREW / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
    ],
)
def test_what_is_refused(data: bytes):
    with pytest.raises(Http1Error):
        RequestParser().feed(data)


def test_a_second_request_is_surplus():
    parser = RequestParser()
    events = parser.feed(b"GET /a HTTP/1.1\r\n\r\nGET /b HTTP/1.1\r\n\r\n")
    assert [event.target for event in events if isinstance(event, RequestHead)] == ["/a"]
    assert parser.surplus


def test_the_target_is_bounded():
    parser = RequestParser(Http1Limits(target_bytes=100))
    with pytest.raises(Http1Error, match="too long"):
        parser.feed(b"GET /" + b"a" * 200 + b" HTTP/1.1\r\n\r\n")


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


def test_connection_close_forbids_reuse():
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
def test_ambiguous_and_malformed_responses_are_refused(head: bytes):
    parser = ResponseParser()
    with pytest.raises(Http1Error):
        parser.feed(head)
    with pytest.raises(Http1Error):
        parser.feed(b"more")


def test_headers_of_interim_responses_are_handed_over_and_no_part_of_the_response():
    given: list[Headers] = []
    parser = ResponseParser(hinted=given.append)
    first, second = [(b"x-a", b"1")], [(b"x-a", b"2"), (b"x-b", b"3")]
    data = hint_bytes(first) + hint_bytes(second) + response_bytes(200, [(b"x-c", b"4")], 2) + b"ok"
    events = [event for at in range(len(data)) for event in parser.feed(data[at : at + 1])]
    assert given == [tuple(first), tuple(second)]
    assert isinstance(events[0], ResponseHead)
    assert (events[0].status, header(events[0].headers, b"x-a"), header(events[0].headers, b"x-c")) == (200, None, b"4")
    # Without anybody who wants them they are skipped, as by earlier versions.
    assert ResponseParser().feed(data)[0] == events[0]
    with pytest.raises(Http1Error):
        hint_bytes([(b"x-a", b"1\r\nx-b: 2")])


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
