"""Damaged requests to a running API: each connection ends, no request causes an internal error, none is smuggled."""

import asyncio
import random
import re

import pytest
from tests.support.api_harness import HERE, THERE, Api, local, peer_streams, route, running_api
from tests.support.fake_upstream import fake_upstream

from mesh_llm.api.types import ApiConfig

VALID = [
    b'POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 16\r\n\r\n{"model":"tiny"}',
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"GET /props?model=tiny HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    (
        b"OPTIONS /v1/messages HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\n"
        b"Access-Control-Request-Method: POST\r\n\r\n"
    ),
]
SPICE = [
    b"\r\n",
    b"\n",
    b"\0",
    b" ",
    b":",
    b"\r\n\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: identity\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n",
    b"GET /admin HTTP/1.1\r\n",
    b"\xff\xfe",
]
CONFIG = ApiConfig(port=0, head_seconds=0.3, body_seconds=0.3, keep_alive_seconds=1)


def damaged(chance: random.Random) -> bytes:
    """One or two valid requests with a few bytes changed, deleted, duplicated or inserted."""
    data = bytearray(b"".join(chance.choices(VALID, k=chance.randint(1, 2))))
    for _ in range(chance.randint(0, 4)):
        at = chance.randrange(len(data))
        match chance.randrange(4):
            case 0:
                data[at] = chance.randrange(256)
            case 1:
                del data[at : at + chance.randint(1, 20)]
            case 2:
                data[at:at] = chance.choice(SPICE)
            case _:
                data[at:at] = data[at : at + chance.randint(1, 60)]
        if not data:
            break
    return bytes(data)


async def send(address: str, data: bytes, cut: int) -> bytes:
    host, _, port = address.partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    answer = b""
    try:
        writer.write(data[:cut])
        await writer.drain()
        writer.write(data[cut:])
        async with asyncio.timeout(10):
            answer = await reader.read()
    except ConnectionError:
        pass
    writer.transport.abort()
    return answer


async def attack(api: Api, address: str, seed: int) -> None:
    chance = random.Random(seed)
    data = damaged(chance)
    answer = await send(address, data, chance.randrange(len(data) + 1))
    assert not answer or answer.startswith(b"HTTP/1.1 "), (seed, data, answer)
    statuses = {int(code) for code in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)}
    assert 500 not in statuses, (seed, data, answer)
    assert b"Traceback" not in answer


@pytest.mark.parametrize("sender", ["client", "peer"])
async def test_damaged_requests(sender: str) -> None:
    async with (
        fake_upstream() as engine,
        running_api([route("tiny", local(engine.address, node=HERE))], config=CONFIG) as api,
        peer_streams(api.server, THERE) as peers,
    ):
        address = peers if sender == "peer" else f"127.0.0.1:{api.port}"
        for start in range(0, 400, 50):
            async with asyncio.TaskGroup() as group:
                for seed in range(start, start + 50):
                    group.create_task(attack(api, address, seed))
        for call in engine.calls:
            assert (call.method, call.target.partition("?")[0]) in (
                ("POST", "/v1/chat/completions"),
                ("POST", "/v1/completions"),
                ("GET", "/props"),
            )
        assert engine.calls
        assert (await api.get("/v1/models")).status_code == 200
        assert api.server.summary().in_flight == 0
