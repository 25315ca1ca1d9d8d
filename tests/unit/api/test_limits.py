"""The bound of requests that are held, and the fair queue before a target."""

import asyncio
from contextlib import AsyncExitStack, ExitStack

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.api_harness import (
    THERE,
    FakeRoutes,
    local,
    peer_streams,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.examples import examples
from tests.support.fake_upstream import Call, fake_upstream
from tests.support.virtual_time import run_virtual

from mesh_llm.api.limits import ConcurrencyLimit, FairQueue
from mesh_llm.api.request import ModelRequest, Request
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus

CHAT = "/v1/chat/completions"
PATIENT = ApiConfig(port=0, resume_wait=0.0)


async def _nothing() -> bytes:
    return b""


class NoReply:
    """Requests of these tests are not answered."""

    started = False

    async def start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    async def write(self, data: bytes) -> None: ...
    async def end(self, data: bytes = b"") -> None: ...
    def abort(self) -> None: ...
    def watch(self, gone: object) -> None: ...
    def unwatch(self) -> None: ...


def request(owner: str, body: bytes = b"{}", path: str = CHAT) -> ModelRequest:
    """An owner whose name begins so is a stranger."""
    source = "192.0.2.1" if owner.startswith("stranger") else None
    asked = Request("POST", path, "", (), _nothing, owner=owner, stranger=source)
    return ModelRequest(asked, body, ModelName("tiny"), NoReply(), 0.0, 0.0)


def engine(slots: int = 1, term: int = 1) -> Target:
    return msgspec.structs.replace(local("127.0.0.1:1"), slots=slots, term=term)


class Crowd:
    """Requests before one engine, and the order in which they reached it."""

    def __init__(self, slots: int = 1, longest: float = 60.0) -> None:
        self.target = engine(slots)
        self.routes = FakeRoutes(snapshot(route("tiny", self.target), default="tiny"))
        self.now = 0.0
        self.longest = longest
        self.queue = FairQueue(self.routes, longest, lambda: self.now)
        self.inside: list[str] = []
        self.sent_away: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, group: asyncio.TaskGroup, name: str, *, begun: bool = False) -> None:
        """`name`: the owner's, and a number."""
        job = request(name.rstrip("0123456789"), name.encode())

        async def one() -> None:
            try:
                async with self.queue.turn(self.target, job, self.now + self.longest, begun=begun):
                    self.inside.append(name)
                    await self.ends[name].wait()
            except MeshError as error:
                self.sent_away.append(f"{name} {error.status}")

        self.ends[name] = asyncio.Event()
        self.tasks[name] = group.create_task(one())
        await settled()

    async def end(self, *names: str, after: float = 0.0) -> None:
        self.now += after
        for name in names:
            self.ends[name].set()
            await settled()

    async def end_all(self) -> None:
        for end in self.ends.values():
            end.set()


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
    assert crowd.queue.waiting == 0
    assert not crowd.queue.engines


async def test_strangers_queue_behind_all_others_and_leave_the_place_before_the_engine_free():
    crowd = Crowd()
    async with asyncio.TaskGroup() as group:
        for name in ("stranger0", "stranger1", "strangers2", "own0", "own1", "friend0"):
            await crowd.ask(group, name)
        # One computes, and goes on; what comes next is for the others.
        assert crowd.inside == ["stranger0", "own0"]
        for name in ("stranger0", "own0", "friend0", "own1", "stranger1", "strangers2"):
            await crowd.end(name)
    assert crowd.inside == ["stranger0", "own0", "own1", "friend0", "stranger1", "strangers2"]
    assert crowd.queue.waiting == 0
    assert not crowd.queue.engines


