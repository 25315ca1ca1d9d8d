"""The handler: paths, which model answers, bodies and their bounds."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Literal
from urllib.parse import unquote

import httpx
import msgspec
import pytest
from tests.support.api_harness import (
    HERE,
    THERE,
    local,
    peer_streams,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.types import ENDPOINTS, TRANSCRIPTIONS, ApiConfig
from mesh_llm.core.routing.aliases import Aliases
from mesh_llm.core.types.model import ModelKind, ModelStatus
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.http.multipart import boundary_of, parse_form

CHAT = "/v1/chat/completions"
PART = b'--x\r\nContent-Disposition: form-data; name="%b"%b\r\n\r\n%b\r\n'
SOUND = PART % (b"file", b'; filename="a"', b"RIFF")
OF_FORMS = "multipart/form-data; boundary=x"


@pytest.mark.parametrize("path", [path for path in ENDPOINTS if path != TRANSCRIPTIONS])
async def test_every_path_goes_to_the_engine_as_it_is(path: str):
    method = ENDPOINTS[path].method
    kind = ModelKind.RERANK if path == "/v1/rerank" else ModelKind.CHAT
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address), kind=kind)]) as api:
        sent = b'{"model": "tiny", "x": "\xc3\xa9"}' if method == "POST" else b""
        answer = await api.client.request(method, f"{path}?a=b", content=sent)
        wrong = await api.client.request("DELETE", path)
        assert answer.status_code == 200
        assert answer.headers["x-mesh-llm-model"] == "tiny"
        assert answer.headers["x-mesh-llm-node"] == "a" * 64
        call = engine.calls[0]
        assert (call.method, call.target, call.body) == (method, f"{path}?a=b", sent)
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == method
        assert len(engine.calls) == 1


@pytest.mark.parametrize("path", ["/v1", "/v1/chat", "/v1/chat/completions/x", "/v1/audio", "/admin"])
async def test_everything_else_is_not_found(path: str):
    async with running_api() as api:
        answer = await api.post(path=path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"
        assert "/v1/rerank" in answer.json()["error"]["message"]


async def test_a_form_with_a_sound_goes_to_the_engine_with_its_known_fields_only():
    parts = {"model": b"tiny", "grammar": b"root ::= root", "json_schema": b"{}", "temperature": b"0.2"}
    body = b"".join(PART % (name.encode(), b"", value) for name, value in parts.items()) + SOUND + b"--x--\r\n"
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        headers = {"content-type": OF_FORMS}
        answer = await api.client.post("/audio/transcriptions/", content=body, headers=headers)
        assert answer.status_code == 200
        call = engine.calls[0]
        assert call.target == TRANSCRIPTIONS
        sent = parse_form(call.body, boundary_of(call.headers[b"content-type"]))
        assert [(part.name, part.content, part.filename) for part in sent] == [
            ("model", b"tiny", None), ("temperature", b"0.2", None), ("file", b"RIFF", "file"),
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "body", "status", "code"),
    [
        ("application/json", b'{"model":"tiny"}', 415, "not_a_form"),
        ("multipart/form-data", b"--x--", 400, "invalid_form"),
        (OF_FORMS, PART % (b"model", b"", b"tiny") + b"--x--", 400, "invalid_form"),
        (OF_FORMS, SOUND, 400, "invalid_form"),
        (OF_FORMS, SOUND + PART % (b"max_tokens", b"", b"-1") + b"--x--", 400, "invalid_form"),
        (OF_FORMS, SOUND + PART % (b"prompt", b"", b"\xff") + b"--x--", 400, "invalid_form"),
    ],
)
async def test_what_is_no_form_with_a_sound_is_refused(kind: str, body: bytes, status: int, code: str):
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.client.post(TRANSCRIPTIONS, content=body, headers={"content-type": kind})
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
        assert not engine.calls


async def test_infill_takes_texts_only():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        taken = await api.post(b'{"input_prefix": "a", "input_suffix": "b"}', "/infill")
        refused = await api.post(b'{"input_prefix": [999999999], "input_suffix": "b"}', "/infill")
        assert (taken.status_code, refused.status_code) == (200, 400)
        assert refused.json()["error"]["param"] == "input_prefix"
        assert len(engine.calls) == 1


async def test_names_with_a_tag_or_a_provider_find_the_model():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        for name in ("tiny:latest", "openai/tiny", "hf.co/owner/tiny", "tiny[1m]"):
            answer = await api.post(json.dumps({"model": name}).encode())
            assert (answer.status_code, answer.headers["x-mesh-llm-model"]) == (200, "tiny")
            assert "x-mesh-llm-asked-model" not in answer.headers


@pytest.mark.parametrize("stream", [False, True])
async def test_the_default_model_answers_for_unknown_names_and_says_so(stream: bool):
    config = ApiConfig(port=0, resume_wait=0.0, queue_wait=0.0, default_model="Other:latest")
    async with fake_upstream() as own, fake_upstream() as other:
        routes = [route("tiny", local(own.address)), route("other-model", local(other.address))]
        async with running_api(routes, config=config) as api:
            for name in ("gpt-4o-mini", "claude-opus-4-8[1m]", "gémini"):
                answer = await api.post(json.dumps({"model": name, "stream": stream}).encode())
                assert (answer.status_code, answer.headers["x-mesh-llm-model"]) == (200, "other-model")
                assert unquote(answer.headers["x-mesh-llm-asked-model"]) == name
            known = await api.post(b'{"model":"tiny"}')
            assert known.headers["x-mesh-llm-model"] == "tiny"
            assert "x-mesh-llm-asked-model" not in known.headers
            # Without a name it is the default model as well, not the node's first one.
            nameless = await api.post(b"{}")
            assert nameless.headers["x-mesh-llm-model"] == "other-model"
            assert "x-mesh-llm-asked-model" not in nameless.headers


async def test_aliases_answer_and_are_listed_and_say_which_model_it_was():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        assert (await api.post(b'{"model":"gpt-4o-mini"}')).status_code == 404
        api.server.use_names("", Aliases({"gpt-4o-mini": "tiny", "claude-*": "tiny", "gone": "nothing"}))
        for name in ("gpt-4o-mini", "claude-opus-4-8[1m]"):
            answer = await api.post(json.dumps({"model": name}).encode())
            assert (answer.status_code, answer.headers["x-mesh-llm-model"]) == (200, "tiny")
            assert unquote(answer.headers["x-mesh-llm-asked-model"]) == name
        listed = (await api.get("/v1/models")).json()["data"]
        assert [(one["id"], one.get("alias_of")) for one in listed] == [("tiny", None), ("gpt-4o-mini", "tiny")]
        one = (await api.get("/v1/models/claude-x")).json()
        assert (one["id"], one["alias_of"]) == ("claude-x", "tiny")
        gone = await api.post(b'{"model":"gone"}')
        assert gone.status_code == 404
        assert "`gone` is an alias of `nothing`" in gone.json()["error"]["message"]
        api.server.use_names("tiny", Aliases())
        answer = await api.post(b'{"model":"gpt-4o-mini"}')
        assert answer.headers["x-mesh-llm-asked-model"] == "gpt-4o-mini"


async def test_keys_and_origins_change_while_it_runs():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        body, page = b'{"model":"tiny"}', {"origin": "https://page.example"}
        assert (await api.post(body)).status_code == 200
        assert (await api.post(body, **page)).status_code == 403
        api.server.use_access((), ["https://page.example"])
        answer = await api.post(body, **page)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page["origin"])
        api.server.use_access(["new"], [])
        assert (await api.post(body)).status_code == 401
        assert (await api.post(body, authorization="Bearer new")).status_code == 200
        assert (await api.post(body, authorization="Bearer old")).status_code == 401


async def test_a_client_node_has_a_default_model_too():
    config = ApiConfig(port=0, resume_wait=0.0, queue_wait=0.0, default_model="tiny")
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address, node=THERE))]) as other,
        peer_streams(other.server, HERE) as address,
        running_api([route("tiny", remote())], config=config) as asked,
    ):
        asked.mesh.nodes[THERE] = address
        answer = await asked.post(b'{"model":"gpt-4o"}')
        assert answer.status_code == 200
        assert (answer.headers["x-mesh-llm-model"], answer.headers["x-mesh-llm-asked-model"]) == ("tiny", "gpt-4o")


async def test_the_default_model_waits_until_the_mesh_is_known():
    config = ApiConfig(port=0, resume_wait=0.0, queue_wait=0.0, default_model="tiny")
    async with fake_upstream() as own, fake_upstream() as other, running_api(config=config) as api:
        tiny = route("tiny", local(own.address))

        class Mesh(asyncio.Event):
            async def wait(self) -> Literal[True]:
                api.routes.set(tiny, route("gpt-4o", local(other.address)))
                return True

        api.routes.set(tiny)
        api.routes.heard = Mesh()
        answer = await api.post(b'{"model":"gpt-4o"}')
        assert answer.headers["x-mesh-llm-model"] == "gpt-4o"
        assert "x-mesh-llm-asked-model" not in answer.headers


@pytest.mark.parametrize("default", ["", "gone"])
async def test_without_a_default_model_an_unknown_name_is_404_with_the_list(default: str):
    config = ApiConfig(port=0, resume_wait=0.0, queue_wait=0.0, default_model=default)
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))], config=config) as api:
        answer = await api.post(b'{"model":"gpt-4o"}')
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
        message = answer.json()["error"]["message"]
        assert "The model `gpt-4o` does not exist" in message
        nameless = (await api.post(b"{}")).status_code
        assert nameless == (404 if default else 200)
        assert "Known models: tiny." in message
        assert ("`gone`" in message) == bool(default)


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ("/v1/chat/completions/", CHAT),
        ("//v1//chat/completions", CHAT),
        ("/v1/chat//completions//", CHAT),
        ("/chat/completions", CHAT),
        ("/api/v1/chat/completions", CHAT),
        ("/openai/v1/chat/completions/", CHAT),
        ("/api/v1/embeddings", "/v1/embeddings"),
        ("/openai/v1/completions", "/v1/completions"),
        ("/api/v1/messages", "/v1/messages"),
        ("/responses", "/v1/responses"),
        ("/rerank", "/v1/rerank"),
        ("/reranking/", "/v1/rerank"),
        ("/v1/reranking", "/v1/rerank"),
        ("/completions/", "/completions"),
        ("/tokenize/", "/tokenize"),
    ],
)
async def test_a_path_has_other_names(asked: str, path: str):
    """Sent as they are: httpx takes two slashes at the beginning for a host."""
    kind = ModelKind.RERANK if path == "/v1/rerank" else ModelKind.CHAT
    request = f"POST {asked}?a=b HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}"
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address), kind=kind)]) as api:
        assert (await api.raw(request.encode())).startswith(b"HTTP/1.1 200 ")
        assert [call.target for call in engine.calls] == [f"{path}?a=b"]


async def test_other_names_open_no_door():
    routes = [route("tiny", local("127.0.0.1:1"))]
    async with running_api(routes, config=ApiConfig(port=0, keys=("secret",))) as api:
        for path in ("/", "/chat/completions", "/api/v1/models", "/v1/models/", "/metrics/", "/embeddings"):
            for method in ("GET", "HEAD", "POST"):
                assert (await api.client.request(method, path)).status_code == 401
        for path in ("/health", "/health/", "/v1/health"):
            assert (await api.get(path)).status_code == 200
    async with running_api(routes) as api:
        for path in ("/", "/chat/completions", "/openai/v1/models/", "/v1/health", "/health/"):
            assert (await api.get(path, host="evil.example")).status_code == 403
            assert (await api.get(path, origin="https://evil.example")).status_code == 403
        # What is refused for a path is refused for its other names.
        picture = b'{"%b": [{"prompt_string": "<__media__>", "multimodal_data": ["aGk="]}]}'
        for path, field in (("/v1/completions/", b"prompt"), ("/completion", b"prompt"), ("/embeddings", b"input")):
            answer = await api.post(picture % field, path=path)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "request_too_complex")
        answer = await api.client.delete("/api/v1/chat/completions/")
        assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
        # Errors have the shape of the path that is meant.
        assert (await api.post(b"[]", path="/api/v1/messages/")).json()["type"] == "error"
    async with running_api([route("ranks", local("127.0.0.1:1"), kind=ModelKind.RERANK)]) as api:
        assert (await api.post(path="/completions")).json()["error"]["code"] == "model_not_for_this"


async def test_a_node_asks_for_paths_by_their_own_names():
    async with running_api([route("tiny", local("127.0.0.1:1"))]) as there, peer_streams(there.server, HERE) as address:
        host, _, port = address.partition(":")
        for path in ("/", "/models", "/chat/completions", "/v1/chat/completions/"):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(f"POST {path} HTTP/1.1\r\nhost: mesh\r\ncontent-length: 2\r\n\r\n{{}}".encode())
            assert (await reader.read()).startswith(b"HTTP/1.1 404 ")
            writer.close()


async def test_the_model_is_found_by_name_or_is_the_nodes_own():
    async with fake_upstream() as own, fake_upstream() as other:
        routes = [route("tiny", local(own.address)), route("Other-Model", local(other.address))]
        async with running_api(routes) as api:
            for body in (b"{}", b'{"model": "tiny"}', b'{"model":""}', b'{"model":null}'):
                assert (await api.post(body)).headers["x-mesh-llm-model"] == "tiny"
            for name in (b"Other-Model", b"other-model", b"oth", b"Other-Model.gguf"):
                answer = await api.post(b'{"model":"%b"}' % name)
                assert answer.headers["x-mesh-llm-model"] == "Other-Model"
            answer = await api.client.get("/props?model=other")
            assert answer.headers["x-mesh-llm-model"] == "Other-Model"
            assert (len(own.calls), len(other.calls)) == (4, 5)
            assert api.traffic.asked == ["tiny"] * 4 + ["Other-Model"] * 4


@pytest.mark.parametrize("name", [b'"tiny"', b"null"])
async def test_a_node_that_does_not_know_its_models_yet_says_so_and_not_that_there_is_none(name: bytes):
    async with running_api() as api:
        api.routes.current = msgspec.structs.replace(api.routes.current, version=0)
        answer = await api.post(b'{"model":%b}' % name)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert int(answer.headers["retry-after"]) >= 1
        one = await api.get("/v1/models/tiny")
        assert (one.status_code, one.json()["error"]["code"]) == (503, "model_loading")
        messages = await api.post(b'{"model":%b}' % name, "/v1/messages")
        assert messages.json()["error"]["type"] == "overloaded_error"
        api.routes.set()
        assert (await api.post(b'{"model":%b}' % name)).status_code == 404


async def test_requests_wait_for_a_model_that_is_loading():
    loading = route("tiny", local("127.0.0.1:1", status=ModelStatus.LOADING), status=ModelStatus.LOADING)
    config = ApiConfig(port=0, resume_wait=0.0)
    async with fake_upstream() as engine, running_api([loading], config=config) as api, TaskScope("test") as scope:
        leaves = scope.spawn(api.post(b'{"seed":0}'), "leave")
        await api.traffic.until(lambda: len(api.traffic.asked) == 1)
        leaves.cancel()
        await api.server._handler.concurrency.wait_idle()
        asked = [scope.spawn(api.post(b'{"seed":%d}' % number), "ask") for number in (1, 2)]
        await api.traffic.until(lambda: len(api.traffic.asked) == 3)
        api.routes.set(loading, route("another", remote()))
        assert not any(one.done() for one in asked)
        api.routes.set(route("tiny", local(engine.address)))
        assert [(await one).status_code for one in asked] == [200, 200]
        assert sorted(call.body for call in engine.calls) == [b'{"seed":1}', b'{"seed":2}']


async def test_a_model_that_loads_for_too_long_is_not_waited_for():
    loading = route("tiny", local("127.0.0.1:1", status=ModelStatus.LOADING), status=ModelStatus.LOADING)
    async with running_api([loading], config=ApiConfig(port=0, queue_wait=0.1)) as api:
        answer = await api.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert "retry-after" in answer.headers


async def test_a_model_that_fails_while_requests_wait_is_not_waited_for():
    loading = route("tiny", local("127.0.0.1:1", status=ModelStatus.LOADING), status=ModelStatus.LOADING)
    async with running_api([loading], config=ApiConfig(port=0)) as api, TaskScope("test") as scope:
        asked = scope.spawn(api.post(), "ask")
        await api.traffic.until(lambda: len(api.traffic.asked) == 1)
        api.routes.set(route("tiny", status=ModelStatus.FAILED, reason="it crashed"))
        answer = await asked
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_failed")


async def test_a_node_that_is_starting_lets_requests_wait_until_it_knows_its_models():
    async with (
        fake_upstream() as engine,
        running_api(config=ApiConfig(port=0)) as api,
        TaskScope("test") as scope,
    ):
        api.routes.current = msgspec.structs.replace(api.routes.current, version=0)
        asked = scope.spawn(api.post(b'{"model":"tiny"}'), "ask")
        assert (await api.get("/health")).status_code == 503
        api.routes.set(route("tiny", local(engine.address)))
        assert (await asked).status_code == 200


async def test_an_unknown_model_lists_what_there_is():
    async with running_api([route("tiny", remote()), route("tall", remote())]) as api:
        answer = await api.post(b'{"model":"gpt-4o"}')
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
        assert "gpt-4o" in error["message"]
        assert "tall and tiny" in error["message"]
        messages = await api.post(b'{"model":"gpt-4o"}', "/v1/messages")
        assert messages.json()["error"]["type"] == "not_found_error"
        ambiguous = await api.post(b'{"model":"t"}')
        assert (ambiguous.status_code, ambiguous.json()["error"]["code"]) == (404, "ambiguous_model")


@pytest.mark.parametrize("ask", ["chat", "list"])
async def test_while_a_node_joins_what_it_does_not_know_may_be_there(ask: str):
    async with fake_upstream() as engine, running_api([route("own", remote())]) as api, TaskScope("test") as scope:
        heard = api.routes.heard = asyncio.Event()
        path = CHAT if ask == "chat" else "/v1/models/tiny"
        asking = api.post(b'{"model":"tiny"}', path) if ask == "chat" else api.client.get(path)
        answer = scope.spawn(asking, "ask")
        # What is known is answered meanwhile.
        assert (await api.client.get("/health")).status_code == 200
        assert not answer.done()
        api.routes.set(route("own", remote()), route("tiny", local(engine.address)))
        heard.set()
        assert (await answer).status_code == 200
        assert (await api.post(b'{"model":"gpt-4o"}')).status_code == 404


async def test_no_model_at_all():
    async with running_api() as api:
        assert (await api.post()).json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("status", "code", "retry"),
    [
        (ModelStatus.LOADING, "model_loading", True),
        (ModelStatus.FAILED, "model_failed", False),
        (ModelStatus.COLD, "model_not_served", True),
        (ModelStatus.STOPPING, "model_stopping", True),
    ],
)
async def test_a_model_that_is_not_ready(status: ModelStatus, code: str, retry: bool):
    model = route("tiny", local("127.0.0.1:1", status=status), status=status, reason="the reason")
    async with running_api([model]) as api:
        answer = await api.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
        assert ("retry-after" in answer.headers) == retry
        if status in (ModelStatus.FAILED, ModelStatus.COLD):
            assert "the reason" in answer.json()["error"]["message"]
        # What waits does not run by another `load`; its reason says what to type.
        assert "mesh-llm load" not in answer.json()["error"]["message"]
        assert api.traffic.asked == ["tiny"]
        assert api.traffic.begun == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b'{"model": 7}', 400, "invalid_model"),
    ],
)
async def test_bad_bodies(body: bytes, status: int, code: str):
    async with running_api([route("tiny", local("127.0.0.1:1"))]) as api:
        answer = await api.post(body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


async def pieces(*parts: bytes) -> AsyncIterator[bytes]:
    for part in parts:
        yield part


async def test_a_byte_order_mark_before_a_body_is_ignored():
    body = b'{"model":"tiny"}'
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address, node=THERE))]) as there,
        peer_streams(there.server, HERE) as address,
        running_api([route("other", local(engine.address)), route("tiny", remote())]) as api,
    ):
        api.mesh.nodes[THERE] = address
        for _ in range(3):
            assert (await api.post(b"\xef\xbb\xbf" + body)).headers["x-mesh-llm-model"] == "tiny"
        answer = await api.client.post(CHAT, content=pieces(b"\xef\xbb", b"\xbf", body))
        assert answer.headers["x-mesh-llm-model"] == "tiny"
        assert [call.body for call in engine.calls] == [body] * 4
        # Only one, and only there.
        answer = await api.post(b"\xef\xbb\xbf" * 2 + body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_the_bound_for_all_bodies_counts_no_byte_order_mark_for_ever():
    config = ApiConfig(port=0, buffered_bytes=20)
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))], config=config) as api:
        for _ in range(8):
            assert (await api.post(b"\xef\xbb\xbf{}")).status_code == 200


async def test_a_compressed_body_is_refused():
    async with running_api([route("tiny", local("127.0.0.1:1"))]) as api:
        for coding in ("gzip", "zstd", "identity, gzip"):
            answer = await api.post(content_encoding=coding)
            assert (answer.status_code, answer.json()["error"]["code"]) == (415, "compressed_body")


async def test_a_body_may_be_as_large_as_the_bound_and_no_larger():
    config = ApiConfig(port=0, body_bytes=1_000_000)
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))], config=config) as api:
        fits = b'{"x":"%b"}' % (b"a" * (1_000_000 - 8))
        assert (await api.post(fits)).content == fits
        answer = await api.post(fits + b" ")
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

        async def chunks():
            for _ in range(40):
                yield b"a" * 65536

        answer = await api.client.post(CHAT, content=chunks())
        assert answer.status_code == 413
        assert len(engine.calls) == 1


async def test_all_bodies_together_are_bounded():
    config = ApiConfig(port=0, body_bytes=1_000_000, buffered_bytes=1_500_000)

    async with running_api(config=config) as api:

        async def wait_for_second(call: Call) -> None:
            second = await api.post(b'{"x":"%b"}' % (b"a" * 900_000))
            assert (second.status_code, second.json()["error"]["code"]) == (503, "out_of_buffers")
            await call.respond(b"done")

        async with fake_upstream(wait_for_second) as engine:
            api.routes.current = snapshot(route("tiny", local(engine.address)), default="tiny")
            assert (await api.post(b'{"x":"%b"}' % (b"a" * 900_000))).content == b"done"
            engine.script = lambda call: call.respond(b"again")
            assert (await api.post(b'{"x":"%b"}' % (b"a" * 900_000))).content == b"again"


async def test_over_the_limit_in_flight_is_429_with_an_honest_retry_after():
    config = ApiConfig(port=0, max_in_flight=2)
    async with running_api(config=config) as api:
        refused: list[httpx.Response] = []

        async def nested(call: Call) -> None:
            if len(engine.calls) < 2:
                await call.respond((await api.post()).content)
            else:
                refused.append(await api.post())
                refused.append(await api.post(path="/v1/messages"))
                await call.respond(b"inner")

        async with fake_upstream(nested) as engine:
            api.routes.current = snapshot(route("tiny", local(engine.address)), default="tiny")
            assert (await api.post()).content == b"inner"
        assert [answer.status_code for answer in refused] == [429, 429]
        assert all(1 <= int(answer.headers["retry-after"]) <= 60 for answer in refused)
        assert refused[1].json()["error"]["type"] == "rate_limit_error"


async def test_a_stopping_node_takes_nothing_new():
    async with running_api() as api:
        api.routes.current = snapshot(route("tiny", remote()), default="tiny", accepting=False)
        answer = await api.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "node_stopping")


async def test_a_model_without_embeddings():
    async with fake_upstream() as engine, running_api() as api:
        chat_only = msgspec.structs.replace(route("tiny", local(engine.address)), embeddings=False)
        api.routes.current = snapshot(chat_only, default="tiny")
        answer = await api.post(path="/v1/embeddings")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "no_embeddings")
        assert (await api.post()).status_code == 200


async def test_an_internal_fault_is_a_500_that_reveals_nothing(monkeypatch: pytest.MonkeyPatch):
    def explode(*_: object) -> None:
        raise ValueError("secret detail")

    monkeypatch.setattr("mesh_llm.api.handler.requested_model", explode)
    async with running_api([route("tiny", remote(THERE))]) as api:
        answer = await api.post()
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "internal_error"
        assert "secret" not in answer.text
        assert (await api.post(path="/nowhere")).status_code == 404


async def test_odd_queries_cannot_break_out():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.raw(b"GET /props?a=\xe9 HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert engine.calls == []
