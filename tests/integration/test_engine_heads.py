"""Heads of a model that guess for it (MTP), and drafts that read its hidden states (EAGLE-3), on real llama.cpp."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from tests.integration.engine_fixtures import (
    CACHE,
    Model,
    client_of,
    embedded,
    model,
    rpc_embedded,
    small_spec,
    started,
)

from mesh_llm.engine.sources.embedded import slot_library
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.engine.supervisor import RunningEngine, Supervisor

__all__ = ["embedded", "model", "rpc_embedded"]

TOKENS = 60
BODY: dict[str, Any] = {"prompt": "the node and the mesh have one model " * 4, "max_tokens": TOKENS, "temperature": 0}


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    if slot_library.find(CACHE) is None:
        pytest.skip("what switches guesses is not built: run `mesh-llm engine install` (as `make setup` does)")
    supervisor = Supervisor(tmp_path / "logs", saves_slots=True)
    try:
        yield supervisor
    finally:
        await supervisor.close()


def target(model: Model, kind: str) -> Path:
    return model("small-heads" if kind == "draft-mtp" else "small")


def guessing_spec(model: Model, kind: str, **more: Any) -> EngineSpec:
    draft = model("small-eagle3") if kind == "draft-eagle3" else None
    return small_spec(target(model, kind), draft=draft, speculation=kind, draft_max=4, context=1024, **more)


async def written(engine: RunningEngine, **more: Any) -> tuple[str, int, int, int]:
    """A streamed answer; how many of its tokens were guessed, and rightly; and how many have log probabilities."""
    text, timings, known = "", {}, 0
    asked = client_of(engine).stream("POST", "/v1/completions", json=BODY | {"stream": True} | more)
    async with asked as answer:
        async for event in answer.events():
            if event.data == "[DONE]":
                break
            one = json.loads(event.data)
            timings = one.get("timings", timings)
            for choice in one["choices"]:
                text += choice["text"]
                known += sum(bool(token["top_logprobs"]) for token in (choice.get("logprobs") or {}).get("content", ()))
    return text, timings.get("draft_n", 0), timings.get("draft_n_accepted", 0), known


@pytest.mark.parametrize("kind", ["draft-mtp", "draft-eagle3"])
async def test_what_is_guessed_is_what_would_be_written(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, kind: str
) -> None:
    plain = await started(supervisor, embedded, small_spec(target(model, kind), context=1024), "plain")
    said, *_ = await written(plain)
    engine = await started(supervisor, embedded, guessing_spec(model, kind), "guessing")
    text, guessed, right, _ = await written(engine)
    assert text == said
    # They have the votes of one layer of six, which decide most tokens.
    assert guessed > right > TOKENS // 3


@pytest.mark.parametrize("kind", ["draft-mtp", "draft-eagle3"])
async def test_log_probabilities_are_whole_while_nothing_is_guessed(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, kind: str
) -> None:
    engine = await started(supervisor, embedded, guessing_spec(model, kind), "guessing")
    assert engine.info is not None
    switch = engine.info.speculation
    assert switch is not None
    text, guessed, right, _ = await written(engine)
    *_, known = await written(engine, logprobs=2)
    assert known < TOKENS
    await switch.speculate(on=False)
    assert await written(engine, logprobs=2) == (text, 0, 0, TOKENS)
    # What was not guessed for is known all the same: the next guesses are as good.
    await switch.speculate(on=True)
    assert (await written(engine))[:3] == (text, guessed, right)


@pytest.mark.parametrize("kind", ["draft-mtp", "draft-eagle3"])
async def test_by_itself_an_engine_guesses_no_more_than_pays(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, kind: str
) -> None:
    engine = await started(supervisor, embedded, guessing_spec(model, kind, while_it_pays=True, slots=1), "auto")
    assert engine.info is not None
    switch = engine.info.speculation
    assert switch is not None
    guesses = [(await written(engine))[1] for _ in range(4)]
    # How many depends on what a guess takes on this machine; the first trials are made on any.
    assert sum(guesses) > 0
    known = await switch.guesses()
    assert known.guessed > 0
    assert known.gain is not None


@pytest.mark.parametrize("kind", ["draft-mtp", "draft-eagle3"])
async def test_split_over_two_workers_the_host_guesses(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, kind: str
) -> None:
    alone = await started(supervisor, rpc_embedded, guessing_spec(model, kind), "alone")
    said = await written(alone)
    await alone.stop()
    workers = [
        await supervisor.launch_rpc_worker(rpc_embedded, RpcWorkerSpec(threads=1), name) for name in ("one", "two")
    ]
    addresses = tuple(worker.info.address for worker in workers if worker.info is not None)
    ahead = 1 if kind == "draft-mtp" else 0
    # As a node starts it: two layers here, two on each worker, and then what guesses.
    split = {"host_layers": 2, "tensor_split": (2.0, 2.0 + (not ahead)), "output_on_host": True, "mtp_layers": ahead}
    spec = guessing_spec(model, kind, rpc=addresses, devices=(), **split)
    assert await written(await started(supervisor, rpc_embedded, spec, "split")) == said
    assert said[2] > TOKENS // 3
