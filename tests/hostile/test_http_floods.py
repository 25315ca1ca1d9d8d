"""Hostile clients of a real node hold connections open, send bombs, and try forbidden paths. The node still serves.

One node gets all of it, as in a real attack. At the end it uses no more resources than before.
"""

import asyncio
import gzip
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.chaos.watch import holding
from tests.support.fixtures import StartNode
from tests.support.http import Connection
from tests.support.node import NodeProcess
from tests.support.pool import chat, content

pytestmark = pytest.mark.timeout(240)

SLOW = 300
MOST_GROWTH = 60_000_000
"""Bytes: what a node may come to hold by all of this together. One bomb unpacked would be a gigabyte."""


def bomb(compress: Callable[[bytes], bytes]) -> bytes:
    """A gigabyte of blanks, compressed twice if once is still too large."""
    packed = compress(b" " * 100_000_000)
    return packed * 10


async def refused(
    node: NodeProcess, path: str, headers: dict[str, str], body: bytes, status: int, port: str = "api"
) -> None:
    client = node.api if port == "api" else node.console
    answer = await client.request("POST", path, headers={"content-type": "application/json", **headers}, body=body)
    assert answer.status == status, (path, headers, answer.status, answer.text[:300])
    assert "error" in answer.json()


async def bombs(node: NodeProcess) -> None:
    """Decompression bombs, bodies nested without end, and too large bodies."""
    gzipped, deflated = bomb(lambda data: gzip.compress(data, 9)), bomb(zlib.compress)
    for coding, body in (("gzip", gzipped), ("deflate", deflated), ("br", gzipped), ("gzip, gzip", gzipped)):
        await refused(node, "/v1/chat/completions", {"content-encoding": coding}, body, 415)
    deep = b"[" * 2_000_000
    await refused(node, "/v1/chat/completions", {}, b'{"model": "random-small", "messages": ' + deep, 400)
    await refused(node, "/v1/chat/completions", {}, b'{"model": ' + b"9" * 1_000_000 + b"}", 400)
    await refused(node, "/api/load", {}, b'{"model": "' + b"a" * 10_000_000 + b'"}', 413, "console")
    for coding, body in (("gzip", gzipped[:50_000]), ("deflate", deflated[:50_000])):
        answer = await node.console.request(
            "POST", "/api/load", body=body, headers={"content-type": "application/json", "content-encoding": coding}
        )
        assert 400 <= answer.status < 500


async def slow_ones(node: NodeProcess) -> list[Connection]:
    """Connections with a request that never ends: half of them in the head, half in the body."""
    client = node.api
    connections = await asyncio.gather(*(client.connect() for _ in range(SLOW)))
    for number, connection in enumerate(connections):
        if number % 2:
            await connection.send_raw(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        else:
            await connection.send_raw(
                b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 6000\r\n\r\n{"
            )
    return connections


async def foreign_pages(node: NodeProcess) -> None:
    """Requests that a web page can make a browser send to the console: another host name, another origin."""
    port = node.console.port
    token = node.options.home / "control-token"
    with_token = {"x-mesh-llm-token": await asyncio.to_thread(token.read_text), "content-type": "application/json"}
    bare = {"content-type": "text/plain"}
    attacks = [
        ("GET", "/api/status", {"host": "evil.example"}, 403),
        ("GET", "/api/status", {"host": f"127.0.0.1.evil.example:{port}"}, 403),
        ("GET", "/", {"host": f"rebound.example:{port}"}, 403),
        ("GET", "/api/events", {"origin": "http://evil.example"}, 403),
        ("POST", "/api/stop", {"origin": "http://evil.example", **with_token}, 403),
        ("POST", "/api/stop", {"origin": "null", **with_token}, 403),
        ("POST", "/api/stop", {"origin": f"https://localhost:{port}", **with_token}, 403),
        ("POST", "/api/stop", bare, 401),
        ("POST", "/api/stop", {"x-mesh-llm-token": "0" * 43, "content-type": "application/json"}, 401),
        ("POST", "/api/load", bare, 401),
        ("GET", "/api/invites", {}, 401),
        ("GET", "/api/status", {}, 401),
        ("GET", "/api/events", {}, 401),
    ]
    for method, path, headers, status in attacks:
        connection = await node.console.connect()
        await connection.send(method, path, headers=headers, body=b"{}" if method == "POST" else b"")
        answer = await (await connection.receive(method)).read()
        await connection.close()
        assert answer.status == status, (method, path, headers, answer.status)
        assert "access-control-allow-origin" not in answer.headers
    answer = await node.api.request("POST", "/v1/chat/completions", json={}, headers={"host": "evil.example"})
    assert answer.status == 403


TRAVERSALS = [
    "/api/logs/..%2f..%2f..%2fetc%2fpasswd",
    "/api/logs/../key",
    "/api/logs/%2e%2e/control-token",
    "/api/logs/daemon.log%00",
    "/../control-token",
    "/assets/..%2f..%2fguard.py",
    "/..%5c..%5ckey",
    "//etc/passwd",
]


async def traversals(node: NodeProcess) -> None:
    """Paths that would lead outside the readable directories."""
    secret = (await asyncio.to_thread((node.options.home / "control-token").read_text)).strip()
    for path in TRAVERSALS:
        for client in (node.console, node.api):
            answer = await client.get(path)
            assert answer.status in {400, 403, 404, 405}, (path, answer.status)
            assert b"root:" not in answer.body
            assert secret.encode() not in answer.body
    for model in (
        "../../../etc/passwd",
        "/etc/passwd",
        "/dev/zero",
        "/proc/self/mem",
        "hf:../../x/y",
        "file:///etc/passwd",
    ):
        answer = await node.console.post("/api/load", {"model": model})
        assert 400 <= answer.status < 500, (model, answer.status)
        assert "root:" not in answer.text
        answer = await chat(node, model)
        assert answer.status == 404
    assert (await node.status())["models"][0]["status"] == "warm"


async def test_a_node_outlives_hostile_clients(start_node: StartNode, random_model: Callable[[str], Path]) -> None:
    node = await start_node("a", models=[random_model("small")])
    said = content(await chat(node, "random-small"))
    before = await holding(node)
    daemon = psutil.Process(node.process.pid)
    await bombs(node)
    assert daemon.memory_info().rss - before.rss_mb * 1e6 < MOST_GROWTH
    connections = await slow_ones(node)
    began = time.monotonic()
    assert content(await chat(node, "random-small")) == said
    print(f"\nmeasured: an answer beside {SLOW} slow clients: {time.monotonic() - began:.2f} s")
    assert daemon.memory_info().rss - before.rss_mb * 1e6 < MOST_GROWTH
    await foreign_pages(node)
    await traversals(node)
    # The server must close these connections; this side never does.
    ends = await asyncio.gather(*(connection.reader.read() for connection in connections))
    assert all(answer == b"" or answer.startswith(b"HTTP/1.1 408 ") for answer in ends)
    for connection in connections:
        await connection.close()
    assert content(await chat(node, "random-small")) == said
    after = await holding(node)
    assert after.descriptors <= before.descriptors + 8
    assert after.tasks <= before.tasks + 8
    assert (after.rss_mb - before.rss_mb) * 1e6 < MOST_GROWTH
    assert (await node.api.get("/metrics")).text.count("mesh_llm_refused_total{") >= 3
    log = await asyncio.to_thread((node.options.home / "logs" / "daemon.log").stat)
    assert log.st_size < 5_000_000
