"""With several `--model`, one that cannot be had does not keep the others from being served."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.pool import chat, content, until, warm

pytestmark = pytest.mark.timeout(300)


async def test_the_others_are_served_and_each_reason_is_shown(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=1)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(random_model("small").read_bytes()[:1000])
    missing = tmp_path / "coming.gguf"
    models = ["no-such-model", missing, damaged, "tiny"]
    node = await start_node("a", models=models, lab=lab, host=0)
    assert content(await chat(node, "tiny"))
    await node.process.line(r"error: no-such-model cannot be served here: No model called no-such-model", 30.0)
    states = {one["name"]: one for one in (await node.status())["models"]}
    for name, reason in (("no-such-model", "No model called"), ("coming", "no file"), ("damaged", "damaged.gguf")):
        assert states[name]["status"] == "failed", name
        assert reason in states[name]["reason"]
        answer = await chat(node, name)
        assert answer.status == 503
        assert reason in answer.text
    _, text = await node.cli("status")
    assert "no-such-model" in text
    _, text = await node.cli("doctor")
    assert "no-such-model is not served: No model called no-such-model" in text
    # Another node that has it serves it.
    other = await start_node("b", models=["tiny"], join=[await node.invite()], lab=lab, host=1)
    await until(other, lambda status: any(one["name"] == "coming" for one in status["models"]), "the reason elsewhere")
    # The file is there at last: it is served without a restart.
    shutil.copy(random_model("small"), missing)
    await until(node, warm("coming"), "serving what came", 90.0)
    assert content(await chat(node, "coming"))
    assert all(one["reason"] == "" for one in (await node.status())["models"] if one["name"] == "coming")


async def test_one_alone_that_is_wrong_ends_the_start(
    netlab: NetLabFactory, start_node: StartNode, tmp_path: Path
) -> None:
    lab = netlab(1)
    for models in (["no-such-model"], ["no-such-model", tmp_path / "missing.gguf"]):
        node = await start_node("a", models=models, lab=lab, host=0, ready=False)
        await node.process.line(r"No model called no-such-model", 60.0)
        assert await node.process.ended() == 1
        await node.close()
