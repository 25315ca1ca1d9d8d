"""Client connections: kept, pipelined, bounded in size and time, and watched."""

import asyncio
import re
import socket
import threading
from typing import cast

import pytest
import uvloop
from tests.support.api_harness import HERE, THERE, Api, local, peer_streams, remote, route, running_api
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api import protocol
from mesh_llm.api.types import ApiConfig

POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%b"
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
CLOSE = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


def statuses(answer: bytes) -> list[int]:
    return [int(code) for code in re.findall(rb"HTTP/1\.1 (\d+) ", answer)]


async def test_pipelined_requests_are_answered_in_order():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        requests = b"".join(POST % (11, b'{"n":"%03d"}' % number) for number in range(50))
        answer = await api.raw(requests + CLOSE)
        assert re.findall(rb'{"n":"(\d+)"}', answer) == [b"%03d" % number for number in range(50)]
        assert statuses(answer) == [200] * 51


async def test_a_client_that_leaves_is_noticed_behind_pipelined_requests():
    begun, left = asyncio.Event(), asyncio.Event()

    async def script(call: Call) -> None:
        await call.begin_stream()
        begun.set()
        try:
            while True:
                await call.event(b"x" * 1000)
                await asyncio.sleep(0)
        except ConnectionError:
            left.set()

    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST % (2, b"{}") + POST % (2, b"{}"))
        await begun.wait()
        await reader.readuntil(b"xxx")
        writer.transport.abort()
        async with asyncio.timeout(20):
            await left.wait()
        assert len(engine.calls) == 1


async def test_a_large_body_and_then_a_departure():
    """The body pauses reading; the departure must be seen all the same."""

    async def script(call: Call) -> None:
        await call.gone()
        left.set()

    left = asyncio.Event()
    async with fake_upstream(script) as engine, running_api([route("tiny", local(engine.address))]) as api:
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        body = b'{"x":"%b"}' % (b"a" * 300_000)
        writer.write(POST % (len(body), body))
        async with asyncio.timeout(20):
            await api.traffic.until(lambda: bool(api.traffic.begun))
        writer.transport.abort()
        async with asyncio.timeout(20):
            await left.wait()


async def test_a_client_that_leaves_before_its_body_is_whole():
    async with running_api([route("tiny", local("127.0.0.1:1"))]) as api:
        _, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST % (100, b"{"))
        await writer.drain()
        writer.transport.abort()
        assert (await api.get("/v1/models")).status_code == 200
        assert api.traffic.begun == []


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost : localhost\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n c\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 100_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", 431),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"CONNECT a:1 HTTP/1.1\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    ],
)
async def test_what_is_not_http_is_refused_in_our_shape(request_bytes: bytes, status: int):
    async with running_api() as api:
        answer = await api.raw(request_bytes)
        assert statuses(answer) == [status]
        assert b'{"error":{"message":' in answer
        assert b"connection: close\r\n" in answer
        assert (await api.get("/v1/models")).status_code == 200


async def test_a_bad_request_behind_a_good_one_does_not_disturb_its_answer():
    async with running_api() as api:
        answer = await api.raw(CLOSE.replace(b"Connection: close\r\n", b"") + b"nonsense\r\n\r\n")
        assert statuses(answer) in ([200], [200, 400], [])


async def test_a_slow_head_is_408():
    async with running_api(config=ApiConfig(port=0, head_seconds=0.1)) as api:
        assert statuses(await api.raw(b"GET / HTTP/1.1\r\nHost: loc")) == [408]
        assert statuses(await api.raw(GET + b"GET / HTT")) == [503, 408]
        assert await api.raw(b"") == b""


async def test_a_slow_body_is_408():
    config = ApiConfig(port=0, body_seconds=0.1)
    async with running_api([route("tiny", local("127.0.0.1:1"))], config=config) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST % (100, b"{"))
        head = await reader.readuntil(b"\r\n\r\n")
        assert statuses(head) == [408]
        # Nor is it waited for until an idle connection would be closed.
        async with asyncio.timeout(10):
            await reader.read()
        writer.close()


