"""Ollama's paths, with an engine that answers from a script."""

import asyncio
import json
from typing import Any

import httpx
import pytest
from tests.support.api_harness import THERE, Api, local, remote, route, running_api
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import ModelRoute
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts, ModelKind, ModelStatus

ASK = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
PROPS = {"chat_template": "<think>", "chat_template_caps": {"supports_tools": True}, "model_ftype": "Q4_K - Medium",
         "modalities": {"vision": True}}  # fmt: skip


def event(content: str = "", finish: str | None = None) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}).encode()


async def engine(call: Call) -> None:
    """Answers as llama.cpp does."""
    if call.target.startswith("/props"):
        await call.respond(json.dumps(PROPS).encode(), kind=b"application/json")
    elif call.target == "/v1/embeddings":
        texts = json.loads(call.body)["input"]
        vectors = [{"index": number, "embedding": [3.0, 4.0]} for number in range(len(texts))]
        await call.respond(json.dumps({"data": vectors, "usage": {"prompt_tokens": 2}}).encode())
    else:
        await call.begin_stream()
        for piece in (event("Hi"), event(" there"), event(finish="stop")):
            await call.event(piece)
        await call.event(b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}')
        await call.event(b"[DONE]")
        await call.end_stream()


async def post(api: Api, path: str, body: dict[str, Any]) -> httpx.Response:
    return await api.client.post(f"/api/{path}", json=body)


def lines(answer: httpx.Response) -> list[dict[str, Any]]:
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


async def test_a_chat_is_streamed_unless_the_client_says_no():
    async with fake_upstream(engine) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        answer = await post(api, "chat", ASK | {"model": "tiny:latest"})
        streamed = lines(answer)
        assert [line["message"]["content"] for line in streamed] == ["Hi", " there", ""]
        assert {line["model"] for line in streamed} == {"tiny:latest"}
        assert [line["done"] for line in streamed] == [False, False, True]
        assert answer.headers["x-mesh-llm-model"] == "tiny"

        whole = await post(api, "chat", ASK | {"stream": False})
        assert whole.headers["content-type"].startswith("application/json")
        assert whole.json()["message"] == {"role": "assistant", "content": "Hi there"}
        assert (whole.json()["done_reason"], whole.json()["eval_count"]) == ("stop", 2)
        assert [call.target for call in upstream.calls] == ["/v1/chat/completions"] * 2
        assert [decision.path for decision in api.server.traces.after(0, 9)] == ["/api/chat"] * 2


async def test_each_piece_goes_on_at_once():
    go_on = asyncio.Event()

    async def slow(call: Call) -> None:
        await call.begin_stream()
        await call.event(event("Hi"))
        await go_on.wait()
        await call.event(event(finish="stop"))
        await call.event(b"[DONE]")
        await call.end_stream()

    async with (
        fake_upstream(slow) as upstream,
        running_api([route("tiny", local(upstream.address))]) as api,
        api.client.stream("POST", "/api/chat", json=ASK) as answer,
    ):
        pieces = answer.aiter_lines()
        assert json.loads(await anext(pieces))["message"]["content"] == "Hi"
        go_on.set()
        assert json.loads(await anext(pieces))["done"] is True


async def test_a_client_that_leaves_frees_the_engine():
    async def endless(call: Call) -> None:
        await call.begin_stream()
        await call.event(event("Hi"))
        await call.gone()

    async with fake_upstream(endless) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        async with api.client.stream("POST", "/api/chat", json=ASK) as answer:
            await anext(answer.aiter_lines())
        await api.traffic.all_ended(1)
        await upstream.until(lambda: not upstream.open)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_that_breaks_off_is_resumed_on_another_node(stream: bool):
    async with (
        fake_upstream() as first,
        fake_upstream(engine) as second,
        running_api([route("tiny", remote())], config=ApiConfig(port=0, resume_wait=5.0)) as api,
    ):

        async def dies(call: Call) -> None:
            await call.begin_stream()
            await call.event(event("So: "))
            api.routes.set(route("tiny", local(second.address)), also_alive=[THERE])
            call.die()

        first.script = dies
        api.mesh.nodes[THERE] = first.address
        answer = await post(api, "chat", ASK | {"stream": stream})
        given = lines(answer) if stream else [answer.json()]
        assert "".join(line["message"]["content"] for line in given) == "So: Hi there"
        assert (given[-1]["done"], given[-1]["done_reason"]) == (True, "stop")
        assert len(first.calls) == 1


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engines_error_in_the_middle(stream: bool):
    async def fails(call: Call) -> None:
        await call.begin_stream()
        await call.event(event("Hi"))
        await call.event(b'{"error":{"code":500,"message":"out of luck","type":"server_error"}}')
        await call.end_stream()

    async with fake_upstream(fails) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        answer = await post(api, "chat", ASK | {"stream": stream})
        if stream:
            assert answer.status_code == 200
            assert lines(answer)[-1] == {"error": "out of luck"}
        else:
            assert (answer.status_code, answer.json()) == (500, {"error": "out of luck"})


