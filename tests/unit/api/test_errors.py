"""Errors in the shape of each dialect, those of engines included."""

import json

import msgspec
import pytest
from msgspec.structs import replace
from tests.support.api_harness import ELSEWHERE, HERE, THERE, local, peer_streams, remote, route, running_api
from tests.support.fake_upstream import Call, Script, fake_upstream

from mesh_llm.api.errors import (
    ContextExceededError,
    Dialect,
    dialect_of,
    error_event,
    error_response,
    stream_error_rewriter,
    upstream_error,
)
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.types.errors import MeshError

LOST = MeshError("model_not_found", "No such model.", "There is: tiny.", 404, param="model")
BUSY = MeshError("too_many_requests", "Busy.", status=429, retry_after=2.6)


@pytest.mark.parametrize(
    ("path", "dialect"),
    [
        ("/v1/messages", Dialect.ANTHROPIC),
        ("/v1/messages/count_tokens", Dialect.ANTHROPIC),
        ("/v1/responses", Dialect.RESPONSES),
        ("/v1/chat/completions", Dialect.OPENAI),
        ("/tokenize", Dialect.OPENAI),
        ("/nowhere", Dialect.OPENAI),
    ],
)
def test_a_path_has_a_dialect(path: str, dialect: Dialect):
    assert dialect_of(path) is dialect


def test_openais_shape():
    status, headers, body = error_response(LOST, Dialect.OPENAI)
    assert status == 404
    assert msgspec.json.decode(body) == {
        "error": {
            "message": "No such model. There is: tiny.",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    assert dict(headers)[b"content-length"] == b"%d" % len(body)
    assert dict(headers)[b"x-mesh-llm-error"] == b"model_not_found"


def test_anthropics_shape():
    _, _, body = error_response(LOST, Dialect.ANTHROPIC)
    assert msgspec.json.decode(body) == {
        "type": "error",
        "error": {"type": "not_found_error", "message": "No such model. There is: tiny."},
    }


def test_retry_after_is_whole_seconds():
    assert dict(error_response(BUSY, Dialect.OPENAI)[1])[b"retry-after"] == b"3"
    assert b"retry-after" not in dict(error_response(LOST, Dialect.OPENAI)[1])


def test_events_end_a_stream():
    assert error_event(BUSY, Dialect.OPENAI) == (
        b'data: {"error":{"message":"Busy.","type":"rate_limit_error","param":null,"code":"too_many_requests"}}\n\n'
    )
    assert error_event(BUSY, Dialect.ANTHROPIC) == (
        b'event: error\ndata: {"type":"error","error":{"type":"rate_limit_error","message":"Busy."}}\n\n'
    )
    assert error_event(BUSY, Dialect.RESPONSES) == (
        b'event: error\ndata: {"type":"error","code":"too_many_requests","message":"Busy.","param":null}\n\n'
    )


MESSAGES = "/v1/messages"
RESPONSES = "/v1/responses"
CHAT = "/v1/chat/completions"
PATHS = [CHAT, "/v1/completions", MESSAGES, RESPONSES, "/v1/messages/count_tokens", "/tokenize"]


def too_long(tokens: int, context: int) -> bytes:
    error = {"code": 400, "message": f"request ({tokens} tokens) exceeds the available context size ({context} tokens)",
             "type": "exceed_context_size_error", "n_prompt_tokens": tokens, "n_ctx": context}  # fmt: skip
    return json.dumps({"error": error}).encode()


async def fail(call: Call) -> None:
    body = b'{"error":{"code":500,"message":"it broke","type":"server_error"}}'
    await call.respond(body, 500, kind=b"application/json")


def check(path: str, told: dict[str, object]) -> None:
    error = told["error"]
    assert isinstance(error, dict)
    if path.startswith(MESSAGES):
        assert told["type"] == "error"
        assert set(error) == {"type", "message"}
    else:
        assert set(told) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engines_error_before_its_answer(path: str, far: bool, stream: bool) -> None:
    body = json.dumps({"stream": stream, "messages": []}).encode()
    async with (
        fake_upstream(fail) as engine,
        running_api([route("tiny", local(engine.address, node=THERE))]) as other,
        peer_streams(other.server, HERE) as address,
        running_api([route("tiny", remote())]) as asked,
    ):
        asked.mesh.nodes[THERE] = address
        answer = await (asked if far else other).post(body, path)
        assert answer.status_code == 500
        check(path, answer.json())
        assert "it broke" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_request_without_messages_is_the_requests_fault(path: str) -> None:
    async def refuse(call: Call) -> None:
        await call.respond(b'{"error":{"code":500,"message":"\'messages\' is required","type":"server_error"}}', 500)

    async with fake_upstream(refuse) as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post(b"{}", path)
        assert answer.status_code == 400
        check(path, answer.json())
        assert "'messages' is required" in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", PATHS)
async def test_a_prompt_that_fits_nowhere_is_400_with_the_largest_context_there_is(path: str) -> None:
    async def refuse(call: Call) -> None:
        await call.respond(too_long(809, 512), 400, kind=b"application/json")

    async with fake_upstream(refuse) as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post(b"{}", path)
        assert answer.status_code == 400
        check(path, answer.json())
        error = answer.json()["error"]
        if path.startswith(MESSAGES):
            assert error == {
                "type": "invalid_request_error",
                "message": "prompt is too long: 809 tokens > 512 maximum",
            }
        else:
            assert error["message"].startswith(
                "This model's maximum context length is 512 tokens, and the prompt has 809 tokens."
            )
            assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("image input is not supported - hint: you may need to provide the mmproj", "image input is not supported by"),
        ("audio input is not supported - hint: you may need to provide the mmproj", "audio input is not supported by"),
        ("Multimodal data provided, but model does not support multimodal requests.", "multimodal input is not"),
    ],
)
async def test_media_for_a_model_that_reads_text_are_the_requests_fault(path: str, said: str, told: str) -> None:
    async def refuse(call: Call) -> None:
        body = json.dumps({"error": {"code": 500, "message": said, "type": "server_error"}}).encode()
        await call.respond(body, 500, kind=b"application/json")

    async with fake_upstream(refuse) as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post(b"{}", path)
        assert answer.status_code == 400
        check(path, answer.json())
        error = answer.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert error["message"].startswith(told)
        if not path.startswith(MESSAGES):
            assert error["code"] == "media_not_supported"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
