"""What `--auto` does when the best mesh is none, and when the mesh that it found is gone."""

import asyncio
import time

from tests.integration.net_nodes import MeshNode, running
from tests.support.discovery import SOON, listed, moved, publishing, urls
from tests.support.fixtures import StartNode
from tests.support.nostr_relays import relays
from tests.support.pool import alive, chat, content, until, warm
from tests.support.postings import Poster


async def test_the_next_best_is_joined_where_the_best_is_out_of_reach_or_lets_nobody_in(start_node: StartNode) -> None:
    async with relays() as (relay,):
        node = await start_node("a", models=["tiny"], **publishing([relay], name="Real"))
        await relay.until(listed(), "listed")
        refusing = MeshNode()
        async with running(refusing):
            address = refusing.net.reachable().addresses[0]
            # Larger both, so that they come first; the one is not there, the other is of another mesh.
            gone, closed = Poster("Gone"), Poster("Closed", address, refusing.key)
            await relay.put(gone.event(gone.content(memory_bytes=10**15), life=600))
            await relay.put(closed.event(closed.content(memory_bytes=10**15), life=600))
            began = time.monotonic()
            client = await start_node("c", client=True, arguments=["--auto", *urls([relay])], env=SOON, ready=False)
            await client.ready(60.0)
            assert "joining Closed (9 nodes" in client.process.text
            assert "that mesh admits nobody; joining Real" in client.process.text
            assert "That mesh does not admit this node. " in client.process.text
            assert "failed" not in client.process.text
            assert "Gone" not in client.process.text
            assert content(await chat(client, "tiny"))
            assert (await client.status())["mesh_id"] == (await node.status())["mesh_id"]
            print(f"joined by the third listing after {time.monotonic() - began:.1f} s")


async def test_whoever_came_by_discovery_looks_there_again_when_left_alone(start_node: StartNode) -> None:
    async with relays() as (relay,):
        first = await start_node("a", models=["tiny"], **publishing([relay], name="First"))
        await relay.until(listed(), "listed")
        auto = {"arguments": ["--auto", *urls([relay])], "env": SOON}
        server = await start_node("s", models=["tiny"], **auto)
        client = await start_node("c", client=True, **auto)
        await until(client, warm("tiny", 2), "both hosts")
        other = await start_node("b", models=["tiny"], **publishing([relay], name="Other"))
        await relay.until(listed(2), "both listed")
        life = len(server.process.lines)
        await first.stop()
        await moved(server, life)
        await until(other, alive(1), "the server came over", timeout=90.0)
        assert (await server.status())["mesh_id"] == (await other.status())["mesh_id"]


async def test_a_client_finds_its_mesh_again_where_it_went(start_node: StartNode) -> None:
    async with relays() as (relay,):
        node = await start_node("a", models=["tiny"], **publishing([relay]))
        await relay.until(listed(), "listed")
        client = await start_node("c", client=True, arguments=["--auto", *urls([relay])], env=SOON)
        assert content(await chat(client, "tiny"))
        before = (await client.status())["mesh_id"]
        # It comes back under the same key, at another address that only its listing tells.
        await node.stop()
        await node.restart()
        await relay.until(listed(), "listed again")

        async with asyncio.timeout(90):
            while (await chat(client, "tiny")).status != 200:
                await until(client, lambda _: True, "there")
        assert (await client.status())["mesh_id"] == before


async def test_who_merges_and_is_not_admitted_is_back_in_its_own_mesh(start_node: StartNode) -> None:
    async with relays() as (relay,):
        refusing = MeshNode()
        async with running(refusing):
            closed = Poster("Closed", refusing.net.reachable().addresses[0], refusing.key)
            options = publishing([relay], "--merge", closed.mesh.mesh_id[:16])
            node = await start_node("a", models=["tiny"], **options)
            own = (await node.status())["mesh_id"]
            await relay.until(listed(), "listed")
            life = len(node.process.lines)
            await relay.put(closed.event(closed.content(), life=600))
            await node.process.line("joining Closed", 60.0, after=life)
            await node.process.line("That mesh does not admit this node. ", 60.0, after=life)
            await node.process.line("that mesh admits nobody; back to this node's own", 60.0, after=life)
            life = len(node.process.lines)
            await moved(node, life)
            assert (await node.status())["mesh_id"] == own
            assert content(await chat(node, "tiny"))
            await relay.until(lambda found: own in [c["mesh"] for c in found], "listed again")
            assert "joining Closed" not in "\n".join(node.process.lines[life:])
            # What it handles itself is no fault.
            assert "failed" not in node.process.text
