"""A mesh that strangers may help (`--publish-scope serve`): what they make its machines do, and who is no stranger."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support.canary_mesh import owner_in
from tests.support.discovery import SOON, listed, urls
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.nostr_relays import relays
from tests.support.pool import chat, named, until, warm

from mesh_llm.core.types.ids import NodeId
from mesh_llm.daemon.ownership import owner_key, sign_for
from mesh_llm.runtime.home import Home

pytestmark = pytest.mark.timeout(400)

MODEL, THEIRS, SPARE = "story", "theirs", "spare"


def here(model: str) -> Callable[[dict[str, Any]], bool]:
    """The node serves a model itself."""
    return lambda status: any(
        one["name"] == model and one["here"] and one["status"] == "warm" for one in status["models"]
    )


async def id_of(node: NodeProcess) -> str:
    return (await node.status())["node_id"]


async def test_a_stranger_has_no_model_loaded_and_one_of_the_owner_has_no_quota(
    start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    story = named(random_model("small"), MODEL, tmp_path / "m")
    theirs = named(random_model("small"), THEIRS, tmp_path / "disk")
    spare = named(random_model("small"), SPARE, tmp_path / "disk")
    owner = owner_in(tmp_path / "host")
    async with relays() as (relay,):
        words = ["--publish", "--yes", "--publish-scope", "serve", "--mesh-name", "Lab", "--ctx-size", "1024"]
        words += ["--stranger-limit", "tokens_per_day=60"]
        named(spare, SPARE, tmp_path / "host-disk")
        options = {"models": [story], "models_dir": tmp_path / "host-disk"}
        host = await start_node("host", arguments=[*words, *urls([relay])], env=SOON, **options)
        await relay.until(listed(), "listed")
        standby = {"join": [await host.invite()], "models_dir": tmp_path / "disk"}
        careful = await start_node("careful", arguments=["--no-fetch"], **standby)
        await until(careful, warm(MODEL), "the host", 60)
        stranger = await start_node("stranger", models=[theirs], arguments=["--auto", *urls([relay])], env=SOON)
        await asyncio.gather(
            until(stranger, warm(MODEL), "the host", 60), until(careful, warm(THEIRS), "the stranger's model", 60)
        )

        # A node with nothing else to do has the file, and leaves it. What a member serves it takes up.
        assert (await host.cli("load", SPARE))[0] == 0
        await until(careful, here(SPARE), "taking up what a member serves", 60)
        assert not here(THEIRS)(await careful.status())
        # One whose user allows it takes up the stranger's.
        generous = await start_node("generous", arguments=["--no-fetch", "--on-demand", "strangers"], **standby)
        await until(generous, here(THEIRS), "taking up what a stranger serves", 60)
        there = await id_of(stranger)
        await stranger.stop()
        await generous.stop()

        # It comes back, and its quota ends.
        await stranger.restart()
        await until(stranger, warm(MODEL), "the host again", 60)
        while (answer := await chat(stranger, MODEL, tokens=20)).status == 200:
            pass
        assert answer.json()["error"]["code"] == "stranger_tokens_per_day"

        # Its owner proves to be the host's: it is a stranger no more, however it came.
        statement = sign_for(owner_key(Home(tmp_path / "host")), NodeId(there))
        assert (await stranger.cli("owner", "accept", statement))[0] == 0

        def proven(status: dict[str, Any]) -> bool:
            return [one["owner"] for one in status["peers"] if one["node_id"] == there] == [owner]

        await until(host, proven, "its owner")
        await stranger.restart()
        await until(stranger, warm(MODEL), "the host again", 60)
        used = (await host.status())["requests"]["strangers"]["tokens_today"]
        for _ in range(6):
            (await chat(stranger, MODEL, tokens=20)).expect()
        assert (await host.status())["requests"]["strangers"]["tokens_today"] == used