async def test_strangers_are_sent_away_first_and_never_in_place_of_others():
    crowd = Crowd(longest=4.0)
    async with asyncio.TaskGroup() as group:
        await crowd.ask(group, "own0")
        # One a second: four more can begin in time.
        await crowd.end("own0", after=1.0)
        for name in ("own1", "own2", "stranger1", "strangers2", "strangers3", "stranger4"):
            await crowd.ask(group, name)
        assert crowd.sent_away == []
        await crowd.ask(group, "own3")
        await crowd.ask(group, "own4")
        await crowd.ask(group, "own5")
        await crowd.ask(group, "own6")
        assert crowd.sent_away == ["stranger4 429", "strangers3 429", "stranger1 429", "strangers2 429"]
        await crowd.ask(group, "stranger7")
        assert crowd.sent_away[-1] == "stranger7 429"
        await crowd.end_all()
    assert crowd.inside == ["own0", "own1", "own2", "own3", "own4", "own5", "own6"]


async def test_strangers_take_no_place_that_is_left_for_small_owners():
    limit = ConcurrencyLimit(16, lambda: 0.0)
    with ExitStack() as held:
        for number in range(14):
            held.enter_context(limit.hold(f"owner{number}"))
        with pytest.raises(MeshError, match="as many requests"), limit.hold("stranger", last=True):
            pass
        with limit.hold("friend"):
            assert limit.in_flight == 15


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
    assert not crowd.queue.engines


async def test_before_anything_is_measured_all_may_wait():
    crowd = Crowd(slots=4)
    async with asyncio.TaskGroup() as group:
        for number in range(640):
            await crowd.ask(group, f"a{number}")
        assert crowd.queue.waiting == 640 - 5
        await crowd.end_all()
    assert (len(crowd.inside), crowd.sent_away) == (640, [])


async def measured(crowd: Crowd, group: asyncio.TaskGroup, count: int, seconds: float) -> None:
    """So many requests, one after another, each this long."""
    for number in range(count):
        await crowd.ask(group, f"first{number}")
        await crowd.end(f"first{number}", after=seconds)


async def test_what_can_begin_in_time_waits_and_no_more():
    crowd = Crowd(slots=1, longest=60.0)
    async with asyncio.TaskGroup() as group:
        await measured(crowd, group, 40, 2.0)
        for number in range(100):
            await crowd.ask(group, f"a{number}")
        # One place is taken, one more request is ahead. The others take two seconds each.
        assert 30 <= crowd.queue.waiting <= 34
        assert len(crowd.sent_away) == 100 - 2 - crowd.queue.waiting
        # The part of an answer that a client has is not given up.
        before = crowd.queue.waiting
        await crowd.ask(group, "resumed0", begun=True)
        assert crowd.queue.waiting == before + 1
        wait = crowd.queue.send_away(request("a", b"another"), [crowd.target])
        assert 1.0 <= wait <= 4.0
        assert crowd.queue.send_away(request("a", b"a third"), [crowd.target]) == pytest.approx(wait + 2.0, rel=0.2)
        await crowd.end_all()


async def test_a_full_queue_drops_the_newest_request_of_the_owner_with_the_most():
    crowd = Crowd(slots=1, longest=33.0)
    async with asyncio.TaskGroup() as group:
        await measured(crowd, group, 40, 2.0)
        for number in range(2 + 16):
            await crowd.ask(group, f"many{number}")
        assert crowd.sent_away == []
        crowd.longest = 33.0
        for number in range(10):
            await crowd.ask(group, f"few{number}")
        # The last of the many went, one for each, until both had the same; from then on the others are sent away.
        assert crowd.sent_away == [*(f"many{number} 429" for number in range(17, 9, -1)), "few8 429", "few9 429"]
        assert crowd.queue.waiting == 16
        # One that is sent away in the moment in which it leaves by itself takes nobody's turn.
        await crowd.ask(group, "third0")
        assert crowd.sent_away[-1] == "many9 429"
        crowd.tasks["few7"].cancel()
        await crowd.ask(group, "third1")
        await crowd.end_all()
    assert crowd.inside[40:43] == ["many0", "many1", "many2"]
    assert not crowd.queue.engines


async def test_a_target_that_turns_slow_sends_away_more():
    crowd = Crowd(slots=1, longest=60.0)
    async with asyncio.TaskGroup() as group:
        await measured(crowd, group, 40, 0.1)
        await crowd.ask(group, "long0")
        await crowd.ask(group, "long1")
        crowd.now += 300.0
        for number in range(20):
            await crowd.ask(group, f"a{number}")
        assert crowd.queue.waiting < 10
        await crowd.end_all()


