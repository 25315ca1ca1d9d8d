"""A console that other machines reach: an API key in place of loopback names; a browser's habits change nothing."""

import base64
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.unit.console.fake_daemon import TOKEN, FakeDaemon, console_app

from mesh_llm.api.types import KeyLimit
from mesh_llm.api.usage import KeyRing
from mesh_llm.console.auth import TOKEN_HEADER
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.daemon.console import console_keys, make_console
from mesh_llm.daemon.published_state import PublishedState, ignore_progress
from mesh_llm.daemon.settings import Settings
from mesh_llm.runtime.home import Home

KEY = b"sesame"
BEARER = {"authorization": "Bearer sesame"}
BASIC = {"authorization": "Basic " + base64.b64encode(b"me:sesame").decode()}
OWN = {"origin": "http://192.168.1.4:3131"}


def accepts(shown: Sequence[bytes]) -> bool:
    return KEY in shown


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
async def client(daemon: FakeDaemon, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = console_app(daemon, tmp_path, accepts=accepts)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://192.168.1.4:3131") as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/", "/api/status", "/api/events", "/api/invites", "/console.js", "/api/openapi.json"]
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "Basic !!!"},
        {"authorization": "Basic " + base64.b64encode(b"sesame").decode()},
        {"authorization": "Digest sesame"},
        {"x-api-key": ""},
        {TOKEN_HEADER: "wrong"},
    ],
)
async def test_nothing_is_told_without_a_key(client: httpx.AsyncClient, path: str, headers: dict[str, str]) -> None:
    answer = await client.get(path, headers=headers)
    assert answer.status_code == 401
    assert TOKEN not in answer.text
    if TOKEN_HEADER not in headers:
        assert answer.headers["www-authenticate"].startswith("Basic ")


@pytest.mark.parametrize("headers", [BEARER, BASIC, {"x-api-key": "sesame"}, {TOKEN_HEADER: TOKEN}])
async def test_a_key_opens_what_is_read(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.get("/api/status", headers=headers)).status_code == 200
    page = await client.get("/", headers=headers)
    assert (page.status_code, TOKEN in page.text) == (200, False)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (BEARER, 202),
        ({"x-api-key": "sesame"}, 202),
        ({**BASIC, TOKEN_HEADER: TOKEN, **OWN}, 202),
        ({TOKEN_HEADER: TOKEN}, 202),
        (BASIC, 401),
        ({**BASIC, **OWN}, 401),
        ({**BASIC, TOKEN_HEADER: "wrong"}, 401),
        ({**BASIC, TOKEN_HEADER: TOKEN, "origin": "http://evil.example"}, 403),
        ({**BEARER, "origin": "null"}, 403),
    ],
)
async def test_what_a_browser_sends_by_itself_changes_nothing(
    client: httpx.AsyncClient, daemon: FakeDaemon, headers: dict[str, str], status: int
) -> None:
    answer = await client.post("/api/load", json={"model": "tiny"}, headers=headers)
    assert answer.status_code == status
    assert daemon.asked == ([("load", "tiny")] if status == 202 else [])


async def test_a_page_behind_tls_is_its_own_origin(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    headers = {**BASIC, TOKEN_HEADER: TOKEN, "host": "mesh.example", "origin": "https://mesh.example"}
    assert (await client.post("/api/load", json={"model": "tiny"}, headers=headers)).status_code == 202


async def test_without_a_key_it_is_not_opened(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, console_listen="0.0.0.0", console_port=0)
    notices = PublishedState(NodeId("n"), ignore_progress).notices
    with pytest.raises(MeshError) as refused:
        make_console(settings, Home(tmp_path), notices)
    assert refused.value.code == "api_key_required"
    opened = Settings(home=tmp_path, console_listen="0.0.0.0", console_port=0, api_keys=("k",))
    console = make_console(opened, Home(tmp_path), notices)
    assert console.url == f"http://127.0.0.1:{console.port}/"
    await console.stop()


async def test_a_key_with_a_limit_opens_no_console(tmp_path: Path) -> None:
    """It is a guest's, and a console can do everything that the node's user can."""
    limits = {"guest": KeyLimit(concurrent=2)}
    keys = ("guest:long-secret", "mine:longer-secret")
    settings = Settings(home=tmp_path, console_listen="0.0.0.0", console_port=0, api_keys=keys, key_limits=limits)
    assert console_keys(settings) == ("mine:longer-secret",)
    notices = PublishedState(NodeId("n"), ignore_progress).notices
    ring = KeyRing(console_keys(settings))
    assert not ring.accepts([b"long-secret", b"guest:long-secret"])
    assert ring.accepts([b"longer-secret"])
    only_guests = msgspec.structs.replace(settings, api_keys=keys[:1])
    with pytest.raises(MeshError, match="needs a key") as refused:
        make_console(only_guests, Home(tmp_path), notices)
    assert "--key-limit" in refused.value.hint
