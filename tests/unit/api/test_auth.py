"""Who may use the API: Host, Origin and keys."""

import httpx
import msgspec
import pytest
from tests.support.api_harness import Api, local, route, running_api
from tests.support.fake_upstream import fake_upstream

from mesh_llm.api.auth import Auth
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.usage import KeyRing
from mesh_llm.core.types.errors import MeshError

KEY = "a-long-secret-key"
GUARDED = ApiConfig(port=0, keys=(KEY, "another-secret-key"))


async def get(api: Api, path: str = "/v1/models", **headers: str) -> httpx.Response:
    return await api.get(path, **headers)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.0.0.1:1", "LOCALHOST:9337", "[::1]", "[::1]:9337"])
async def test_local_names_are_answered(host: str):
    async with running_api() as api:
        assert (await get(api, host=host)).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil.example:9337", "127.0.0.1.evil.example", "0.0.0.0", "localhost:x"],
)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics", "/v1/chat/completions", "/nowhere"])
async def test_a_rebound_name_is_refused_everywhere(host: str, path: str):
    async with running_api() as api:
        answer = await get(api, path, host=host)
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "host_refused"


async def test_a_request_without_a_host_is_refused():
    async with running_api() as api:
        answer = await api.raw(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert b"bad_host" in answer


async def test_a_request_with_two_hosts_is_refused():
    async with running_api() as api:
        for second in (b"evil.example", b"localhost"):
            answer = await api.raw(
                b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: " + second + b"\r\nConnection: close\r\n\r\n"
            )
            assert answer.startswith(b"HTTP/1.1 400 ")
            assert b"more than one Host header" in answer


async def test_pages_of_other_sites_are_refused_and_get_no_work_done():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        for origin in ("https://evil.example", "null", "http://localhost.evil.example", "file://"):
            answer = await api.client.post("/v1/completions", content=b"{}", headers={"origin": origin})
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
        assert engine.calls == []


async def test_local_pages_may_read_answers():
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address))]) as api,
    ):
        for origin in ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:8443"):
            for path in ("/v1/completions", "/v1/nowhere"):
                answer = await api.client.post(path, content=b"{}", headers={"origin": origin})
                assert answer.headers["access-control-allow-origin"] == origin
                assert answer.headers["vary"] == "origin"
                assert "x-mesh-llm-node" in answer.headers["access-control-expose-headers"]


async def test_preflight():
    asked = {
        "origin": "http://localhost:3000",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, x-stainless-os",
    }
    async with running_api(config=GUARDED) as api:
        answer = await api.client.options("/v1/chat/completions", headers=asked)
        assert answer.status_code == 204
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
        assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert "access-control-allow-private-network" not in answer.headers
        other = await api.client.options("/v1/chat/completions", headers={**asked, "origin": "https://evil.example"})
        assert other.status_code == 403
        assert "access-control-allow-origin" not in other.headers
        plain = await api.client.options("/v1/chat/completions", headers={"x-api-key": KEY})
        assert plain.status_code == 405


async def test_a_key_is_demanded_everywhere_but_for_health():
    async with running_api(config=GUARDED) as api:
        for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/props", "/nowhere"):
            answer = await get(api, path)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await get(api, "/health")).status_code == 503
        for bad in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY):
            assert (await get(api, authorization=bad)).status_code == 401
        assert (await get(api, x_api_key="wrong")).status_code == 401


async def test_a_key_may_be_shown_in_two_ways():
    async with running_api(config=GUARDED) as api:
        assert (await get(api, authorization=f"Bearer {KEY}")).status_code == 200
        assert (await get(api, authorization="bearer another-secret-key")).status_code == 200
        assert (await get(api, x_api_key=KEY)).status_code == 200


async def test_messages_refuse_a_bad_key_in_anthropics_shape():
    async with running_api(config=GUARDED) as api:
        answer = await api.client.post("/v1/messages", content=b"{}")
        assert answer.json()["error"]["type"] == "authentication_error"


async def test_with_a_key_pages_of_other_sites_get_no_leave_to_read():
    async with running_api(config=GUARDED) as api:
        answer = await get(api, origin="https://evil.example", x_api_key=KEY)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers


async def test_keys_go_no_further():
    config = ApiConfig(port=0, keys=(KEY,))
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address))], config=config) as api,
    ):
        headers = {
            "authorization": f"Bearer {KEY}",
            "x-api-key": KEY,
            "cookie": "a=b",
            "origin": "http://localhost",
            "anthropic-version": "2023-06-01",
            "x-mesh-llm-model": "other",
            "accept-encoding": "gzip",
        }
        await api.client.post("/v1/completions", content=b"{}", headers=headers)
        passed = engine.calls[0].headers
        assert KEY.encode() not in b"".join(passed.values())
        assert passed[b"anthropic-version"] == b"2023-06-01"
        assert passed[b"x-mesh-llm-model"] == b"tiny"
        assert not {b"cookie", b"origin", b"accept-encoding"} & passed.keys()