@pytest.mark.parametrize("stream", [True, False])
async def test_an_engines_refusal(stream: bool):
    async def refuses(call: Call) -> None:
        await call.respond(b'{"error":{"code":400,"message":"no such role","type":"invalid_request_error"}}', 400)

    async with fake_upstream(refuses) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        answer = await post(api, "chat", ASK | {"stream": stream})
        assert (answer.status_code, answer.json()) == (400, {"error": "no such role"})


@pytest.mark.parametrize(
    ("path", "body", "status", "error"),
    [
        ("chat", {"messages": []}, 400, "model is required"),
        ("chat", {"model": "nosuch", "messages": ASK["messages"]}, 404, "model 'nosuch' not found."),
        ("chat", {"model": "nosuch"}, 404, "model 'nosuch' not found."),
        ("show", {"name": "nosuch:latest"}, 404, "model 'nosuch:latest' not found."),
        ("embed", {"model": "nosuch", "input": "a"}, 404, "model 'nosuch' not found."),
        ("chat", {"model": "loading", "messages": ASK["messages"]}, 503, "is loading"),
        ("chat", {"model": "vectors", "messages": ASK["messages"]}, 400, "only makes embeddings"),
        ("embed", {"model": "tiny", "input": 3}, 400, "not understood"),
        ("chat", {**ASK, "keep_alive": "soon"}, 400, "invalid duration"),
        ("chat", {**ASK, "messages": [{"role": "user", "images": ["x"]}]}, 400, "illegal base64"),
        ("generate", {"model": "tiny", "prompt": "a", "format": {"enum": ["a"] * 5000}}, 400, "too much"),
        ("nothing", {}, 404, "nothing at this path"),
    ],
)
async def test_errors_are_in_ollamas_shape(path: str, body: dict[str, Any], status: int, error: str):
    async with fake_upstream(engine) as upstream:
        routes = [
            route("tiny", local(upstream.address)),
            route("vectors", local(upstream.address), kind=ModelKind.EMBEDDING),
            route("loading", status=ModelStatus.LOADING),
        ]
        async with running_api(routes) as api:
            answer = await post(api, path, body)
            assert answer.status_code == status
            assert list(answer.json()) == ["error"]
            assert error in answer.json()["error"]
            assert not upstream.calls


async def test_a_conversation_that_is_too_long_loses_its_oldest_messages():
    async def short(call: Call) -> None:
        messages = json.loads(call.body)["messages"]
        if sum(len(message["content"]) for message in messages) > 100:
            error = {
                "code": 400,
                "type": "exceed_context_size_error",
                "n_prompt_tokens": 60,
                "n_ctx": 30,
                "message": "long",
            }
            await call.respond(json.dumps({"error": error}).encode(), 400)
        else:
            await engine(call)

    said = [{"role": "system", "content": "be kind"}]
    for number in range(6):
        said += [{"role": "user", "content": f"{number} " * 9}, {"role": "assistant", "content": "well " * 2}]
    said.append({"role": "user", "content": "and now?"})
    async with fake_upstream(short) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        answer = await post(api, "chat", {"model": "tiny", "messages": said})
        assert lines(answer)[-1]["done"] is True
        sent = [message["content"] for message in json.loads(upstream.calls[-1].body)["messages"]]
        assert (sent[0], sent[-1]) == ("be kind", "and now?")
        assert sent[1:] == [message["content"] for message in said[-len(sent) + 1 :]]
        assert 2 < len(sent) < len(said)
        refused = await post(api, "chat", {"model": "tiny", "messages": said, "truncate": False})
        assert (refused.status_code, "context" in refused.json()["error"]) == (400, True)
        alone = await post(api, "chat", {"model": "tiny", "messages": [{"role": "user", "content": "x" * 200}]})
        assert alone.status_code == 400


