"""The three transports, and the life of the server."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from tests.support.api_harness import (
    ELSEWHERE,
    HERE,
    THERE,
    Api,
    FakeRoutes,
    FakeTraffic,
    local,
    peer_streams,
    remote,
    route,
    running_api,
    snapshot,
)
from tests.support.fake_upstream import Call, FakeUpstream, Script, echo, fake_upstream

from mesh_llm.api.server import ApiServer, StreamReply
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.runtime.asgi import AsgiServer, bind

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}"


async def test_a_taken_port_is_reported_with_what_to_do():
    async with running_api() as api:
        other = ApiServer(ApiConfig(port=api.port), FakeRoutes(snapshot()), FakeTraffic())
        with pytest.raises(MeshError) as caught:
            await other.start()
        assert caught.value.code == "port_in_use"
        assert "--port" in caught.value.hint
        await other.stop()


async def test_requests_end_before_the_server_stops():
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def script(call: Call) -> None:
        begun.set()
        await go_on.wait()
        await call.respond(b"done")

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        async with asyncio.TaskGroup() as group:
            asked = group.create_task(api.post())
            await begun.wait()
            stopped = group.create_task(api.server.stop(30.0))
            async with httpx.AsyncClient(verify=False, trust_env=False) as client:
                while not stopped.done():
                    try:
                        await client.get(api.url + "/health")
                    except httpx.ConnectError:
                        break
                    await asyncio.sleep(0)
            go_on.set()
        assert asked.result().content == b"done"
        assert len(api.traffic.ended) == 1


async def test_what_does_not_end_in_time_is_cut():
    left = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        await call.gone()
        left.set()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST)
        await reader.readuntil(b"data: 1")
        async with asyncio.timeout(20):
            await api.server.stop(0.1)
            await left.wait()
            with pytest.raises(asyncio.IncompleteReadError):
                await reader.readuntil(b"0\r\n\r\n")
        writer.close()
        assert len(api.traffic.ended) == 1


async def test_a_draining_server_accepts_nothing_new_on_open_connections():
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def script(call: Call) -> None:
        begun.set()
        await go_on.wait()
        await call.respond(b"done")

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST + POST)
        await begun.wait()
        async with asyncio.TaskGroup() as group:
            stopping = group.create_task(api.server.stop(30.0))
            stopping.get_loop().call_soon(go_on.set)
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200 ") == 1
        assert len(engine.calls) == 1
        writer.close()


async def test_stopping_twice_or_unstarted_is_fine():
    server = ApiServer(ApiConfig(port=0), FakeRoutes(snapshot()), FakeTraffic())
    await server.stop()
    async with running_api() as api:
        await api.server.stop()


PATH = "/v1/chat/completions"


@asynccontextmanager
async def second_door(
    script: Script = echo, config: ApiConfig | None = None
) -> AsyncGenerator[tuple[httpx.AsyncClient, Api, FakeUpstream]]:
    async with (
        fake_upstream(script) as engine,
        running_api([route("tiny", local(engine.address))], config=config) as api,
    ):
        listener = bind("127.0.0.1", 0, "--console")
        server = AsgiServer(api.server.trusted_app, listener, "test")
        await server.start()
        url = f"http://127.0.0.1:{server.port}"
        async with httpx.AsyncClient(base_url=url, verify=False, trust_env=False, timeout=30.0) as client:
            yield client, api, engine
        await server.stop(0.2)


@pytest.mark.parametrize(("option", "listen"), [("--port", "--listen"), ("--console", "--console-listen")])
def test_an_address_of_another_machine_says_which_option_sets_it(option: str, listen: str) -> None:
    with pytest.raises(MeshError) as caught:
        bind("203.0.113.1", 0, option)
    assert caught.value.code == "cannot_listen"
    assert f"{listen} ADDR" in caught.value.hint


async def test_a_request_for_an_upgrade_is_answered_there_too() -> None:
    """As Java's HttpClient sends it: its body is read, and the connection goes on."""
    h2c = b"\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n\r\n{}"
    async with second_door() as (client, _, engine):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        request = POST.replace(b"\r\n\r\n{}", h2c)
        writer.write(request + request + POST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        answer = await reader.read()
        assert answer.count(b"HTTP/1.1 200 ") == 3
        assert [call.body for call in engine.calls] == [b"{}"] * 3
        writer.close()


async def test_it_answers_as_the_api_does() -> None:
    async with second_door() as (client, api, _):
        body = b'{"model": "tiny"}'
        answer = await client.post(PATH, content=body)
        assert (answer.status_code, answer.content) == (200, body)
        assert answer.headers["x-mesh-llm-node"] == HERE
        assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
        missing = await client.post(PATH, content=b'{"model": "nothing"}')
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"
        assert (await client.get("/v1/nothing")).status_code == 404
        assert len(api.traffic.ended) == 1


async def test_keys_and_origins_are_not_asked_for_again() -> None:
    async with second_door(config=ApiConfig(port=0, keys=("secret",))) as (client, api, _):
        origin = {"origin": "http://localhost:3131"}
        answer = await client.post(PATH, content=b"{}", headers=origin)
        assert answer.status_code == 200
        assert "access-control-allow-origin" not in answer.headers
        assert (await api.client.post(PATH, content=b"{}", headers=origin)).status_code == 401


async def test_pieces_come_as_they_are_made() -> None:
    go_on = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        await go_on.wait()
        await call.event(b"2")
        await call.end_stream()

    async with second_door(script) as (client, _, _), client.stream("POST", PATH, content=b"{}") as answer:
        pieces = answer.aiter_raw()
        assert await anext(pieces) == b"data: 1\n\n"
        go_on.set()
        assert b"".join([piece async for piece in pieces]) == b"data: 2\n\n"


async def test_a_page_that_leaves_frees_the_slot() -> None:
    left = asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        await call.gone()
        left.set()

    async with second_door(script) as (client, api, _):
        async with client.stream("POST", PATH, content=b"{}") as answer:
            await anext(answer.aiter_raw())
        async with asyncio.timeout(10):
            await left.wait()
            await api.traffic.all_ended(1)


async def test_an_answer_broken_off_is_no_whole_answer() -> None:
    async def script(call: Call) -> None:
        await call.send(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n")
        await call.send(b"f4240\r\n%b\r\n" % (b"x" * 1_000_000))
        call.die()

    async with second_door(script) as (client, _, _):
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(PATH, content=b"{}")


async def test_a_body_that_is_too_large_is_refused() -> None:
    async with second_door(config=ApiConfig(port=0, body_bytes=1000)) as (client, _, engine):
        assert (await client.post(PATH, content=b" " * 2000)).status_code == 413
        assert engine.calls == []


HEAD = "{} {} HTTP/1.1\r\nhost: mesh\r\nx-mesh-llm-model: {}\r\ncontent-length: {}\r\n\r\n"


@asynccontextmanager
async def host(*, config: ApiConfig | None = None) -> AsyncGenerator[tuple[Api, FakeUpstream, str]]:
    """A node that serves `tiny`, knows `far` on another node, and loads `slow`; and where its peer streams end."""
    loading = route("slow", local("127.0.0.1:1", status=ModelStatus.LOADING), status=ModelStatus.LOADING)
    async with (
        fake_upstream() as engine,
        running_api(
            [route("tiny", local(engine.address)), route("far", remote(ELSEWHERE)), loading], config=config
        ) as api,
        peer_streams(api.server, THERE) as address,
    ):
        yield api, engine, address


async def ask(address: str, data: bytes) -> bytes:
    name, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(name, int(port))
    writer.write(data)
    answer = await reader.read()
    writer.close()
    return answer


def request(
    model: str = "tiny", body: bytes = b"{}", path: str = "/v1/chat/completions", method: str = "POST"
) -> bytes:
    return HEAD.format(method, path, model, len(body)).encode() + body


async def test_a_peers_request_is_answered_by_the_local_engine():
    async with host() as (api, engine, address):
        answer = await ask(address, request(body=b'{"model":"whatever"}'))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 20\r\n")
        assert answer.endswith(b'\r\n\r\n{"model":"whatever"}')
        assert b"x-mesh-llm-node: " + HERE.encode() in answer
        assert len(engine.calls) == 1
        assert api.traffic.asked == []
        metrics = (await api.get("/metrics")).text
        assert 'via="peer"' in metrics


async def test_streams_are_chunked():
    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        await call.event(b"2")
        await call.end_stream()

    async with host() as (_, engine, address):
        engine.script = script
        head, _, body = (await ask(address, request())).partition(b"\r\n\r\n")
        assert b"transfer-encoding: chunked" in head
        assert body.replace(b"\r\n", b"|") in (
            b"9|data: 1\n\n|9|data: 2\n\n|0||",
            b"12|data: 1\n\ndata: 2\n\n|0||",
        )


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (request("far"), 404, b"model_not_here"),
        (request("nope"), 404, b"model_not_here"),
        (request("TINY"), 404, b"model_not_here"),
        (request("slow"), 503, b"model_loading"),
        (request(path="/v1/models", method="GET", body=b""), 404, b"not_found"),
        (request(path="/metrics", method="GET", body=b""), 404, b"not_found"),
        (request(path="/health", method="GET", body=b""), 404, b"not_found"),
        (request(method="DELETE"), 405, b"method_not_allowed"),
        (b"nonsense\r\n\r\n", 400, b"bad_request"),
        (b"GET http://evil.example/ HTTP/1.1\r\n\r\n", 400, b"bad_request"),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000, 400, b"bad_request"),
    ],
)
async def test_one_hop_and_models_only(data: bytes, status: int, code: bytes):
    async with host() as (api, engine, address):
        answer = await ask(address, data)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        assert b"x-mesh-llm-error: " + code in answer
        assert engine.calls == []
        assert api.traffic.begun == []


