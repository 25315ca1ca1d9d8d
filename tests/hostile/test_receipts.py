"""Hosts that lie in their part of a receipt, and a member that accuses others: what is found, what changes nothing."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.support import lying_host, wiretap
from tests.support.canary_mesh import trust
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat_body, named, until, warm
from tests.support.rogue import Treason, rogue

from mesh_llm.core.trust.receipts import Checked
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.gossip import Exchange, Verdict
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.net.admission.credentials import SigningKey, verify
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.owners import parse_ownership
from mesh_llm.wire.mesh.receipts import read_receipt

pytestmark = pytest.mark.timeout(240)

MODEL = "story"


async def receipt_of(asked: NodeProcess, host: str) -> dict[str, Any]:
    """The receipt of an answer to the same prompt as ever, which only this host can give."""
    answer = await asked.api.request(
        "POST", "/v1/chat/completions", json=chat_body(MODEL), headers={"x-mesh-llm-receipt": "on"}
    )
    assert answer.expect().headers["x-mesh-llm-node"] == host
    return (await asked.api.get(f"/v1/receipts/{answer.headers['x-mesh-llm-receipt-id']}")).expect().json()


def served_by(node: str) -> Callable[[dict[str, Any]], bool]:
    """Whether the model answers at this node alone."""
    return lambda status: any(one["name"] == MODEL and list(one["host_ids"]) == [node] for one in status["models"])


def part_of(shown: dict[str, Any]) -> tuple[bytes, bytes]:
    """What its host signed."""
    checked = read_receipt(shown["receipt"], verify)
    assert isinstance(checked, Checked)
    (step,) = checked.receipt.steps
    return step.statement, step.signature


def failures(shown: dict[str, Any]) -> str:
    return " ".join(one["text"] for one in shown["findings"] if one["mark"] == "fails")


async def test_a_host_that_lies_in_its_part_is_found_out_or_says_nothing_against_others(
    start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, lies = named(random_model("small"), MODEL, tmp_path / "m"), tmp_path / "lies"
    lying_host.tell(lies)
    honest = await start_node("honest", models=[model])
    token = await honest.invite()
    asked = await start_node("asked", client=True, join=[token])
    await until(asked, warm(MODEL), "served by one node")
    good = (await honest.status())["node_id"]
    of_good = await receipt_of(asked, good)
    liar = await start_node("liar", models=[model], join=[token], shell=lying_host.shell(lies), env=wiretap.ENV)
    bad = (await liar.status())["node_id"]
    assert (await honest.cli("unload", MODEL))[0] == 0
    await until(asked, served_by(bad), "served by the liar alone")
    of_bad = await receipt_of(asked, bad)
    assert of_good["holds"]
    assert of_bad["holds"]

    async def lie(**how: Any) -> dict[str, Any]:
        lying_host.tell(lies, **how)
        return await receipt_of(asked, bad)

    # What the other host signed about the same prompt, and what it signed itself about an earlier time.
    assert "the signature is not its host's" in failures(await lie(replay=part_of(of_good)))
    again = await lie(replay=part_of(of_bad))
    assert "the challenge differs" in failures(again)
    assert not again["holds"]
    assert "does not hold" in failures(await lie(cut=40))
    # What it signed before its engine got the prompt stands against what it signs at the end.
    contradicts = failures(await lie(ends={"context": 1, "quantisation": "Q2_K"}))
    assert "contradicts itself" in contradicts
    assert contradicts.endswith("otherwise about: quantisation, context.")
    # Also for who has nothing but the file.
    (tmp_path / "receipt.json").write_text(json.dumps(again))
    status, text = await asked.cli("receipt", "verify", str(tmp_path / "receipt.json"))
    assert status == 1
    assert "the challenge differs" in text

    # It names an honest node as its worker: that is its own word, and marked as such.
    named_other = await lie(workers=[good])
    assert [(one["part"], one["signed"]) for one in named_other["seen"] if one["node"] == good] == [("worker", False)]
    assert any(
        one["mark"] == "note" and "had not announced" in one["text"] and good[:10] in one["text"]
        for one in named_other["findings"]
    )
    # Nothing of that follows for anybody: the named one is asked as before.
    assert (await honest.cli("load", MODEL))[0] == 0
    assert (await liar.cli("unload", MODEL))[0] == 0
    await until(asked, served_by(good), "served by the other one alone")
    assert (await receipt_of(asked, good))["holds"]


async def test_nothing_that_a_member_says_of_others_changes_whom_this_node_trusts(
    start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """It accuses everybody, claims to be the owner's, and shows what was signed for another node."""
    story = named(random_model("small"), MODEL, tmp_path / "m")
    first = await start_node("first", models=["tiny"], arguments=("--privacy", "own", "--on-demand", "off"))
    second = await start_node("second", models=[story], join=[await first.invite()])
    there = (await second.status())["node_id"]
    await first.cli("owner", "create")
    status, text = await first.cli("owner", "add", there, "--json")
    assert status == 0, text
    statement = json.loads(text)["statement"]
    assert (await second.cli("owner", "accept", statement))[0] == 0

    def owners(status: dict[str, Any]) -> dict[str, str]:
        return {one["node_id"]: one["owner"] for one in status["peers"]}

    await until(first, lambda status: bool(owners(status).get(there)), "its owner")
    before = owners(await first.status())
    owned = parse_ownership(statement)
    assert not isinstance(owned, Malformed)

    key = SigningKey.generate()
    papers = Treason(first.options.home).certificate(key, Scope.SERVE)
    async with rogue(first, key) as liar:
        await liar.enter(papers)
        forged = Ownership(
            owner=owned.ownership.owner, issued=0, expires=2**40, signature=key.sign(b"it is theirs, believe me")
        )
        claims = (owned.ownership, forged)
        for sequence, ownership in enumerate(claims, start=1):
            said = liar.word(papers, sequence=sequence, ownership=ownership)
            accused = [NodeId((await one.status())["node_id"]) for one in (first, second)]
            verdicts = tuple(
                Verdict(node=node, incarnation=Incarnation(1), by=key.node_id, state=state)
                for node in accused
                for state in "sd"
            )
            await liar.gossip(Exchange(entries=(liar.signed(said),), verdicts=verdicts))
            await until(first, lambda status: key.node_id in owners(status), "hearing the liar")
            assert owners(await first.status()) == {**before, key.node_id: ""}
            answer = await first.api.request("POST", "/v1/chat/completions", json=chat_body(MODEL))
            assert answer.expect().headers["x-mesh-llm-node"] == there
        # No node distrusts another for it, and none counts on less.
        for one in (first, second):
            assert await trust(one) == {}
            assert (await one.status())["corrections"] == []
