"""Admitted peers misuse streams: too many, too long, incomplete, of a wrong type, and RPC without being the host."""

import asyncio
import contextlib

import pytest
from tests.chaos.watch import grown, holding
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import alive, chat, content, until
from tests.support.rogue import Rogue, Treason, logged, refused, rogue

from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.tunnel import SplitStream
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType, encode_header, frame
from mesh_llm.wire.mesh.streams import CacheParameters, CacheQuestion

pytestmark = pytest.mark.timeout(240)

STREAMS = 400
REQUEST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
ALL_REFUSED = {"PROTOCOL", "UNKNOWN_TYPE", "WRONG_SCOPE", "BUSY", "TIMEOUT", "FAILED", "CANCELLED"}


async def headers(peer: Rogue) -> None:
    """No header, half of one, a too long one, and one of an unknown type."""
    half = encode_header(StreamType.HTTP)
    cases = {
        "TIMEOUT": [b"", half[:2], half[:5]],
        "PROTOCOL": [b"\xff\xff\xff\xff", frame(bytes(8000)), frame(b"")],
        "UNKNOWN_TYPE": [frame(b"\x92\xcc\xc8\xc4\x00")],
    }

    async def case(code: str, opening: bytes) -> None:
        assert await refused(await peer.raw(opening)) == code

    await asyncio.gather(*(case(code, opening) for code, openings in cases.items() for opening in openings))


async def wrong_scope(client: Rogue, server: Rogue) -> None:
    """A client may not gossip, nor ask for prompt caches; neither it nor a server may reach an RPC server."""
    for kind in (*(StreamType.GOSSIP, StreamType.PROBE, StreamType.RPC, StreamType.PUSH, StreamType.PROMPT_CACHE),):
        assert await refused(await client.typed(kind)) == "WRONG_SCOPE", kind
    for kind in (StreamType.RPC, StreamType.PUSH):
        assert await refused(await server.typed(kind)) == "WRONG_SCOPE", kind


async def rpc_of_no_host(peer: Rogue) -> None:
    """A member of scope split that was not elected: refused before a byte reaches an RPC server."""
    alloc = b"\x00" + (16).to_bytes(8, "little") + bytes(16)

    async def attempt(kind: StreamType, parameters: bytes) -> None:
        stream = await peer.typed(kind, parameters)
        with contextlib.suppress(ConnectionError):
            await stream.write(alloc * 100)
        assert await refused(stream) == "FAILED"

    await asyncio.gather(
        *(
            attempt(kind, parameters)
            for kind in (StreamType.RPC, StreamType.PUSH)
            for parameters in (
                encode(SplitStream("tiny", 1)),
                encode(SplitStream("tiny", 2**53, bytes(1024))),
                encode(SplitStream("x" * 256, 0)),
                b"",
                b"\xc1" * 500,
                b"\x93\xa4tiny\xff\xc4\x00",
            )
        )
    )


async def prompt_caches(peer: Rogue) -> None:
    """A member asks for the prompt caches of others: in no order, without a question, or of what it does not know."""
    proper = encode(CacheParameters(bytes(32), bytes(16)))
    for parameters in (b"", b"\xc1" * 500, proper[:-1], bytes(8000)):
        assert await refused(await peer.typed(StreamType.PROMPT_CACHE, parameters)) == "PROTOCOL"
    for question in (frame(b""), frame(b"\x92\x90\x90"), b"\x00\x01\x00\x01", frame(bytes(65_536))):
        stream = await peer.typed(StreamType.PROMPT_CACHE, proper)
        await stream.write(question)
        assert await refused(stream) == "PROTOCOL"
    answer = b""
    for _ in range(30):
        stream = await peer.typed(StreamType.PROMPT_CACHE, proper)
        await stream.write(frame(encode(CacheQuestion((bytes(16),), (bytes(16),)))))
        answer = await everything(stream)
        assert b"refused" in answer, answer[:100]
    assert b"too often" in answer


