"""Strangers that misuse a node are disconnected and refused, by key and by address; members at that address are not."""

import asyncio

import pytest
from tests.integration.net_nodes import MeshNode, join, running
from tests.integration.test_net_grants import joined

from mesh_llm.core.trust.strangers import CutOff
from mesh_llm.core.types.events import PeerLost
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import STRANGERS_PER_ADDRESS

HERE = "127.0.0.1"


def connected(node: MeshNode) -> set[NodeId]:
    return set(node.net.connections.nodes())


async def lost(node: MeshNode, other: MeshNode) -> str:
    event = await node.seen(PeerLost, lambda event: event.node == other.net.node_id)
    return event.reason


async def test_a_stranger_is_cut_off_by_its_key_and_by_its_address() -> None:
    founder = MeshNode()
    async with joined(founder, "serve") as (friend,):
        listed, _ = await founder.net.listing_invite("client", b"a" * 32)
        stranger, newcomer = MeshNode(listed, client=True), MeshNode(listed, client=True)
        async with running(stranger, newcomer):
            await join(stranger)
            assert founder.net.source_of(stranger.net.node_id) == HERE
            founder.net.cut_off(CutOff(who=stranger.net.node_id, source=False, seconds=300.0), "it sent too much")
            assert "it is cut off: it sent too much" in await lost(stranger, founder)
            ((ban, left),) = founder.net.connections.bans()
            assert (ban.who, ban.source) == (stranger.net.node_id, False)
            assert 290.0 < left <= 300.0
            with pytest.raises(ConnectionError, match="it is cut off"):
                await stranger.net.connections.get(founder.net.node_id)
            # Another key of this address is admitted, until the address is cut off.
            await join(newcomer)
            founder.net.cut_off(CutOff(who=HERE, source=True, seconds=300.0), "it sent too much")
            assert "it is cut off" in await lost(newcomer, founder)
            await founder.only_connected_to(friend)
            again = MeshNode(listed, client=True)
            async with running(again):
                # It hears why before or after it counts itself as connected: which, is a matter of timing.
                report = await again.net.joiner.join()
                told = await lost(again, founder) if report.admitted else report.problems[0].message
                assert "it is cut off" in told
                assert again.net.node_id not in connected(founder)
            # Invited by hand, from the same address.
            async with running(guest := MeshNode(founder.net.create_invite("client", 60.0, 1).token, client=True)):
                await join(guest)
                assert guest.net.node_id in connected(founder)


async def test_few_strangers_of_one_address_are_connected_at_once() -> None:
    founder = MeshNode()
    async with joined(founder, "serve") as (friend,):
        listed, _ = await founder.net.listing_invite("client", b"a" * 32)
        strangers = [MeshNode(listed, client=True) for _ in range(STRANGERS_PER_ADDRESS + 2)]
        async with running(*strangers):
            await asyncio.gather(*(stranger.net.joiner.join() for stranger in strangers))
            assert len(connected(founder)) <= 1 + STRANGERS_PER_ADDRESS
            assert friend.net.node_id in connected(founder)
