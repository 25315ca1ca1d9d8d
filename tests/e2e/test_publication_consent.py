"""Before a mesh becomes public for the first time, its user is asked: on a terminal, and in the console."""

from pathlib import Path

from tests.support.discovery import SOON, listed, publishing
from tests.support.fixtures import StartNode
from tests.support.node import NodeOptions
from tests.support.nostr_relays import relays
from tests.support.pool import until
from tests.support.terminal import on_terminal

QUESTION = r"List this mesh\? \[y/N\]"


async def test_the_first_publish_asks_on_a_terminal_and_only_yes_lists(tmp_path: Path) -> None:
    home = tmp_path / "a"
    home.mkdir()
    async with relays() as (relay,):
        words = ["--publish", "--mesh-name", "Lab", "--nostr-relay", relay.url]
        options = NodeOptions(home, models=["tiny"], arguments=words, env=SOON)
        for answer in ("\r", "n\r", "y\r"):
            async with on_terminal(options.argv(), env=options.environment()) as terminal:
                await terminal.until(QUESTION)
                # The lines are wrapped for the terminal.
                shown = " ".join(terminal.text.split())
                assert f"This mesh becomes public. Anybody can read on {relay.url}: its name (Lab)" in shown
                assert not (home / "publication.json").exists()
                terminal.type(answer)
                if answer == "y\r":
                    await relay.until(listed(), "listed")
                else:
                    await terminal.until("The mesh is not listed")
                    await terminal.until("Ctrl-C stops this node")
                    assert await relay.contents() == []
                terminal.type("\x03")
                assert await terminal.ended() == 0
        # Remembered.
        async with on_terminal(options.argv(), env=options.environment()) as terminal:
            await relay.until(listed(), "listed")
            assert "This mesh becomes public" not in terminal.text
            terminal.type("\x03")
            assert await terminal.ended() == 0


async def test_without_a_terminal_it_is_refused_until_somebody_has_agreed(start_node: StartNode) -> None:
    async with relays() as (relay,):
        options = publishing([relay])
        asking = options | {"arguments": [word for word in options["arguments"] if word != "--yes"]}
        node = await start_node("a", models=["tiny"], ready=False, **asking)
        assert await node.process.ended(60.0) == 1
        assert "--publish makes this mesh public" in node.process.text
        assert "--publish --yes" in node.process.text
        assert not (node.home / "nostr.nsec").exists()
        agreed = await start_node("a", models=["tiny"], **options)
        assert "This mesh becomes public" in agreed.process.text
        await relay.until(listed(), "listed")
        await agreed.stop()
        again = await start_node("a", models=["tiny"], **asking)
        await relay.until(listed(), "listed")
        assert "This mesh becomes public" not in again.process.text


async def test_the_consoles_switch_needs_the_same_consent(start_node: StartNode) -> None:
    async with relays() as (relay,):
        node = await start_node("a", models=["tiny"], arguments=["--nostr-relay", relay.url], env=SOON)
        before = (await node.console.get("/api/publication")).expect().json()
        assert (before["on"], "This mesh becomes public" in before["consent"]) == (False, True)
        refused = await node.console.post("/api/publication", {"on": True})
        assert refused.status == 409
        assert refused.json()["error"]["code"] == "publication_not_agreed"
        assert await relay.contents() == []
        (await node.console.post("/api/publication", {"on": True, "agreed": True})).expect()
        await relay.until(listed(), "listed")
        await until(node, lambda status: status["listing"]["state"] == "listed", "listed")
        (await node.console.post("/api/publication", {"on": False})).expect()
        await relay.until(listed(0), "gone")
        on = (await node.console.post("/api/publication", {"on": True})).expect().json()
        assert on["consent"] == ""
        await relay.until(listed(), "listed again")
