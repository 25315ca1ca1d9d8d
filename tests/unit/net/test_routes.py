"""Many clients at one node, as streams without a network, and how they are counted."""

import asyncio
from typing import Any

import pytest
from tests.unit.net.members import Member

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.net import routes as routes_module
from mesh_llm.net.connection_manager import AddressBook
from mesh_llm.net.limits import COME_BACK, MAX_LONG_POLLS
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.net.routes import ClientCounter, RoutesServer
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.frames import LENGTH_BYTES
from mesh_llm.wire.mesh.routes import RoutesReply, RoutesRequest, RoutesUnchanged, RouteTable, decode_routes_reply

NAME = ModelName("tiny")
MEMBER = Member()


class Client:
    """A client's stream as the server sees it."""

    def __init__(self) -> None:
        self.written = b""
        self.left = asyncio.Event()

    async def read(self, _limit: int) -> bytes:
        await self.left.wait()
        raise ConnectionResetError("gone")

    async def write(self, data: bytes) -> None:
        self.written += data

    async def finish(self) -> None:
        return

    def reply(self) -> RoutesReply:
        reply = decode_routes_reply(self.written[LENGTH_BYTES:])
        assert not isinstance(reply, Malformed)
        return reply


def snapshot(version: int) -> RoutingSnapshot:
    target = Target(node=MEMBER.key.node_id, local=True, address="127.0.0.1:1")
    route = ModelRoute(name=NAME, status=ModelStatus.WARM, targets=(target,))
    return RoutingSnapshot(version=version, node=MEMBER.key.node_id, models={NAME: route})


def server() -> RoutesServer:
    made = RoutesServer(AddressBook(), MEMBER.key.node_id, lambda: Reachable(("10.0.0.1:4433",), ""))
    made.update(snapshot(1))
    return made


async def ask(routes: RoutesServer, client: Client, request: RoutesRequest) -> None:
    assert MEMBER.standing.certificate is not None
    peer = Peer(MEMBER.key.node_id, MEMBER.standing.certificate, "1.0", b"session1")
    stream: Any = client
    await routes.serve(stream, peer, encode(request))


async def test_the_whole_table_the_first_time_and_for_another_life():
    routes = server()
    for request in (RoutesRequest(), RoutesRequest(b"other", 1, 30.0)):
        client = Client()
        await ask(routes, client, request)
        table = client.reply()
        assert isinstance(table, RouteTable)
        assert (table.version, table.hosts[0].addresses) == (1, ("10.0.0.1:4433",))


async def test_a_thousand_clients_hold_nothing_but_their_open_requests(monkeypatch: pytest.MonkeyPatch):
    routes, encodings = server(), 0
    original = routes_module.table_of

    def counted(*arguments: Any) -> RouteTable:
        nonlocal encodings
        encodings += 1
        return original(*arguments)

    monkeypatch.setattr(routes_module, "table_of", counted)
    first = Client()
    await ask(routes, first, RoutesRequest())
    table = first.reply()
    assert isinstance(table, RouteTable)
    known = RoutesRequest(table.epoch, table.version, 30.0)
    state = set(vars(routes))
    clients = [Client() for _ in range(1000)]
    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        for client in clients:
            group.create_task(ask(routes, client, known))
        # One turn, in which all of them get as far as they get.
        await asyncio.sleep(0)
        assert routes.waiting == MAX_LONG_POLLS
        told = [client for client in clients if client.written]
        assert len(told) == 1000 - MAX_LONG_POLLS
        assert {client.reply() for client in told} == {RoutesUnchanged(COME_BACK)}
        # One of them leaves; then the table changes, and the rest are told, with one encoding for all.
        gone = next(client for client in clients if not client.written)
        gone.left.set()
        routes.update(snapshot(2))
    assert {reply.version for client in clients if isinstance(reply := client.reply(), RouteTable)} == {2}
    assert encodings == 2
    assert routes.waiting == 0
    assert set(vars(routes)) == state


async def test_nothing_known_yet():
    routes = RoutesServer(AddressBook(), MEMBER.key.node_id, lambda: Reachable((), ""))
    client = Client()
    await ask(routes, client, RoutesRequest())
    assert client.reply().again > 0


async def test_closing_lets_everybody_go():
    routes = server()
    first, waiting = Client(), Client()
    await ask(routes, first, RoutesRequest())
    table = first.reply()
    assert isinstance(table, RouteTable)
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(ask(routes, waiting, RoutesRequest(table.epoch, table.version, 30.0)))
        await asyncio.sleep(0)
        routes.close()
    assert isinstance(waiting.reply(), RoutesUnchanged)


def node(number: int) -> NodeId:
    return NodeId(f"{number:064x}")


class Counted:
    """What an audience told, and an event for each time."""

    def __init__(self) -> None:
        self.counts: list[int] = []
        self.told = asyncio.Event()

    def __call__(self, count: int) -> None:
        self.counts.append(count)
        self.told.set()


async def test_a_client_that_asks_again_and_again_counts_once() -> None:
    counted = Counted()
    there = ClientCounter(counted)
    for _ in range(3):
        with there.asking(node(1)), there.asking(node(1)):
            pass
    with there.asking(node(2)):
        assert len(there) == 2
    assert counted.counts == [1, 2]
    there.close()


async def test_whoever_stays_away_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "LINGER_SECONDS", 0.02)
    counted = Counted()
    there = ClientCounter(counted)
    with there.asking(node(1)):
        pass
    async with asyncio.timeout(20):
        while counted.counts != [1, 0]:
            counted.told.clear()
            await counted.told.wait()
    assert len(there) == 0


async def test_memory_does_not_grow_with_the_audience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes_module, "MAX_CLIENTS_COUNTED", 2)
    counted = Counted()
    there = ClientCounter(counted)
    for number in range(5):
        with there.asking(node(number)):
            pass
    assert len(there) == 2
    with there.asking(node(0)):
        assert len(there) == 2
    there.close()
    assert counted.counts == [1, 2]
