"""Random bytes as HTTP/1.1: readers raise only what they document; where a stream is cut does not matter."""

import itertools
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.wire.http.http1 import (
    END,
    LAST_CHUNK,
    Http1Error,
    Http1Limits,
    RequestHead,
    RequestParser,
    ResponseHead,
    ResponseParser,
    chunk,
    request_bytes,
    response_bytes,
)
from mesh_llm.wire.http.sse import SseError, SseParser

LIMITS = Http1Limits(head_bytes=2048, headers=16, target_bytes=256)

fragments = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"HTTP/1.1 200 OK\r\n",
            b"HTTP/1.1 100 Continue\r\n\r\n",
            b"HTTP/1.0 204 X\r\n",
            b"POST /v1/x HTTP/1.1\r\n",
            b"GET /?a HTTP/1.1\r\n",
            b"Content-Length: 5\r\n",
            b"Content-Length: 05\r\n",
            b"Transfer-Encoding: chunked\r\n",
            b"Connection: close\r\n",
            b"Connection: upgrade\r\nUpgrade: h2c\r\n",
            b"\r\n",
            b"\n",
            b"5\r\nabcde\r\n",
            b"0\r\n\r\n",
            b"0;" + b"x" * 100 + b"\r\n",
            b"X: " + b"y" * 300,
            b"data: x\n\n",
            b"--XX\r\n",
            b'Content-Disposition: form-data; name="model"\r\n\r\n',
        ]
    ),
)
streams = st.lists(fragments, max_size=30)
header_lists = st.lists(st.tuples(st.binary(max_size=12), st.binary(max_size=20)), max_size=5)


@pytest.mark.parametrize("make", [lambda: ResponseParser(LIMITS, lambda _: None), lambda: RequestParser(LIMITS)])
@given(pieces=streams)
def test_readers_raise_only_http1_error(
    make: Callable[[], ResponseParser | RequestParser], pieces: list[bytes]
) -> None:
    parser = make()
    seen: list[object] = []
    with suppress(Http1Error):
        for piece in pieces:
            seen += parser.feed(piece)
        if isinstance(parser, ResponseParser):
            seen += parser.eof()
    heads = [event for event in seen if isinstance(event, (RequestHead, ResponseHead))]
    assert len(heads) <= 1
    assert seen.count(END) <= 1
    if seen:
        assert seen[0] is heads[0]
    if END in seen:
        assert seen[-1] == END


@given(
    body=st.lists(st.binary(max_size=50), max_size=8),
    chunked=st.booleans(),
    cuts=st.lists(st.integers(0, 600), max_size=6),
)
def test_a_written_response_is_read_back_however_it_is_cut(body: list[bytes], chunked: bool, cuts: list[int]) -> None:
    whole = b"".join(body)
    head = response_bytes(200, [(b"x-a", b"b")], None if chunked else len(whole))
    data = head + (b"".join(map(chunk, body)) + LAST_CHUNK if chunked else whole)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    parser = ResponseParser()
    events = [event for a, b in itertools.pairwise(edges) for event in parser.feed(data[a:b])]
    assert b"".join(event for event in events if isinstance(event, bytes)) == whole
    assert events[-1] == END
    assert not parser.keep_alive


@given(method=st.text(max_size=8), target=st.text(max_size=20), host=st.text(max_size=10), headers=header_lists)
def test_no_header_appears_that_was_not_given(
    method: str, target: str, host: str, headers: list[tuple[bytes, bytes]]
) -> None:
    try:
        data = request_bytes(method, "/" + target, host or "mesh", headers, 0)
    except Http1Error:
        return
    lines = data.split(b"\r\n")
    assert lines[-2:] == [b"", b""]
    assert b"\n" not in b"".join(lines)
    names = [line.split(b":")[0] for line in lines[1:-2]]
    assert [name for name in names if name not in (b"host", b"content-length")] == [name for name, _ in headers]


@given(pieces=streams)
def test_event_reader_raises_only_sse_error(pieces: list[bytes]) -> None:
    parser = SseParser(limit=500)
    with suppress(SseError):
        for piece in pieces:
            parser.feed(piece)
