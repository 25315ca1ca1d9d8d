"""Traces, the last hour, and the last minute."""

import asyncio

import pytest
from tests.support.api_harness import ELSEWHERE, HERE, THERE, local, remote, route, running_api
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.errors import ERROR_HEADER
from mesh_llm.api.telemetry import COUNT, KEPT, HourlyStats, RecentRequests, TraceLog, why
from mesh_llm.api.types import ApiConfig, StatusRequests
from mesh_llm.core.routing.ranking import Target, Warmth
from mesh_llm.core.types.errors import MeshError


async def answer(call: Call) -> None:
    await call.respond(b'{"usage":{"prompt_tokens":7,"completion_tokens":5}}', kind=b"application/json")


async def test_the_trace_of_an_answered_request_has_its_targets_and_the_chosen_one() -> None:
    async with (
        fake_upstream(answer) as engine,
        fake_upstream(answer) as other,
        running_api([route("tiny", local(engine.address), remote(THERE))]) as api,
    ):
        api.mesh.nodes[THERE] = other.address
        await api.post(b'{"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}')
        (decision,) = api.server.traces.after(0, 10)
        assert {target.node_id for target in decision.targets} == {HERE, THERE}
        assert decision.chosen == decision.targets[0].node_id
        assert [target.expected_s for target in decision.targets] == sorted(t.expected_s for t in decision.targets)
        assert (decision.outcome, decision.status, decision.via) == ("answered", 200, "client")
        assert (decision.model, decision.prompt_tokens, decision.tokens) == ("tiny", 7, 5)
        assert decision.ttfb_ms is not None
        assert 0 < decision.ttfb_ms <= decision.seconds * 1000
        assert sum(bucket.tokens for bucket in api.server.traces.hour.history().buckets) == 5


async def test_a_trace_has_the_lost_target_and_the_next_one() -> None:
    async with fake_upstream(answer) as other, running_api([route("tiny", remote(THERE), remote(ELSEWHERE))]) as api:
        api.mesh.nodes[ELSEWHERE] = other.address
        for _ in range(4):
            await api.post()
        decisions = api.server.traces.after(0, 10)
        assert [decision.id for decision in decisions] == [4, 3, 2, 1]
        assert {decision.chosen for decision in decisions} == {ELSEWHERE}
        lost = [attempt for decision in decisions for attempt in decision.attempts if attempt.outcome == "lost"]
        assert lost
        assert {attempt.node_id for attempt in lost} == {THERE}
        assert all(attempt.reason for attempt in lost)


async def test_refusals_say_why() -> None:
    async with running_api([route("tiny", remote(THERE))]) as api:
        assert (await api.post()).status_code >= 500
        assert (await api.post(b'{"model": "nothing"}')).status_code == 404
        unknown, lost = api.server.traces.after(0, 10)
        assert (unknown.outcome, unknown.status, unknown.chosen, unknown.targets) == ("refused", 404, "", ())
        assert "nothing" in unknown.attempts[-1].reason
        assert (lost.outcome, lost.model, lost.chosen) == ("refused", "tiny", "")
        assert lost.status >= 500
        assert [attempt.outcome for attempt in lost.attempts] == ["lost", "refused"]
        assert sum(bucket.failed for bucket in api.server.traces.hour.history().buckets) == 1


@pytest.mark.parametrize(
    ("status", "body", "reason"),
    [
        (
            400,
            b'{"error":{"code":400,"message":"the request exceeds\\n the context"}}',
            "the request exceeds the context",
        ),
        (401, b'{"type":"error","error":{"type":"x","message":"no"}}', "no"),
        (413, b'{"error":"too large"}', "too large"),
        (404, b"<html>nothing</html>", "status 404"),
        (429, b'{"detail":[]}', "status 429"),
        (500, b'{"error":[1]}', "status 500"),
        (501, b'{"message":"' + b"x" * 1000 + b'"}', "x" * 300),
    ],
)
async def test_what_an_engine_refuses_is_no_answer(status: int, body: bytes, reason: str) -> None:
    async def refuse(call: Call) -> None:
        await call.respond(body, status=status, kind=b"application/json")

    async with fake_upstream(refuse) as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post()
        assert answer.status_code == status
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        (decision,) = api.server.traces.after(0, 10)
        assert (decision.outcome, decision.status, decision.chosen) == ("refused", status, "")
        assert [(one.node_id, one.outcome, one.reason) for one in decision.attempts] == [(HERE, "refused", reason)]


async def test_what_another_node_refuses_is_said_by_its_code() -> None:
    async def refuse(call: Call) -> None:
        await call.respond(b"{}", status=429, headers=[(ERROR_HEADER, b"engine_busy")])

    async with fake_upstream(refuse) as other, running_api([route("tiny", remote(THERE))]) as api:
        api.mesh.nodes[THERE] = other.address
        assert (await api.post()).status_code == 429
        (decision,) = api.server.traces.after(0, 10)
        assert (decision.outcome, decision.status) == ("refused", 429)
        assert [one.outcome for one in decision.attempts] == ["refused", "refused"]
        assert "engine_busy" in decision.attempts[0].reason
        assert "busy" in decision.attempts[1].reason