def test_a_request_that_got_no_place_in_time_is_sent_away():
    async def course() -> None:
        loop = asyncio.get_running_loop()
        routes = FakeRoutes(snapshot(route("tiny", engine()), default="tiny"))
        queue = FairQueue(routes, 5.0, loop.time)
        async with AsyncExitStack() as stack:
            for _ in range(2):
                await stack.enter_async_context(queue.turn(engine(), request("a"), loop.time() + 5.0))
            began = loop.time()
            with pytest.raises(MeshError) as refused:
                await stack.enter_async_context(queue.turn(engine(), request("b"), began + 5.0))
            assert (refused.value.status, loop.time() - began) == (429, pytest.approx(5.0, abs=0.1))
            assert queue.waiting == 0

    run_virtual(course())


def test_a_place_that_became_free_while_the_node_stood_still_is_given_before_anybody_is_sent_away():
    async def course() -> None:
        loop = asyncio.get_running_loop()
        queue = FairQueue(FakeRoutes(snapshot(route("tiny", engine()), default="tiny")), 5.0, loop.time)
        deadline, end = loop.time() + 5.0, asyncio.Event()

        async def first() -> None:
            async with queue.turn(engine(), request("a"), deadline):
                await end.wait()

        async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
            group.create_task(first())
            await settled()
            await stack.enter_async_context(queue.turn(engine(), request("a"), deadline))
            # The loop runs again at the deadline, and reads then what came before it.
            loop.call_at(deadline, lambda: loop.call_soon(lambda: loop.call_soon(end.set)))
            await stack.enter_async_context(queue.turn(engine(), request("b"), deadline))
            assert queue.waiting == 0

    run_virtual(course())


async def test_an_engine_that_is_replaced_sends_its_queue_on():
    crowd = Crowd(slots=1)
    async with asyncio.TaskGroup() as group:
        for number in range(5):
            await crowd.ask(group, f"a{number}")
        crowd.routes.set(route("tiny", msgspec.structs.replace(crowd.target, status=ModelStatus.LOADING)))
        await crowd.end("a0")
        assert crowd.sent_away == ["a2 503", "a3 503", "a4 503"]
        await crowd.end("a1")
    assert not crowd.queue.engines


async def test_what_takes_no_slot_does_not_wait():
    queue = FairQueue(FakeRoutes(snapshot()), 60.0, float)
    async with AsyncExitStack() as stack:
        for _ in range(100):
            await stack.enter_async_context(queue.turn(engine(), request("", path="/tokenize"), 0.0))
        assert queue.waiting == 0


async def test_another_node_gets_a_little_more_than_it_has_slots_and_the_rest_takes_turns_here():
    target = remote(THERE)
    queue = FairQueue(FakeRoutes(snapshot(route("tiny", target))), 60.0, lambda: 0.0)
    order: list[str] = []
    release = asyncio.Event()

    async def one(owner: str) -> None:
        async with queue.turn(target, request(owner), 60.0):
            order.append(owner)
            await release.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(30):
            group.create_task(one("many"))
        await settled()
        group.create_task(one("modest"))
        await settled()
        assert (len(order), queue.waiting) == (9, 22)
        release.set()
    assert order.index("modest") <= 10


BURSTS = st.tuples(
    st.integers(1, 8),
    st.floats(0.05, 20.0),
    st.integers(1, 150),
    st.floats(2.0, 60.0),
    st.integers(0, 3),
)
"""Slots, seconds of a request, requests at once, the longest wait, single requests before."""


@given(BURSTS)
@examples(60)
def test_in_a_burst_all_that_can_begin_in_time_wait_and_every_retry_after_comes_true(
    burst: tuple[int, float, int, float, int],
):
    slots, seconds, count, longest, before = burst
    run_virtual(_burst(slots, seconds, count, longest, before))


