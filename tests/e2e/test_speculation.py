"""Tokens guessed ahead, on one node and split over two: where that pays, and never where it would be seen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.e2e.test_split import split_invite, split_over
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import named, until
from tests.support.repeating_text import repeating_prompt

pytestmark = pytest.mark.timeout(300)

TOKENS = 120


def body(kind: str, seed: int, **more: Any) -> dict[str, Any]:
    prompt = repeating_prompt("small", kind, TOKENS, seed)
    return {"model": "red", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, **more}


async def written(node: NodeProcess, kind: str, seed: int) -> tuple[str, int, int]:
    """An answer, how many of its tokens were guessed, and how many of these were right."""
    answer = (await node.api.post("/v1/completions", body(kind, seed))).expect().json()
    timings = answer["timings"]
    return answer["choices"][0]["text"], timings.get("draft_n", 0), timings.get("draft_n_accepted", 0)


def guessing(status: dict[str, Any]) -> str:
    """What it says of the model's guesses."""
    return next(one["speculation"] for one in status["models"] if one["name"] == "red")


async def test_guesses_begin_where_text_repeats_itself_and_not_where_they_would_be_seen(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=10)
    model = named(random_model("small"), "red", tmp_path / "m")
    sizes = ("--parallel", "1", "--ctx-size", "1024", "--no-draft")
    first = await start_node("a", models=[model], arguments=(*sizes, "--split"), lab=lab, host=0)
    novel, guessed, _ = await written(first, "novel", 1)
    assert guessed == 0
    assert guessing(await first.status()) == "ngram-map-k (auto), nothing guessed yet"
    # How many depends on what a guess takes on this machine.
    repeated, guessed, right = await written(first, "repeated", 2)
    assert guessed >= right > 0
    await until(first, lambda status: "of guesses right" in guessing(status), "saying what guesses gain")
    assert "speculation ngram-map-k (auto), " in (await first.cli("status"))[1]

    # The same text, with the log probabilities of every token.
    seen: list[dict[str, Any]] = []
    asked = first.api.stream("POST", "/v1/completions", json=body("repeated", 2, logprobs=2, stream=True))
    async with asked as answer:
        async for event in answer.events():
            if event.data != "[DONE]":
                seen += json.loads(event.data)["choices"]
    assert "".join(one["text"] for one in seen) == repeated
    known = [tops for one in seen for tops in (one.get("logprobs") or {}).get("top_logprobs", ())]
    assert len(known) == TOKENS
    assert all(known)

    # Split: the same answers, of fewer trips.
    token = await split_invite(first)
    second = await start_node("b", join=[token], arguments=sizes, lab=lab, host=1, models_dir=model.parent)
    await until(first, split_over(1), "split over one worker", 60.0)
    assert await written(second, "novel", 1) == (novel, 0, 0)
    text, guessed, right = await written(second, "repeated", 2)
    assert text == repeated
    assert guessed >= right > TOKENS // 2
    host = {(await node.status())["node_id"]: node for node in (first, second)}[(await first.status())["split"]["host"]]
    await until(host, lambda status: "(auto), gains " in guessing(status), "saying that guesses gain in a split")


async def test_a_draft_guesses_where_links_are_slow(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=10)
    directory = tmp_path / "m"
    model = named(random_model("small"), "red", directory)
    draft = named(random_model("small-draft"), "red-draft", directory)
    sizes = ("--parallel", "1", "--ctx-size", "1024", "--draft", str(draft))
    first = await start_node("a", models=[model], arguments=(*sizes, "--split"), lab=lab, host=0)
    # The draft writes most of what the model writes, whatever the prompt is.
    said, _, _ = await written(first, "novel", 1)
    assert guessing(await first.status()).startswith("draft-simple (auto)")
    token = await split_invite(first)
    second = await start_node("b", join=[token], arguments=sizes, lab=lab, host=1, models_dir=directory)
    await until(first, split_over(1), "split over one worker", 60.0)
    rights: list[int] = []
    for _ in range(4):
        text, guessed, right = await written(second, "novel", 1)
        assert text == said
        assert guessed >= right
        rights.append(right)
    # The draft reads the prompt, and the first pass of each width takes longer: that does not stop it.
    assert max(rights) > TOKENS // 3


async def test_heads_of_the_models_own_guess_on_the_host_of_a_split(
    netlab: NetLabFactory, start_node: StartNode, random_model: Callable[[str], Path], tmp_path: Path
) -> None:
    lab = netlab(2, delay_ms=10)
    model = named(random_model("small-heads"), "red", tmp_path / "m")
    sizes = ("--parallel", "1", "--ctx-size", "1024", "--spec", "auto")
    first = await start_node("a", models=[model], arguments=(*sizes, "--split"), lab=lab, host=0)
    said, _, _ = await written(first, "novel", 1)
    # Alone, a head beside so few layers costs more than it can gain.
    assert guessing(await first.status()).startswith("ngram-map-k (auto)")
    token = await split_invite(first)
    second = await start_node("b", join=[token], arguments=sizes, lab=lab, host=1, models_dir=model.parent)
    await until(first, split_over(1), "split over one worker", 60.0)
    rights: list[int] = []
    for _ in range(4):
        text, guessed, right = await written(second, "novel", 1)
        assert text == said
        assert guessed >= right
        rights.append(right)
    assert max(rights) > TOKENS // 3
    host = {(await node.status())["node_id"]: node for node in (first, second)}[(await first.status())["split"]["host"]]
    await until(
        host, lambda status: guessing(status).startswith("draft-mtp (auto), gains "), "saying that guesses gain"
    )
