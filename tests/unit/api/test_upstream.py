"""Connections to engines, and the watchdog: slow is not dead, and dead is not slow."""

import asyncio

import msgspec
import pytest
from tests.support.api_harness import ELSEWHERE, THERE, FakeRoutes, local, remote, route, running_api, snapshot
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api import stream_watchdog
from mesh_llm.api.stream_watchdog import StreamWatchdog, WatchedStream
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.upstream import first_byte_seconds
from mesh_llm.core.routing.ranking import ModelRoute, Target
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import ByteStream, TransportSilentError
from mesh_llm.runtime.supervision import TaskScope


async def test_an_idle_connection_does_not_hold_what_others_wait_for():
    """An engine of one thread per connection, and one thread: it takes the second once the first has closed."""
    turn = asyncio.Lock()
    both = asyncio.Event()

    async def script(call: Call) -> None:
        async with turn:
            if len(engine.calls) == 1:
                await both.wait()
            await call.respond(b"done")
            if call is engine.calls[0]:
                await call.gone()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            first = group.create_task(api.post())
            second = group.create_task(api.post())
            await engine.until(lambda: len(engine.calls) == 2)
            both.set()
        assert (first.result().content, second.result().content) == (b"done", b"done")


async def test_idle_connections_are_closed_with_the_server():
    async with fake_upstream() as engine:
        async with running_api([route("tiny", local(engine.address))]) as api:
            await api.post()
            assert engine.open == 1
        async with asyncio.timeout(20):
            await engine.until(lambda: engine.open == 0)


async def test_a_request_of_which_a_node_heard_nothing_takes_its_other_transport_at_once():
    opened: list[ByteStream] = []
    silent = Stream(TransportSilentError("TCP stopped answering"))

    async with fake_upstream() as node, running_api([route("tiny", remote(THERE))]) as api:
        api.mesh.nodes[THERE] = node.address

        async def open_stream(target: Target) -> ByteStream:
            opened.append(await api.mesh.open_stream(target) if opened else silent)
            return opened[-1]

        api.server.use_mesh(open_stream)
        assert (await api.post()).status_code == 200
        assert (len(opened), len(node.calls), silent.cut) == (2, 1, True)
        # The node is not to blame: it may get the next request.
        assert not api.traffic.dead
        opened.clear()
        silent.failure = ConnectionResetError("the connection was lost")
        assert (await api.post()).status_code == 503
        assert [call.method for call in node.calls].count("POST") == 1
        assert len(api.traffic.dead) == 1


TINY = ModelName("tiny")


class Stream:
    def __init__(self, failure: ConnectionError | None = None) -> None:
        self.cut, self.failure = False, failure

    async def read(self, limit: int) -> bytes:
        if self.failure is not None:
            raise self.failure
        return b""

    async def write(self, data: bytes) -> None: ...

    async def finish(self) -> None: ...

    def abort(self) -> None:
        self.cut = True


def vigil(*routes: ModelRoute) -> StreamWatchdog:
    return StreamWatchdog(ApiConfig(chunk_seconds=60.0), FakeRoutes(snapshot(*routes)))


def watched(
    watch: StreamWatchdog, target: Target, *, begun: bool = True, waiting: bool = True
) -> tuple[WatchedStream, Stream]:
    stream = Stream()
    one = watch.watch(stream, target, TINY)
    one.waiting, one.begun = waiting, begun
    return one, stream


def passes(watch: StreamWatchdog, seconds: int) -> None:
    for _ in range(seconds):
        watch.check(1.0)


def test_silence_in_the_middle_has_a_limit_and_pieces_begin_it_anew():
    watch = vigil(route("tiny", local("127.0.0.1:1")))
    one, stream = watched(watch, local("127.0.0.1:1"))
    passes(watch, 59)
    one.quiet = 0.0
    passes(watch, 59)
    assert not stream.cut
    passes(watch, 2)
    assert stream.cut
    assert one.reason == "nothing came for 60 s in the middle of its answer"


def test_before_the_first_byte_and_while_nobody_reads_silence_means_nothing():
    watch = vigil(route("tiny", local("127.0.0.1:1")))
    _, thinking = watched(watch, local("127.0.0.1:1"), begun=False)
    _, unread = watched(watch, local("127.0.0.1:1"), waiting=False)
    passes(watch, 1000)
    assert not thinking.cut
    assert not unread.cut