async def test_without_a_resolved_name_the_body_decides():
    async with host() as (_, _engine, address):
        answer = await ask(address, b"POST /tokenize HTTP/1.1\r\ncontent-length: 14\r\n\r\n" + b'{"model":"ti"}')
        assert answer.startswith(b"HTTP/1.1 200 ")
        answer = await ask(address, b"POST /tokenize HTTP/1.1\r\ncontent-length: 15\r\n\r\n" + b'{"model":"far"}')
        assert answer.startswith(b"HTTP/1.1 503 ")


async def test_the_limit_in_flight_counts_peers_as_well():
    async with host(config=ApiConfig(port=0, max_in_flight=0)) as (_, _engine, address):
        answer = await ask(address, request())
        assert answer.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: " in answer


async def test_a_peer_that_leaves_frees_the_slot():
    left = asyncio.Event()

    async def script(call: Call) -> None:
        await call.gone()
        left.set()

    async with host() as (api, engine, address):
        engine.script = script
        name, _, port = address.partition(":")
        _, writer = await asyncio.open_connection(name, int(port))
        writer.write(request())
        await api.traffic.until(lambda: bool(api.traffic.begun))
        writer.transport.abort()
        async with asyncio.timeout(20):
            await left.wait()
            await api.traffic.all_ended(1)


