"""What one session may take up on a worker, whatever its host and the other workers send."""

import asyncio
import struct
from collections.abc import AsyncIterator

import numpy as np
import pytest
from tests.support.byte_pipe import End, Pipe, pair

from mesh_llm.core.types.ports import ByteStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.framing import ControlStream
from mesh_llm.split.worker import transfers as transfers_module
from mesh_llm.split.worker.session import SplitWorker, WorkerServices, WorkerSession
from mesh_llm.split.worker.transfers import READY
from mesh_llm.wire.codec import encode
from mesh_llm.wire.ggml_rpc.activations import Format, pack
from mesh_llm.wire.ggml_rpc.protocol import REPLY_SIZES, REQUEST_HEADER, V8, Command, hello_reply, reply
from mesh_llm.wire.ggml_rpc.tunnel import (
    KEY_BYTES,
    PUSH_HEADER,
    SESSION_BYTES,
    Ended,
    Open,
    Opened,
    Peer,
    TunnelStream,
    Undelivered,
    decode_to_host,
    push_header,
    push_tag,
)

KEY = b"k" * KEY_BYTES
ROOM = 64 << 10
PIECE = 16 << 10


class Server:
    """An rpc-server with one device, that answers what a session asks at its beginning."""

    def __init__(self) -> None:
        self.ending: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.address = ""
        self.reference = True

    async def start(self) -> asyncio.Server:
        listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{listening.sockets[0].getsockname()[1]}"
        return listening

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        answers = {Command.HELLO: hello_reply(V8), Command.DEVICE_COUNT: struct.pack("<I", 1)}
        while head := await reader.read(REQUEST_HEADER.size):
            command, size = REQUEST_HEADER.unpack(head)
            await reader.readexactly(size)
            writer.write(reply(answers.get(Command(command), bytes(REPLY_SIZES[Command(command)]))))
        writer.close()

    async def ended(self) -> str:
        return await asyncio.shield(self.ending)

    async def stop(self) -> None: ...