@pytest.mark.parametrize("stream", [False, True])
async def test_another_nodes_too_long_prompt_is_told_in_the_askers_words(path: str, stream: bool) -> None:
    async def refuse(call: Call) -> None:
        await call.respond(too_long(512, 512), 400, kind=b"application/json")

    async with (
        fake_upstream(refuse) as engine,
        running_api([route("tiny", local(engine.address, node=THERE))]) as other,
        peer_streams(other.server, HERE) as address,
        running_api([route("tiny", remote())]) as asked,
    ):
        asked.mesh.nodes[THERE] = address
        answer = await asked.post(json.dumps({"stream": stream}).encode(), path)
        assert answer.status_code == 400
        check(path, answer.json())
        message = answer.json()["error"]["message"]
        if path == MESSAGES:
            # The engine wants room for an answer, so 511 is the most, and the vendor's relation holds.
            assert message == "prompt is too long: 512 tokens > 511 maximum"
        else:
            assert message.startswith("This model's maximum context length is 512 tokens, and the prompt has 512")


@pytest.mark.parametrize("dialect", [dialect for dialect in Dialect if dialect is not Dialect.OLLAMA])
def test_a_prompt_that_turns_out_too_long_within_a_stream(dialect: Dialect) -> None:
    event = b"data: " + too_long(809, 512) + b"\n\n"
    told = json.loads(stream_error_rewriter(dialect)(event).rpartition(b"data: ")[2])
    if dialect is Dialect.ANTHROPIC:
        assert told["error"]["message"] == "prompt is too long: 809 tokens > 512 maximum"
    else:
        error = told if dialect is Dialect.RESPONSES else told["error"]
        assert error["code"] == "context_length_exceeded"
        assert "maximum context length is 512 tokens" in error["message"]


@pytest.mark.parametrize(
    ("tokens", "context", "openai"),
    [
        (0, 0, "The prompt is too long: more than the model's maximum context length."),
        (9, 0, "The prompt has 9 tokens: more than the model's maximum context length."),
        (0, 8, "This model's maximum context length is 8 tokens, and the prompt is too long."),
    ],
)
def test_a_too_long_prompt_of_unknown_length(tokens: int, context: int, openai: str) -> None:
    error = upstream_error(too_long(tokens, context), 400, ())
    assert error.message == openai
    body = json.loads(error_response(error, Dialect.ANTHROPIC)[2])
    assert body["error"]["message"].startswith("prompt is too long: ")


def host(context: int) -> Script:
    async def script(call: Call) -> None:
        tokens = json.loads(call.body)["tokens"]
        if tokens >= context:
            await call.respond(too_long(tokens, context), 400, kind=b"application/json")
        else:
            await call.respond(b"answered by %d" % context)

    return script


