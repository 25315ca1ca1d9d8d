"""A prompt goes to nodes of its circle only: routing, hosts with workers, resuming, caches, keys and headers."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from tests.support.answering_engine import AnsweringEngine
from tests.support.api_harness import ELSEWHERE, HERE, THERE, Api, local, peer_streams, remote, route, running_api
from tests.support.fake_upstream import Call, FakeUpstream, fake_upstream

from mesh_llm.api.resume import resume
from mesh_llm.api.types import ApiConfig, KeyLimit
from mesh_llm.core.routing.ranking import Awaited, Target
from mesh_llm.core.trust.circle import Owners, Privacy
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import LoadAsker
from mesh_llm.runtime.supervision import TaskScope

CHAT = "/v1/chat/completions"
NAME = ModelName("tiny")
MINE, FRIEND, STRANGER = (OwnerId(letter * 64) for letter in "123")
BODY = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "a secret"}]}).encode()
STREAMED = json.dumps(
    {"model": "tiny", "stream": True, "temperature": 0, "messages": [{"role": "user", "content": "a secret"}]}
).encode()


def owned(owners: dict[NodeId, OwnerId], expires: int = 2**40) -> dict[NodeId, Ownership]:
    return {
        node: Ownership(owner=owner, issued=0, expires=expires, signature=b"s" * 64) for node, owner in owners.items()
    }


async def answer(call: Call) -> None:
    await call.respond(b'{"choices":[]}', kind=b"application/json")


@asynccontextmanager
async def two_hosts(
    owners: dict[NodeId, OwnerId], script: Any = answer, second: Any = answer, **config: Any
) -> AsyncGenerator[tuple[Api, FakeUpstream, FakeUpstream]]:
    """THERE is the better host, ELSEWHERE the other one."""
    given: dict[str, Any] = {"resume_wait": 0.0, "owners": Owners(own=MINE, group=(FRIEND,)), **config}
    async with (
        fake_upstream(script) as one,
        fake_upstream(second) as two,
        running_api(config=ApiConfig(port=0, **given)) as api,
    ):
        better = msgspec.structs.replace(remote(ELSEWHERE), load=0.9)
        api.routes.set(route("tiny", remote(THERE), better))
        api.routes.current = msgspec.structs.replace(api.routes.current, owners=owned(owners))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        yield api, one, two


@pytest.mark.parametrize("privacy", ["own", "group"])
async def test_a_request_goes_past_a_better_host_outside(privacy: str) -> None:
    async with two_hosts({THERE: STRANGER, ELSEWHERE: MINE}, privacy=Privacy(privacy)) as (api, one, two):
        assert (await api.post(BODY, CHAT)).headers["x-mesh-llm-node"] == ELSEWHERE
        assert not one.calls
        circle = {MINE} if privacy == "own" else {MINE, FRIEND}
        assert set(two.calls[0].headers[b"x-mesh-llm-circle"].decode().split(",")) == circle


async def test_a_request_that_has_nowhere_to_go_says_so_and_what_to_type() -> None:
    async with two_hosts({THERE: STRANGER}, privacy=Privacy.OWN) as (api, one, two):
        refused = await api.post(BODY, CHAT)
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert error["code"] == "outside_circle"
        assert THERE[:10] in error["message"]
        assert "mesh-llm load tiny" in error["message"]
        assert "mesh-llm owner add" in error["message"]
        assert not one.calls
        assert not two.calls


async def test_a_header_only_makes_it_stricter_and_nonsense_is_refused() -> None:
    async with two_hosts({THERE: FRIEND, ELSEWHERE: MINE}, privacy=Privacy.GROUP) as (api, one, two):
        assert (await api.post(BODY, CHAT)).headers["x-mesh-llm-node"] == THERE
        assert (await api.post(BODY, CHAT, x_mesh_llm_privacy="own")).headers["x-mesh-llm-node"] == ELSEWHERE
        await api.post(BODY, CHAT, x_mesh_llm_privacy="any")
        assert all(b"x-mesh-llm-circle" in call.headers for call in (*one.calls, *two.calls))
        assert (await api.post(BODY, CHAT, x_mesh_llm_privacy="ours")).status_code == 400


async def test_a_key_may_be_stricter() -> None:
    limits = {"one": KeyLimit(privacy=Privacy.OWN)}
    config: dict[str, Any] = {"keys": ("one:secret-one", "two:secret-two"), "key_limits": limits}
    async with two_hosts({THERE: STRANGER, ELSEWHERE: MINE}, **config) as (api, _, __):
        assert (await api.post(BODY, CHAT, x_api_key="secret-one")).headers["x-mesh-llm-node"] == ELSEWHERE
        assert (await api.post(BODY, CHAT, x_api_key="secret-two")).headers["x-mesh-llm-node"] == THERE


async def test_an_owner_whose_statement_has_ended_does_not_count() -> None:
    async with two_hosts({ELSEWHERE: MINE}, privacy=Privacy.OWN) as (api, _, two):
        api.routes.current = msgspec.structs.replace(api.routes.current, owners=owned({ELSEWHERE: MINE}, expires=1000))
        assert (await api.post(BODY, CHAT)).status_code == 403
        assert not two.calls


async def test_an_answer_is_not_resumed_outside() -> None:
    engine = AnsweringEngine("first")

    async def mortal(call: Call) -> None:
        await call.begin_stream()
        for event in engine.stream(call.target, json.loads(call.body))[:7]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        call.die()

    async with two_hosts({THERE: MINE, ELSEWHERE: STRANGER}, mortal, privacy=Privacy.OWN) as (api, one, two):
        content = (await api.post(STREAMED, CHAT)).content
        assert b"target_lost" in content
        assert [call.target for call in one.calls] == [CHAT]
        assert not two.calls


async def test_an_answer_that_lost_its_host_has_its_model_loaded_here_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "_COMMENT_SECONDS", 0.05)
    engine = AnsweringEngine("first")

    async def mortal(call: Call) -> None:
        await call.begin_stream()
        for event in engine.stream(call.target, json.loads(call.body))[:7]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        call.die()

    config: dict[str, Any] = {"privacy": Privacy.OWN, "resume_wait": 0.3, "load_wait": 30.0}
    async with two_hosts({THERE: MINE, ELSEWHERE: STRANGER}, mortal, **config) as (api, _, two):
        await api.post(STREAMED, CHAT)
        assert {asker.anywhere for _, asker, _ in api.traffic.awaited} == {False}
        assert not two.calls


async def test_no_cache_is_asked_for_on_a_node_outside() -> None:
    long = json.dumps({"model": "tiny", "messages": [{"role": "user", "content": "word " * 2000}]}).encode()
    async with two_hosts({THERE: MINE, ELSEWHERE: MINE}, privacy=Privacy.OWN) as (api, one, two):
        await api.post(long, CHAT)
        api.routes.set(route("tiny", remote(ELSEWHERE)), also_alive=(THERE,))
        await api.post(long, CHAT)
        assert one.calls
        assert b"x-mesh-llm-prompt-at" not in two.calls[-1].headers


@pytest.mark.parametrize(
    ("circle", "status"),
    [
        (f"{MINE}", 200),
        (f"{FRIEND},{MINE}", 200),
        (FRIEND, 503),
        ("-", 503),
        ("", 400),
        ("any", 400),
        (f"{MINE};", 400),
    ],
)
async def test_a_host_refuses_where_a_worker_is_outside(circle: str, status: int) -> None:
    """It knows its workers exactly; a circle that it does not understand is never taken for none."""
    async with fake_upstream(answer) as engine, running_api() as api:
        target = msgspec.structs.replace(local(engine.address), workers=(ELSEWHERE, THERE))
        api.routes.set(route("tiny", target))
        api.routes.current = msgspec.structs.replace(api.routes.current, owners=owned({ELSEWHERE: MINE}))
        async with peer_streams(api.server, THERE) as address:
            head = f"POST {CHAT} HTTP/1.1\r\nhost: mesh\r\nx-mesh-llm-model: tiny\r\n"
            head += f"x-mesh-llm-circle: {circle}\r\ncontent-length: {len(BODY)}\r\n\r\n"
            name, _, port = address.partition(":")
            reader, writer = await asyncio.open_connection(name, int(port))
            writer.write(head.encode() + BODY)
            got = await reader.read()
            writer.close()
        assert got.startswith(b"HTTP/1.1 %d " % status), got
        assert len(engine.calls) == (status == 200)


async def test_a_split_here_with_a_worker_outside_is_not_used() -> None:
    config = ApiConfig(port=0, resume_wait=0.0, privacy=Privacy.OWN)
    async with fake_upstream(answer) as engine, running_api(config=config) as api:
        api.routes.set(route("tiny", msgspec.structs.replace(local(engine.address), workers=(THERE,))))
        assert (await api.post(BODY, CHAT)).status_code == 403
        api.routes.set(route("tiny", local(engine.address, node=HERE)))
        assert (await api.post(BODY, CHAT)).status_code == 200
        assert len(engine.calls) == 1


def loading(node: NodeId, *, here: bool) -> Target:
    return Target(node=node, local=here, status=ModelStatus.LOADING)


@asynccontextmanager
async def one_of_strangers(**config: Any) -> AsyncGenerator[tuple[Api, FakeUpstream, FakeUpstream]]:
    """ELSEWHERE is a stranger's and answers; the second host's part is for the test to say."""
    given: dict[str, Any] = {"privacy": Privacy.OWN, "load_wait": 30.0, "keep_alive_event_seconds": 0.02, **config}
    async with two_hosts({THERE: MINE, ELSEWHERE: STRANGER}, **given) as (api, one, two):
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        yield api, one, two


async def test_a_request_waits_for_the_own_model_while_a_strangers_copy_answers() -> None:
    async with one_of_strangers() as (api, _, strangers), fake_upstream(answer) as engine:
        own = loading(HERE, here=True)
        api.routes.set(route("tiny", own, remote(ELSEWHERE)), awaited={NAME: Awaited(text="it is loading here")})
        pieces: list[bytes] = []
        async with api.client.stream("POST", CHAT, content=STREAMED) as got:
            assert got.status_code == 200
            async for piece in got.aiter_bytes():
                if not pieces:
                    api.routes.set(route("tiny", local(engine.address), remote(ELSEWHERE)))
                pieces.append(piece)
        assert pieces[0].startswith(b": the model is being loaded: it is loading here")
        assert b'{"choices":[]}' in b"".join(pieces)
        assert len(engine.calls) == 1
        assert not strangers.calls


async def test_what_another_node_of_the_circle_loads_is_waited_for_and_not_loaded_here_too() -> None:
    async with one_of_strangers() as (api, own, strangers), TaskScope("test") as scope:
        api.routes.set(route("tiny", loading(THERE, here=False), remote(ELSEWHERE)))
        asking = scope.spawn(api.post(BODY, CHAT), "ask")
        async with api.client.stream("POST", CHAT, content=STREAMED) as got:
            async for piece in got.aiter_bytes():
                assert piece.startswith(b": the model is being loaded")
                break
            assert not asking.done()
            api.routes.set(route("tiny", remote(THERE), remote(ELSEWHERE)))
        assert (await asking).headers["x-mesh-llm-node"] == THERE
        assert api.traffic.awaited == []
        assert own.calls
        assert not strangers.calls


async def test_a_model_that_only_strangers_serve_is_loaded_here_or_refused_with_the_reason() -> None:
    async with one_of_strangers() as (api, _, strangers), TaskScope("test") as scope:
        asking = scope.spawn(api.post(BODY, CHAT), "ask")
        await api.traffic.until(lambda: bool(api.traffic.awaited))
        assert api.traffic.awaited[0][1] == LoadAsker(anywhere=False, circle=frozenset({MINE}))
        api.routes.set(route("tiny", remote(ELSEWHERE)), awaited={NAME: Awaited(problem_here="it is too large")})
        refused = await asking
        assert refused.status_code == 403
        error = refused.json()["error"]
        assert error["code"] == "outside_circle"
        assert "This node does not load it: it is too large." in error["message"]
        assert not strangers.calls


async def test_without_waits_for_loads_a_request_still_waits_for_its_own_model() -> None:
    async with one_of_strangers(load_wait=0.0) as (api, _, strangers), fake_upstream(answer) as engine:
        api.routes.set(route("tiny", loading(HERE, here=True), remote(ELSEWHERE)))
        async with TaskScope("test") as scope:
            asking = scope.spawn(api.post(BODY, CHAT), "ask")
            await api.traffic.until(lambda: "tiny" in api.traffic.asked)
            assert not asking.done()
            api.routes.set(route("tiny", local(engine.address), remote(ELSEWHERE)))
            assert (await asking).status_code == 200
        assert not strangers.calls


async def test_a_split_that_loads_here_with_a_worker_outside_is_not_waited_for() -> None:
    async with one_of_strangers() as (api, _, strangers):
        mine = msgspec.structs.replace(loading(HERE, here=True), workers=(ELSEWHERE,))
        api.routes.set(route("tiny", mine, status=ModelStatus.LOADING))
        refused = await api.post(BODY, CHAT)
        assert refused.status_code == 403
        assert ELSEWHERE[:10] in refused.json()["error"]["message"]
        assert not strangers.calls


@pytest.mark.parametrize("loads", [True, False])
async def test_a_request_whose_own_model_is_unloaded_on_the_way_waits_for_it_again(*, loads: bool) -> None:
    async with (
        running_api([route("tiny", status=ModelStatus.COLD)]) as other,
        peer_streams(other.server, HERE) as address,
        one_of_strangers() as (api, _, strangers),
        fake_upstream(answer) as engine,
        TaskScope("test") as scope,
    ):
        api.mesh.nodes[THERE] = address
        api.routes.set(route("tiny", remote(THERE), remote(ELSEWHERE)))
        asking = scope.spawn(api.post(BODY, CHAT), "ask")
        await api.traffic.until(lambda: bool(api.traffic.ended))
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        await api.traffic.until(lambda: bool(api.traffic.awaited))
        assert api.traffic.awaited[0][1] == LoadAsker(anywhere=False, circle=frozenset({MINE}))
        if loads:
            api.routes.set(route("tiny", local(engine.address), remote(ELSEWHERE)))
        else:
            api.routes.set(route("tiny", remote(ELSEWHERE)), awaited={NAME: Awaited(problem_here="it is too large")})
        assert (await asking).status_code == (200 if loads else 403)
        assert len(engine.calls) == loads
        assert not strangers.calls