async def test_a_body_that_comes_fast_enough_may_take_long():
    config = ApiConfig(port=0, body_seconds=1.0, body_rate=50.0)
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))], config=config) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(POST % (122, b'{"x":"'))
        for _ in range(4):
            await asyncio.sleep(0.4)
            writer.write(b"a" * 28 + b"aa" * (_ == 3))
        writer.write(b'"}')
        assert statuses(await reader.readuntil(b"\r\n\r\n")) == [200]
        writer.close()


async def test_an_idle_connection_is_closed():
    async with running_api(config=ApiConfig(port=0, keep_alive_seconds=1)) as api:
        assert statuses(await api.raw(GET)) == [503]


async def test_one_connection_too_many_is_turned_away():
    async with running_api(config=ApiConfig(port=0, max_connections=2)) as api:
        open_connections = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(2)]
        for reader, writer in open_connections:
            writer.write(GET)
            await reader.readuntil(b"\r\n\r\n")
        assert statuses(await api.raw(b"")) == [503]
        for _, writer in open_connections:
            writer.close()
            await writer.wait_closed()


async def test_expect_continue():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        head = (POST % (2, b"")).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n")
        writer.write(head)
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"{}")
        assert statuses(await reader.readuntil(b"\r\n\r\n")) == [200]
        writer.close()


async def test_a_client_of_http_1_0():
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        request = (POST % (2, b"{}")).replace(b"HTTP/1.1", b"HTTP/1.0")
        answer = await api.raw(request)
        assert answer.endswith(b"{}")
        assert statuses(answer) == [200]


async def test_an_upgrade_is_not_taken_and_does_no_harm():
    async with running_api() as api:
        request = CLOSE.replace(b"close", b"Upgrade, close\r\nUpgrade: websocket")
        answer = await api.raw(request)
        assert statuses(answer) == [200]


H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk\r\n"
H2C_POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n" + H2C
BODY = b'{"prompt":"hello"}'
WITH_LENGTH = H2C_POST + b"Content-Length: %d\r\n\r\n" % len(BODY) + BODY
IN_CHUNKS = H2C_POST + b"Transfer-Encoding: chunked\r\n\r\n7\r\n%b\r\nb\r\n%b\r\n0\r\n\r\n" % (BODY[:7], BODY[7:])
WEBSOCKET = WITH_LENGTH.replace(H2C, b"Connection: Upgrade\r\nUpgrade: websocket\r\n")


@pytest.mark.parametrize("request_bytes", [WITH_LENGTH, IN_CHUNKS, WEBSOCKET], ids=["length", "chunked", "websocket"])
async def test_the_body_of_a_request_for_an_upgrade_is_read_and_the_connection_goes_on(request_bytes: bytes):
    """As Java's HttpClient sends it."""
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        answer = await api.raw(request_bytes * 2 + POST % (11, b'{"n":"000"}') + request_bytes + CLOSE)
        assert statuses(answer) == [200] * 5
        assert [call.body for call in engine.calls] == [BODY, BODY, b'{"n":"000"}', BODY]


@pytest.mark.parametrize("request_bytes", [WITH_LENGTH, IN_CHUNKS], ids=["length", "chunked"])
async def test_it_may_come_in_pieces(request_bytes: bytes):
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        for size in (1, 7, len(request_bytes) - 3):
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for begin in range(0, len(request_bytes), size):
                writer.write(request_bytes[begin : begin + size])
                await asyncio.sleep(0)
            head = await reader.readuntil(b"\r\n\r\n")
            assert statuses(head) == [200]
            assert await reader.readexactly(len(BODY)) == BODY
            writer.write(CLOSE)
            assert statuses(await reader.read()) == [200]
            writer.close()


async def test_the_head_of_a_request_for_an_upgrade_alone_starts_no_answer():
    """The body comes later: what came so far is not all of it."""
    async with fake_upstream() as engine, running_api([route("tiny", local(engine.address))]) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(WITH_LENGTH.removesuffix(BODY).replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY + CLOSE)
        assert statuses(await reader.read()) == [200, 200]
        assert [call.body for call in engine.calls] == [BODY]
        writer.close()