@pytest.mark.parametrize("fast", [512, 4096])
async def test_a_prompt_that_is_too_long_for_one_host_goes_to_a_larger_one(fast: int) -> None:
    async with fake_upstream(host(512)) as small, fake_upstream(host(4096)) as large:
        targets = [
            replace(remote(node), context=context, tokens_per_second=100.0 if context == fast else 1.0)
            for node, context in ((THERE, 512), (ELSEWHERE, 4096))
        ]
        async with running_api([route("tiny", *targets)]) as api:
            api.mesh.nodes = {THERE: small.address, ELSEWHERE: large.address}
            for _ in range(4):
                assert (await api.post(b'{"tokens":809}')).text == "answered by 4096"
            refused = await api.post(b'{"tokens":5000}')
            assert refused.status_code == 400
            assert "maximum context length is 4096 tokens" in refused.json()["error"]["message"]
            # A short one goes where it is answered soonest.
            assert (await api.post(b'{"tokens":10}')).text == f"answered by {fast}"
            # A long one is not even asked where it cannot fit.
            before = len(small.calls)
            long = json.dumps({"tokens": 1000, "prompt": "word " * 800}).encode()
            assert (await api.post(long)).text == "answered by 4096"
            assert len(small.calls) == before


async def test_many_small_hosts_do_not_hide_the_large_one() -> None:
    async with fake_upstream(host(512)) as small, fake_upstream(host(4096)) as large:
        targets = [
            replace(local(small.address, node=name * 64), context=512, tokens_per_second=100.0)  # pyright: ignore[reportArgumentType]
            for name in "0123456789"
        ]
        targets.append(replace(local(large.address), context=4096, tokens_per_second=1.0))
        config = ApiConfig(port=0, resume_wait=0.0, queue_wait=0.0, attempts=3)
        async with running_api([route("tiny", *targets)], config=config) as api:
            assert (await api.post(b'{"tokens":809}')).text == "answered by 4096"
            assert len(small.calls) == 1


async def test_a_larger_host_that_is_busy_is_worth_coming_back_to() -> None:
    async def busy(call: Call) -> None:
        await call.respond(b"{}", 503, [(b"retry-after", b"7")])

    async with fake_upstream(host(512)) as small, fake_upstream(busy) as large:
        targets = [replace(local(small.address, node=THERE), context=512), replace(local(large.address), context=4096)]
        async with running_api([route("tiny", *targets)]) as api:
            answer = await api.post(b'{"tokens":809}')
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "7")


STREAM_ERRORS = {
    MESSAGES: b'event: error\ndata: {"code":500,"message":"it broke","type":"server_error"}\n\n',
    RESPONSES: b'data: {"error":{"code":500,"message":"it broke","type":"server_error"}}\n\n',
    CHAT: b'data: {"error":{"code":500,"message":"it broke","type":"server_error"}}\n\n',
}


@pytest.mark.parametrize("path", list(STREAM_ERRORS))
@pytest.mark.parametrize("resume", ["on", "off"])
async def test_an_engines_error_in_the_middle_of_a_stream(path: str, resume: str) -> None:
    first = b'event: ping\ndata: {"type":"ping"}\n\n'

    async def breaks(call: Call) -> None:
        await call.begin_stream()
        for event in (first, STREAM_ERRORS[path]):
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        await call.end_stream()

    async with fake_upstream(breaks) as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post(b'{"stream":true}', path, x_mesh_llm_resume=resume)
        assert answer.content.startswith(first)
        event = answer.text.removeprefix(first.decode()).strip()
        told = json.loads(event.rpartition("data: ")[2])
        assert event.startswith("data: " if path == CHAT else "event: error\ndata: ")
        if path == MESSAGES:
            assert told == {"type": "error", "error": {"type": "api_error", "message": "it broke"}}
        elif path == RESPONSES:
            numbered = {"type": "error", "sequence_number": 0}
            assert told == numbered | {"code": "server_error", "message": "it broke", "param": None}
        else:
            error = {"message": "it broke", "type": "server_error", "param": None, "code": "server_error"}
            assert told == {"error": error}


@pytest.mark.parametrize(
    "data",
    [
        b'event: content_block_delta\ndata: {"delta":{"text":"an error: data: {}"}}\n\n',
        b'event: error\ndata: {"type":"error","error":{"type":"x","message":"y"}}\n\n',
        b"event: error\ndata: not json\n\n",
        b'data: {"error" ',
        b"",
        b"\n\n",
    ],
)
def test_everything_else_in_a_stream_passes_as_it_is(data: bytes) -> None:
    assert stream_error_rewriter(Dialect.ANTHROPIC)(data) == data
    assert stream_error_rewriter(Dialect.OPENAI)(data) == data


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"error":[1]}', b'{"error":{"message":7}}', b'{"error":{"code":true}}', b"\xff"]
)
def test_any_body_is_some_error(body: bytes) -> None:
    error = upstream_error(body, 500, ())
    assert error.message == "The engine answered with status 500."
    assert not isinstance(error, ContextExceededError)
