"""Who is let in by a link of `mesh-llm console`, for how long, and that half a session opens nothing."""

import base64
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from tests.unit.console.fake_daemon import COOKIE, PAGE, TOKEN, FakeDaemon, console_app

from mesh_llm.console.auth import (
    CODE_SECONDS,
    MOST_CODES,
    MOST_SESSIONS,
    MOST_WRONG,
    SESSION_HEADER,
    SESSION_SECONDS,
    TOKEN_HEADER,
    Access,
    Sessions,
)
from mesh_llm.console.routes import CALLS
from mesh_llm.core.types.errors import MeshError

ORIGIN = "https://mesh.example"
USER = {TOKEN_HEADER: TOKEN}


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def refusal(sessions: Sessions, code: str) -> str:
    with pytest.raises(MeshError) as refused:
        sessions.redeem(code)
    return refused.value.code


def test_a_code_is_good_once_and_for_a_quarter_of_an_hour() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    code, late = sessions.new_code(), sessions.new_code()
    session = sessions.redeem(code)
    assert sessions.accepts(session.cookie, session.key)
    assert refusal(sessions, code) == "sign_in_code"
    clock.now += CODE_SECONDS
    assert refusal(sessions, late) == "sign_in_code"
    assert sessions.count == 1


def test_half_a_session_is_none() -> None:
    sessions = Sessions()
    one, other = sessions.open(), sessions.open()
    for cookie, key in ((one.cookie, ""), ("", one.key), (one.cookie, other.key), (one.key, one.cookie), ("", "")):
        assert not sessions.accepts(cookie, key)


def test_everything_is_bounded_and_the_oldest_makes_room() -> None:
    sessions = Sessions()
    codes = [sessions.new_code() for _ in range(MOST_CODES + 1)]
    assert refusal(sessions, codes[0]) == "sign_in_code"
    sessions.redeem(codes[1])
    opened = [sessions.open() for _ in range(MOST_SESSIONS)]
    assert sessions.count == MOST_SESSIONS
    assert sessions.accepts(opened[0].cookie, opened[0].key)
    sessions.open()
    # Not the one that was used last.
    assert sessions.accepts(opened[0].cookie, opened[0].key)
    assert not sessions.accepts(opened[1].cookie, opened[1].key)


def test_wrong_codes_are_slowed_down_and_lock_nobody_out() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    code = sessions.new_code()
    assert [refusal(sessions, f"guess{number}") for number in range(MOST_WRONG)] == ["sign_in_code"] * MOST_WRONG
    assert refusal(sessions, "one more") == "too_many_codes"
    sessions.redeem(code)
    clock.now += 61.0
    assert refusal(sessions, "again") == "sign_in_code"


def test_a_session_ends_by_itself_and_by_the_user() -> None:
    clock = Clock()
    sessions = Sessions(clock)
    used, idle, code = sessions.open(), sessions.open(), sessions.new_code()
    clock.now += SESSION_SECONDS - 1
    assert sessions.accepts(used.cookie, used.key)
    clock.now += 2
    assert sessions.accepts(used.cookie, used.key)
    assert not sessions.accepts(idle.cookie, idle.key)
    assert sessions.end_all() == 1
    assert not sessions.accepts(used.cookie, used.key)
    assert refusal(sessions, code) == "sign_in_code"


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
async def browser(daemon: FakeDaemon, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=console_app(daemon, tmp_path, origins=(f"{ORIGIN}/lab/",)))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:3131") as client:
        yield client


async def new_code(client: httpx.AsyncClient) -> str:
    made = await client.post("/api/sign-in-links", headers=USER)
    assert made.status_code == 201
    link = made.json()
    assert link["urls"] == [f"{page}#sign-in={link['code']}" for page in (PAGE, f"{ORIGIN}/lab/")]
    return link["code"]


async def sign_in(client: httpx.AsyncClient, **headers: str) -> dict[str, str]:
    """The key of a new session, as a header; its cookie is the client's."""
    answer = await client.post("/api/session", json={"code": await new_code(client)}, headers=headers)
    assert answer.status_code == 201
    return {SESSION_HEADER: answer.json()["key"]}


NOT_OPEN = [(call.method, call.path.replace("{", "").replace("}", "")) for call in CALLS if call.access != Access.OPEN]


