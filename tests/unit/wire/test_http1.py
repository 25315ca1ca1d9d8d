"""Writing heads: what cannot be said, and what a proxy lets through."""

import pytest

from mesh_llm.wire.http.http1 import LAST_CHUNK, Http1Error, chunk, end_to_end, header, request_bytes, response_bytes


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
