"""Requests that wait for a model to be loaded."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import msgspec
import pytest
from tests.support.api_harness import THERE, Api, local, peer_streams, remote, route, running_api
from tests.support.fake_upstream import Call, FakeUpstream, fake_upstream

from mesh_llm.api.loading import LoadAnswer
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import Awaited, ModelRoute
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import LoadAsker
from mesh_llm.runtime.supervision import TaskScope

NAME = ModelName("tiny")
COLD = route("tiny", status=ModelStatus.COLD)
ASKED = b'{"model":"tiny"}'
STREAMED = b'{"model":"tiny","stream":true}'
CHAT = "/v1/chat/completions"


def config(wait: float = 30.0, comments: float = 60.0) -> ApiConfig:
    return ApiConfig(port=0, resume_wait=0.0, load_wait=wait, keep_alive_event_seconds=comments)


@pytest.fixture
async def engine() -> AsyncIterator[FakeUpstream]:
    async with fake_upstream() as upstream:
        yield upstream


def warm(engine: FakeUpstream) -> ModelRoute:
    return route("tiny", local(engine.address))


async def waits(api: Api, count: int = 1) -> None:
    await api.traffic.until(lambda: sum(change for _, _, change in api.traffic.awaited) == count)


async def test_a_request_waits_until_its_model_is_loaded(engine: FakeUpstream):
    async with running_api([COLD], config=config()) as api, TaskScope("test") as scope:
        asking = [scope.spawn(api.post(ASKED), "ask") for _ in range(3)]
        await waits(api, 3)
        assert {(model, asker) for model, asker, _ in api.traffic.awaited} == {("tiny", LoadAsker())}
        api.routes.set(COLD, awaited={NAME: Awaited(text="it is loading here")})
        api.routes.set(warm(engine))
        assert [(await one).status_code for one in asking] == [200, 200, 200]
        await waits(api, 0)


async def test_a_model_that_cannot_be_loaded_is_refused_with_the_reason():
    async with running_api([COLD], config=config()) as api, TaskScope("test") as scope:
        asking = scope.spawn(api.post(ASKED), "ask")
        await waits(api)
        api.routes.set(COLD, awaited={NAME: Awaited(problem="it is too large")})
        answer = await asking
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_not_served")
        assert "it is too large" in answer.json()["error"]["message"]
        assert int(answer.headers["retry-after"]) >= 1


async def test_after_the_wait_the_client_is_told_when_the_model_should_answer():
    async with running_api([COLD], config=config(0.2)) as api:
        now = asyncio.get_running_loop().time()
        state = Awaited(text="it takes turns with red", ready_at=now + 40.0)
        api.routes.set(COLD, awaited={NAME: state})
        answer = await api.post(ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert 35 <= int(answer.headers["retry-after"]) <= 40
        assert "takes turns with red" in answer.json()["error"]["message"]


async def test_without_a_wait_a_request_is_refused_at_once():
    async with running_api([COLD], config=config(0.0)) as api:
        answer = await api.post(ASKED)
        assert answer.status_code == 503
        assert api.traffic.awaited == []
        assert (await api.get("/v1/models")).json()["data"] == []


async def test_models_that_a_request_loads_are_listed():
    async with running_api([COLD], config=config()) as api:
        (entry,) = (await api.get("/v1/models")).json()["data"]
        assert (entry["id"], entry["status"]) == ("tiny", "cold")


async def test_a_stream_is_kept_alive_by_comments(engine: FakeUpstream):
    async with running_api([COLD], config=config(comments=0.02)) as api:
        pieces: list[bytes] = []
        async with api.client.stream("POST", CHAT, content=STREAMED) as answer:
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")
            async for piece in answer.aiter_bytes():
                if not pieces:
                    api.routes.set(warm(engine))
                pieces.append(piece)
        text = b"".join(pieces)
        assert text.startswith(b": ")
        # The answer follows whole.
        assert text.endswith(STREAMED)


async def test_a_comment_says_what_the_load_waits_for(engine: FakeUpstream):
    async with running_api([COLD], config=config(comments=0.02)) as api:
        api.routes.set(COLD, awaited={NAME: Awaited(text="node2 is still\nbuilding its RPC plugin")})
        async with api.client.stream("POST", CHAT, content=STREAMED) as answer:
            async for piece in answer.aiter_bytes():
                assert piece.startswith(b": the model is being loaded: node2 is still building its RPC plugin\n\n")
                break
            api.routes.set(warm(engine))


@pytest.mark.parametrize(
    ("path", "event"),
    [(CHAT, b'data: {"error"'), ("/v1/messages", b"event: error"), ("/v1/responses", b"event: error")],
)
async def test_an_error_after_comments_is_an_event_of_the_dialect(path: str, event: bytes):
    async with running_api([COLD], config=config(0.3, 0.02)) as api:
        answer = await api.post(STREAMED, path)
        assert answer.status_code == 200
        assert answer.content.startswith(b": ")
        assert event in answer.content
        assert b"not loaded yet" in answer.content


async def test_who_leaves_does_not_wait_any_more():
    async with running_api([COLD], config=config()) as api, TaskScope("test") as scope:
        asking = scope.spawn(api.post(ASKED), "ask")
        await waits(api)
        asking.cancel()
        await waits(api, 0)


async def test_no_more_requests_wait_than_half_of_the_places():
    small = ApiConfig(port=0, load_wait=30.0, max_in_flight=4)
    async with running_api([COLD], config=small) as api, TaskScope("test") as scope:
        waiting = [scope.spawn(api.post(ASKED), "ask") for _ in range(2)]
        await waits(api, 2)
        answer = await api.post(ASKED)
        assert answer.status_code == 503
        assert "wait" in answer.json()["error"]["message"]
        for one in waiting:
            one.cancel()
        await waits(api, 0)


async def test_a_model_that_was_unloaded_on_the_way_is_waited_for_again(engine: FakeUpstream):
    """Another node says that it does not serve it: nothing is lost."""
    async with (
        running_api([COLD], config=config()) as other,
        peer_streams(other.server, THERE) as address,
        running_api([route("tiny", remote(THERE))], config=config()) as api,
        TaskScope("test") as scope,
    ):
        api.mesh.nodes[THERE] = address
        asking = scope.spawn(api.post(ASKED), "ask")
        await api.traffic.until(lambda: len(api.traffic.ended) >= 1)
        api.routes.set(COLD)
        await waits(api)
        api.routes.set(warm(engine))
        assert (await asking).status_code == 200


def one_slot(engine: FakeUpstream) -> ModelRoute:
    """A launch with one slot: it is given two requests, and the others are queued before it."""
    return route("tiny", msgspec.structs.replace(local(engine.address), slots=1, term=1))


@dataclass
class SlowEngine:
    """Answers only when `answering` is set."""

    answering: asyncio.Event = field(default_factory=asyncio.Event)

    async def script(self, call: Call) -> None:
        await self.answering.wait()
        await call.respond(b'{"done":true}', kind=b"application/json")


@pytest.mark.parametrize("status", [ModelStatus.COLD, ModelStatus.STOPPING])
@pytest.mark.parametrize("body", [ASKED, STREAMED])
async def test_who_is_queued_when_the_model_is_unloaded_waits_for_it_again(
    engine: FakeUpstream, body: bytes, status: ModelStatus
):
    """It takes turns with another one: what its engine has is answered there, and the rest at its next turn."""
    one = SlowEngine()
    async with (
        fake_upstream(one.script) as slow,
        running_api([one_slot(slow)], config=config()) as api,
        TaskScope("test") as scope,
    ):
        asking = [scope.spawn(api.post(body), "ask") for _ in range(4)]
        await api.traffic.until(lambda: len(api.traffic.begun) == 4)
        await slow.until(lambda: len(slow.calls) == 2)
        api.routes.set(route("tiny", status=status))
        one.answering.set()
        await waits(api, 2)
        api.routes.set(warm(engine))
        assert [(await each).status_code for each in asking] == [200] * 4
        assert (len(slow.calls), len(engine.calls)) == (2, 2)


async def test_who_is_queued_at_another_node_when_the_model_is_unloaded_there_waits_for_it_again(engine: FakeUpstream):
    one = SlowEngine()
    async with (
        fake_upstream(one.script) as slow,
        running_api([one_slot(slow)], config=config()) as other,
        peer_streams(other.server, THERE) as address,
        running_api([route("tiny", remote(THERE))], config=config()) as api,
        TaskScope("test") as scope,
    ):
        api.mesh.nodes[THERE] = address
        asking = [scope.spawn(api.post(ASKED), "ask") for _ in range(4)]
        await slow.until(lambda: len(slow.calls) == 2)
        await other.traffic.until(lambda: len(other.traffic.begun) == 4)
        other.routes.set(COLD)
        api.routes.set(COLD, also_alive=[THERE])
        one.answering.set()
        await waits(api, 2)
        assert other.traffic.awaited == []
        api.routes.set(warm(engine))
        assert [(await each).status_code for each in asking] == [200] * 4


async def test_a_request_whose_only_host_is_lost_waits_until_another_one_has_loaded_the_model(engine: FakeUpstream):
    async def die(call: Call) -> None:
        call.die()

    async with (
        fake_upstream(die) as dying,
        running_api([route("tiny", remote(THERE))], config=config()) as api,
        TaskScope("test") as scope,
    ):
        api.mesh.nodes[THERE] = dying.address
        asking = scope.spawn(api.post(ASKED), "ask")
        await api.traffic.until(lambda: bool(api.traffic.dead))
        api.routes.set(COLD)
        await waits(api)
        api.routes.set(warm(engine))
        assert (await asking).status_code == 200


async def test_a_request_whose_host_stays_lost_is_not_asked_for_ever():
    """The routes still name what does not answer: nothing would change by waiting."""
    async with running_api([route("tiny", remote(THERE))], config=config()) as api:
        answer = await api.post(ASKED)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert api.traffic.awaited == []


async def test_another_node_asks_this_one_to_load_and_hears_how_it_is_served(engine: FakeUpstream):
    async with (
        running_api([COLD], config=config()) as api,
        peer_streams(api.server, THERE) as address,
        running_api(config=config()) as asker,
        TaskScope("test") as scope,
    ):
        asker.mesh.nodes[THERE] = address
        asking = scope.spawn(asker.server.ask_to_load(remote(THERE), NAME, {"clients": "1"}), "ask")
        await waits(api)
        assert api.traffic.awaited == [("tiny", LoadAsker(THERE, anywhere=False, for_clients=True), 1)]
        target = msgspec.structs.replace(local(engine.address), term=3, context=512)
        # What another node serves is not what was asked for.
        api.routes.set(route("tiny", remote()))
        api.routes.set(route("tiny", target))
        assert await asking == LoadAnswer(NAME, 3, 512, target.slots, True, 10**6)
        await waits(api, 0)


async def test_another_node_hears_why_not_and_when_to_ask_again():
    async with (
        running_api([COLD], config=config()) as api,
        peer_streams(api.server, THERE) as address,
        running_api(config=config()) as asker,
    ):
        asker.mesh.nodes[THERE] = address
        api.routes.set(COLD, awaited={NAME: Awaited(problem_here="it does not fit")})
        with pytest.raises(MeshError, match="it does not fit") as refused:
            await asker.server.ask_to_load(remote(THERE), NAME, {})
        assert refused.value.retry_after == 30.0
        asker.mesh.nodes.clear()
        with pytest.raises(MeshError, match="did not answer"):
            await asker.server.ask_to_load(remote(THERE), NAME, {})


async def test_one_other_node_has_no_more_than_half_of_the_places():
    small = ApiConfig(port=0, load_wait=30.0, max_in_flight=8)
    async with (
        running_api([COLD], config=small) as api,
        peer_streams(api.server, THERE) as address,
        running_api(config=config()) as asker,
        TaskScope("test") as scope,
    ):
        asker.mesh.nodes[THERE] = address
        asking = [scope.spawn(asker.server.ask_to_load(remote(THERE), NAME, {}), "ask") for _ in range(2)]
        await waits(api, 2)
        with pytest.raises(MeshError, match="one other node"):
            await asker.server.ask_to_load(remote(THERE), NAME, {})
        own = [scope.spawn(api.post(ASKED), "ask") for _ in range(2)]
        await waits(api, 4)
        for one in (*asking, *own):
            one.cancel()
        await waits(api, 0)


async def test_a_node_that_asks_no_more_is_not_waited_for():
    async with (
        running_api([COLD], config=config()) as api,
        peer_streams(api.server, THERE) as address,
        running_api(config=config()) as asker,
        TaskScope("test") as scope,
    ):
        asker.mesh.nodes[THERE] = address
        asking = scope.spawn(asker.server.ask_to_load(remote(THERE), NAME, {}), "ask")
        await waits(api)
        asking.cancel()
        await waits(api, 0)
