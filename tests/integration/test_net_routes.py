"""Passive nodes: they fetch the routes, wait for changes, go elsewhere when theirs is lost, and leave no trace."""

import asyncio
from collections.abc import Callable

import pytest
from tests.integration.net_nodes import TIMEOUT, MeshNode, join, running

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.events import ClientsCounted, RoutesLearned
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.net import routes as routes_server
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.streams import PeerStream

NAME = ModelName("tiny")


def snapshot(version: int, *nodes: NodeId, here: NodeId) -> RoutingSnapshot:
    targets = tuple(
        Target(node=node, local=node == here, address="127.0.0.1:5001" if node == here else "") for node in nodes
    )
    route = ModelRoute(name=NAME, status=ModelStatus.WARM, targets=targets)
    return RoutingSnapshot(version=version, node=here, models={NAME: route})


def client_of(node: MeshNode) -> MeshNode:
    return MeshNode(node.net.create_invite("client", 3600.0, None).token, client=True)


def serves(*nodes: MeshNode) -> Callable[[RoutesLearned], bool]:
    wanted = {node.net.node_id for node in nodes}

    def matches(event: RoutesLearned) -> bool:
        route = event.snapshot.models.get(NAME)
        return route is not None and {target.node for target in route.targets} == wanted

    return matches


def when_waiting(node: MeshNode, count: int) -> asyncio.Event:
    """Set when so many clients wait for changes at once."""
    reached, server = asyncio.Event(), node.net.routes_server
    wait = server._wait

    async def counted(stream: PeerStream, seconds: float) -> None:
        if server.waiting >= count:
            reached.set()
        await wait(stream, seconds)

    server._wait = counted
    return reached


def when_lost(node: MeshNode, count: int) -> asyncio.Event:
    """Set when so many connections to a node have ended."""
    reached, events = asyncio.Event(), node.net._events
    lost = events.lost
    ended: list[str] = []

    def counted(connection: PeerConnection, reason: str, *, clean: bool) -> None:
        lost(connection, reason, clean=clean)
        ended.append(reason)
        if len(ended) == count:
            reached.set()

    events.lost = counted
    return reached


async def test_a_client_learns_the_routes_and_every_change():
    active, other = MeshNode(), MeshNode()
    async with running(active, other):
        here = active.net.node_id
        active.net.routes_server.update(snapshot(1, here, here=here))
        client = client_of(active)
        async with running(client):
            learned = await client.seen(RoutesLearned, serves(active))
            assert learned.source == here
            (target,) = learned.snapshot.models[NAME].targets
            assert (target.local, target.address) == (False, "")
            assert client.net.scope is not None
            active.net.routes_server.update(snapshot(2, here, other.net.node_id, here=here))
            changed = await client.seen(RoutesLearned, serves(active, other))
            assert changed.snapshot.version > learned.snapshot.version
            assert not [event for event in active.events if not isinstance(event, RoutesLearned | ClientsCounted)]


async def test_a_client_asks_the_target_itself():
    active = MeshNode()
    async with running(active):

        async def answer(stream: ByteStream, _peer: NodeId) -> None:
            await stream.write(b"answer to " + await stream.read(100))
            await stream.finish()

        active.net.serve_http(answer)
        active.net.routes_server.update(snapshot(1, active.net.node_id, here=active.net.node_id))
        client = client_of(active)
        async with running(client):
            learned = await client.seen(RoutesLearned)
            stream = await client.net.open_http(learned.snapshot.models[NAME].targets[0])
            await stream.write(b"x")
            assert await stream.read(100) == b"answer to x"


async def test_a_client_goes_to_another_node_when_its_own_is_lost():
    first = MeshNode()
    async with running(first):
        second = MeshNode(first.net.invite_book.token())
        async with running(second):
            await join(second)
            # The first knows where the second is from the second's own word.
            first.net.connections.addresses.learn(second.net.node_id, second.net.reachable().addresses)
            both = (first.net.node_id, second.net.node_id)
            for node in (first, second):
                node.net.routes_server.update(snapshot(1, *both, here=node.net.node_id))
            client = client_of(first)
            async with running(client):
                await client.seen(RoutesLearned, serves(first, second))
                await first.net.close()
                second.net.routes_server.update(snapshot(2, second.net.node_id, here=second.net.node_id))
                learned = await client.seen(RoutesLearned, serves(second))
                assert learned.source == second.net.node_id


async def test_refresh_asks_somebody_else_at_once():
    first = MeshNode()
    async with running(first):
        second = MeshNode(first.net.invite_book.token())
        async with running(second):
            await join(second)
            first.net.connections.addresses.learn(second.net.node_id, second.net.reachable().addresses)
            both = (first.net.node_id, second.net.node_id)
            first.net.routes_server.update(snapshot(1, *both, here=first.net.node_id))
            second.net.routes_server.update(snapshot(1, second.net.node_id, here=second.net.node_id))
            client = client_of(first)
            async with running(client):
                await client.seen(RoutesLearned, serves(first, second))
                client.net.routes_client.refresh()
                learned = await client.seen(RoutesLearned, serves(second))
                assert learned.source == second.net.node_id


async def test_nothing_is_kept_of_a_client_that_left():
    active = MeshNode()
    async with running(active):
        active.net.routes_server.update(snapshot(1, active.net.node_id, here=active.net.node_id))
        all_wait, all_gone = when_waiting(active, 3), when_lost(active, 3)
        async with running(*[client_of(active) for _ in range(3)]), asyncio.timeout(TIMEOUT):
            await all_wait.wait()
        async with asyncio.timeout(TIMEOUT):
            await all_gone.wait()
        assert active.net.routes_server.waiting == 0
        assert len(active.net.connections) == 0
        assert not active.net.streams._open
        assert active.net.gossip.peers == ()
        assert {type(event) for event in active.events} == {ClientsCounted}


async def test_more_clients_than_long_polls_are_told_to_come_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(routes_server, "MAX_LONG_POLLS", 1)
    active = MeshNode()
    async with running(active):
        active.net.routes_server.update(snapshot(1, active.net.node_id, here=active.net.node_id))
        one_waits = when_waiting(active, 1)
        clients = [client_of(active) for _ in range(3)]
        async with running(*clients):
            for client in clients:
                await client.seen(RoutesLearned)
            async with asyncio.timeout(TIMEOUT):
                await one_waits.wait()
            again = [await client.net.routes_client.fetch(active.net.node_id, 5.0) for client in clients[1:]]
            assert {reply.again for reply in again} == {routes_server.COME_BACK}
