"""Random requests to the console: each is answered without an internal error; none passes without authentication."""

import asyncio
import http.client
from typing import cast

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.console.fake_daemon import TOKEN, FakeDaemon, console_app

from mesh_llm.cli.client import events
from mesh_llm.console.auth import TOKEN_HEADER
from mesh_llm.console.routes import CALLS
from mesh_llm.core.types.errors import MeshError

_TEXT = st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_characters="\x7f"), max_size=60)
_HOSTS = st.one_of(
    _TEXT, st.sampled_from(["localhost:3131", "127.0.0.1", "[::1]:3131", "[::1", "localhost@evil", "::1", "LOCALHOST"])
)
_ORIGINS = st.one_of(
    st.none(), _TEXT, _HOSTS.map(lambda host: f"http://{host}"), st.sampled_from(["null", "http://", "http:// ", "://"])
)
_TOKENS = st.one_of(st.none(), _TEXT, st.just(TOKEN), st.just(TOKEN + " "), st.just(TOKEN[:-1]))
_PATHS = st.one_of(
    st.sampled_from([call.path for call in CALLS]),
    st.text("abc/{}.%?=&", max_size=40).map(lambda text: f"/api/{text}"),
)
_BODIES = st.one_of(
    st.binary(max_size=200),
    st.sampled_from(
        [b"[" * 5000, b'{"model":' * 2000, b'{"model":"tiny"}', b'{"scope":"serve","uses":1e999}', b"\xff"]
    ),
)


def headers_of(**given_headers: str | None) -> list[tuple[bytes, bytes]]:
    return [
        (name.replace("_", "-").encode(), value.encode("latin-1"))
        for name, value in given_headers.items()
        if value is not None
    ]


@settings(max_examples=300, deadline=None)
@given(
    method=st.sampled_from(["GET", "POST", "DELETE", "HEAD", "PUT", "OPTIONS"]),
    path=_PATHS,
    host=_HOSTS,
    origin=_ORIGINS,
    token=_TOKENS,
    kind=st.one_of(st.none(), _TEXT, st.just("application/json")),
    body=_BODIES,
)
def test_every_request_is_answered_and_none_passes_without_authentication(
    method: str, path: str, host: str, origin: str | None, token: str | None, kind: str | None, body: bytes
) -> None:
    daemon = FakeDaemon()
    app = console_app(daemon)

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3131") as client:
            headers = headers_of(host=host, origin=origin, content_type=kind, x_mesh_llm_token=token)
            return await client.request(method, path, content=body, headers=headers)

    answer = asyncio.run(ask())
    assert answer.status_code < 500, answer.text
    entitled = token is not None and token.strip() == TOKEN
    if not entitled:
        assert daemon.asked == []
        assert TOKEN not in answer.text
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert TOKEN_HEADER not in answer.headers


class Streamed:
    """A streamed answer of any bytes, in pieces of any size."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    def read1(self, _limit: int) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=50), st.sampled_from([b"data: x\n\n", b"\r\n", b"id: 1\n", b"\xff\n\n"]))))
def test_the_command_line_reads_any_stream_of_events(pieces: list[bytes]) -> None:
    refused: list[str] = []
    try:
        for event in events(cast("http.client.HTTPResponse", Streamed(pieces))):
            assert isinstance(event.data, str)
    except MeshError as error:
        refused.append(error.code)
    assert refused in ([], ["no_answer"])


def test_the_fuzzer_reaches_the_daemon_when_it_may() -> None:
    """Proof that the test above can fail: with the right headers, the same request passes."""
    daemon = FakeDaemon()
    app = console_app(daemon)

    async def ask() -> int:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3131") as client:
            headers = headers_of(content_type="application/json", x_mesh_llm_token=TOKEN)
            return (await client.post("/api/load", content=b'{"model":"tiny"}', headers=headers)).status_code

    assert asyncio.run(ask()) == 202
    assert daemon.asked == [("load", "tiny")]


@pytest.mark.parametrize("token", [TOKEN + "\u00e9", "\u00e9", ""])
def test_tokens_outside_ascii(token: str) -> None:
    app = console_app(FakeDaemon())

    async def ask() -> int:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3131") as client:
            return (await client.get("/api/invites", headers=headers_of(x_mesh_llm_token=token))).status_code

    assert asyncio.run(ask()) == 401