async def _burst(slots: int, seconds: float, count: int, longest: float, before: int) -> None:
    """Requests of equal length at once; those that are sent away come back when they were told to."""
    loop = asyncio.get_running_loop()
    target = engine(slots)
    queue = FairQueue(FakeRoutes(snapshot(route("tiny", target))), longest, loop.time)
    computing = asyncio.Semaphore(slots)
    waited: list[float] = []
    told: list[tuple[float, float]] = []
    refused_again = 0
    began = 0.0

    async def answer(name: str) -> None:
        job, arrived = request("", name.encode()), loop.time()
        async with queue.turn(target, job, arrived + longest), computing:
            waited.append(loop.time() - arrived)
            await asyncio.sleep(seconds)

    async def client(name: str) -> None:
        nonlocal refused_again
        tries = 0
        while True:
            try:
                await answer(name)
            except MeshError:
                refused_again += tries > 0 and queue_seconds < longest * 0.5
                wait = float(max(1, -int(-queue.send_away(request("", name.encode()), [target]) // 1)))
                if not tries:
                    told.append((loop.time() - began, wait))
                tries += 1
                assert tries < 40
                await asyncio.sleep(wait)
            else:
                return

    queue_seconds = seconds / slots
    for number in range(before):
        await answer(f"before {number}")
    waited.clear()
    began = loop.time()
    async with asyncio.TaskGroup() as group:
        for number in range(count):
            group.create_task(client(f"one {number}"))
    in_time = slots + int(longest * slots / seconds)
    assert len(waited) == count
    # One is ahead in the engine. It may have waited the longest time before that.
    assert max(waited) <= longest + 2 * seconds
    refused_at_once = sum(at == 0.0 for at, _ in told)
    assert refused_at_once <= max(0, count - in_time)
    if before and slots == 1:
        # The rate is known: the time that is said is when a place is free.
        for number, (at, wait) in enumerate(told):
            if at == 0.0:
                true = (number + 1) * queue_seconds
                assert true / 2 - 1.0 <= wait <= 2 * true + 1.0
        assert refused_again == 0


def test_nobody_gets_all_places():
    admission = ConcurrencyLimit(8, lambda: 0.5)
    with ExitStack() as stack:
        for _ in range(7):
            stack.enter_context(admission.hold("greedy"))
        with pytest.raises(MeshError) as refused, admission.hold("greedy"):
            pass
        assert (refused.value.status, refused.value.retry_after) == (429, 2.0)
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

    async with fake_upstream(script) as upstream, running_api(config=PATIENT) as host, running_api() as asking:
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
        assert api.server._handler._proxy.queue.waiting == 0


async def test_requests_that_wait_while_their_engine_is_replaced_are_answered_by_the_next_one():
    go_on = asyncio.Event()

    async def old(call: Call) -> None:
        await go_on.wait()
        await call.respond(b"old")

    async with (
        fake_upstream(old) as before,
        fake_upstream(lambda call: call.respond(b"new")) as after,
        running_api(default="tiny", config=PATIENT) as api,
        asyncio.TaskGroup() as group,
    ):
        first = msgspec.structs.replace(local(before.address), slots=1, term=1)
        api.routes.set(route("tiny", first))
        asked = [group.create_task(api.post(b'{"seed":%d}' % number)) for number in range(6)]
        asked.append(group.create_task(api.post(b'{"input":"x"}', "/v1/embeddings")))
        await api.traffic.until(lambda: len(api.traffic.begun) == 7)
        await before.until(lambda: len(before.calls) == 2)
        # It stops: what runs may end, and then the next one is loaded.
        loading = msgspec.structs.replace(first, status=ModelStatus.LOADING, address="")
        api.routes.set(route("tiny", loading, status=ModelStatus.LOADING))
        late = group.create_task(api.post(b'{"seed":99}'))
        go_on.set()
        await api.traffic.all_ended(7)
        assert not late.done()
        api.routes.set(route("tiny", msgspec.structs.replace(local(after.address), slots=1, term=2)))
        answers = [await one for one in (*asked, late)]
        assert [answer.status_code for answer in answers] == [200] * 8
        assert sorted(answer.text for answer in answers) == ["new"] * 6 + ["old"] * 2
        assert api.traffic.dead == []