async def test_too_many_requests_are_a_503():
    config = ApiConfig(port=0, max_in_flight=0)
    async with (
        fake_upstream(engine) as upstream,
        running_api([route("tiny", local(upstream.address))], config=config) as api,
    ):
        answer = await post(api, "chat", ASK)
        assert answer.status_code == 503
        assert "retry-after" in answer.headers


async def test_an_empty_request_loads_a_model():
    async with fake_upstream(engine) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        loaded = (await post(api, "chat", {"model": "tiny"})).json()
        assert (loaded["message"], loaded["done"], loaded["done_reason"]) == (
            {"role": "assistant", "content": ""}, True, "load",
        )  # fmt: skip
        assert (await post(api, "generate", {"model": "tiny", "keep_alive": -1})).json()["done_reason"] == "load"
        assert (await post(api, "embed", {"model": "tiny", "input": ""})).json()["embeddings"] == []
        assert (await post(api, "embeddings", {"model": "tiny"})).json() == {"embedding": []}
        assert {call.target.partition("?")[0] for call in upstream.calls} == {"/props"}


class Known:
    """Knows nothing, and remembers what is to be unloaded."""

    gpu = False

    def __init__(self) -> None:
        self.unloaded: list[str] = []

    def facts(self) -> dict[str, ModelFacts]:
        return {}

    def modified(self) -> dict[str, float]:
        return {}

    async def metadata(self, model: ModelName, *, arrays: bool) -> dict[str, object]:
        return {}

    def unload(self, model: ModelName) -> None:
        self.unloaded.append(model)


async def test_keep_alive_0_unloads_for_those_who_may_change_models():
    async with fake_upstream(engine) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        known = Known()
        api.server.use_models(known)
        unloaded = (await post(api, "generate", {"model": "tiny:latest", "keep_alive": "0s"})).json()
        assert (unloaded["done_reason"], known.unloaded) == ("unload", ["tiny"])
        for keep in (-1, "5m", None):
            await post(api, "chat", ASK | {"keep_alive": keep})
        assert known.unloaded == ["tiny"]
        assert lines(await post(api, "chat", ASK | {"keep_alive": 0}))[-1]["done_reason"] == "stop"
        assert known.unloaded == ["tiny", "tiny"]
        page = await api.client.post("/api/chat", json=ASK | {"keep_alive": 0}, headers={"origin": "http://localhost"})
        assert (page.status_code, known.unloaded) == (200, ["tiny", "tiny"])
        assert (await post(api, "chat", {"model": "nosuch", "keep_alive": 0})).status_code == 404


async def test_models_that_a_request_loads_are_listed():
    async with running_api([route("cold", status=ModelStatus.COLD)], config=ApiConfig(port=0, load_wait=1.0)) as api:
        assert [model["name"] for model in (await api.get("/api/tags")).json()["models"]] == ["cold:latest"]
        assert (await api.get("/api/ps")).json() == {"models": []}


COLD = route("tiny", status=ModelStatus.COLD)


async def waited(api: Api, path: str, body: dict[str, Any], *routes: ModelRoute) -> list[dict[str, Any]]:
    """The chunks of a stream whose model is not loaded; the routes become these after the first one."""
    chunks: list[dict[str, Any]] = []
    async with api.client.stream("POST", f"/api/{path}", json=body) as answer:
        assert (answer.status_code, answer.headers["content-type"]) == (200, "application/x-ndjson")
        async for line in answer.aiter_lines():
            if not chunks:
                api.routes.set(*routes)
            chunks.append(json.loads(line))
    return chunks


def keeps_alive(wait: float = 30.0) -> ApiConfig:
    return ApiConfig(port=0, resume_wait=0.0, load_wait=wait, keep_alive_event_seconds=0.02)


