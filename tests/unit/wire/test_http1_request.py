"""Reading one request from a stream of a peer."""

import pytest

from mesh_llm.wire.http.http1 import END, Http1Error, Http1Limits, RequestHead, RequestParser


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
