"""The management API: who may do what, and what each call gives."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import msgspec
import pytest
from tests.unit.console.fake_daemon import TOKEN, FakeDaemon, console_app

from mesh_llm.console.auth import TOKEN_HEADER
from mesh_llm.console.status import Status


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
async def client(daemon: FakeDaemon, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "daemon.log").write_text("one\ntwo\nthree\n")
    app = console_app(daemon, tmp_path)
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3131") as client:
        yield client


AUTH = {TOKEN_HEADER: TOKEN}


async def test_status_is_told(client: httpx.AsyncClient) -> None:
    answer = await client.get("/api/status", headers=AUTH)
    assert answer.status_code == 200
    assert msgspec.json.decode(answer.content, type=Status).models[0].name == "tiny"


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:3131",
        "192.168.1.4:3131",
        "localhost.evil.example",
        # No host and port at all, of which a lenient reader would see the first part.
        "localhost:3131@evil.example",
        "localhost:evil.example",
        "localhost:3131:80",
        "[::1]evil.example",
        "[::1",
    ],
)
async def test_other_host_names_are_refused(client: httpx.AsyncClient, host: str) -> None:
    answer = await client.get("/api/status", headers={**AUTH, "host": host})
    assert answer.status_code == 403
    assert answer.json()["error"]["code"] == "host_refused"


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "https://localhost:3131", "http://localhost:9999"])
async def test_other_origins_are_refused_even_with_the_token(
    client: httpx.AsyncClient, daemon: FakeDaemon, origin: str
) -> None:
    answer = await client.post("/api/load", json={"model": "tiny"}, headers={**AUTH, "origin": origin})
    assert answer.status_code == 403
    assert daemon.asked == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/load"),
        ("POST", "/api/drop"),
        ("POST", "/api/stop"),
        ("POST", "/api/invites"),
        ("GET", "/api/invites"),
        ("DELETE", "/api/invites/i1"),
    ],
)
async def test_changes_need_the_token(client: httpx.AsyncClient, daemon: FakeDaemon, method: str, path: str) -> None:
    for headers in ({}, {TOKEN_HEADER: "wrong"}):
        answer = await client.request(method, path, json={"model": "tiny"}, headers=headers)
        assert answer.status_code == 401
    assert daemon.asked == []


async def test_load_drop_stop(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    assert (await client.post("/api/load", json={"model": "tiny"}, headers=AUTH)).status_code == 202
    assert (await client.post("/api/drop", json={"model": "tiny", "drain_seconds": 2}, headers=AUTH)).status_code == 202
    assert (await client.post("/api/drop", json={"model": "tiny", "rest": True}, headers=AUTH)).status_code == 202
    assert (await client.post("/api/stop", json={}, headers=AUTH)).status_code == 202
    assert daemon.asked == [("load", "tiny"), ("drop", "tiny", 2.0), ("rest", "tiny", 30.0), ("stop", 0.0)]


async def test_a_refusal_says_why_and_what_next(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/load", json={"model": "huge"}, headers=AUTH)
    assert answer.status_code == 409
    assert answer.json()["error"] == {
        "code": "does_not_fit",
        "message": "need 55.0 GB, have 51.5 GB",
        "hint": "Add a node.",
    }


async def test_a_byte_order_mark_before_a_body_is_ignored(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    body = b'\xef\xbb\xbf{"model": "tiny"}'
    answer = await client.post("/api/load", content=body, headers={**AUTH, "content-type": "application/json"})
    assert (answer.status_code, daemon.asked) == (202, [("load", "tiny")])


@pytest.mark.parametrize(
    "body", [b"{", b"[]", b'{"model": 3}', b'{"model": ""}', b'{"model":"a","extra":1}', b'{"model":"\xff"}']
)
async def test_malformed_bodies_are_400(client: httpx.AsyncClient, body: bytes) -> None:
    answer = await client.post("/api/load", content=body, headers={**AUTH, "content-type": "application/json"})
    assert answer.status_code == 400


async def test_a_form_from_another_page_is_not_json(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/load", data={"model": "tiny"}, headers=AUTH)
    assert answer.status_code == 415


async def test_a_huge_body_is_refused(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/load", content=b" " * 70_000, headers={**AUTH, "content-type": "application/json"})
    assert answer.status_code == 413


async def test_invites(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    made = await client.post("/api/invites", json={"scope": "client", "lifetime_seconds": 60, "uses": 2}, headers=AUTH)
    assert made.status_code == 201
    assert made.json()["token"] == "tok"
    assert daemon.asked == [("invite", "client", 60.0, 2)]
    assert (await client.get("/api/invites", headers=AUTH)).json()["invites"][0]["id"] == "i1"
    assert (await client.delete("/api/invites/i1", headers=AUTH)).json()["revoked"] is True


async def test_logs_are_read_only_from_their_place(client: httpx.AsyncClient, tmp_path: Path) -> None:
    (tmp_path.parent / "secret.log").write_text("secret")
    assert (await client.get("/api/logs", headers=AUTH)).json() == {"logs": ["daemon"]}
    assert (await client.get("/api/logs/daemon?lines=2", headers=AUTH)).text == "two\nthree\n"
    for name in ("..%2Fsecret", "nothing", "%2e%2e%2fsecret"):
        assert (await client.get(f"/api/logs/{name}", headers=AUTH)).status_code == 404


async def test_the_page_carries_its_fences_and_no_secret(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.status_code == 200
    assert TOKEN not in page.text
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert (await client.get("/guard.py")).status_code == 404


async def test_without_the_page_only_the_api_answers(daemon: FakeDaemon, tmp_path: Path) -> None:
    app = console_app(daemon, tmp_path, page=False)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://127.0.0.1") as client:
        assert (await client.get("/")).status_code == 404
        assert (await client.get("/api/status", headers=AUTH)).status_code == 200


async def test_a_fault_inside_tells_nothing_of_the_inside(client: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    daemon.fault = RuntimeError("secret detail")
    answer = await client.get("/api/status", headers=AUTH)
    assert answer.status_code == 500
    assert "secret" not in answer.text