@pytest.mark.parametrize("path", ["chat", "generate"])
async def test_a_stream_is_kept_alive_by_empty_chunks_while_its_model_is_loaded(path: str):
    """A client adds up the chunks' texts, so that those without one change nothing."""
    ask = ASK if path == "chat" else {"model": "tiny", "prompt": "hello"}
    async with fake_upstream(engine) as upstream, running_api([COLD], config=keeps_alive()) as api:
        chunks = await waited(api, path, ask, route("tiny", local(upstream.address)))
        texts = [chunk["message"]["content"] if path == "chat" else chunk["response"] for chunk in chunks]
        assert texts[0] == ""
        assert "".join(texts) == "Hi there"
        assert {chunk["model"] for chunk in chunks} == {"tiny"}
        assert [chunk["done"] for chunk in chunks] == [False] * (len(chunks) - 1) + [True]


async def test_an_error_after_empty_chunks_is_the_last_line():
    async with running_api([COLD], config=keeps_alive(0.3)) as api:
        *chunks, last = await waited(api, "chat", ASK, COLD)
        assert {chunk["message"]["content"] for chunk in chunks} == {""}
        assert list(last) == ["error"]
        assert "not loaded yet" in last["error"]


async def test_an_engines_refusal_after_empty_chunks_is_the_last_line():
    async def refuses(call: Call) -> None:
        await call.respond(b'{"error":{"code":400,"message":"no such role","type":"invalid_request_error"}}', 400)

    async with fake_upstream(refuses) as upstream, running_api([COLD], config=keeps_alive()) as api:
        chunks = await waited(api, "chat", ASK, route("tiny", local(upstream.address)))
        assert chunks[-1] == {"error": "no such role"}


async def test_a_conversation_that_is_too_long_is_cut_after_empty_chunks_too():
    async def short(call: Call) -> None:
        if len(json.loads(call.body)["messages"]) > 1:
            error = {"code": 400, "type": "exceed_context_size_error", "n_prompt_tokens": 60, "n_ctx": 30}
            await call.respond(json.dumps({"error": error | {"message": "long"}}).encode(), 400)
        else:
            await engine(call)

    said = [{"role": "user", "content": "one " * 9}, {"role": "assistant", "content": "well"}, *ASK["messages"]]
    async with fake_upstream(short) as upstream, running_api([COLD], config=keeps_alive()) as api:
        chunks = await waited(api, "chat", ASK | {"messages": said}, route("tiny", local(upstream.address)))
        assert "".join(chunk["message"]["content"] for chunk in chunks) == "Hi there"
        assert len(upstream.calls) == 2


async def test_without_a_stream_nothing_comes_before_the_answer():
    async with running_api([COLD], config=keeps_alive(0.3)) as api:
        answer = await post(api, "chat", ASK | {"stream": False})
        assert answer.status_code == 503
        assert "not loaded yet" in answer.json()["error"]


async def test_vectors():
    async with fake_upstream(engine) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        answer = (await post(api, "embed", {"model": "tiny", "input": ["a", "b"], "dimensions": 1})).json()
        assert answer["embeddings"] == [[1.0], [1.0]]
        assert answer["prompt_eval_count"] == 2
        assert (await post(api, "embeddings", {"model": "tiny", "prompt": "a"})).json() == {"embedding": [3.0, 4.0]}


async def test_the_lists_and_a_model():
    async with fake_upstream(engine) as upstream:
        routes = [route("tiny", local(upstream.address)), route("other:7b", status=ModelStatus.LOADING),
                  route("cold", status=ModelStatus.COLD)]  # fmt: skip
        async with running_api(routes) as api:
            assert (await api.get("/api/version")).json()["version"].count(".") == 2
            assert (await api.client.head("/api/version")).status_code == 200
            listed = (await api.get("/api/tags")).json()["models"]
            assert [model["name"] for model in listed] == ["tiny:latest", "other:7b"]
            assert listed[1]["details"]["parameter_size"] == "7B"
            assert len(listed[0]["digest"]) == 64
            [running] = (await api.get("/api/ps")).json()["models"]
            assert (running["model"], running["context_length"]) == ("tiny:latest", 2048)
            shown = (await post(api, "show", {"model": "tiny"})).json()
            assert shown["capabilities"] == ["completion", "vision", "tools", "thinking"]
            assert shown["details"]["quantization_level"] == "Q4_K_M"
            assert shown["template"] == "<think>"
            cold = (await post(api, "show", {"model": "cold"})).json()
            assert (cold["capabilities"], cold["template"]) == (["completion"], "")