async def test_a_lost_engine_cuts_the_stream_so_that_the_peer_can_resume_elsewhere():
    async def script(call: Call) -> None:
        await call.begin_stream()
        await call.event(b"1")
        call.die()

    async with host() as (_, engine, address):
        engine.script = script
        answer = await ask(address, request())
        assert b"data: 1" in answer
        assert not answer.endswith(b"0\r\n\r\n")
        assert b"error" not in answer


async def test_a_large_body_in_chunks():
    body = b'{"x":"%b"}' % (b"a" * 500_000)
    pieces = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[i : i + 9999] for i in range(0, len(body), 9999)))
    head = b"POST /v1/completions HTTP/1.1\r\nx-mesh-llm-model: tiny\r\ntransfer-encoding: chunked\r\n\r\n"
    async with host() as (_, engine, address):
        answer = await ask(address, head + pieces + b"0\r\n\r\n")
        assert answer.endswith(body)
        assert engine.calls[0].body == body


async def test_slow_and_broken_off_requests_end():
    async with host(config=ApiConfig(port=0, head_seconds=0.1, body_seconds=0.1)) as (_, engine, address):
        assert await ask(address, b"POST /v1/compl") == b""
        answer = await ask(address, request()[:-1])
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert engine.calls == []


class BrokenStream:
    """A stream whose other side is gone."""

    def __init__(self) -> None:
        self.aborted = 0

    async def read(self, limit: int) -> bytes:
        raise ConnectionResetError

    async def write(self, data: bytes) -> None:
        raise ConnectionResetError

    async def finish(self, data: bytes = b"") -> None:
        raise ConnectionResetError

    def watch(self, gone: Callable[[], None]) -> None: ...

    def unwatch(self) -> None: ...

    def abort(self) -> None:
        self.aborted += 1


async def test_a_reset_before_the_request_is_no_error():
    async with host() as (api, _, _address):
        stream = BrokenStream()
        await api.server.serve_peer(stream, THERE)
        assert stream.aborted == 1


async def test_an_answer_that_is_aborted_is_not_finished():
    stream = BrokenStream()
    reply = StreamReply(stream)
    await reply.start(200, [])
    reply.abort()
    reply.abort()
    assert stream.aborted == 1
