"""What another web page in the user's browser can send to the console's port, and that it achieves nothing.

A page can send simple requests (GET, HEAD, POST of a form or of text/plain) to any host, with its own Origin, and with
`Origin: null` from a sandboxed frame; some requests carry no Origin (GET of an image or a script). It can rebind its
own name to 127.0.0.1: then Host and Origin are both its own. It cannot set other headers or types without a preflight.
"""

import itertools
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from starlette.types import Receive, Scope, Send
from tests.unit.console.fake_daemon import TOKEN, FakeDaemon, console_app

from mesh_llm.console.auth import TOKEN_HEADER, Access
from mesh_llm.console.routes import CALLS

CHANGES = [(call.method, call.path) for call in CALLS if call.access is Access.CHANGE]
OPEN = ["/api/health", "/", "/console.js", "/api/openapi.json"]
READS = [call.path for call in CALLS if call.access is Access.READ] + ["/api/events", *OPEN]
FOREIGN = [
    "http://evil.example",
    "null",
    "http://localhost:9999",
    "https://localhost:3131",
    "http://localhost.evil.example",
]
SIMPLE_TYPES = ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"]


class Models:
    """In place of the API: counts who got through."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.asked += 1
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
def models() -> Models:
    return Models()


@pytest.fixture
async def browser(daemon: FakeDaemon, models: Models, tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    app = console_app(daemon, tmp_path, models=models)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:3131") as client:
        yield client


def concrete(path: str) -> str:
    return (
        path.replace("{invite}", "i1").replace("{download}", "d1").replace("{node}", "n1").replace("{name}", "daemon")
    )


@pytest.mark.parametrize(("method", "path"), CHANGES)
async def test_simple_requests_change_nothing(
    browser: httpx.AsyncClient, daemon: FakeDaemon, method: str, path: str
) -> None:
    body = b'{"model": "tiny", "scope": "serve", "on": true, "approved": true}'
    for kind, origin in itertools.product(SIMPLE_TYPES, [*FOREIGN, None]):
        headers = {"content-type": kind} | ({"origin": origin} if origin is not None else {})
        answer = await browser.request(method, concrete(path), content=body, headers=headers)
        assert answer.status_code in {401, 403}, headers
        assert not [name for name in answer.headers if name.startswith("access-control-")], headers
        assert daemon.asked == [], headers


@pytest.mark.parametrize("path", READS)
async def test_nothing_is_told_to_another_origin(browser: httpx.AsyncClient, path: str) -> None:
    for origin in FOREIGN:
        answer = await browser.get(concrete(path), headers={"origin": origin})
        assert answer.status_code == 403, origin
        assert TOKEN not in answer.text, origin


HOSTS = ("evil.example", "evil.example:3131", "localhost.", "127.0.0.1.evil.example", "", "0.0.0.0:3131")


@pytest.mark.parametrize("path", [*READS, "/v1/models"])
async def test_a_name_that_points_here_gets_nothing(browser: httpx.AsyncClient, path: str) -> None:
    for host in HOSTS:
        rebound = {"host": host, "origin": f"http://{host}", TOKEN_HEADER: TOKEN}
        for headers in (rebound, {"host": host}):
            answer = await browser.get(concrete(path), headers=headers)
            assert answer.status_code == 403, headers
            assert TOKEN not in answer.text, headers


@pytest.mark.parametrize("path", ["/api/load", "/api/status", "/v1/chat/completions"])
async def test_a_preflight_gives_no_leave(browser: httpx.AsyncClient, path: str) -> None:
    headers = {
        "origin": "http://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": f"content-type, {TOKEN_HEADER}",
    }
    answer = await browser.options(path, headers=headers)
    assert answer.status_code >= 400
    assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize("origin", [*FOREIGN, None])
async def test_the_models_answer_nobody_without_the_token(
    browser: httpx.AsyncClient, models: Models, origin: str | None
) -> None:
    headers = {"content-type": "text/plain"} | ({"origin": origin} if origin is not None else {})
    for method in ("GET", "POST"):
        answer = await browser.request(method, "/v1/chat/completions", content=b"{}", headers=headers)
        assert answer.status_code in {401, 403}
    assert models.asked == 0
    own = {"origin": "http://localhost:3131", TOKEN_HEADER: TOKEN}
    assert (await browser.post("/v1/chat/completions", json={}, headers=own)).status_code == 200
    assert models.asked == 1


async def test_no_answer_may_be_framed_sniffed_or_embedded(browser: httpx.AsyncClient) -> None:
    for path in [*READS[:3], *OPEN]:
        headers = (await browser.get(concrete(path))).headers
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


async def test_the_own_page_may(browser: httpx.AsyncClient, daemon: FakeDaemon) -> None:
    headers = {"origin": "http://localhost:3131", TOKEN_HEADER: TOKEN}
    assert (await browser.post("/api/load", json={"model": "tiny"}, headers=headers)).status_code == 202
    assert daemon.asked == [("load", "tiny")]


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
@pytest.mark.parametrize(("mode", "dest"), [("no-cors", "image"), ("no-cors", "script"), ("navigate", "iframe")])
@pytest.mark.parametrize("path", [*READS, "/v1/models"])
async def test_what_a_page_loads_without_an_origin(
    browser: httpx.AsyncClient, path: str, mode: str, dest: str, site: str
) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": mode, "sec-fetch-dest": dest}
    answer = await browser.get(concrete(path), headers={**headers, TOKEN_HEADER: TOKEN})
    assert answer.status_code == 403
    assert TOKEN not in answer.text


@pytest.mark.parametrize("site", ["cross-site", "same-site", "none", "same-origin"])
async def test_a_link_to_the_console_may_be_followed(browser: httpx.AsyncClient, site: str) -> None:
    headers = {"sec-fetch-site": site, "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert (await browser.get("/", headers=headers)).status_code == 200
    own = {"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors", "sec-fetch-dest": "empty", TOKEN_HEADER: TOKEN}
    assert (await browser.get("/api/status", headers=own)).status_code == 200


async def test_a_name_that_the_user_allowed_is_the_consoles_own(daemon: FakeDaemon, tmp_path: Path) -> None:
    app = console_app(daemon, tmp_path, hosts=("mybox.local",))
    transport = httpx.ASGITransport(app=app)
    token = {TOKEN_HEADER: TOKEN}
    async with httpx.AsyncClient(transport=transport, base_url="http://mybox.local:3131") as client:
        assert (await client.get("/api/health")).status_code == 200
        assert (await client.get("/api/health", headers={"origin": "http://mybox.local:3131"})).status_code == 200
        for foreign in ("http://evil.example", "http://mybox.local:9999", "http://localhost:3131"):
            answer = await client.get("/api/status", headers={"origin": foreign, **token})
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_refused")
        answer = await client.get("/api/health", headers={"host": "evil.example:3131"})
        assert answer.status_code == 403
        assert "--allow-host evil.example" in answer.json()["error"]["hint"]