async def test_a_request_for_an_upgrade_reaches_another_node():
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address, node=THERE))]) as there,
        peer_streams(there.server, HERE) as address,
        running_api([route("tiny", remote())]) as api,
    ):
        api.mesh.nodes[THERE] = address
        assert statuses(await api.raw(WITH_LENGTH + IN_CHUNKS + CLOSE)) == [200] * 3
        assert [call.body for call in engine.calls] == [BODY, BODY]


async def test_limits_hold_for_requests_for_an_upgrade():
    config = ApiConfig(port=0, body_bytes=1_500_000)
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address))], config=config) as api,
        asyncio.timeout(20),
    ):
        assert statuses(await uploaded(api, H2C_POST + b"X: " + b"a" * 100_000 + b"\r\n\r\n", 1)) == [431]
        piece = b"%x\r\n%b\r\n" % (len(MEGABYTE), MEGABYTE)
        chunked = H2C_POST + b"Transfer-Encoding: chunked\r\n\r\n"
        assert statuses(await uploaded(api, chunked, 2, piece)) == [413]
        # No framing that another parser may read in another way.
        assert statuses(await api.raw(H2C_POST + b"Transfer-Encoding: gzip\r\n\r\n" + CLOSE)) in ([], [400])
        # The body does not count as a head.
        body = b'{"prompt":"%b"}' % (b"a" * 300_000)
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        expect = b"Content-Length: %d\r\nExpect: 100-continue\r\n\r\n" % len(body)
        writer.write(H2C_POST + expect)
        await reader.readuntil(b" 100 Continue\r\n\r\n")
        writer.write(body + CLOSE)
        assert statuses(await reader.read()) == [200, 200]
        assert [call.body for call in engine.calls] == [body]
        writer.close()


async def flood(api: Api, sent: list[int]) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    while True:
        writer.write(piece)
        await writer.drain()
        sent[0] += 65536


async def test_an_endless_body_is_cut_off():
    config = ApiConfig(port=0, body_bytes=100_000)
    async with running_api([route("tiny", local("127.0.0.1:1"))], config=config) as api:
        sent = [0]
        with pytest.raises(ConnectionError):
            await flood(api, sent)
        # What a client sends beyond an answer that it could read is dropped, up to a gigabyte.
        assert sent[0] < 1100 * 1024 * 1024


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n%b\r\n"
MEGABYTE = bytes(1024 * 1024)


