"""Ambiguous requests and injected headers: none reaches an engine.

Each attack contains a second, marked request that must never reach an engine as a request of its own.
"""

import re

import pytest
from tests.support.api_harness import HERE, THERE, local, peer_streams, route, running_api
from tests.support.fake_upstream import fake_upstream

from mesh_llm.api.types import ApiConfig

MARK = b"/v1/smuggled"
SECOND = b"POST %b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}" % MARK
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
CONFIG = ApiConfig(port=0, head_seconds=0.5, body_seconds=0.5, keep_alive_seconds=0.5)


def chunked(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


SMUGGLED = {
    "length and chunks": HEAD
    + b"Content-Length: %d\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" % (5 + len(SECOND))
    + SECOND,
    "chunks and length": HEAD
    + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n"
    + chunked(SECOND)
    + b"0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 2\r\nContent-Length: %d\r\n\r\n{}" % (2 + len(SECOND)) + SECOND,
    "a list of lengths": HEAD + b"Content-Length: 2, 2\r\n\r\n{}" + SECOND,
    "a signed length": HEAD + b"Content-Length: +2\r\n\r\n{}" + SECOND,
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n" + SECOND,
    "a length in hex": HEAD + b"Content-Length: 0x2\r\n\r\n{}" + SECOND,
    "a huge length": HEAD + b"Content-Length: 99999999999999999999999999\r\n\r\n{}" + SECOND,
    "a folded coding": HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a space before the colon": HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "a tab in the coding": HEAD + b"Transfer-Encoding: \tchunked\x0b\r\n\r\n0\r\n\r\n" + SECOND,
    "an unknown coding": HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + SECOND,
    "two codings": HEAD + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + SECOND,
    "gzip and chunks": HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "bare line feeds": (HEAD + b"Content-Length: 2\r\n\r\n{}").replace(b"\r\n", b"\n") + SECOND,
    "a carriage return in a value": HEAD + b"X: a\rContent-Length: 2\r\n\r\n{}" + SECOND,
    "a zero byte in a name": HEAD + b"Content\0-Length: 2\r\n\r\n{}" + SECOND,
    "an odd chunk size": HEAD + b"Transfer-Encoding: chunked\r\n\r\n0x5\r\nhello\r\n0\r\n\r\n" + SECOND,
    "a chunk size that overflows": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n10000000000000002\r\n{}\r\n0\r\n\r\n"
    + SECOND,
    "a chunk longer than it says": HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n" + SECOND,
    "HTTP/1.0 with chunks": HEAD.replace(b"1.1", b"1.0") + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SECOND,
    "HTTP/2 in words": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SECOND,
    "an upgrade": HEAD + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nContent-Length: 0\r\n\r\n" + SECOND,
    "an absolute target": b"GET http://elsewhere/v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n" + SECOND,
    "a line break in the target": b"GET /v1/models\r\nX: y HTTP/1.1\r\nHost: localhost\r\n\r\n" + SECOND,
}


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


@pytest.mark.parametrize("attack", SMUGGLED.values(), ids=SMUGGLED)
async def test_a_smuggled_request_of_a_client_reaches_no_engine(attack: bytes) -> None:
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address))], config=CONFIG) as api,
    ):
        answer = await api.raw(attack)
        # A refused request ends the connection, sometimes without an answer; after a valid one, others may follow.
        first, *rest = statuses(answer) or [400]
        assert 400 <= first < 500 or (first == 200 and rest in ([], [400], [404], [408])), answer
        assert all(call.target == "/v1/completions" for call in engine.calls), engine.calls
        assert (await api.get("/v1/models")).status_code == 200
        assert (await api.post(b'{"prompt": "x"}', "/v1/completions")).status_code == 200
        assert engine.calls[-1].body == b'{"prompt": "x"}'


@pytest.mark.parametrize("attack", SMUGGLED.values(), ids=SMUGGLED)
async def test_a_smuggled_request_of_a_peer_reaches_no_engine(attack: bytes) -> None:
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address, node=HERE))], config=CONFIG) as api,
        peer_streams(api.server, THERE) as peers,
    ):
        from tests.fuzz.test_http1_server import send

        answer = await send(peers, attack, len(attack) // 2)
        assert len(statuses(answer)) <= 1, answer
        assert all(call.target == "/v1/completions" for call in engine.calls), engine.calls


async def test_private_headers_of_a_client_are_not_forwarded() -> None:
    """No header about routing or this connection, and no secret, is forwarded to an engine."""
    hostile = (
        b"X-Mesh-LLM-Model: other\r\nX-Mesh-LLM-Node: 1234\r\nX-Forwarded-For: 1.2.3.4\r\nCookie: a=b\r\n"
        b"Authorization: Bearer secret\r\nConnection: close, content-type\r\nKeep-Alive: timeout=1000\r\n"
        b"Proxy-Authorization: Basic x\r\nTE: trailers\r\nExpect: nothing\r\n"
    )
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        await api.raw(HEAD + hostile + b"Content-Length: 2\r\n\r\n{}")
        assert len(engine.calls) <= 1
        for call in engine.calls:
            names = set(call.headers)
            assert not names & {
                b"cookie",
                b"authorization",
                b"x-forwarded-for",
                b"proxy-authorization",
                b"te",
                b"expect",
            }
            assert call.headers[b"x-mesh-llm-model"] == b"tiny"
            assert b"x-mesh-llm-node" not in names


@pytest.mark.parametrize(
    "name", ["tiny\r\nx-injected: 1", "tiny\n\nHTTP/1.1 200 OK", "tiny\0", "tiny\u2028", "\x1b[31mtiny"]
)
async def test_a_models_name_cannot_add_a_header(name: str) -> None:
    """A peer may announce any name: the answer's headers contain it encoded."""
    async with fake_upstream() as engine, running_api([route(name, local(engine.address))]) as api:
        answer = await api.raw(HEAD + b"Connection: close\r\nContent-Length: 2\r\n\r\n{}")
        head = answer.partition(b"\r\n\r\n")[0].lower()
        assert head.startswith(b"http/1.1 200 ")
        assert not [line for line in head.splitlines()[1:] if line.startswith((b"x-injected", b"http/"))]
        assert b"\x1b" not in head
        assert b"\0" not in head
        assert all(b"x-injected" not in call.headers for call in engine.calls)
