"""A request is proxied to the best target, and its answer relayed."""

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import msgspec
import pytest
from tests.support.api_harness import (
    ELSEWHERE,
    HERE,
    THERE,
    Api,
    FakeEngines,
    local,
    peer_streams,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.request import PROMPT_AT_HEADER
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream, PromptElsewhere

CHAT = "/v1/chat/completions"


def request(body: bytes = b"{}", path: str = CHAT) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def read_chunk(reader: asyncio.StreamReader) -> bytes:
    size = int(await reader.readline(), 16)
    data = await reader.readexactly(size + 2)
    return data[:-2]


async def test_each_piece_is_passed_on_before_the_next_exists():
    step: asyncio.Queue[bytes] = asyncio.Queue()

    async def script(call: Call) -> None:
        await call.begin_stream()
        while piece := await step.get():
            await call.event(piece)
        await call.end_stream()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(request())
        step.put_nowait(b"0")
        head = await reader.readuntil(b"\r\n\r\n")
        assert b"content-type: text/event-stream\r\n" in head
        assert b"x-mesh-llm-node: " + HERE.encode() in head
        for number in range(5):
            assert await read_chunk(reader) == b"data: %d\n\n" % number
            step.put_nowait(b"%d" % (number + 1))
        await read_chunk(reader)
        step.put_nowait(b"")
        assert await reader.readline() == b"0\r\n"
        writer.close()


async def test_an_engines_own_errors_are_passed_on_in_the_shape_that_clients_know():
    async def script(call: Call) -> None:
        await call.respond(
            b'{"error":{"code":400,"message":"wrong","type":"invalid_request_error"}}',
            400,
            [(b"server", b"x"), (b"access-control-allow-origin", b"*"), (b"x-own", b"y")],
        )

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post()
        told = {"message": "wrong", "type": "invalid_request_error", "param": None, "code": "invalid_request_error"}
        assert (answer.status_code, answer.json()) == (400, {"error": told})
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-own"] == "y"
        assert not {"server", "access-control-allow-origin", "x-mesh-llm-error"} & set(answer.headers)
        assert api.traffic.ended == [("tiny", HERE, True, 0)]


async def test_the_connection_to_an_engine_is_used_again():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        for _ in range(5):
            assert (await api.post(b'{"a":1}')).content == b'{"a":1}'
        assert (engine.connections, len(engine.calls)) == (1, 5)


async def test_a_stale_connection_is_replaced_without_a_word():
    async def close_after(call: Call) -> None:
        await call.respond(b"one")
        call.reader.feed_eof()

    async def die_on_second(call: Call) -> None:
        if engine.connections == 1 and len(engine.calls) == 2:
            call.die()
        else:
            await call.respond(b"two")

    async with fake_upstream(close_after) as engine, running_api([route("tiny", local(engine.address))]) as api:
        assert (await api.post()).content == b"one"
        engine.script = die_on_second
        assert (await api.post()).content == b"two"
        assert api.traffic.dead == []


async def test_a_dead_engine_is_reported_and_answered_with_503():
    async def script(call: Call) -> None:
        call.die()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
        assert api.traffic.dead == [("tiny", HERE)]
        assert api.traffic.ended == [("tiny", HERE, False, 0)]


@pytest.mark.parametrize(
    "nonsense",
    [
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"x" * 100_000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n",
    ],
)
async def test_an_engine_that_talks_nonsense_counts_as_dead(nonsense: bytes):
    async def script(call: Call) -> None:
        await call.send(nonsense)
        call.writer.write_eof()
        await call.gone()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        assert (await api.post()).status_code == 503
        assert api.traffic.dead == [("tiny", HERE)]


async def test_a_silent_engine_is_given_up_at_its_deadline():
    async def script(call: Call) -> None:
        await call.gone()

    config = ApiConfig(port=0, first_byte_seconds=0.2)
    async with (
        fake_upstream(script) as engine,
        running_api([route("tiny", local(engine.address))], config=config) as api,
    ):
        answer = await api.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_stuck")
        assert len(engine.calls) == 1


async def lost_in_the_middle(call: Call) -> None:
    await call.begin_stream()
    await call.event(b'{"n":1}')
    call.die()


@pytest.mark.parametrize(
    ("path", "ending"),
    [
        (CHAT, b'data: {"error":{"message":"The node that was answering was lost'),
        ("/v1/messages", b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"'),
        ("/v1/responses", b'event: error\ndata: {"type":"error","code":"target_lost"'),
    ],
)
async def test_a_broken_stream_ends_with_an_error_in_its_apis_shape(path: str, ending: bytes):
    async with (
        fake_upstream(lost_in_the_middle) as engine,
        running_api([route("tiny", local(engine.address))]) as api,
    ):
        answer = await api.post(path=path)
        assert answer.status_code == 200
        first, rest = answer.content.split(b"\n\n", 1)
        assert first == b'data: {"n":1}'
        assert rest.startswith(ending)
        assert api.traffic.dead == [("tiny", HERE)]


async def test_half_an_event_or_body_is_never_passed_on():
    async def within_event(call: Call) -> None:
        await call.begin_stream()
        await call.send(b'f\r\ndata: {"half": \r\n')
        call.die()

    async def within_body(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
        call.die()

    async with fake_upstream(within_event) as engine, running_api([route("tiny", local(engine.address))]) as api:
        for script in (within_event, within_body):
            engine.script = script
            answer = await api.post()
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_unavailable")


async def test_a_large_body_that_breaks_off_is_cut_and_never_looks_complete():
    async def within_body(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\nContent-Length: 10000000\r\n\r\n" + b"x" * 9_000_000)
        call.die()

    async with fake_upstream(within_body) as engine, running_api([route("tiny", local(engine.address))]) as api:
        with pytest.raises(httpx.RemoteProtocolError):
            await api.post()


async def stream_for_ever(call: Call) -> None:
    await call.begin_stream()
    number = 0
    while not call.reader.at_eof():
        await call.event(b"%d" % number)
        number += 1
        await asyncio.sleep(0)


async def silent(call: Call) -> None:
    await call.gone()


@pytest.mark.parametrize("script", [stream_for_ever, silent])
async def test_a_client_that_leaves_frees_its_slot_at_once(script: object):
    left = asyncio.Event()

    async def watched(call: Call) -> None:
        try:
            await script(call)  # type: ignore[operator]
        finally:
            left.set()

    async with fake_upstream(watched) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(request())
        if script is stream_for_ever:
            await reader.readuntil(b"data: 3")
        else:
            await engine.until(lambda: bool(engine.calls))
        writer.transport.abort()
        async with asyncio.timeout(20):
            await left.wait()
            await api.traffic.all_ended(1)
        assert api.traffic.ended[0][2]
        assert api.traffic.dead == []
        assert api.server.summary().in_flight == 0


async def test_a_client_that_leaves_while_targets_are_tried():
    async with running_api() as api:
        reached = asyncio.Event()

        async def never(_target: Target) -> ByteStream:
            reached.set()
            await asyncio.Event().wait()
            raise AssertionError

        api.server.use_mesh(never)
        api.routes.current = snapshot(route("tiny", remote(THERE)), default="tiny")
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(request())
        await reached.wait()
        writer.transport.abort()
        async with asyncio.timeout(20):
            await api.traffic.all_ended(1)


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_of_a_split_model_say_how_its_activations_travel(stream: bool) -> None:
    async with fake_upstream() as engine:
        routes = [route("red", local(engine.address)), route("tiny", local(engine.address))]
        async with running_api(routes) as api:
            api.server.use_wire(lambda model: "f16 for prompts, f32 for tokens" if model == "red" else "")
            told = [
                (await api.post(json.dumps({"model": model, "stream": stream}).encode())).headers.get("x-mesh-llm-wire")
                for model in ("red", "tiny")
            ]
    assert told == ["f16 for prompts, f32 for tokens", None]


async def test_a_slow_client_slows_the_engine_and_nothing_is_gathered():
    sent = 0
    piece = b"x" * 65536

    async def flood(call: Call) -> None:
        nonlocal sent
        call.writer.transport.set_write_buffer_limits(high=65536)
        await call.begin_stream()
        for _ in range(1600):
            await call.event(piece)
            sent += len(piece)
        await call.end_stream()

    async with fake_upstream(flood) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port, limit=65536)
        writer.write(request())
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.2)
        assert sent < 32 * 1024 * 1024
        total = 0
        while total < 1600 * 65536:
            total += len(await reader.read(1 << 20))
        assert sent == 1600 * 65536
        writer.close()


async def test_two_hundred_streams_at_once():
    async def script(call: Call) -> None:
        await call.begin_stream()
        for number in range(20):
            await call.event(b"%b %d" % (call.body, number))
        everyone.discard(call.body)
        if not everyone:
            all_begun.set()
        await all_begun.wait()
        await call.end_stream()

    async def ask(api: Api, number: int) -> None:
        body = b'{"seed":%d}' % number
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(request(body))
        await reader.readuntil(b"\r\n\r\n")
        text = b""
        while (size := int(await reader.readline(), 16)) > 0:
            text += (await reader.readexactly(size + 2))[:-2]
        assert text == b"".join(b"data: %b %d\n\n" % (body, i) for i in range(20))
        writer.close()

    everyone = {b'{"seed":%d}' % number for number in range(200)}
    all_begun = asyncio.Event()
    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            for number in range(200):
                group.create_task(ask(api, number))
        assert len(api.traffic.ended) == 200
        assert api.server.summary().in_flight == 0


async def test_a_conversation_goes_back_to_the_node_that_knows_it():
    async def ask(api: Api, turns: int, who: str) -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": f"{who} {i} " * 50} for i in range(turns)]
        body = msgspec.json.encode({"model": "tiny", "messages": messages})
        return (await api.post(body)).headers["x-mesh-llm-node"]

    async with fake_upstream() as engine, running_api() as api:
        api.routes.current = snapshot(route("tiny", remote(THERE), remote(ELSEWHERE)), default="tiny")
        api.mesh.nodes = dict.fromkeys((THERE, ELSEWHERE), engine.address)
        homes: dict[str, str] = {}
        for turns in (1, 3, 5, 7):
            for who in map(str, range(12)):
                home = await ask(api, turns, who)
                assert homes.setdefault(who, home) == home
        assert len(set(homes.values())) == 2
        text = (await api.get("/metrics")).text
        assert 'mesh_llm_affinity_total{model="tiny",result="hit"} 36.0' in text
        assert 'mesh_llm_affinity_total{model="tiny",result="miss"} 12.0' in text


def long_prompt(turns: int = 1) -> bytes:
    messages = [{"role": ("user", "assistant")[i % 2], "content": f"{i} " * 1000} for i in range(turns)]
    return msgspec.json.encode({"model": "tiny", "messages": messages})


async def test_a_host_that_lacks_a_prompt_learns_who_got_it():
    """Also when the first one does not serve the model any more, but not of itself, nor of what a client claims."""
    seen: list[bytes | None] = []

    async def note(call: Call) -> None:
        seen.append(call.headers.get(PROMPT_AT_HEADER))
        await call.respond(b"{}")

    async with fake_upstream(note) as engine, running_api() as api:
        api.mesh.nodes = dict.fromkeys((THERE, ELSEWHERE), engine.address)
        api.routes.current = snapshot(route("tiny", remote(THERE)), default="tiny")
        for body in (long_prompt(), long_prompt(3)):
            (await api.post(body, x_mesh_llm_prompt_at=ELSEWHERE)).raise_for_status()
        moved = snapshot(route("tiny", remote(ELSEWHERE)), default="tiny")
        api.routes.current = msgspec.structs.replace(moved, alive=frozenset({THERE, ELSEWHERE}))
        (await api.post(long_prompt(5))).raise_for_status()
        (await api.post(long_prompt(7))).raise_for_status()
        # A node that is taken for dead is not asked.
        api.routes.current = snapshot(route("tiny", remote(HERE)), default="tiny")
        assert seen == [None, None, THERE.encode(), None]


@dataclass
class FakeCaches:
    """What a host is told of each prompt."""

    told: list[PromptElsewhere | None] = field(default_factory=list[PromptElsewhere | None])

    def keeps(self, model: str, term: int) -> bool:
        return bool(model) and term >= 0

    async def begin(
        self,
        model: str,
        term: int,
        engine: str,
        prompt: Sequence[Mark],
        elsewhere: PromptElsewhere | None = None,
        slot: int | None = None,
    ) -> Callable[[], None]:
        assert slot is None
        assert (model, term, bool(engine), len(prompt)) == ("tiny", 0, True, 1)
        self.told.append(elsewhere)
        return lambda: None


@pytest.mark.parametrize(
    ("header", "holder"),
    [(ELSEWHERE, ELSEWHERE), (THERE, None), ("c" * 63, None), ("C" * 64, None), ("\xe9" * 64, None), ("", None)],
)
async def test_a_host_asks_the_node_that_another_one_names(header: str, holder: str | None):
    caches = FakeCaches()
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address, node=THERE))]) as host,
        peer_streams(host.server, HERE) as address,
    ):
        host.server.use_engines(FakeEngines(), caches)
        reader, writer = await asyncio.open_connection(*address.rsplit(":", 1))
        body = long_prompt()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n"
        writer.write(head.encode() + PROMPT_AT_HEADER + b": " + header.encode("latin-1") + b"\r\n\r\n" + body)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
    expected = None if holder is None else PromptElsewhere(NodeId(holder), CHAT, body)
    assert caches.told == [expected]


