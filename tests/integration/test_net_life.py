"""Connections over time: two dials at once, peers that die, restart, fall silent; idle connections; getting back in."""

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path

import msgspec
import pytest
from tests.integration.net_nodes import TIMEOUT, MeshNode, join, running

from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import (
    MessageReceived,
    PathChanged,
    PeerConnected,
    PeerLost,
    RejoinFailed,
    SendFailed,
    UserWarned,
)
from mesh_llm.core.types.gossip import Exchange, Ping
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import ByteStream
from mesh_llm.net.quic.connection import PathSample, PeerConnection
from mesh_llm.runtime.supervision import TaskScope

PATIENCE = 10 * TIMEOUT
"""An `accept_timeout` that a busy machine does not reach."""

CHILD = """
import asyncio, sys
from pathlib import Path
from tests.integration.net_nodes import MeshNode
from mesh_llm.core.types.events import PeerConnected

async def main():
    node = MeshNode(*sys.argv[2:], home=Path(sys.argv[1]))
    async def serve(stream, peer):
        await stream.read(100)
        await stream.write(b"hello")
        await stream.read(1)
    await node.net.start()
    node.net.serve_http(serve)
    report = await node.net.joiner.join()
    print("ready", node.net.node_id, report.admitted, *node.net.reachable().addresses, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Child:
    """A node in a process of its own, which can be killed."""

    def __init__(self, process: asyncio.subprocess.Process, node: NodeId, addresses: tuple[str, ...]) -> None:
        self.process, self.node, self.addresses = process, node, addresses

    @property
    def target(self) -> Target:
        return Target(node=self.node, local=False)

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


@contextlib.asynccontextmanager
async def child(home: Path, *tokens: str) -> AsyncGenerator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        str(home),
        *tokens,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path) + os.pathsep + "."},
    )
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            while not (line := await process.stdout.readline()).startswith(b"ready"):
                assert line, "the node did not start"
        _, node, _, *addresses = line.decode().split()
        yield Child(process, NodeId(node), tuple(addresses))
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def known(node: MeshNode, peer: Child) -> PeerConnection:
    """The connection to a peer that answers."""
    await node.seen(PeerConnected, lambda event: event.node == peer.node)
    assert await ask(node, peer.target) == b"hello"
    connection = node.net.connections.find(peer.node)
    assert connection is not None
    return connection


def give(connection: PeerConnection, seconds: float) -> None:
    """So long the peer has from now on to accept a stream."""
    connection._limits = msgspec.structs.replace(connection._limits, accept_timeout=seconds)


async def ask(node: MeshNode, target: Target) -> bytes:
    stream = await node.net.open_http(target)
    try:
        await stream.write(b"question")
        return await stream.read(100)
    finally:
        stream.abort()


async def test_two_dials_at_once_end_in_one_connection_that_both_use():
    founder = MeshNode()
    async with running(founder):
        nodes = [MeshNode(founder.net.invite_book.token()) for _ in range(2)]
        async with running(*nodes):
            await join(*nodes)
            one, two = (node.net for node in nodes)
            one.send(two.node_id, Ping(nonce=1), two.reachable().addresses)
            two.send(one.node_id, Ping(nonce=2), one.reachable().addresses)
            await nodes[1].seen(MessageReceived, lambda event: event.message == Ping(nonce=1))
            await nodes[0].seen(MessageReceived, lambda event: event.message == Ping(nonce=2))
            mine, theirs = one.connections.find(two.node_id), two.connections.find(one.node_id)
            assert mine is not None
            assert theirs is not None
            # Made by the same side, as both see it: the two ends of one connection.
            assert mine.dialed != theirs.dialed
            for nonce in range(10, 15):
                one.send(two.node_id, Ping(nonce=nonce))
                two.send(one.node_id, Ping(nonce=nonce))
            await nodes[1].seen(MessageReceived, lambda event: event.message == Ping(nonce=14))
            await nodes[0].seen(MessageReceived, lambda event: event.message == Ping(nonce=14))
            assert not [event for node in nodes for event in node.events if isinstance(event, PeerLost | SendFailed)]


async def test_many_dials_at_once_lose_no_message():
    founder = MeshNode()
    async with running(founder):
        for _ in range(5):
            nodes = [MeshNode(founder.net.invite_book.token()) for _ in range(3)]
            pairs = [(one, two) for one in nodes for two in nodes if one is not two]
            async with running(*nodes):
                await join(*nodes)
                for one, two in pairs:
                    one.net.send(two.net.node_id, Ping(nonce=1), two.net.reachable().addresses)
                for one, two in pairs:
                    # A message may be on its way over the connection that does not stay.
                    await two.seen(MessageReceived, lambda event, one=one: event.peer == one.net.node_id)
                assert not [e for node in nodes for e in node.events if isinstance(e, PeerLost | SendFailed)]


async def test_a_request_to_a_killed_peer_fails_within_the_accept_timeout(tmp_path: Path):
    node = MeshNode(accept_timeout=PATIENCE)
    async with running(node), child(tmp_path, node.net.invite_book.token()) as peer:
        give(await known(node, peer), 1.0)
        await peer.kill()
        began = time.perf_counter()
        with pytest.raises(ConnectionError, match="does not answer"):
            await ask(node, peer.target)
        # QUIC itself would notice after 30 s.
        assert time.perf_counter() - began < 15.0


async def test_a_frozen_peer_is_not_waited_for_and_thaws(tmp_path: Path):
    node = MeshNode(accept_timeout=PATIENCE)
    async with running(node), child(tmp_path, node.net.invite_book.token()) as peer:
        connection = await known(node, peer)
        give(connection, 1.0)
        peer.process.send_signal(signal.SIGSTOP)
        with pytest.raises(ConnectionError, match="does not answer"):
            await ask(node, peer.target)
        give(connection, PATIENCE)
        peer.process.send_signal(signal.SIGCONT)
        assert await ask(node, peer.target) == b"hello"


async def test_a_killed_and_restarted_peer_is_used_again_at_once(tmp_path: Path):
    # For so long it would wait on the connection to the killed one.
    node = MeshNode(accept_timeout=PATIENCE)
    async with running(node):
        async with child(tmp_path, node.net.invite_book.token()) as peer:
            first = await node.seen(PeerConnected)
            await peer.kill()
        node.events.clear()
        # No token: it comes back by its certificate and its last-known peers. Its old connection seems alive here.
        async with child(tmp_path, node.net.invite_book.token()) as again:
            assert again.node == first.node
            await node.seen(PeerConnected)
            async with asyncio.timeout(TIMEOUT):
                assert await ask(node, again.target) == b"hello"


async def test_a_peer_that_goes_in_good_order_is_seen_at_once():
    node = MeshNode()
    async with running(node):
        peer = MeshNode(node.net.invite_book.token())
        async with running(peer):
            await join(peer)
            peer.net.send(node.net.node_id, Ping(nonce=99))
        lost = await node.seen(PeerLost)
        assert lost.clean
        # The last word was delivered before the goodbye.
        assert any(isinstance(event, MessageReceived) and event.message == Ping(nonce=99) for event in node.events)


async def test_idle_connections_are_closed_where_there_are_many_and_made_again_when_needed():
    node = MeshNode(keep_open=0)
    async with running(node):
        peer = MeshNode(node.net.invite_book.token())
        async with running(peer):
            await join(peer)
            # The streams of probes and gossip last as long as the connection: they do not keep it open.
            for one, other in ((peer, node), (node, peer)):
                one.net.send(other.net.node_id, Ping(nonce=1))
                one.net.send(other.net.node_id, Exchange(entries=(one.announcement(),)))
                await other.seen(MessageReceived, lambda event: isinstance(event.message, Exchange))
            # From now on: a message that is on its way when its connection closes may be lost.
            connections = node.net.connections
            connections.limits = msgspec.structs.replace(connections.limits, idle_after=0.4)
            node.net._maintenance._limits = connections.limits
            lost = await peer.seen(PeerLost)
            connections.limits = msgspec.structs.replace(connections.limits, idle_after=30.0)
            assert (lost.reason, lost.clean) == ("idle", True)
            peer.events.clear()
            node.events.clear()
            peer.net.send(node.net.node_id, Ping(nonce=7))
            await node.seen(MessageReceived)
            assert [event for event in peer.events if isinstance(event, PeerConnected)]


async def test_connections_in_use_are_not_idle():
    node = MeshNode(keep_open=0)
    async with running(node):

        async def slow(stream: ByteStream, _peer: NodeId) -> None:
            await stream.read(100)
            # Longer than an idle connection would live.
            await node.seen(PeerLost, lambda event: event.node == other.net.node_id)
            await stream.write(b"at last")
            await stream.finish()

        node.net.serve_http(slow)
        peer, other = MeshNode(node.net.invite_book.token()), MeshNode(node.net.invite_book.token())
        async with running(peer, other):
            await join(peer)
            stream = await peer.net.open_http(Target(node=node.net.node_id, local=False))
            await stream.write(b"question")
            await join(other)
            # From now on: a connection that is idle while its node still joins would be closed under it.
            connections = node.net.connections
            connections.limits = msgspec.structs.replace(connections.limits, idle_after=0.2)
            node.net._maintenance._limits = connections.limits
            assert await stream.read(100) == b"at last"


async def test_passive_connections_close_when_unused():
    node = MeshNode(idle_client_after=0.3, idle_after=0.4)
    async with running(node):
        client = MeshNode(node.net.create_invite("client", 3600.0, None).token)
        async with running(client):
            await join(client)
            await client.seen(PeerLost)
        # The core of the serving node never heard of it.
        assert node.events == []


async def test_clients_leave_room_for_members():
    node = MeshNode(connections=4)
    async with running(node), contextlib.AsyncExitStack() as stack:
        # One invite, and as many keys as its holder likes.
        invite = node.net.create_invite("client", 3600.0, None).token
        clients = [MeshNode(invite, client=True) for _ in range(6)]
        for client in clients:
            await stack.enter_async_context(running(client))
            await client.net.joiner.join()
        member = MeshNode(node.net.invite_book.token())
        await stack.enter_async_context(running(member))
        await join(member)
        member.net.send(node.net.node_id, Ping(nonce=7), node.net.reachable().addresses)
        await node.seen(MessageReceived, lambda event: event.message == Ping(nonce=7))


async def test_messages_to_nobody_fail_and_back_off():
    node = MeshNode(dial_timeout=0.3, retry_base=3600.0)
    async with running(node):
        nobody = NodeId("1" * 64)
        node.net.send(nobody, Ping(nonce=1), ("127.0.0.1:9",))
        assert (await node.seen(SendFailed)).peer == nobody
        node.events.clear()
        node.net.send(nobody, Ping(nonce=2))
        failed = await node.seen(SendFailed)
        # Nobody was dialled a second time.
        assert "a moment ago" in failed.reason


async def test_nothing_is_kept_of_peers_that_were_never_reached():
    node = MeshNode(dial_timeout=0.2)
    async with running(node):
        names = [NodeId(f"{number:064x}") for number in range(1, 41)]

        def failures(name: NodeId) -> int:
            return sum(isinstance(event, SendFailed) and event.peer == name for event in node.events)

        for name in names:
            node.net.send(name, Ping(nonce=1), ("127.0.0.1:9",))
            node.net.send(name, Exchange())
        # A probe and an exchange each: two lanes a name.
        for name in names:
            await node.seen(SendFailed, lambda event, name=name: event.peer == name and failures(name) == 2)
        assert node.net.gossip.peers == ()


async def test_rejoin_reports_failure():
    founder = MeshNode()
    async with running(founder):
        peer = MeshNode(founder.net.invite_book.token(), dial_timeout=0.5)
        async with running(peer):
            await join(peer)
            where = KnownPeer(node=founder.net.node_id, addresses=founder.net.reachable().addresses)
            await founder.net.close()
            await peer.seen(PeerLost)
            peer.net.joiner.rejoin((where,))
            failed = await peer.seen(RejoinFailed)
            assert "reached" in failed.reason


async def test_rejoin_finds_a_last_known_peer(tmp_path: Path):
    founder = MeshNode(home=tmp_path / "founder")
    async with running(founder):
        third = MeshNode(founder.net.invite_book.token())
        async with running(third):
            await join(third)
            peer = MeshNode(founder.net.invite_book.token())
            async with running(peer):
                await join(peer)
                await founder.net.close()
                await peer.seen(PeerLost)
                peer.events.clear()
                known = KnownPeer(node=third.net.node_id, addresses=third.net.reachable().addresses)
                peer.net.joiner.rejoin((known,))
                connected = await peer.seen(PeerConnected)
                assert connected.node == third.net.node_id


async def test_ports_in_use_are_said():
    node = MeshNode()
    async with running(node):
        port = int(node.net.reachable().addresses[0].rpartition(":")[2])
        other = MeshNode(port=port)
        with pytest.raises(MeshError) as error:
            await other.net.start()
        assert error.value.code == "quic_port_unavailable"


async def test_a_copied_home_is_found_out_and_told_on_all_three_machines():
    third = MeshNode()
    async with running(third):
        one = MeshNode(third.net.invite_book.token())
        other = MeshNode(third.net.invite_book.token(), key=one.key)
        async with running(one, other):
            await join(one, other)

            async def lives(node: MeshNode) -> None:
                """As its core would, a node gossips with its peer all the time."""
                while True:
                    node.net.send(third.net.node_id, Exchange(), third.net.reachable().addresses)
                    await asyncio.sleep(0.1)

            async with TaskScope("lives") as scope:
                for node in (one, other):
                    scope.spawn(lives(node), "life")
                told = [await node.seen(UserWarned) for node in (third, one, other)]
        assert {event.code for event in told} == {"duplicate_identity"}
        assert all(event.serious and "MESH_LLM_HOME" in event.text for event in told)
        assert {event.about for event in told} == {one.net.node_id}
        # iroh may find the other family of the loopback interface the shorter way.
        assert len(set(re.findall(r"(?:127\.0\.0\.1|\[::1\]):\d+", told[0].text))) == 2


async def test_a_restarted_node_is_no_copy(tmp_path: Path):
    third = MeshNode()
    async with running(third):
        for _ in range(3):
            node = MeshNode(third.net.invite_book.token(), home=tmp_path)
            async with running(node):
                await join(node)
        assert not [event for event in third.events if isinstance(event, UserWarned)]


async def test_a_path_that_does_not_change_is_sampled_seldom_and_one_that_does_often(monkeypatch: pytest.MonkeyPatch):
    # Checked by hand: on its own it would be done between two lines of this test, or not.
    first = MeshNode(sample_period=60.0)
    async with running(first):
        second = MeshNode(first.net.create_invite("serve", 3600.0, None).token)
        async with running(second):
            await join(second)
            (connection,) = first.net.connections
            samples = 0

            def counted() -> PathSample:
                nonlocal samples
                samples += 1
                return PathSample(1.0, relayed=False)

            # The real one changes with this machine's other work.
            monkeypatch.setattr(connection, "sample", counted)
            maintenance = first.net._maintenance
            maintenance.check()
            samples = 0
            # As after a long time: what comes next is seldom, a change makes it often again.
            connection.steady_since -= 3600.0
            for _ in range(3):
                maintenance.check()
            assert samples <= 1
            assert connection.sample_at > time.monotonic()
            monkeypatch.setattr(connection, "sample", lambda: PathSample(900.0, relayed=True))
            connection.sample_at = 0.0
            maintenance.check()
            await first.seen(PathChanged, lambda event: event.relayed)
            assert connection.sample_at == 0.0
