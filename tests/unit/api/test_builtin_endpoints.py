"""What the node answers by itself: its models, its health, its metrics, and what it is."""

from urllib.parse import quote

import httpx
import pytest
from tests.support.api_harness import (
    ELSEWHERE,
    Api,
    local,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.core.types.model import ModelStatus


@pytest.mark.parametrize("base", ["/v1", "/api/v1", "/openai/v1", "", "//v1/"])
async def test_models_are_listed_at_every_base(base: str):
    async with running_api([route("tiny", local("127.0.0.1:1"))]) as api:
        for path in (f"{api.url}{base}/models", f"{api.url}{base}/models/"):
            assert [one["id"] for one in (await api.get(path)).json()["data"]] == ["tiny"]
        assert (await api.get(f"{api.url}{base}/models/tiny/")).json()["id"] == "tiny"


async def test_the_root_says_what_this_is():
    async with running_api() as api:
        answer = await api.get("/")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        assert "mesh-llm is running" in answer.text
        head = await api.client.head("/")
        assert (head.status_code, head.content) == (200, b"")
        assert (await api.post(path="/")).status_code == 405


WARM = route("tiny", local("127.0.0.1:1"), remote(ELSEWHERE))
LOADING = route("other", status=ModelStatus.LOADING)
FAILED = route("broken", status=ModelStatus.FAILED, reason="out of memory")
COLD = route("cold", status=ModelStatus.COLD, reason="need 55.0 GB, have 51.5 GB")

ODD_NAMES = ("Owner/Big", "per%cent name", "percent%20name", "50%")


async def get(api: Api, path: str, method: str = "GET") -> httpx.Response:
    return await api.client.request(method, path)


async def test_models_are_listed_with_what_a_client_wants_to_know():
    async with running_api([LOADING, COLD, FAILED, WARM]) as api:
        answer = (await get(api, "/v1/models")).json()
        assert answer["object"] == "list"
        assert [model["id"] for model in answer["data"]] == ["tiny", "broken", "other"]
        assert answer["data"][0] == {
            "id": "tiny",
            "object": "model",
            "created": 7,
            "owned_by": "mesh-llm",
            "status": "warm",
            "context_length": 2048,
            "max_model_len": 2048,
            "size_bytes": 10**6,
            "nodes": 2,
            "aliases": [],
            "capabilities": ["completion", "embedding"],
            "meta": {"n_ctx": 2048, "size": 10**6},
            "reason": "",
        }
        assert answer["data"][1]["reason"] == "out of memory"


async def test_one_model():
    async with running_api([WARM, COLD, *(route(name, local("127.0.0.1:1")) for name in ODD_NAMES)]) as api:
        assert (await get(api, "/v1/models/tiny")).json()["id"] == "tiny"
        for name in ODD_NAMES:
            assert (await get(api, f"/v1/models/{quote(name, safe='')}")).json()["id"] == name
        assert (await get(api, "/v1/models/TIN")).json()["id"] == "tiny"
        assert (await get(api, "/v1/models/cold")).json()["status"] == "cold"
        assert (await get(api, "/v1/models/Owner/Big")).json()["id"] == "Owner/Big"
        assert (await get(api, "/v1/models/Owner%2FBig")).json()["id"] == "Owner/Big"
        missing = await get(api, "/v1/models/nope")
        assert missing.status_code == 404
        assert "tiny" in missing.json()["error"]["message"]


async def test_health():
    async with running_api([WARM, LOADING, FAILED], default="tiny") as api:
        assert (await get(api, "/health")).json() == {"status": "ok", "state": "ready", "reason": ""}
        for default, state in (("other", "loading"), ("broken", "failed")):
            api.routes.current = snapshot(WARM, LOADING, FAILED, default=default)
            answer = await get(api, "/health")
            assert answer.status_code == 503
            assert answer.json()["state"] == state
            assert answer.headers["retry-after"] == "2"
        api.routes.current = snapshot(WARM, accepting=False)
        assert (await get(api, "/health")).json()["state"] == "stopping"


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/tiny"])
async def test_get_and_head_only(path: str):
    async with running_api([WARM]) as api:
        wrong = await get(api, path, "POST")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "GET"
        head = await get(api, path, "HEAD")
        assert head.status_code == 200
        assert head.content == b""
        assert int(head.headers["content-length"]) > 0


async def test_metrics_count_requests_tokens_and_cache_hits():
    async def script(call: Call) -> None:
        await call.respond(b'{"timings":{"cache_n":30,"prompt_n":10,"predicted_n":7,"predicted_ms":100}}')

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        for _ in range(3):
            await api.client.post("/v1/completions", content=b"{}")
        await api.client.post("/v1/completions", content=b'{"model":"nope"}')
        text = (await get(api, "/metrics")).text
        where = 'model="tiny",target="aaaaaaaaaa"'
        assert f'mesh_llm_tokens_total{{kind="generated",{where}}} 21.0' in text
        assert f'mesh_llm_tokens_total{{kind="prompt",{where}}} 120.0' in text
        assert 'mesh_llm_prefix_cache_hit_ratio{model="tiny"} 0.75' in text
        assert f"mesh_llm_first_byte_seconds_count{{{where}}} 3.0" in text
        assert f"mesh_llm_in_flight{{{where}}} 0.0" in text
        assert 'mesh_llm_requests_total{model="tiny",status="2xx",target="aaaaaaaaaa",via="client"} 3.0' in text
        assert 'mesh_llm_refused_total{code="model_not_found"} 1.0' in text
        assert "nope" not in text
        told = api.server.summary()
        assert (told.per_minute, told.in_flight) == (3.0, 0)
        assert told.ttfb_ms_p50 > 0.0