async def uploaded(api: Api, head: bytes, pieces: int, piece: bytes = MEGABYTE) -> bytes:
    """Send all of a body before reading anything, as most clients do; a reset on the way is an error."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(head)
    for _ in range(pieces):
        writer.write(piece)
        await writer.drain()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    return answer


@pytest.mark.parametrize("extra", [b"", b"Connection: close\r\n"])
@pytest.mark.parametrize("megabytes", [1, 100])
async def test_a_body_over_the_limit_reads_413_and_no_reset(extra: bytes, megabytes: int):
    config = ApiConfig(port=0, body_bytes=100_000)
    head = HEAD % (b"Content-Length: %d\r\n%b" % (megabytes * len(MEGABYTE), extra))
    async with running_api([route("tiny", local("127.0.0.1:1"))], config=config) as api, asyncio.timeout(20):
        answer = await uploaded(api, head, megabytes)
        assert statuses(answer) == [413]
        assert b"body_too_large" in answer
        assert b"connection: close" in answer.lower()


async def test_nor_does_one_without_a_length():
    config = ApiConfig(port=0, body_bytes=100_000)
    head = HEAD % b"Transfer-Encoding: chunked\r\n"
    piece = b"%x\r\n%b\r\n" % (len(MEGABYTE), MEGABYTE)
    async with running_api([route("tiny", local("127.0.0.1:1"))], config=config) as api, asyncio.timeout(20):
        assert statuses(await uploaded(api, head, 80, piece)) == [413]


async def test_a_large_body_that_is_refused_for_another_reason_reads_why():
    head = HEAD % (b"Content-Length: %d\r\n" % (100 * len(MEGABYTE)))
    config = ApiConfig(port=0, keys=("secret",), body_bytes=2**30)
    async with running_api([route("tiny", local("127.0.0.1:1"))], config=config) as api, asyncio.timeout(20):
        assert statuses(await uploaded(api, head, 100))[:1] == [401]


async def test_a_head_that_is_too_large_reads_431():
    async with running_api() as api, asyncio.timeout(20):
        assert statuses(await uploaded(api, b"GET /health HTTP/1.1\r\nX: ", 8, b"a" * len(MEGABYTE))) == [431]


async def endless(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(MEGABYTE)
        await writer.drain()


async def test_who_goes_on_sending_for_ever_is_cut(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(protocol, "_LINGER_SECONDS", 0.2)
    head = HEAD % b"Content-Length: 100000000000\r\n"
    config = ApiConfig(port=0, body_bytes=100_000)
    async with running_api([route("tiny", local("127.0.0.1:1"))], config=config) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(head)
        async with asyncio.timeout(20):
            assert statuses(await reader.read()) == [413]
            with pytest.raises(ConnectionError):
                await endless(writer)
        monkeypatch.setattr(protocol, "_LINGER_SECONDS", 30.0)
        monkeypatch.setattr(protocol, "_MAX_LINGERING", 10_000_000)
        with pytest.raises(ConnectionError):
            await uploaded(api, head, 500)


@pytest.mark.parametrize("begun", [b"", b"GET /health HTTP/1.1\r\n"])
def test_a_head_that_came_while_the_node_was_busy_is_no_late_one(begun: bytes) -> None:
    """With uvloop, which the daemon uses, a timer can be due before its socket is looked at again."""

    async def ask() -> bytes:
        async with running_api(config=ApiConfig(port=0, head_seconds=1.0)) as api:
            loop = asyncio.get_running_loop()
            wakes, wake = socket.socketpair()
            with wakes, wake, socket.socket() as client:
                client.setblocking(False)
                await loop.sock_connect(client, ("127.0.0.1", api.port))
                client.send(begun)

                def busy() -> None:
                    loop.remove_reader(wakes)
                    client.send(GET[len(begun) :])
                    threading.Event().wait(1.0)

                loop.add_reader(wakes, busy)
                await asyncio.sleep(0.2)
                wake.send(b"!")
                return await loop.sock_recv(client, 4096)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert statuses(runner.run(ask())) == [503]


class Sent:
    """Stands for a client's connection: what each system call sends."""

    def __init__(self) -> None:
        self.calls: list[bytes] = []
        self.closed_after = -1

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def writelines(self, pieces: list[bytes]) -> None:
        self.calls.append(b"".join(pieces))

    def close(self) -> None:
        self.closed_after = len(self.calls)


async def test_a_head_is_sent_with_what_follows_it_and_alone_where_nothing_does():
    sent = Sent()
    outgoing = protocol._Outgoing(cast("asyncio.Transport", sent), asyncio.get_running_loop())

    def head() -> None:
        outgoing.keep_next(True)
        outgoing.write(b"head ")
        outgoing.keep_next(False)

    head()
    outgoing.write(b"first ")
    outgoing.write(b"second")
    assert sent.calls == [b"head first ", b"second"]
    await asyncio.sleep(0)
    head()
    assert len(sent.calls) == 2
    await asyncio.sleep(0)
    assert sent.calls[2:] == [b"head "]
    head()
    outgoing.close()
    assert (sent.calls[3:], sent.closed_after) == ([b"head "], 4)


@pytest.mark.parametrize("goes_on", [b"close", b"keep-alive"])
async def test_an_answer_without_a_body_has_its_head(goes_on: bytes):
    async with running_api() as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
        writer.write(b"HEAD / HTTP/1.1\r\nHost: localhost\r\nConnection: %b\r\n\r\n" % goes_on)
        async with asyncio.timeout(20):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 ")
        writer.close()