@pytest.mark.parametrize(
    ("routes", "kept_until", "cut_at"),
    [
        ([route("tiny", remote(ELSEWHERE))], 2, 3),
        ([route("tiny")], 7, 8),
        ([], 7, 8),
        # Not lost, but silent: for longer than its own door waits (`node_seconds`).
        ([route("tiny", remote(THERE))], 74, 76),
        ([route("tiny", status=ModelStatus.STOPPING)], 7, 8),
    ],
)
def test_a_silent_node_that_the_mesh_has_lost_is_left(routes: list[ModelRoute], kept_until: int, cut_at: int):
    watch = vigil(*routes)
    one, stream = watched(watch, remote(THERE))
    passes(watch, kept_until)
    assert not stream.cut
    passes(watch, cut_at - kept_until)
    assert stream.cut
    assert one.reason


@pytest.mark.parametrize(
    "routes",
    [
        # Another request failed there: it is no target for a while, and another host is.
        [route("tiny", remote(ELSEWHERE))],
        # It drains, alone or not.
        [route("tiny", status=ModelStatus.STOPPING)],
        [],
    ],
)
def test_a_silent_node_that_is_no_target_for_a_while_but_alive_is_waited_for(routes: list[ModelRoute]):
    known = FakeRoutes(snapshot())
    known.set(*routes, also_alive=[THERE])
    watch = StreamWatchdog(ApiConfig(chunk_seconds=60.0), known)
    _, reading = watched(watch, remote(THERE))
    _, waiting = watched(watch, remote(THERE), begun=False)
    passes(watch, 59)
    assert not reading.cut
    passes(watch, 1000)
    assert not waiting.cut
    known.set(*routes)
    passes(watch, 1)
    assert waiting.cut


def test_what_is_forgotten_is_left_alone():
    watch = vigil()
    one, stream = watched(watch, remote(THERE))
    watch.forget(one)
    passes(watch, 1000)
    assert not stream.cut


def test_a_long_prompt_has_more_time():
    config = ApiConfig(first_byte_seconds=600.0, prompt_rate=200.0)
    assert first_byte_seconds(config, 0) == 600.0
    assert first_byte_seconds(config, 20_000) == 700.0
    assert first_byte_seconds(config, 60_000_000) == 3600.0


async def test_a_frozen_node_is_left_for_one_that_answers():
    begun = asyncio.Event()

    async def freezes(call: Call) -> None:
        await call.begin_stream()
        await call.event(b'{"id":"x","choices":[{"index":0,"delta":{"role":"assistant"}}]}')
        begun.set()
        await call.gone()

    async def answers(call: Call) -> None:
        await call.begin_stream()
        await call.event(b'{"id":"y","choices":[{"index":0,"delta":{"content":"here"},"finish_reason":"stop"}]}')
        await call.event(b"[DONE]")
        await call.end_stream()

    async with fake_upstream(freezes) as frozen, fake_upstream(answers) as other, running_api() as api:
        api.routes.set(route("tiny", remote(THERE), msgspec.structs.replace(remote(ELSEWHERE), load=0.9)))
        api.mesh.nodes = {THERE: frozen.address, ELSEWHERE: other.address}
        asking = asyncio.gather(api.post(b'{"model":"tiny","messages":[]}'))
        await begun.wait()
        api.routes.set(route("tiny", remote(ELSEWHERE)))
        async with asyncio.timeout(20):
            (answer,) = await asking
        assert b'"here"' in answer.content
        assert answer.content.endswith(b"data: [DONE]\n\n")
        assert b'"y"' not in answer.content


async def test_without_a_stream_nothing_is_checked_and_with_one_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stream_watchdog, "_WATCH_PERIOD", 0.01)
    checks: asyncio.Queue[float] = asyncio.Queue()

    def check(_: StreamWatchdog, passed: float) -> None:
        checks.put_nowait(passed)

    monkeypatch.setattr(StreamWatchdog, "check", check)
    watch = vigil(route("tiny", local("127.0.0.1:1")))
    async with TaskScope("watchdog") as scope, asyncio.timeout(20):
        scope.spawn(watch.run(), "run")
        await asyncio.sleep(0.1)
        assert checks.empty()
        one, _ = watched(watch, local("127.0.0.1:1"))
        await checks.get()
        await checks.get()
        watch.forget(one)