async def test_a_model_that_cannot_think_is_not_asked_to():
    async def plain(call: Call) -> None:
        await call.respond(b'{"chat_template": "{{ messages }}"}')

    async with fake_upstream(plain) as upstream, running_api([route("tiny", local(upstream.address))]) as api:
        answer = await post(api, "chat", ASK | {"think": True})
        assert (answer.status_code, answer.json()) == (400, {"error": '"tiny" does not support thinking'})
        assert [call.method for call in upstream.calls] == ["GET"]
        upstream.script = engine
        assert (await post(api, "chat", ASK | {"think": False})).status_code == 200


async def test_the_port_for_clients_of_ollama():
    async with fake_upstream(engine) as upstream:
        config = ApiConfig(port=0, ollama_port=0, keys=("secret",))
        async with running_api([route("tiny", local(upstream.address))], config=config) as api:
            assert api.server.ollama_port not in (0, api.port)
            address = f"http://127.0.0.1:{api.server.ollama_port}"
            key = {"authorization": "Bearer secret"}
            assert (await api.client.get(address)).status_code == 401
            assert (await api.client.get(address, headers=key)).text == "Ollama is running"
            assert (await api.client.head(address, headers=key)).status_code == 200
            answer = await api.client.post(f"{address}/api/chat", json=ASK, headers=key)
            assert lines(answer)[-1]["done"] is True
            assert (await api.client.get(f"{address}/v1/models", headers=key)).status_code == 200
            assert (await api.get("/", authorization="Bearer secret")).text.startswith("mesh-llm is running")
        async with httpx.AsyncClient(trust_env=False) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(address)


async def test_a_taken_port_is_named_by_its_option():
    async with running_api() as other:
        config = ApiConfig(port=0, ollama_port=other.port)
        with pytest.raises(MeshError, match="--ollama-port") as taken:
            async with running_api(config=config):
                pass
        assert taken.value.param == "--ollama-port"


async def test_lm_studios_list_of_models():
    routes = [route("qwen-7b-q4_k_m"), route("vectors", kind=ModelKind.EMBEDDING, status=ModelStatus.LOADING)]
    async with running_api(routes) as api:
        listed = (await api.get(f"{api.url}//api/v0/models/")).json()
        assert [(one["id"], one["type"], one["state"]) for one in listed["data"]] == [
            ("qwen-7b-q4_k_m", "llm", "loaded"),
            ("vectors", "embeddings", "not-loaded"),
        ]
        one = (await api.get("/api/v0/models/qwen-7b")).json()
        assert (one["id"], one["quantization"], one["max_context_length"]) == ("qwen-7b-q4_k_m", "Q4_K_M", 2048)
        missing = await api.get("/api/v0/models/nosuch")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/api//tags/", "//api/tags", "/api/v1/models", "/openai/v1/models", "/api/tags"])
async def test_other_bases_and_slashes(path: str):
    async with running_api([route("tiny")]) as api:
        answer = (await api.get(f"{api.url}{path}")).json()
        assert next(one.get("name") or one["id"] for one in answer.get("models") or answer["data"]).startswith("tiny")


async def test_clients_are_authenticated_and_web_pages_kept_out():
    config = ApiConfig(port=0, keys=("secret",))
    async with running_api(config=config) as api:
        for path in ("/api/tags", "/api/version", "/api/ps"):
            refused = await api.get(path)
            assert (refused.status_code, list(refused.json())) == (401, ["error"])
            assert (await api.get(path, authorization="Bearer secret")).status_code == 200
    async with running_api() as api:
        assert (await api.get("/api/tags", origin="https://other.example")).status_code == 403
        assert (await api.get("/api/tags", host="other.example")).status_code == 403
