"""Meshes find each other over real Nostr relays, as their users would have it."""

import asyncio
import shutil
from pathlib import Path

from tests.support.discovery import SOON, discover, listed, publishing, serving, urls
from tests.support.fixtures import StartNode
from tests.support.nostr_relays import relays
from tests.support.pool import alive, chat, content, until, warm


async def test_a_mesh_is_published_found_replaced_and_deleted_with_one_relay_dying(
    start_node: StartNode, tmp_path: Path
) -> None:
    async with relays(2) as (first, second):
        node = await start_node("a", models=["tiny"], **publishing([first, second], "--region", "AU"))
        for relay in (first, second):
            (content_there,) = await relay.until(serving("tiny"), "listed")
            assert (content_there["name"], content_there["region"], content_there["scope"]) == (
                "Sydney Lab",
                "AU",
                "serve",
            )
        assert "This mesh becomes public" in node.process.text
        assert (tmp_path / "a" / "nostr.nsec").stat().st_mode & 0o777 == 0o600

        for words, found in (
            ((), True),
            (("--model", "TIN"), True),
            (("--model", "glm"), False),
            (("--region", "au"), True),
            (("--region", "EU"), False),
            (("--min-vram", "0.001"), True),
            (("--min-vram", "100000"), False),
            (("--scope", "split"), False),
        ):
            status, output = await discover(node, first, *words)
            assert (status, "Sydney Lab" in output) == ((0, True) if found else (4, False)), (words, output)
        status, token = await node.cli("discover", "--auto", "--relay", first.url, "--relay", "ws://127.0.0.1:9")
        assert status == 0
        assert token.strip().startswith("mesh2")
        assert len(token.split()) == 1
        status, output = await node.cli("discover", "--relay", "ws://127.0.0.1:9")
        assert (status, "No Nostr relay answered" in output) == (5, True)

        # Renewed and replaced where a relay lives, whatever became of the other.
        before = {event.id().to_hex() for event in await first.events()}
        await second.stop()
        (renewed,) = await first.until(lambda _: True, "there")
        assert renewed["name"] == "Sydney Lab"
        async with asyncio.timeout(30):
            while before & {event.id().to_hex() for event in await first.events()}:
                await until(node, lambda status: status["listing"]["state"] == "listed", "listed")
        assert await node.stop() == 0
        await first.until(listed(0), "deleted")


async def test_a_killed_publisher_is_followed_by_another_and_its_listing_expires(start_node: StartNode) -> None:
    async with relays() as (relay,):
        first = await start_node("a", models=["tiny"], **publishing([relay]))
        await relay.until(listed(), "listed")
        second = await start_node("b", join=[await first.invite()], **publishing([relay]))
        await until(second, alive(1), "seeing the other")
        await until(first, lambda status: status["listing"]["state"] == "listed", "still the publisher")
        await until(second, lambda status: status["listing"]["state"] == "resting", "resting")
        (one,) = await relay.until(
            lambda contents: [c.get("nodes") for c in contents] == [2], "one listing of two nodes"
        )
        killed = (await relay.events())[0].author().to_hex()
        await first.crash()
        await until(second, lambda status: status["listing"]["state"] == "listed", "taken over", timeout=60.0)
        await relay.until(
            lambda contents: [c["mesh"] for c in contents] == [one["mesh"]] and contents[0].get("nodes", 1) == 1,
            "only its own listing, the other's expired",
        )
        assert killed not in {event.author().to_hex() for event in await relay.events()}


async def test_the_cap_of_clients_delists_and_lists_again(start_node: StartNode) -> None:
    async with relays() as (relay,):
        node = await start_node("a", models=["tiny"], **publishing([relay], "--max-clients", "1"))
        await relay.until(listed(), "listed")
        client = await start_node("c", client=True, arguments=["--auto", *urls([relay])], env=SOON)
        assert content(await chat(client, "tiny"))
        await until(node, lambda status: status["listing"]["state"] == "full", "full")
        await relay.until(listed(0), "delisted")
        await client.stop()
        await until(node, lambda status: status["listing"]["state"] == "listed", "listed again", timeout=90.0)
        await relay.until(listed(), "listed again")


