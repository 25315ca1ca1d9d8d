"""A published mesh with real nodes: what who came by the listing may use, and that others go before it."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.daemon_support import engines
from tests.support.discovery import SOON, listed, urls
from tests.support.fixtures import StartNode
from tests.support.nostr_relays import relays
from tests.support.pool import chat, content, named, streaming, until, warm

pytestmark = pytest.mark.timeout(300)

MODEL = "story"


async def test_a_stranger_waits_behind_the_owner_and_is_cut_at_its_quota(
    start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    story = named(random_model("small-slow"), MODEL, tmp_path / "m")
    disk = tmp_path / "disk"
    named(random_model("small"), "spare", disk)
    async with relays() as (relay,):
        words = ["--publish", "--yes", "--mesh-name", "Lab", "--parallel", "1", "--ctx-size", "1024"]
        words += ["--on-demand", "clients", "--stranger-limit", "tokens_per_day=600"]
        options = {"models": [story], "models_dir": disk, "arguments": [*words, *urls([relay])], "env": SOON}
        host = await start_node("host", **options)
        shown = " ".join(host.process.text.split())
        assert "may only send requests (--publish-scope client). With --publish-scope serve their machines" in shown
        await relay.until(listed(), "listed")
        assert (await relay.contents())[0]["scope"] == "client"
        stranger = await start_node("stranger", client=True, arguments=["--auto", *urls([relay])], env=SOON)
        friend = await start_node("friend", client=True, join=[await host.invite()])
        await asyncio.gather(until(stranger, warm(MODEL), "the host"), until(friend, warm(MODEL), "the host"))

        # Nothing is loaded for it, though passive clients may have models loaded.
        refused = await chat(stranger, "spare")
        assert refused.status == 503
        assert "public listing" in refused.text
        assert content(await chat(friend, "spare"))

        # Of two requests of the stranger one computes. What the owner and who was invited ask meanwhile comes first.
        order: list[str] = []

        async def ask(name: str, tokens: int) -> None:
            node = {"stranger": stranger, "host": host, "friend": friend}[name]
            content(await chat(node, MODEL, tokens=tokens))
            order.append(name)

        async with streaming(stranger, MODEL, 400) as events, asyncio.TaskGroup() as group:
            # The engine computes nothing until all have come.
            working = engines(host)
            for engine in working:
                engine.suspend()
            # Long enough that it cannot overtake, on its way to its client, an answer that was computed before it.
            group.create_task(ask("stranger", 60))
            await until(host, lambda status: status["requests"]["strangers"]["running"] == 2, "two of the stranger")
            too_many = await chat(stranger, MODEL)
            assert (too_many.status, too_many.json()["error"]["code"]) == (429, "stranger_concurrent")
            for name in ("host", "friend", "host"):
                group.create_task(ask(name, 4))
            await until(host, lambda status: status["requests"]["in_flight"] == 5, "all of them")
            for engine in working:
                engine.resume()
            async for _ in events:
                pass
        assert order[-1] == "stranger"

        # Its tokens of the day end, for prompts and answers; after a restart of the host too.
        # (For two seconds its own node still goes by the refusal above.)
        while (answer := await chat(stranger, MODEL, tokens=60)).status == 200 or "stranger_concurrent" in answer.text:
            pass
        for _ in range(2):
            assert answer.status == 429, answer.text
            error = answer.json()["error"]
            assert error["code"] == "stranger_tokens_per_day", error
            assert "public listing" in error["message"]
            assert 1 <= int(answer.headers["retry-after"]) <= 86400
            used = (await host.status())["requests"]["strangers"]
            assert 600 <= used["tokens_today"] <= 600 + 2 * 1024
            assert used["nodes"] == 1
            assert content(await chat(friend, MODEL))
            assert content(await chat(host, MODEL))
            await host.stop()
            await host.restart()
            await until(stranger, warm(MODEL), "the host again", 60.0)
            await until(friend, warm(MODEL), "the host again", 60.0)
            answer = await chat(stranger, MODEL)
        _, text = await host.cli("status")
        assert " tokens today of 1 node, " in text