class Lab:
    """A session, and the host's end of its control stream."""

    def __init__(self, scope: TaskScope) -> None:
        self.scope = scope
        self.opened_pushes = 0

    async def start(self) -> None:
        server = Server()
        self.listening = await server.start()

        async def launch() -> Server:
            return server

        here, there = pair()
        self.control: ControlStream[object] = ControlStream(here, decode_to_host)
        services = WorkerServices(launch=launch, weights=None, open_push=self._open_push, limit=1 << 30)
        self.session = WorkerSession(there, services)
        self.life = self.scope.spawn(self.session.run(), "session")
        self.from_host = there.reads
        await self.control.send(Open(str(V8), KEY))
        assert isinstance(await self.control.receive(), Opened)

    async def _open_push(self, _address: str, _parameters: bytes) -> ByteStream:
        self.opened_pushes += 1
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def push(self, *counters: int) -> End:
        """Another worker's stream, with transfers on it as far as they are taken."""
        here, there = pair()
        self.scope.spawn(self.session.serve_push(there), "push")
        assert await here.read(1) == READY

        async def write() -> None:
            for counter in counters:
                tag = push_tag(KEY, counter, PIECE)
                await here.write(PUSH_HEADER.pack(counter, tag, PIECE))
                for _ in range(16):
                    await here.write(bytes(PIECE // 16))

        self.scope.spawn(write(), "writer")
        return here

    async def bring(self, *counters: int) -> None:
        """The host brings transfers itself, as far as they are taken."""

        async def send() -> None:
            for counter in counters:
                data = memoryview(bytes(PIECE))
                await self.control.send(Undelivered(0, counter, push_tag(KEY, counter, PIECE), data))

        self.scope.spawn(send(), "host")


@pytest.fixture
async def lab(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    monkeypatch.setattr(transfers_module, "MAX_BYTES", ROOM)
    scope = TaskScope("test")
    lab = Lab(scope)
    await lab.start()
    yield lab
    await scope.close()
    lab.listening.close()


async def still(*pipes: Pipe) -> int:
    """Wait until nothing more is read; the bytes that were."""
    before = -1
    while (now := sum(pipe.taken for pipe in pipes)) != before:
        before = now
        for _ in range(200):
            await asyncio.sleep(0)
    return before


async def test_what_the_host_brings_is_read_no_further_than_there_is_room(lab: Lab) -> None:
    before = lab.from_host.taken
    await lab.bring(*range(2, 100))
    taken = await still(lab.from_host) - before
    # One more is in the session's hand: nothing tells what it is before it was read.
    assert ROOM <= taken <= ROOM + 2 * PIECE
    assert not lab.life.done()


async def test_many_streams_of_other_workers_fill_no_more_than_the_room(lab: Lab) -> None:
    streams = [await lab.push(counter) for counter in range(2, 40)]
    taken = await still(*(stream.writes for stream in streams))
    # Each was read as far as its head. What is half there counts as well.
    assert taken <= ROOM + len(streams) * (PUSH_HEADER.size + 1)
    assert not lab.life.done()


async def test_transfers_that_have_begun_count_before_they_are_whole(lab: Lab) -> None:
    stalled: list[End] = []
    for counter in range(2, 40):
        here, there = pair()
        lab.scope.spawn(lab.session.serve_push(there), "push")
        assert await here.read(1) == READY
        await here.write(PUSH_HEADER.pack(counter, push_tag(KEY, counter, PIECE), PIECE))
        stalled.append(here)
    for here in stalled[:4]:
        await here.write(bytes(PIECE - 1))
    for here in stalled[4:]:
        lab.scope.spawn(here.write(bytes(PIECE - 1)), "writer")
    taken = await still(*(here.writes for here in stalled))
    assert taken <= ROOM + len(stalled) * PUSH_HEADER.size


async def test_a_stream_that_ends_within_a_transfer_gives_its_room_back(lab: Lab) -> None:
    ended: list[End] = []
    for counter in range(2, 6):
        here, there = pair()
        lab.scope.spawn(lab.session.serve_push(there), "push")
        assert await here.read(1) == READY
        await here.write(PUSH_HEADER.pack(counter, push_tag(KEY, counter, PIECE), PIECE))
        await here.write(bytes(100))
        ended.append(here)
    for here in ended:
        await here.finish()
    other = await lab.push(*range(10, 14))
    assert await still(other.writes) >= 4 * PIECE


@pytest.mark.parametrize("wanted", [Format.F32, Format.F16, Format.Q8])
async def test_a_transfer_is_kept_as_it_was_whatever_its_format(lab: Lab, wanted: Format) -> None:
    here, there = pair()
    lab.scope.spawn(lab.session.serve_push(there), "push")
    assert await here.read(1) == READY
    data = struct.pack("<64f", *range(64))
    kind, packed = pack(wanted, data)
    assert kind is wanted
    await here.write(push_header(1, push_tag(KEY, 1, len(data)), len(data), kind) + packed)
    inbox = lab.session._inbox
    assert inbox is not None
    got = np.frombuffer(await inbox.take(1, len(data), 5.0), dtype="<f4")
    assert np.abs(got - np.arange(64)).max() < 0.3


@pytest.mark.parametrize(
    "bad",
    [
        PUSH_HEADER.pack(1, push_tag(KEY, 1, 128), 128 | 9 << 56) + bytes(128),
        push_header(1, push_tag(KEY, 1, 100), 100, Format.Q8) + bytes(100),
        push_header(1, push_tag(KEY, 1, 128), 128, Format.F16) + b"\xff" * 64,
        push_header(1, push_tag(KEY, 1, 64), 128, Format.F16) + bytes(64),
        push_header(0, bytes(16), 128, Format.F16) + bytes(64),
    ],
)
async def test_what_no_worker_pushes_ends_its_stream_and_not_the_session(lab: Lab, bad: bytes) -> None:
    here, there = pair()
    serving = lab.scope.spawn(lab.session.serve_push(there), "push")
    assert await here.read(1) == READY
    await here.write(bad)
    await asyncio.wait_for(serving, 20.0)
    assert not lab.life.done()
    good = await lab.push(2)
    assert await still(good.writes) >= PIECE


async def test_a_host_names_no_more_peers_than_a_split_has(lab: Lab) -> None:
    for index in range(64):
        await lab.control.send(Peer(index, "w", bytes(SESSION_BYTES)))
    await still(lab.from_host)
    assert lab.opened_pushes == 64
    # The same one again while it is still being reached, which is one attempt more.
    await lab.control.send(Peer(3, "w", bytes(SESSION_BYTES)))
    ended = await lab.control.receive()
    assert isinstance(ended, Ended)
    assert "too many peers" in ended.message


@pytest.mark.parametrize("index", [-1, -1000, 64, 1 << 40])
async def test_a_peers_number_is_one_that_a_worker_of_a_split_can_have(lab: Lab, index: int) -> None:
    await lab.control.send(Peer(index, "w", bytes(SESSION_BYTES)))
    ended = await lab.control.receive()
    assert isinstance(ended, Ended)
    assert lab.opened_pushes == 0


async def test_only_so_many_streams_of_other_workers_are_taken(lab: Lab) -> None:
    for _ in range(128):
        await lab.push()
    here, there = pair()
    await lab.session.serve_push(there)
    assert here.reads.broken


class Lender:
    """A worker whose sessions all have the same rpc-server; `events` says what became of it, in order."""

    def __init__(self, scope: TaskScope) -> None:
        self._scope = scope
        self.worker = SplitWorker()
        self.server = Server()
        self.events: list[str] = []
        self.lives: list[asyncio.Task[object]] = []
        self.server.stop = self._stop

    async def open(self, session: bytes) -> ControlStream[object]:
        """A session's control stream on which the host has said Open."""

        async def open_push(_address: str, _parameters: bytes) -> ByteStream:
            raise ConnectionError

        here, there = pair()
        services = WorkerServices(launch=self._launch, weights=None, open_push=open_push, limit=1 << 30)
        control: ControlStream[object] = ControlStream(here, decode_to_host)
        purpose = encode(TunnelStream(session, control=True))
        self.lives.append(self._scope.spawn(self.worker.serve_rpc(there, purpose, services), "session"))
        self._scope.spawn(control.send(Open(str(V8), KEY)), "host")
        return control

    async def _launch(self) -> Server:
        self.events.append("launched")
        return self.server

    async def _stop(self) -> None:
        if self.events[-1] != "stopped":
            self.events.append("stopped")


async def test_sessions_of_one_host_follow_each_other_since_each_may_take_all_that_is_lent() -> None:
    scope = TaskScope("test")
    lender = Lender(scope)
    listening = await lender.server.start()
    hosts = [await lender.open(bytes([number]) * SESSION_BYTES) for number in range(8)]
    for host in hosts:
        assert isinstance(await host.receive(), Opened)
        assert lender.events[-1] == "launched"
        await host.finish()
    await asyncio.wait(lender.lives)
    assert lender.events == ["launched", "stopped"] * 8
    await scope.close()
    listening.close()


async def test_a_session_whose_turn_never_came_ends_with_its_streams() -> None:
    scope = TaskScope("test")
    lender = Lender(scope)
    listening = await lender.server.start()
    names = [bytes([number]) * SESSION_BYTES for number in range(2)]
    hosts = [await lender.open(name) for name in names]
    assert isinstance(await hosts[0].receive(), Opened)
    here, there = pair()
    tunnel = scope.spawn(lender.worker.serve_rpc(there, encode(TunnelStream(names[1])), UNUSED), "tunnel")
    await asyncio.sleep(0)
    await lender.worker.close()
    await asyncio.wait([tunnel])
    assert here.reads.broken
    assert lender.worker.sessions == 0
    assert lender.events == ["launched", "stopped"]
    await scope.close()
    listening.close()


async def _no_launch() -> Server:
    raise AssertionError


async def _no_push(_address: str, _parameters: bytes) -> ByteStream:
    raise AssertionError


UNUSED = WorkerServices(launch=_no_launch, weights=None, open_push=_no_push, limit=0)
"""What a stream that is no control stream brings along."""
