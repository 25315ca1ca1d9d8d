"""`mesh-llm --model BIG` on one machine and `mesh-llm --join TOKEN` on another: BIG answers, though it fits neither.

The times are printed, not asserted: `make test ARGS='tests/e2e/test_two_commands.py -rP'`.
"""

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import Status, chat, content, named, until, warm

pytestmark = pytest.mark.timeout(300)


def serves(model: str) -> Callable[[Status], bool]:
    """The node itself serves a model."""
    return lambda status: any(
        one["name"] == model and one["here"] and one["status"] == "warm" for one in status["models"]
    )


@pytest.mark.parametrize("has", ["the file", "nothing", "another model that it serves"])
async def test_the_second_command_is_enough(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path, has: str
) -> None:
    lab = netlab(3, delay_ms=1)
    big = named(random_model("half-gigabyte"), "big", tmp_path / "m")
    own = [named(random_model("small"), "own", tmp_path / "n")] if "another" in has else []
    began = time.monotonic()

    def seconds() -> str:
        return f"{time.monotonic() - began:.1f} s"

    a = await start_node("a", models=[big], arguments=("--max-vram", "0.55"), lab=lab, host=0, ready=False)
    # The token is there while the model waits, and with it all that the second machine types.
    token = (await a.process.line(r"^  mesh-llm --join (\S+)$", 60.0))[1]
    print(f"first machine: token after {seconds()}")
    await a.process.line(r"big: waiting for more memory: .* Add a machine, or take a smaller model\.", 60.0)

    began = time.monotonic()
    arguments = ("--max-vram", "0.6" if own else "0.55")
    models_dir = big.parent if "file" in has else tmp_path / "empty"
    joins = {"join": [token], "lab": lab, "ready": False}
    b = await start_node("b", models=own, arguments=arguments, models_dir=models_dir, host=1, **joins)
    client = await start_node("c", client=True, host=2, **joins)
    await b.process.line(r"^mesh: joined", 60.0)
    print(f"second machine, which has {has}: joined after {seconds()}")
    await until(client, warm("big"), "an answering model", 120.0)
    print(f"second machine: the split model is ready after {seconds()}")
    said = content(await chat(b, "big"))
    print(f"second machine: the first answer is there after {seconds()}")
    assert said
    assert content(await chat(client, "big")) == content(await chat(a, "big")) == said
    shared = (await a.status())["split"]
    assert (shared["model"], len(shared["workers"])) == ("big", 1)
    if own:
        assert content(await chat(client, "own"))
    assert "cannot be reached" not in b.process.text
    # Both say what it would take, and count what it takes now as theirs.
    for node in (a, b):
        status, text = await node.cli("plan", "big")
        assert (status, "fits 2 nodes together" in text) == (0, True), text
    load = os.getloadavg()[0]
    print(f"load average {load:.0f} on {os.cpu_count()} cores")
    await asyncio.gather(a.stop(), b.stop(), client.stop())


async def test_a_standby_that_is_left_alone_serves_what_it_has(
    netlab: NetLabFactory, start_node: StartNode, tmp_path: Path, random_model: Callable[[str], Path]
) -> None:
    lab = netlab(2, delay_ms=1)
    model = named(random_model("small"), "red", tmp_path / "m")
    host = await start_node("a", models=[model], lab=lab, host=0)
    token = await host.invite()
    standby = await start_node("b", join=[token], models_dir=model.parent, lab=lab, host=1)
    await until(standby, warm("red"), "seeing the model", 60.0)
    began = time.monotonic()
    await host.crash()
    await until(standby, serves("red"), "serving it", 60.0)
    answer = await chat(standby, "red")
    print(f"the host killed with -9: the standby answers after {time.monotonic() - began:.1f} s")
    assert content(answer)