@pytest.mark.parametrize(("method", "path"), [*NOT_OPEN, ("GET", "/api/events"), ("GET", "/v1/models")])
async def test_whoever_shows_nothing_gets_nothing(browser: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await browser.request(method, path)
    assert answer.status_code == (404 if path == "/v1/models" else 401)
    if path != "/v1/models":
        assert answer.json()["error"]["code"] == "sign_in_required"
        assert "mesh-llm console" in answer.json()["error"]["hint"]


async def test_what_anybody_may_see_says_nothing_of_the_node(browser: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    daemon.fault = RuntimeError("the status was made for a stranger")
    answer = await browser.get("/api/health")
    assert (answer.status_code, set(answer.json())) == (200, {"status", "version"})
    assert TOKEN not in (await browser.get("/")).text


async def test_a_link_opens_a_session_whose_halves_are_worth_nothing_alone(
    browser: httpx.AsyncClient, daemon: FakeDaemon
) -> None:
    key = await sign_in(browser)
    cookie = browser.cookies[COOKIE]
    assert (await browser.get("/api/status", headers=key)).json()["token"] == "t"
    assert (await browser.post("/api/load", json={"model": "tiny"}, headers=key)).status_code == 202
    assert daemon.asked == [("load", "tiny")]
    # A cookie goes to every port of this host; a key that leaked comes without the cookie.
    assert (await browser.get("/api/status")).status_code == 401
    browser.cookies.clear()
    assert (await browser.get("/api/status", headers=key)).status_code == 401
    browser.cookies.set(COOKIE, cookie)
    assert (await browser.get("/api/status", headers={SESSION_HEADER: "x"})).status_code == 401
    assert (await browser.get("/api/status", headers=key)).status_code == 200


async def test_a_cookie_that_no_script_and_no_other_site_has(browser: httpx.AsyncClient) -> None:
    answer = await browser.post("/api/session", json={"code": await new_code(browser)})
    words = answer.headers["set-cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/", f"Max-Age={SESSION_SECONDS:.0f}"} <= set(words)
    assert "Secure" not in words
    through_proxy = {"host": "mesh.example", "origin": ORIGIN}
    answer = await browser.post("/api/session", json={"code": await new_code(browser)}, headers=through_proxy)
    assert "Secure" in answer.headers["set-cookie"].split("; ")


@pytest.mark.parametrize("body", [{}, {"code": ""}, {"code": "guess"}])
async def test_without_a_code_there_is_no_session(browser: httpx.AsyncClient, body: dict[str, str]) -> None:
    answer = await browser.post("/api/session", json=body)
    assert answer.status_code == 401
    assert "set-cookie" not in answer.headers


async def test_signing_out_here_and_everywhere(browser: httpx.AsyncClient) -> None:
    key = await sign_in(browser)
    cookie = browser.cookies[COOKIE]
    assert (await browser.delete("/api/session", headers=key)).json() == {"ended": 1}
    browser.cookies.set(COOKIE, cookie)
    assert (await browser.get("/api/status", headers=key)).status_code == 401
    key = await sign_in(browser)
    assert (await browser.get("/api/session", headers=key)).json() == {"sessions": 1}
    assert (await browser.delete("/api/sessions", headers=USER)).json() == {"ended": 1}
    assert (await browser.get("/api/status", headers=key)).status_code == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "mesh.example", "origin": ORIGIN}, 202),
        ({"host": "mesh.example:443", "origin": ORIGIN}, 202),
        # A proxy that does not pass the name on, as nginx does without `proxy_set_header Host`.
        ({"host": "127.0.0.1:3131", "origin": ORIGIN}, 202),
        ({"host": "mesh.example", "origin": "http://mesh.example"}, 403),
        ({"host": "mesh.example", "origin": "https://evil.example"}, 403),
        ({"host": "mesh.example", "origin": "https://mesh.example:8443"}, 403),
        ({"host": "mesh.example:8443", "origin": ORIGIN}, 403),
        ({"host": "evil.example", "origin": ORIGIN}, 403),
        ({"host": "mesh.example.evil.example"}, 403),
    ],
)
async def test_the_public_address_of_a_proxy_is_our_own_and_no_other(
    browser: httpx.AsyncClient, headers: dict[str, str], status: int
) -> None:
    answer = await browser.post("/api/load", json={"model": "tiny"}, headers={**USER, **headers})
    assert answer.status_code == status


async def test_without_a_page_there_are_no_links(daemon: FakeDaemon) -> None:
    transport = httpx.ASGITransport(app=console_app(daemon, page=False))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.post("/api/sign-in-links", headers=USER)
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "no_page")


async def test_where_others_reach_it_a_browsers_key_opens_a_session(daemon: FakeDaemon) -> None:
    app = console_app(daemon, accepts=lambda shown: b"sesame" in shown)
    basic = {"authorization": "Basic " + base64.b64encode(b"me:sesame").decode()}
    own = {"origin": "http://192.168.1.4:3131"}
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app=app), base_url="http://192.168.1.4:3131", headers=basic
    ) as client:
        # What the browser sends by itself also where another page causes it is no reason to change anything.
        assert (await client.post("/api/load", json={"model": "tiny"}, headers=own)).status_code == 401
        evil = {"origin": "http://evil.example"}
        assert (await client.post("/api/session", json={}, headers=evil)).status_code == 403
        assert (
            await client.post("/api/session", content=b"{}", headers={"content-type": "text/plain"})
        ).status_code == 415
        key = {SESSION_HEADER: (await client.post("/api/session", json={}, headers=own)).json()["key"], **own}
        assert (await client.post("/api/load", json={"model": "tiny"}, headers=key)).status_code == 202
    assert daemon.asked == [("load", "tiny")]
