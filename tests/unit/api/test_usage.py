"""Usage by API key: names, counts of every kind of answer, limits, and the file."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.support.api_harness import HERE, THERE, Api, local, remote, route, running_api
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.telemetry import TARGET_LOST, Metrics, RequestTrace
from mesh_llm.api.types import ApiConfig, KeyLimit, KeyUsage, Usage, split_key
from mesh_llm.api.usage import KeyRing, UsageBook
from mesh_llm.core.types.errors import MeshError

CONFIG = ApiConfig(port=0, resume_wait=0.0, keys=("laptop:secret-one", "phone:secret-two", "secret-three"))
LAPTOP = "Bearer secret-one"
ANSWER = b'{"usage":{"prompt_tokens":7,"completion_tokens":5}}'
ASKED = b'{"model":"tiny","messages":[{"role":"user","content":"%b"}],"stream":true}'


def used(api: Api) -> dict[str, KeyUsage]:
    return {usage.name: usage for usage in api.server.summary().keys}


def test_a_key_has_the_name_before_its_first_colon():
    assert split_key("laptop:se:cret") == ("laptop", "se:cret")
    for plain in ("secret", ":secret", "1:secret", "a b:secret", "sk.1:secret", "laptop:"):
        assert split_key(plain) == ("unnamed", plain)


def test_a_key_is_found_by_its_secret_and_as_it_was_written_before_names_existed():
    ring = KeyRing(["laptop:one", "two", "phone:three"])
    for shown, name in ((b"one", "laptop"), (b"laptop:one", "laptop"), (b"two", "unnamed"), (b"three", "phone")):
        assert ring.name_of([b"wrong", shown]) == name
    for wrong in (b"laptop", b"laptop:two", b"", b"phone:", b"unnamed:two"):
        assert ring.name_of([wrong]) == ""


async def test_requests_and_tokens_are_counted_by_name_and_no_key_is_shown():
    async def script(call: Call) -> None:
        await call.respond(ANSWER, kind=b"application/json")

    async with (
        fake_upstream(script) as engine,
        running_api([route("tiny", local(engine.address))], config=CONFIG) as api,
    ):
        for key in (LAPTOP, LAPTOP, "Bearer secret-two", "Bearer secret-three"):
            assert (await api.post(authorization=key)).status_code == 200
        assert (await api.post(b'{"model":"none"}', authorization=LAPTOP)).status_code == 404
        assert (await api.post(authorization="Bearer wrong")).status_code == 401
        await api.get("/v1/models", authorization=LAPTOP)
        counts = used(api)
        assert (counts["laptop"].requests, counts["laptop"].failed) == (3, 1)
        assert (counts["laptop"].prompt_tokens, counts["laptop"].tokens, counts["laptop"].tokens_today) == (14, 10, 24)
        assert {name: one.tokens for name, one in counts.items()} == {"laptop": 10, "phone": 5, "unnamed": 5}
        metrics = (await api.get("/metrics", authorization=LAPTOP)).text
        assert 'mesh_llm_key_tokens_total{key="laptop",kind="generated"} 10.0' in metrics
        assert 'mesh_llm_key_requests_total{key="laptop",status="4xx"} 1.0' in metrics
        assert "secret" not in metrics


async def test_streams_count_by_what_the_engine_says_and_clients_that_hang_up_by_what_they_got():
    left = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        for number in range(4):
            await call.event(b'{"choices":[{"delta":{"content":"%d"}}]}' % number)
        if b"leave" in call.body:
            await call.gone()
            left.set()
            return
        await call.event(b'{"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":3}}')
        await call.event(b"[DONE]")
        await call.end_stream()

    async with (
        fake_upstream(script) as engine,
        running_api([route("tiny", local(engine.address))], config=CONFIG) as api,
    ):
        headers = {"authorization": LAPTOP}
        whole = await api.client.post("/v1/chat/completions", content=ASKED % b"stay", headers=headers)
        assert whole.text.endswith("[DONE]\n\n")
        assert (used(api)["laptop"].prompt_tokens, used(api)["laptop"].tokens) == (7, 3)
        body = ASKED % (b"leave" + b"x" * 400)
        async with api.client.stream("POST", "/v1/chat/completions", content=body, headers=headers) as answer:
            seen = b""
            async for piece in answer.aiter_bytes():
                seen += piece
                if seen.count(b"\n\n") == 4:
                    break
        await left.wait()
        await api.server._handler.concurrency.wait_idle()
        counts = used(api)["laptop"]
        # The first event has a role and no text. The prompt is estimated.
        assert (counts.requests, counts.failed, counts.tokens) == (2, 0, 3 + 3)
        assert 7 + 100 <= counts.prompt_tokens <= 7 + 130


async def test_a_limit_of_requests_at_once_counts_those_that_run():
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await go_on.wait()
        await call.respond(ANSWER, kind=b"application/json")

    config = msgspec.structs.replace(CONFIG, key_limits={"laptop": KeyLimit(concurrent=2)})
    async with (
        fake_upstream(script) as engine,
        running_api([route("tiny", local(engine.address))], config=config) as api,
        asyncio.TaskGroup() as group,
    ):
        running = [group.create_task(api.post(authorization=LAPTOP)) for _ in range(2)]
        await engine.until(lambda: len(engine.calls) == 2)
        assert used(api)["laptop"].running == 2
        refused = await api.post(authorization=LAPTOP)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_concurrent")
        assert "`laptop`" in refused.json()["error"]["message"]
        assert "concurrent" in refused.json()["error"]["message"]
        assert "retry-after" in refused.headers
        other = group.create_task(api.post(authorization="Bearer secret-two"))
        await engine.until(lambda: len(engine.calls) == 3)
        go_on.set()
        assert [(await one).status_code for one in (*running, other)] == [200] * 3
        assert (await api.post(authorization=LAPTOP)).status_code == 200


def test_a_limit_of_tokens_a_day_says_when_it_starts_again():
    now = 20000.0 * 86400 + 3600 * 20
    book = UsageBook(Metrics(), limits={"laptop": KeyLimit(tokens_per_day=100)}, wall_clock=lambda: now)
    for _ in range(2):
        with book.admit("laptop"):
            pass
        book.ended("laptop", status=200, prompt=40, generated=20)
    with pytest.raises(MeshError) as refused, book.admit("laptop"):
        pass
    assert (refused.value.code, refused.value.status) == ("key_tokens_per_day", 429)
    assert refused.value.retry_after == 4 * 3600
    assert "tokens_per_day" in str(refused.value)
    assert "00:00 UTC on 2024-10-05, in 4h" in str(refused.value)
    with book.admit("phone"), book.admit(""):
        pass
    now += 4 * 3600
    with book.admit("laptop"):
        pass
    (usage,) = book.usage()
    assert (usage.tokens_today, usage.tokens, usage.tokens_per_day) == (0, 40, 100)
    book.use_limits({})
    assert book.usage()[0].tokens_per_day == 0


async def test_counts_survive_a_restart(tmp_path: Path):
    async def script(call: Call) -> None:
        await call.respond(ANSWER, kind=b"application/json")

    file = tmp_path / "usage.json"
    config = msgspec.structs.replace(CONFIG, usage_file=file)
    async with fake_upstream(script) as engine:
        for life in (1, 2):
            async with running_api([route("tiny", local(engine.address))], config=config) as api:
                assert (await api.post(authorization=LAPTOP)).status_code == 200
                assert used(api)["laptop"].tokens_today == life * 12
                metrics = (await api.get("/metrics", authorization=LAPTOP)).text
                assert f'mesh_llm_key_tokens_total{{key="laptop",kind="prompt"}} {7.0 * life}' in metrics
    assert b"secret" not in file.read_bytes()
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", [b"", b"nonsense", b"[]", b'{"keys":{"a":7}}', b"x" * 300_000, b'{"keys":{}}'])
def test_a_file_that_is_not_right_is_not_used(tmp_path: Path, content: bytes):
    file = tmp_path / "usage.json"
    file.write_bytes(content)
    book = UsageBook(Metrics(), file)
    assert book.usage() == ()
    book.ended("laptop", status=200, prompt=1, generated=2)
    book.file.save()
    assert UsageBook(Metrics(), file).usage()[0].tokens == 2


def test_a_file_that_cannot_be_written_loses_nothing(tmp_path: Path):
    book = UsageBook(Metrics(), tmp_path / "none" / "usage.json")
    book.ended("laptop", status=200, prompt=1, generated=2)
    book.file.save()
    assert book.usage()[0].tokens == 2


def test_names_are_bounded():
    book = UsageBook(Metrics())
    for number in range(400):
        book.ended(f"k{number}", status=200, prompt=1, generated=1)
    assert len(book.usage()) == 256


async def test_without_keys_nothing_is_counted():
    async with running_api([route("tiny", remote())], config=ApiConfig(port=0, queue_wait=0.0, resume_wait=0.0)) as api:
        await api.post()
        assert api.server.summary().keys == ()


def test_an_answer_that_was_resumed_counts_once():
    trace = RequestTrace(0.0, 0.0, "client", "/v1/chat/completions")
    trace.attempt_ended(HERE, TARGET_LOST, "lost", Usage(generated=5))
    # The engine that went on has read the first five tokens as a part of the prompt.
    trace.attempt_ended(THERE, 200, "", Usage(prompt=25, generated=10))
    assert trace.tokens() == (20, 15)
