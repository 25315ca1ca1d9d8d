"""The concurrency limit, and the fair queue before an engine."""

import asyncio
from contextlib import AsyncExitStack, ExitStack

import msgspec
import pytest
from tests.support.api_harness import THERE, local, peer_streams, remote, route, running_api, snapshot
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.limits import ConcurrencyLimit, FairQueue
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError

CHAT = "/v1/chat/completions"


def engine(slots: int = 1) -> Target:
    return msgspec.structs.replace(local("127.0.0.1:1"), slots=slots)


class Crowd:
    """Requests before one engine, and the order in which they reached it."""

    def __init__(self, slots: int = 1) -> None:
        self.turns = FairQueue(float)
        self.target = engine(slots)
        self.inside: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, group: asyncio.TaskGroup, name: str) -> None:
        """`name`: the owner's, and a number."""

        async def one() -> None:
            async with self.turns.turn(self.target, name.rstrip("0123456789"), CHAT):
                self.inside.append(name)
                await self.ends[name].wait()

        self.ends[name] = asyncio.Event()
        self.tasks[name] = group.create_task(one())
        await settled()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await settled()


async def settled() -> None:
    """Let everybody do what they can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_owner_with_many_requests_does_not_delay_the_others():
    crowd = Crowd()
    async with asyncio.TaskGroup() as group:
        for number in range(6):
            await crowd.ask(group, f"many{number}")
        await crowd.ask(group, "one0")
        await crowd.ask(group, "two0")
        assert crowd.inside == ["many0", "many1"]
        for name in ("many0", "many1", "many2", "one0", "two0", "many3", "many4", "many5"):
            await crowd.end(name)
    assert crowd.inside == ["many0", "many1", "many2", "one0", "two0", "many3", "many4", "many5"]
    assert crowd.turns.waiting == 0
    assert not crowd.turns.engines


async def test_a_request_that_leaves_the_queue_is_skipped():
    crowd = Crowd()
    async with asyncio.TaskGroup() as group:
        for name in ("a0", "a1", "a2", "b0", "c0"):
            await crowd.ask(group, name)
        crowd.tasks["b0"].cancel()
        await settled()
        # This one leaves at the very moment in which its turn comes.
        crowd.ends["a0"].set()
        await asyncio.sleep(0)
        crowd.tasks["a2"].cancel()
        await settled()
        assert crowd.inside == ["a0", "a1", "c0"]
        for name in ("a1", "c0"):
            await crowd.end(name)
    assert not crowd.turns.engines


async def test_the_queue_is_bounded_and_its_error_says_how_long_to_wait():
    crowd = Crowd(slots=2)
    async with asyncio.TaskGroup() as group:
        for number in range(3 + 16):
            await crowd.ask(group, f"a{number}")
        with pytest.raises(MeshError) as refused:
            async with crowd.turns.turn(crowd.target, "a", CHAT):
                pass
        assert (refused.value.code, refused.value.status, refused.value.retry_after) == ("engine_busy", 429, 16.0)
        for end in crowd.ends.values():
            end.set()


async def test_a_full_queue_drops_the_newest_request_of_the_owner_with_the_most():
    crowd = Crowd(slots=2)
    sent_away: list[str] = []

    async def flood(name: str) -> None:
        try:
            async with crowd.turns.turn(crowd.target, name.rstrip("0123456789"), CHAT):
                crowd.inside.append(name)
                await crowd.ends[name].wait()
        except MeshError as error:
            sent_away.append(f"{name} {error.status}")

    async with asyncio.TaskGroup() as group:

        async def ask(name: str) -> None:
            crowd.ends[name] = asyncio.Event()
            crowd.tasks[name] = group.create_task(flood(name))
            await settled()

        for number in range(3 + 16):
            await ask(f"many{number}")
        for number in range(10):
            await ask(f"few{number}")
        # The last of the many went, one for each, until both had the same; from then on the others are sent away.
        assert sent_away == [*(f"many{number} 429" for number in range(18, 10, -1)), "few8 429", "few9 429"]
        assert crowd.turns.waiting == 16
        # One that is sent away in the moment in which it leaves by itself takes nobody's turn.
        await ask("third0")
        assert sent_away[-1] == "many10 429"
        crowd.tasks["few7"].cancel()
        await ask("third1")
        for end in crowd.ends.values():
            end.set()
    assert crowd.inside[:3] == ["many0", "many1", "many2"]
    assert not crowd.turns.engines


async def test_what_takes_no_slot_or_is_elsewhere_does_not_wait():
    turns = FairQueue(lambda _: 1.0)
    async with AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(turns.turn(engine(), "", "/tokenize"))
            await stack.enter_async_context(turns.turn(remote(), "", CHAT))
        assert turns.waiting == 0


def test_nobody_gets_all_places():
    admission = ConcurrencyLimit(8, lambda _: 3.0)
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(admission.hold("greedy"))
        with pytest.raises(MeshError) as refused, admission.hold("greedy"):
            pass
        assert (refused.value.status, refused.value.retry_after) == (429, 3.0)
        stack.enter_context(admission.hold("modest"))
        with pytest.raises(MeshError), admission.hold("third"):
            pass
        assert admission.in_flight == 8
    assert admission.in_flight == 0
    assert not admission._held


async def test_peers_and_clients_take_turns_at_a_real_server():
    order: list[bytes] = []
    go_on: asyncio.Queue[None] = asyncio.Queue()

    async def script(call: Call) -> None:
        order.append(call.body)
        await go_on.get()
        await call.respond(b"{}", kind=b"application/json")

    async with fake_upstream(script) as upstream, running_api() as host, running_api() as asking:
        target = msgspec.structs.replace(local(upstream.address), slots=1)
        host.routes.current = snapshot(route("tiny", target), default="tiny")
        async with peer_streams(host.server, THERE) as address, asyncio.TaskGroup() as group:
            asking.routes.current = snapshot(route("tiny", remote(THERE)), default="tiny")
            asking.mesh.nodes = {THERE: address}
            for number in range(5):
                group.create_task(host.post(b'{"own":%d}' % number))
                await host.traffic.until(lambda: len(host.traffic.begun) == number + 1)  # noqa: B023
            group.create_task(asking.post(b'{"peer":0}'))
            await host.traffic.until(lambda: len(host.traffic.begun) == 6)
            for _ in range(6):
                go_on.put_nowait(None)
        assert order.index(b'{"peer":0}') <= 3


async def test_over_ten_times_the_capacity_every_request_is_answered_or_gets_a_retry_after():
    async def script(call: Call) -> None:
        await call.respond(b'{"usage":{"completion_tokens":1}}', kind=b"application/json")

    config = ApiConfig(port=0, max_in_flight=20, resume_wait=0.0)
    async with fake_upstream(script) as upstream, running_api(config=config) as api:
        api.routes.current = snapshot(
            route("tiny", msgspec.structs.replace(local(upstream.address), slots=2)), default="tiny"
        )
        answers = await asyncio.gather(*(api.post(b'{"seed":%d}' % number) for number in range(200)))
        statuses = [answer.status_code for answer in answers]
        assert set(statuses) == {200, 429}
        assert all(1 <= int(a.headers["retry-after"]) <= 60 for a in answers if a.status_code == 429)
        assert (await api.post()).status_code == 200
        assert api.server.in_flight == 0
        assert api.server._handler._proxy._queue.waiting == 0