async def test_the_metrics_count_prompt_caches_that_move():
    async with running_api() as api:
        api.server.watch_moves(lambda: (2, 3))
        text = (await api.get("/metrics")).text
    assert 'mesh_llm_prompt_caches_moved{direction="in"} 2.0' in text
    assert 'mesh_llm_prompt_caches_moved{direction="out"} 3.0' in text


class FakeGuessing:
    """A launch that guesses; what happened to it, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def active(self, model: str, term: int) -> bool:
        return (model, term) == ("tiny", 0)

    async def pause(self, model: str, term: int) -> Callable[[], None]:
        self.told.append(f"pause {model}#{term}")
        return lambda: self.told.append("resume")


@pytest.mark.parametrize(
    ("wanted", "paused"),
    [
        ('"logprobs":true', True),
        ('"logprobs": 5', True),
        ('"n_probs":1', True),
        ('"include":["message.output_text.logprobs"]', True),
        ('"lo\\u0067\\u0070robs":true', True),
        ('"n\\u005Fprobs":1', True),
        ('"include":["message.output_text\\u002elogprobs"]', True),
        ('"logprobs":false', False),
        ('"logprobs":null,"top_logprobs":0', False),
        ('"user":"\\"logprobs\\":true"', False),
        ('"user":"\\"lo\\u0067probs\\":true"', False),
    ],
)
async def test_an_engine_guesses_nothing_while_it_answers_with_log_probabilities(wanted: str, paused: bool):
    guessing = FakeGuessing()
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        api.server.use_engines(FakeEngines(), guessing=guessing)
        answer = await api.post(f'{{"model":"tiny",{wanted}}}'.encode())
        assert answer.status_code == 200
    assert guessing.told == (["pause tiny#0", "resume"] if paused else [])


async def test_through_two_nodes():
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address, node=THERE))]) as host,
        peer_streams(host.server, HERE) as address,
        running_api() as api,
    ):
        api.routes.current = snapshot(route("tiny", remote(THERE)), default="tiny")
        api.mesh.nodes = {THERE: address}
        answer = await api.post(b'{"model":"ti"}')
        assert (answer.content, answer.headers["x-mesh-llm-node"]) == (b'{"model":"ti"}', THERE)
        assert host.traffic.begun == [("tiny", THERE)]


async def test_the_next_target_answers_when_the_best_does_not():
    async def die(call: Call) -> None:
        call.die()

    async with fake_upstream(die) as dying, fake_upstream() as healthy, running_api() as api:
        targets = (remote(THERE), remote(ELSEWHERE))
        api.routes.current = snapshot(route("tiny", *targets), default="tiny")
        api.mesh.nodes = {THERE: dying.address, ELSEWHERE: healthy.address}
        for _ in range(8):
            answer = await api.post()
            assert answer.status_code == 200
            assert answer.headers["x-mesh-llm-node"] == ELSEWHERE
        assert ("tiny", THERE) in api.traffic.dead
        assert len(api.traffic.begun) == len(api.traffic.ended)


async def test_what_an_engine_says_of_itself_is_asked_of_this_nodes_own():
    async with fake_upstream() as own, fake_upstream() as other, running_api() as api:
        # By its load, the other one would be chosen.
        here = msgspec.structs.replace(local(own.address), load=1.0)
        api.routes.current = snapshot(route("tiny", remote(THERE), here), default="tiny")
        api.mesh.nodes = {THERE: other.address}
        for path in ("/slots", "/props?model=tiny"):
            assert (await api.client.get(path)).headers["x-mesh-llm-node"] == HERE
        assert (await api.post()).headers["x-mesh-llm-node"] == THERE
        assert (len(own.calls), len(other.calls)) == (2, 1)


async def test_an_unreachable_node_is_passed_over():
    async with fake_upstream() as healthy, running_api() as api:
        api.routes.current = snapshot(route("tiny", remote(THERE), remote(ELSEWHERE)), default="tiny")
        api.mesh.nodes = {ELSEWHERE: healthy.address}
        for _ in range(8):
            assert (await api.post()).headers["x-mesh-llm-node"] == ELSEWHERE
        assert set(api.traffic.dead) == {("tiny", THERE)}


@pytest.mark.parametrize(
    ("status", "headers", "tried_elsewhere"),
    [
        (503, [], True),
        (503, [(b"x-mesh-llm-error", b"model_loading")], True),
        (404, [(b"x-mesh-llm-error", b"model_not_here")], True),
        (429, [(b"x-mesh-llm-error", b"too_many_requests")], True),
        (404, [], False),
        (429, [], False),
        (500, [(b"x-mesh-llm-error", b"internal_error")], False),
        (400, [], False),
    ],
)
async def test_which_refusals_are_tried_elsewhere(
    status: int, headers: list[tuple[bytes, bytes]], tried_elsewhere: bool
):
    async def refuse(call: Call) -> None:
        await call.respond(b"no", status, headers)

    async with fake_upstream(refuse) as refusing, fake_upstream() as healthy, running_api() as api:
        busy_elsewhere = msgspec.structs.replace(remote(ELSEWHERE), load=0.9)
        api.routes.current = snapshot(route("tiny", remote(THERE), busy_elsewhere), default="tiny")
        api.mesh.nodes = {THERE: refusing.address, ELSEWHERE: healthy.address}
        answer = await api.post()
        assert len(refusing.calls) == 1
        assert len(healthy.calls) == tried_elsewhere
        assert answer.status_code == (200 if tried_elsewhere else status)
        assert api.traffic.dead == []


async def test_when_all_are_busy_the_shortest_wait_is_given():
    async def busy(call: Call) -> None:
        wait = b"7" if call.headers[b"host"] else b"9"
        await call.respond(b"", 429, [(b"x-mesh-llm-error", b"too_many_requests"), (b"retry-after", wait)])

    async with fake_upstream(busy) as one, running_api() as api:
        api.routes.current = snapshot(route("tiny", remote(THERE), remote(ELSEWHERE)), default="tiny")
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: one.address}
        answer = await api.post()
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert answer.headers["retry-after"] == "7"


async def test_no_more_targets_are_tried_than_allowed():
    async def die(call: Call) -> None:
        call.die()

    nodes = [remote(letter * 64) for letter in "defghijk"]  # type: ignore[arg-type]
    async with fake_upstream(die) as dying, running_api() as api:
        api.routes.current = snapshot(route("tiny", *nodes), default="tiny")
        api.mesh.nodes = {target.node: dying.address for target in nodes}
        assert (await api.post()).status_code == 503
        assert len(dying.calls) == 3