async def test_a_client_that_fails_authentication_is_traced_too() -> None:
    config = ApiConfig(port=0, keys=("sesame",), body_bytes=1000)
    async with running_api([route("tiny", remote(THERE))], config=config) as api:
        key = {"authorization": "Bearer sesame"}
        assert (await api.post()).status_code == 401
        assert (await api.client.get("/v1/models")).status_code == 401
        assert (await api.client.post("/nothing", headers=key)).status_code == 404
        assert (await api.client.post("/v1/completions", headers=key, content=bytes(5000))).status_code == 413
        large, stranger = api.server.traces.after(0, 10)
        assert (stranger.outcome, stranger.status, stranger.path) == ("refused", 401, "/v1/chat/completions")
        assert "key" in stranger.attempts[0].reason
        assert (large.outcome, large.status) == ("refused", 413)
        assert large.attempts[0].reason


async def test_a_client_that_leaves_is_traced_as_such() -> None:
    begun = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        begun.set()
        await call.gone()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        async with api.client.stream("POST", "/v1/completions", content=b"{}"):
            await begun.wait()
        await api.traffic.all_ended(1)
        await api.server.stop(10.0)
        (decision,) = api.server.traces.after(0, 10)
        assert (decision.outcome, decision.status) == ("left", 499)


def test_old_ones_are_forgotten_and_the_newest_come_first() -> None:
    book = TraceLog(lambda: 0.0, lambda: 0.0)
    for _ in range(KEPT + 10):
        with book.trace("/v1/completions", "client", 0.0):
            pass
    assert [decision.id for decision in book.after(0, 3)] == [KEPT + 10, KEPT + 9, KEPT + 8]
    assert len(book.after(0, 10_000)) == KEPT
    assert [decision.id for decision in book.after(KEPT + 9, 100)] == [KEPT + 10]


def test_a_fault_passes_and_is_no_refusal() -> None:
    book = TraceLog(lambda: 0.0, lambda: 0.0)
    with pytest.raises(MeshError), book.trace("/x", "client", 0.0):
        raise MeshError("node_busy", "busy", status=429)
    with pytest.raises(RuntimeError), book.trace("/x", "client", 0.0):
        raise RuntimeError
    fault, busy = book.after(0, 2)
    assert (busy.outcome, busy.status) == ("refused", 429)
    assert fault.outcome == "left"


def test_why_in_words() -> None:
    target = Target(node=THERE, local=False, slots=4, load=0.5, tokens_per_second=21.4, rtt_ms=12.34)
    told = why(target, 1, Warmth(prefix_bytes=100, conversation=True))
    assert told == "12.3 ms away, 2 of 4 slots busy, 21 tokens/s, knows this conversation"
    idle = why(Target(node=HERE, local=True), 0, Warmth(prefix_bytes=9))
    assert idle == "this node, idle, speed not known, knows the prompt's beginning"


def test_the_hour_is_whole_and_forgets() -> None:
    now = 1_000_000.0
    hour = HourlyStats(lambda: now)
    for seconds in range(1, 101):
        hour.ended(failed=seconds % 10 == 0, tokens=2, prompt=3, ttfb=seconds / 1000, seconds=float(seconds))
    buckets = hour.history().buckets
    assert len(buckets) == COUNT
    assert [b.at for b in buckets] == sorted(b.at for b in buckets)
    last = buckets[-1]
    assert (last.requests, last.failed, last.tokens, last.prompt_tokens) == (100, 10, 200, 300)
    assert last.ttfb_ms_p50 == pytest.approx(51.0)
    assert last.ttfb_ms_p95 == pytest.approx(96.0)
    assert buckets[0].ttfb_ms_p50 is None
    now += 59 * 60
    assert hour.history().buckets[0].requests == 100
    now += 60
    hour.ended(failed=False, tokens=0, prompt=0, ttfb=None, seconds=0.1)
    assert sum(bucket.requests for bucket in hour.history().buckets) == 1


def test_many_requests_in_a_minute_keep_few_samples() -> None:
    hour = HourlyStats(lambda: 0.0)
    for position in range(5000):
        hour.ended(failed=False, tokens=0, prompt=0, ttfb=1.0, seconds=float(position > 100))
    assert hour.history().buckets[-1].seconds_p50 == 1.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_nothing_yet():
    recent = RecentRequests(Clock())
    assert recent.summary(0) == StatusRequests()
    assert recent.rate() == 0.0


def test_a_minute_is_summed_and_forgotten():
    clock = Clock()
    recent = RecentRequests(clock)
    for _ in range(10):
        began = clock.now
        recent.first_byte(0.05)
        clock.now += 2.0
        recent.finished(began, 100)
        clock.now += 1.0
    told = recent.summary(3)
    assert told.in_flight == 3
    assert told.per_minute == 10.0
    assert told.ttfb_ms_p50 == 50.0
    assert 30.0 < told.tokens_per_second < 51.0
    clock.now += 100.0
    assert recent.summary(0) == StatusRequests()


def test_tokens_per_second_count_busy_seconds_only():
    clock = Clock()
    recent = RecentRequests(clock)
    recent.finished(clock.now - 9.0, 200)
    clock.now += 40.0
    assert recent.summary(0).tokens_per_second == 20.0


def test_a_very_long_request_is_no_more_than_a_minute():
    clock = Clock()
    recent = RecentRequests(clock)
    recent.finished(clock.now - 5000.0, 600)
    assert recent.summary(0).tokens_per_second == 10.0


def test_how_fast_requests_end_counts_busy_seconds_only():
    clock = Clock()
    recent = RecentRequests(clock)
    for _ in range(20):
        recent.finished(clock.now - 9.0, 0)
    clock.now += 40.0
    assert recent.rate() == 2.0