async def test_any_loopback_address_may_be_bound_and_asked_for():
    async with running_api(config=ApiConfig(host="127.0.0.2", port=0)) as api:
        address = f"127.0.0.2:{api.port}"
        async with httpx.AsyncClient(verify=False, trust_env=False) as client:
            assert (await client.get(f"http://{address}/v1/models")).status_code == 200
            headers = {"host": f"127.0.0.3:{api.port}"}
            assert (await client.get(f"http://{address}/v1/models", headers=headers)).status_code == 403


def test_listening_to_others_demands_a_key():
    for host in ("0.0.0.0", "::", "192.168.1.2"):
        with pytest.raises(MeshError) as caught:
            Auth(ApiConfig(host=host))
        assert caught.value.code == "api_key_required"
        Auth(ApiConfig(host=host, keys=(KEY,)))


async def test_by_other_addresses_any_host_goes_with_a_key():
    config = ApiConfig(host="0.0.0.0", port=0, keys=(KEY,))
    async with running_api(config=config) as api:
        assert (await get(api, host="node.lan:9337", x_api_key=KEY)).status_code == 200
        assert (await get(api, host="node.lan:9337")).status_code == 401


def test_any_one_of_the_keys_is_enough():
    ring = KeyRing(["first-key", "second-key"])
    assert ring
    assert ring.accepts([b"second-key"])
    assert ring.accepts([b"wrong", b"first-key"])
    assert not ring.accepts([b"first-ke", b"", b"first-keyy"])
    assert not ring.accepts([])
    assert not KeyRing([])


OPEN = ApiConfig(
    port=0,
    allowed_hosts=("host.docker.internal", "mybox.local:8080", "[fe80::1]"),
    allowed_origins=("https://chat.example", "app://obsidian.md", "chrome-extension://abcdef"),
)


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("host.docker.internal:9337", 200),
        ("HOST.docker.internal", 200),
        ("mybox.local:8080", 200),
        ("mybox.local", 403),
        ("mybox.local:9337", 403),
        ("[fe80::1]:9337", 200),
        ("evil.example", 403),
        ("host.docker.internal.evil.example", 403),
        ("host.docker.internal@evil.example", 403),
    ],
)
async def test_allowed_names_are_answered(host: str, status: int):
    async with running_api(config=OPEN) as api:
        answer = await get(api, host=host)
        assert answer.status_code == status
        if status == 403 and "@" not in host:
            assert f"--allow-host {host.partition(':')[0]}" in answer.json()["error"]["message"]


@pytest.mark.parametrize("keys", [(), (KEY,)])
@pytest.mark.parametrize("origin", ["https://chat.example", "app://obsidian.md", "chrome-extension://abcdef"])
async def test_allowed_pages_and_programs_may_ask_and_read(origin: str, keys: tuple[str, ...]):
    config = msgspec.structs.replace(OPEN, keys=keys)
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))], config=config) as api:
        asked = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type",
            "access-control-request-private-network": "true",
        }
        before = await api.client.options("/v1/chat/completions", headers=asked)
        assert before.status_code == 204
        assert before.headers["access-control-allow-origin"] == origin
        assert before.headers["access-control-allow-headers"] == "authorization, content-type"
        assert before.headers["access-control-allow-private-network"] == "true"
        assert "origin" in before.headers["vary"]
        key = {"authorization": f"Bearer {KEY}"} if keys else {}
        answer = await api.client.post("/v1/completions", content=b"{}", headers={"origin": origin, **key})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == origin
        assert answer.headers["vary"] == "origin"
        assert "retry-after" in answer.headers["access-control-expose-headers"]
        if keys:
            # The page can read why, too.
            wrong = await api.client.post("/v1/completions", content=b"{}", headers={"origin": origin})
            assert (wrong.status_code, wrong.headers["access-control-allow-origin"]) == (401, origin)


@pytest.mark.parametrize(
    ("origin", "says"),
    [
        ("https://evil.example", "--allow-origin https://evil.example"),
        ("https://chat.example:8443", "--allow-origin https://chat.example:8443"),
        ("http://chat.example", "--allow-origin http://chat.example"),
        ("app://other", "--allow-origin app://other"),
        ("null", "serve it on localhost"),
        ("https://chat.example.evil.example", "--allow-origin"),
        ("https://chat.example@evil.example", "serve it on localhost"),
    ],
)
async def test_a_refusal_names_the_option(origin: str, says: str):
    async with running_api(config=OPEN) as api:
        for asked in ({"origin": origin}, {"origin": origin, "access-control-request-method": "POST"}):
            method = "OPTIONS" if len(asked) > 1 else "GET"
            answer = await api.client.request(method, "/v1/models", headers=asked)
            assert answer.status_code == 403
            assert says in answer.json()["error"]["message"]
            assert "access-control-allow-origin" not in answer.headers