async def http(peer: Rogue) -> None:
    """Requests that are incomplete, endless, or not HTTP: each is refused on its own stream."""
    for request in (
        b"\x16\x03\x01\x02\x00\x01" * 20,
        b"GET / HTTP/9.9\r\n\r\n",
        REQUEST + b"Content-Length: -1\r\n\r\n",
        REQUEST + b"Content-Length: 99999999999\r\n\r\n",
        REQUEST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        REQUEST + b"X: " + b"y" * 200_000 + b"\r\n\r\n",
    ):
        stream = await peer.typed(StreamType.HTTP)
        await stream.write(request)
        answer = await everything(stream)
        assert not answer or answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), answer[:100]
    stream = await peer.typed(StreamType.HTTP)
    await stream.write(REQUEST + b'Content-Length: 1000\r\n\r\n{"model": "tiny"')
    await stream.finish()
    assert not (await everything(stream)).startswith(b"HTTP/1.1 2")


async def everything(stream: IrohStream) -> bytes:
    """Everything that arrives on an acknowledged stream until it ends."""
    received = b""
    async with asyncio.timeout(30):
        try:
            while chunk := await stream.read(65536):
                received += chunk
        except ConnectionError:
            pass
    return received[1:]


async def flood(node: NodeProcess, peer: Rogue) -> None:
    """Hundreds of silent streams and unfinished requests at once, while others send requests."""
    silent = await asyncio.gather(*(peer.raw(b"\x00") for _ in range(STREAMS // 4)))
    hanging = await asyncio.gather(*(peer.typed(StreamType.HTTP) for _ in range(STREAMS - len(silent))))
    await asyncio.gather(*(stream.write(REQUEST) for stream in hanging), return_exceptions=True)
    for _ in range(3):
        assert content(await chat(node, "tiny"))
    assert [await refused(stream) for stream in silent] == ["TIMEOUT"] * len(silent)
    for stream in hanging:
        stream.abort()


async def routes(peer: Rogue) -> None:
    """Malformed requests for the routing table, and more of them at once than allowed."""
    for parameters in (b"\xc1", b"\x93\xc4\x00\x00\xcd\xff\xff", bytes(8000)):
        assert await refused(await peer.typed(StreamType.ROUTES, parameters)) in ALL_REFUSED


async def test_misused_streams_are_reset_and_the_mesh_serves(start_node: StartNode) -> None:
    arguments = ["--log-level", "debug"]
    first = await start_node("a", models=["tiny"], arguments=arguments)
    second = await start_node("b", models=["tiny"], join=[await first.invite()], arguments=arguments)
    await until(first, alive(1), "with the second")
    treason = Treason(first.options.home)
    keys = {scope: SigningKey.generate() for scope in Scope}
    before = await holding(first)
    async with (
        rogue(first, keys[Scope.CLIENT]) as client,
        rogue(first, keys[Scope.SERVE]) as server,
        rogue(first, keys[Scope.SPLIT]) as splitter,
    ):
        for peer, scope in ((client, Scope.CLIENT), (server, Scope.SERVE), (splitter, Scope.SPLIT)):
            await peer.enter(treason.certificate(peer.key, scope))
        await asyncio.gather(
            headers(client),
            wrong_scope(client, server),
            rpc_of_no_host(splitter),
            http(client),
            routes(client),
            prompt_caches(server),
        )
        for node in (first, second):
            assert content(await chat(node, "tiny"))
        await flood(first, client)
        for node in (first, second):
            assert content(await chat(node, "tiny"))
    log = logged(first)
    for reason in ("no header", "malformed header", "unknown type", "wrong scope", "this node does not compute for it"):
        assert reason in log, reason
    assert "task failed" not in log
    assert not [name for name in (first.options.home / "logs").iterdir() if "worker" in name.name], "nothing was lent"
    async with asyncio.timeout(60):
        while grown(before, await holding(first), rss_mb=100.0):
            assert content(await chat(first, "tiny"))
