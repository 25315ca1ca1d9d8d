"""A model that is too big for one node and is not split: both sides say why, and what to type, wherever one looks."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.async_api import expect
from tests.e2e.test_split import split_over
from tests.netlab.fixtures import NetLabFactory
from tests.support.browser import Visitor, chromium
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, named, until, warm

pytestmark = pytest.mark.timeout(300)

LITTLE = ("--parallel", "2", "--ctx-size", "512", "--no-draft")
COMMAND = "mesh-llm invite grant bob --scope split"
WHY = "may not lend it, because its invite has scope serve"


def knows(obstacle: str) -> Callable[[dict[str, object]], bool]:
    """The status names a node that this keeps out."""
    return lambda status: f"'obstacle': '{obstacle}'" in str(status["waiting"])


async def invite(node: NodeProcess, scope: str) -> str:
    status, output = await node.cli("invite", "create", "--scope", scope, "--json")
    assert status == 0, output
    return json.loads(output)["token"]


async def test_the_scope_of_an_invite_is_said_on_both_sides_and_everywhere(
    start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    alice = await start_node(
        "a", models=[model], arguments=(*LITTLE, "--max-vram", "0.55", "--name", "alice"), ready=False
    )
    told = await alice.process.line(
        r"red: waiting for more memory: it needs (\d+\.\d) MB \((\d+\.\d) on two nodes, each with buffers of its own\)",
        60.0,
    )
    alone, wider = float(told[1]), float(told[2])
    token = await invite(alice, "serve")
    bob = await start_node("b", join=[token], arguments=("--max-vram", "0.5", "--name", "bob"), ready=False)
    await alice.process.line(f"alice offers 550.0 MB. bob offers 500.0 MB but {WHY}: {COMMAND}", 60.0)
    said = await bob.process.line(
        rf"red: alice needs about (\d+\.\d) MB more; this node offers 500.0 MB but {WHY}: on alice: {COMMAND}",
        60.0,
    )
    # It lacks the file, and knows less of the model.
    assert float(said[1]) == pytest.approx(wider - 550.0, rel=0.2)
    assert wider > alone > 550.0
    client = await start_node("c", join=[token], client=True, ready=False)
    await client.process.line(r"^mesh: ", 60.0)
    await until(client, lambda status: "red" in str(status["models"]), "the routes")
    # A request is answered with it at every node.
    for node in (alice, bob, client):
        await until(
            node, lambda status: "on alice: " + COMMAND in str(status["models"]) or bool(status["waiting"]), "it"
        )
        answer = await chat(node, "red")
        error = answer.json()["error"]
        assert (answer.status, error["code"]) == (503, "model_not_served")
        assert f"bob offers 500.0 MB but {WHY}: on alice: {COMMAND}" in error["message"]
        assert ("because it is a client" in error["message"]) == (node is client)
    # So say the status, as text and as JSON, and the plan, from either side.
    for node, where in ((alice, ""), (bob, "on alice: ")):
        (waiting,) = (await node.status())["waiting"]
        first, second = waiting["nodes"]
        assert (first["name"], first["takes_part"], second["name"], second["obstacle"]) == (
            "alice",
            True,
            "bob",
            "scope",
        )
        assert second["reason"] == f"{WHY}: {where}{COMMAND}"
        assert waiting["have_bytes"] == 550_000_000
        _, text = await node.cli("status")
        assert re.search(r"^ *bob +500\.0 MB +no$", text, re.MULTILINE), text
        assert f"{WHY}: {where}{COMMAND}." in text
        _, text = await node.cli("plan", "red", "--json")
        plan = json.loads(text)
        assert (plan["runs"], plan["split"]) == ("no", None)
        assert f"{WHY}: {where}{COMMAND}" in plan["hint"]
        assert not any(one["fits"] for one in plan["machines"])
    # `load` promises nothing.
    status, text = await bob.cli("load", str(model))
    assert status == 0, text
    assert "red is not loaded yet: waiting for more memory: " in text
    async with chromium() as browser, Visitor.of(browser) as visitor:
        page = await visitor.open(alice, "models")
        row = page.locator('li[data-model="red"]')
        await expect(row).to_contain_text(f"bob offers 500.0 MB but {WHY}: {COMMAND}.")
        shares = row.get_by_role("list", name="Who shares red")
        await expect(shares.get_by_role("listitem")).to_have_text(
            ["alice: 550 MB, takes part", "bob: 500 MB, does not take part"]
        )
        await page.screenshot(path=tmp_path / "reasons.png", full_page=True)
    assert (visitor.foreign, visitor.faults) == ([], [])
    # What was said to type is typed, and helps.
    status, text = await alice.cli(*COMMAND.split()[1:])
    assert status == 0, text
    await until(alice, split_over(1), "split over two nodes", 120.0)
    assert (await alice.status())["waiting"] == []
    await until(client, warm("red"), "an answering model", 60.0)
    assert (await chat(client, "red")).status == 200


@pytest.mark.parametrize(
    ("words", "obstacle", "reason"),
    [
        (("--no-fetch",), "no-fetch", "lacks the file and takes none from others: on bob: start it without --no-fetch"),
        (("--max-rtt", "1"), "far", r"is too far away \(\d+ ms from alice\): start bob with --max-rtt \d+"),
    ],
)
async def test_what_else_keeps_a_node_out(
    netlab: NetLabFactory,
    start_node: StartNode,
    random_model: Callable[[str], Path],
    tmp_path: Path,
    words: tuple[str, ...],
    obstacle: str,
    reason: str,
) -> None:
    lab = netlab(2, delay_ms=10)
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    little = (*LITTLE, "--max-vram", "0.55")
    alice = await start_node("a", models=[model], arguments=(*little, "--name", "alice"), lab=lab, ready=False)
    await alice.process.line(r"red: waiting for more memory: ", 60.0)
    token = await invite(alice, "split")
    arguments = (*little, "--name", "bob", *words)
    bob = await start_node("b", join=[token], arguments=arguments, lab=lab, host=1, ready=False)
    await alice.process.line(f"bob offers 550.0 MB but {reason}", 60.0)
    await bob.process.line(f"red: .*{reason.replace('on bob: ', '')}", 60.0)
    await until(alice, knows(obstacle), "why")
    assert not split_over(1)(await alice.status())


async def test_a_better_token_counts_at_the_next_start(
    start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model = named(random_model("half-gigabyte"), "red", tmp_path / "m")
    little = (*LITTLE, "--max-vram", "0.55")
    alice = await start_node("a", models=[model], arguments=(*little, "--name", "alice"), ready=False)
    await alice.process.line(r"red: waiting for more memory: ", 60.0)
    words = (*little, "--name", "bob")
    bob = await start_node("b", join=[await invite(alice, "serve")], arguments=words, ready=False)
    await bob.process.line("its invite has scope serve", 60.0)
    assert (await bob.cli("stop"))[0] == 0
    await bob.process.ended(30.0)
    # It has kept its certificate of scope serve.
    bob = await start_node("b", join=[await invite(alice, "split")], arguments=words, ready=False)
    await until(alice, split_over(1), "split over two nodes", 120.0)
    assert (await bob.status())["scope"] == "split"