async def test_auto_starts_a_mesh_where_there_is_none_and_others_join_it_and_chat(start_node: StartNode) -> None:
    async with relays() as (relay,):
        arguments = ["--auto", *publishing([relay])["arguments"]]
        first = await start_node("a", models=["tiny"], arguments=arguments, env=SOON)
        assert "Starting a mesh of its own, and listing it" in first.process.text
        await relay.until(listed(), "listed")
        second = await start_node("b", models=["tiny"], arguments=arguments, env=SOON)
        assert "joining Sydney Lab (1 node" in second.process.text
        await until(first, alive(1), "one mesh")
        client = await start_node("c", client=True, arguments=["--auto", *urls([relay])], env=SOON)
        await until(client, warm("tiny", 2), "both hosts")
        assert content(await chat(client, "tiny"))
        mesh = {(await node.status())["mesh_id"] for node in (first, second)}
        assert len(mesh) == 1


async def test_a_new_key_takes_the_old_ones_place(start_node: StartNode, tmp_path: Path) -> None:
    async with relays() as (relay,):
        node = await start_node("a", models=["tiny"], **publishing([relay]))
        await relay.until(listed(), "listed")
        (old,) = [event.author().to_hex() for event in await relay.events()]
        status, output = await node.cli("rotate-key")
        assert status == 0, output
        await relay.until(listed(), "listed again")
        authors = [event.author().to_hex() for event in await relay.events()]
        assert len(authors) == 1
        assert authors != [old]
        await node.stop()
        await relay.until(listed(0), "gone")
        status, output = await node.cli("rotate-key", "--relay", relay.url)
        assert (status, "0 listings" in output) == (0, True), output
        status, output = await node.cli("rotate-key", "--relay", "ws://127.0.0.1:9")
        assert (status, "No relay answered" in output) == (5, True), output


async def test_two_meshes_of_one_name_stay_apart(start_node: StartNode) -> None:
    """Two strangers take the same name. The smaller mesh looked round for a larger one of its name, and went there."""
    async with relays() as (relay,):
        lone = await start_node("lone", models=["tiny"], **publishing([relay]))
        mesh, life = (await lone.status())["mesh_id"], len(lone.process.lines)
        other = await start_node("other", models=["tiny"], **publishing([relay], name="sydney lab"))
        third = await start_node("third", models=["tiny"], join=[await other.invite()], env=SOON)
        await until(third, alive(1), "a mesh of two")
        await relay.until(lambda found: sorted(c.get("nodes", 1) for c in found) == [1, 2], "both listed")
        # A node that looks round does so every second here: time for three renewals is time for eight looks.
        seen: set[str] = set()
        async with asyncio.timeout(60):
            while len(seen) < 4:
                seen |= {event.id().to_hex() for event in await relay.events() if mesh in event.content()}
        assert (await lone.status())["mesh_id"] == mesh
        assert not (await lone.status())["peers"]
        assert "Moving to" not in lone.process.text[life:]
        status, output = await discover(lone, relay)
        assert status == 0, output
        for one in (lone, other):
            assert (await one.status())["mesh_id"][:16] in output


async def test_merge_moves_a_lone_node_into_the_mesh_of_the_key(start_node: StartNode) -> None:
    async with relays() as (relay,):
        other = await start_node("other", models=["tiny"], **publishing([relay], name="Lab"))
        mesh = (await other.status())["mesh_id"]
        decoy = await start_node("decoy", models=["tiny"], **publishing([relay]))
        await relay.until(listed(2), "both listed")
        lone = await start_node("lone", models=["tiny"], **publishing([relay], "--merge", mesh[:16]))
        await until(other, alive(1), "the lone one came over", timeout=90.0)
        assert "because --merge says so" in lone.process.text
        await until(lone, warm("tiny", 2), "both hosts", timeout=60.0)
        assert (await lone.status())["mesh_id"] == mesh
        assert content(await chat(lone, "tiny"))
        assert not (await decoy.status())["peers"]
        await relay.until(listed(2), "its own listing is gone")


async def test_a_home_that_founds_another_mesh_leaves_no_ghost_of_the_first(
    start_node: StartNode, tmp_path: Path
) -> None:
    async with relays() as (relay,):
        # Two minutes of life, as for users: the ghost would outlive the test.
        options = publishing([relay]) | {"env": {"MESH_LLM_LISTING_PERIOD": "60"}}
        node = await start_node("a", models=["tiny"], **options)
        (before,) = await relay.until(listed(), "listed")
        await node.crash()
        shutil.rmtree(tmp_path / "a" / "mesh")
        await node.restart()
        (now,) = await relay.until(
            lambda found: len(found) == 1 and found[0]["mesh"] != before["mesh"], "only the new mesh"
        )
        assert (await node.status())["mesh_id"] == now["mesh"]
