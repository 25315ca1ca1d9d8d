"""Many clients over a split: two engines over the same workers, and slots that are computed in one pass."""

import asyncio
import json

import pytest
from tests.integration.engine_fixtures import (
    Model,
    client_of,
    embedded,
    model,
    rpc_embedded,
    small_spec,
    started,
    supervisor,
)
from tests.integration.split_fixtures import split, text

from mesh_llm.api.slots import takes_one_slot, with_slot
from mesh_llm.core.types.ids import ModelName
from mesh_llm.daemon.dispatch import Dispatch, DispatchedEngine
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.wire.ggml_rpc.tunnel import SESSION_BYTES

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

POOL = b"p" * SESSION_BYTES
SHORT = "the mesh of all the nodes"
LONG = "the mesh of all the nodes and what they have of it " * 30
"""Some 360 tokens: several batches of 128."""


@pytest.mark.parametrize("workers", [1, 2])
async def test_two_engines_at_once_say_what_one_says(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, workers: int
) -> None:
    path = model("small")
    solo = await started(supervisor, rpc_embedded, small_spec(path, threads=1), "solo")
    expected = [await text(solo, prompt) for prompt in (SHORT, LONG)]
    await solo.stop()
    async with split(supervisor, rpc_embedded, path, workers, pool=POOL) as group:
        assert group.host.pools
        first = await group.start(path, batch=128, micro_batch=128)
        assert [await text(first, prompt) for prompt in (SHORT, LONG)] == expected
        async with group.another() as other:
            second = await other.start(path, batch=128, micro_batch=128)
            loaded = other.host.stats().total
            assert loaded.weight_bytes_sent == 0
            assert loaded.weight_bytes_referenced > 4_000_000
            for _ in range(3):
                both = await asyncio.gather(*(text(engine, one) for engine in (first, second) for one in (SHORT, LONG)))
                assert both == expected * 2
            assert (group.host.stats().total.pushed > 0) is (workers > 1)
            assert (other.host.stats().total.pushed > 0) is (workers > 1)
            # The one that brought the weights dies within an answer; the other one has them all the same.
            answering = asyncio.gather(*(text(second, LONG) for _ in range(2)))
            dying = asyncio.gather(text(first, LONG), return_exceptions=True)
            first.kill()
            await dying
            assert await answering == [expected[1]] * 2
            await group.host.close()
            assert [await text(second, prompt) for prompt in (SHORT, LONG)] == expected
            # Its replacement finds them.
            async with other.another() as again:
                third = await again.start(path, batch=128, micro_batch=128)
                assert await asyncio.gather(text(second), text(third)) == [expected[0]] * 2
                assert again.host.stats().total.weight_bytes_sent == 0
                await third.stop()
            await second.stop()
        for worker in group.workers:
            await worker.idle()


async def test_a_free_slot_between_two_busy_ones_costs_a_second_pass_for_each_token(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    """Why slots are named. Two answers to one prompt begin at once: in the named slot, and in the first free one."""
    path = model("small")
    async with split(supervisor, rpc_embedded, path, 1) as group:
        engine = await group.start(path, slots=4, context=256)

        async def round_trips(slot: int, tokens: int) -> int:
            before = group.host.stats().total
            body = {"prompt": SHORT, "max_tokens": tokens, "temperature": 0, "n": 2, "id_slot": slot}
            answer = (await client_of(engine).post("/v1/completions", body)).expect().json()
            assert len({choice["text"] for choice in answer["choices"]}) == 1
            return group.host.stats().total.minus(before).round_trips

        async def for_each_token(slot: int) -> float:
            await round_trips(slot, 16)
            return (await round_trips(slot, 64) - await round_trips(slot, 24)) / 40

        # Slots 0 and 1; then 2 and 0.
        assert await for_each_token(0) == pytest.approx(1.0, abs=0.2)
        assert await for_each_token(2) == pytest.approx(2.0, abs=0.2)
        await engine.stop()


async def test_answers_in_named_slots_take_one_pass_for_each_token_and_are_the_same(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    """Three answer; the middle one's place is given to the next one, and not the free place at the end."""
    path, prompts = model("small"), [f"{SHORT} {word}" for word in ("they", "say", "have", "more")]
    async with split(supervisor, rpc_embedded, path, 1) as group:
        engine = await group.start(path, slots=4, context=256)
        assert engine.info is not None
        dispatch = Dispatch(ModelName("m"), [DispatchedEngine(engine.info)])

        async def answer(prompt: str, path: str = "/v1/completions") -> str:
            body = json.dumps({"prompt": prompt, "max_tokens": 24, "temperature": 0}).encode()
            place = dispatch.place(path, body)
            assert place.slot is not None
            found = (await client_of(engine).post(path, json.loads(with_slot(body, place.slot)))).expect().json()
            place.done()
            return found["choices"][0]["text"]

        alone = [await answer(prompt) for prompt in prompts]
        assert await asyncio.gather(*map(answer, prompts)) == alone
        held = [dispatch.place("/v1/completions", b"{}") for _ in range(3)]
        held[1].done()
        assert await answer(prompts[0]) == alone[0]
        listed = (await client_of(engine).get("/slots")).expect().json()
        assert max(listed, key=lambda slot: slot.get("id_task", -1))["id"] == held[1].slot
        await engine.stop()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat/completions", "/v1/completions", "/completion"])
async def test_a_request_is_answered_in_the_slot_that_it_names(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, path: str
) -> None:
    engine = await started(supervisor, embedded, small_spec(model("small"), threads=1, slots=4, context=256), "named")
    asked: dict[str, object] = {"max_tokens": 2}
    asked |= {"messages": [{"role": "user", "content": SHORT}]} if "chat" in path else {"prompt": SHORT}
    body = json.dumps(asked).encode()
    assert takes_one_slot(path, body)
    for slot in (2, 0, 3):
        (await client_of(engine).post(path, json.loads(with_slot(body, slot)))).expect()
        listed = (await client_of(engine).get("/slots")).expect().json()
        assert max(listed, key=lambda one: one.get("id_task", -1))["id"] == slot
    await engine.stop()
