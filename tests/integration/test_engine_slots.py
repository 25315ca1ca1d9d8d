"""The slots of the embedded engine: saved and restored by its own tasks, in its process, and not over HTTP."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from tests.integration.engine_fixtures import CACHE, Model, client_of, embedded, model, small_spec, started
from tests.support.repeating_text import repeating_prompt

from mesh_llm.engine.slots import SlotControl, SlotError
from mesh_llm.engine.sources.embedded import slot_library
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import NGRAM
from mesh_llm.engine.supervisor import RunningEngine, Supervisor
from mesh_llm.runtime.supervision import TaskScope

__all__ = ["embedded", "model"]

PROMPT = " ".join(f"w{number % 97}" for number in range(300))


@pytest.fixture
async def supervisor(tmp_path: Path) -> AsyncIterator[Supervisor]:
    if slot_library.find(CACHE) is None:
        pytest.skip("what saves slots is not built: run `mesh-llm engine install` (as `make setup` does)")
    supervisor = Supervisor(tmp_path / "logs", saves_slots=True)
    try:
        yield supervisor
    finally:
        await supervisor.close()


def control(engine: RunningEngine) -> SlotControl:
    assert engine.info is not None
    assert engine.info.slot_control is not None
    return engine.info.slot_control


def memory_file(data: bytes = b"") -> BinaryIO:
    file = os.fdopen(os.memfd_create("test"), "w+b")
    file.write(data)
    file.flush()
    return file


async def ask(engine: RunningEngine, text: str, tokens: int = 12) -> tuple[str, int]:
    """The answer, and how many tokens of the prompt came from the cache."""
    body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens, "temperature": 0}
    answer = (await client_of(engine).post("/v1/chat/completions", body)).expect().json()
    return answer["choices"][0]["message"]["content"], answer["timings"]["cache_n"]


async def saved(engine: RunningEngine) -> BinaryIO:
    """The state of the slot that holds most."""
    slot = max(await control(engine).list(), key=lambda one: one.tokens)
    file = memory_file()
    assert (await control(engine).save(slot.id, file.fileno())).tokens == slot.tokens
    return file


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
async def test_another_engine_goes_on_where_the_first_one_was(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, cache_type: str
) -> None:
    spec = small_spec(model("small"), context=2048, cache_type=cache_type)
    first = await started(supervisor, embedded, spec, "first")
    text, cached = await ask(first, PROMPT)
    assert cached == 0
    with await saved(first) as file:
        await first.stop()
        second = await started(supervisor, embedded, spec, "second")
        moved = await control(second).restore(1, file.fileno())
    assert moved.tokens > 700
    again, cached = await ask(second, PROMPT)
    assert again == text
    assert cached > 700


async def test_what_is_no_state_empties_the_slot_and_nothing_more(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small"), context=2048), "s")
    await ask(engine, PROMPT)
    slot = max(await control(engine).list(), key=lambda one: one.tokens)
    with memory_file(b"no state of a slot" * 100) as file, pytest.raises(SlotError, match="restore"):
        await control(engine).restore(slot.id, file.fileno())
    assert max(one.tokens for one in await control(engine).list()) == 0
    assert (await ask(engine, "and now?"))[0]


async def test_a_busy_slot_is_waited_for_and_its_answer_is_not_disturbed(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    spec = small_spec(model("small"), context=2048, slots=1)
    engine = await started(supervisor, embedded, spec, "s")
    scope = TaskScope("test")
    undisturbed, _ = await ask(engine, "tell me of the mesh", 300)
    body = {"messages": [{"role": "user", "content": "tell me of the mesh"}], "max_tokens": 300, "temperature": 0}
    text = ""
    stream = client_of(engine).stream("POST", "/v1/chat/completions", json=body | {"stream": True})
    with memory_file() as file:
        async with stream as answer:
            events = answer.events()
            text += answer_text((await anext(events)).data)
            saving = scope.spawn(control(engine).save(0, file.fileno()), "save")
            async for event in events:
                text += answer_text(event.data)
        assert text == undisturbed
        await saving
        assert os.fstat(file.fileno()).st_size > 100_000
    await scope.close()


async def test_only_who_has_the_key_is_answered(supervisor: Supervisor, embedded: EmbeddedSource, model: Model) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    path = control(engine).path
    assert path.stat().st_mode & 0o077 == 0
    with pytest.raises(SlotError, match="wrong key"):
        await SlotControl(path, "guess").list()
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(b"nonsense\n")
    assert b"not a question" in await reader.readline()
    writer.close()
    assert len(await control(engine).list()) == 2


async def test_the_route_that_writes_files_stays_shut(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small")), "s")
    for action in ("save", "restore", "erase"):
        answer = await client_of(engine).post(f"/slots/0?action={action}", {"filename": "x"})
        assert answer.status == 501


async def test_a_model_with_a_draft_has_no_slots_to_save(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    spec = small_spec(model("small"), draft=model("small-draft"))
    engine = await started(supervisor, embedded, spec, "s")
    assert engine.info is not None
    assert engine.info.slot_control is None


def answer_text(data: str) -> str:
    """The text in one event of a chat stream."""
    if data == "[DONE]":
        return ""
    choices = json.loads(data)["choices"]
    return (choices[0]["delta"].get("content") or "") if choices else ""


@pytest.mark.parametrize("kind", ["ngram", "draft"])
async def test_guesses_are_switched_while_the_engine_runs(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, kind: str
) -> None:
    draft = model("small") if kind == "draft" else None
    spec = small_spec(model("small"), draft=draft, speculation="" if draft else kind, draft_max=6)
    engine = await started(supervisor, embedded, spec, kind)
    assert engine.info is not None
    switch = engine.info.speculation
    assert switch is not None
    body: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 48, "temperature": 0}
    body |= {"logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    body["logit_bias"] = {"40": 1e6} if kind == "ngram" else {}

    async def answer() -> tuple[str, int, int]:
        """The text, how many tokens were guessed, and how many have log probabilities."""
        got = (await client_of(engine).post("/v1/chat/completions", body)).expect().json()
        choice = got["choices"][0]
        probable = sum(1 for token in choice["logprobs"]["content"] if token["top_logprobs"])
        return choice["message"]["content"], got["timings"].get("draft_n", 0), probable

    text, guessed, probable = await answer()
    assert guessed > 0
    assert probable < 48
    await switch.speculate(on=False)
    assert await answer() == (text, 0, 48)
    await switch.speculate(on=True)
    assert (await answer())[1] == guessed


@pytest.mark.parametrize(("kind", "auto"), [("ngram", False), ("ngram", True), ("draft", False)])
async def test_guesses_change_no_answer_and_know_each_new_text(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, kind: str, *, auto: bool
) -> None:
    # The model drafts for itself: its guesses are right, whatever it has read, and had not read while it was paused.
    draft = model("small") if kind == "draft" else None
    guesses = {"draft": draft, "speculation": "" if draft else NGRAM, "while_it_pays": auto}
    plain = await started(supervisor, embedded, small_spec(model("small"), context=1024), "plain")
    spec = small_spec(model("small"), context=1024, slots=1, **guesses)
    engine = await started(supervisor, embedded, spec, kind)
    assert engine.info is not None
    switch = engine.info.speculation
    assert switch is not None

    async def guessed(text: str, seed: int) -> tuple[int, int]:
        """How many tokens of an answer were guessed, and how many of them rightly."""
        body = {"prompt": repeating_prompt("small", text, 120, seed), "max_tokens": 120, "temperature": 0}
        said, got = [(await client_of(one).post("/v1/completions", body)).expect().json() for one in (plain, engine)]
        assert got["choices"][0]["text"] == said["choices"][0]["text"]
        return got["timings"].get("draft_n", 0), got["timings"].get("draft_n_accepted", 0)

    assert (await switch.guesses()).gain is None
    count, right = await guessed("novel", 1)
    assert right == count
    assert (count == 0) == (kind == "ngram")
    for seed in (2, 4):
        # Another text in the same slot.
        count, right = await guessed("repeated", seed)
        assert count >= right > 80 or auto
        await switch.speculate(on=False)
        assert await guessed("repeated", seed + 1) == (0, 0)
        await switch.speculate(on=True)
    known = await switch.guesses()
    assert known.guessed > 0
    assert known.gain is not None
    assert sum(await guessed("misleading", 7)) < 400
