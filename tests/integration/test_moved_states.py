"""What passes the strict reading of a slot's state is restored by a real engine; nothing else reaches one."""

import os
import random
from pathlib import Path

import pytest
from tests.integration.engine_fixtures import Model, embedded, model, small_spec, started
from tests.integration.test_engine_slots import PROMPT, ask, control, memory_file, saved, supervisor

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import PromptElsewhere
from mesh_llm.daemon.prompt_moves import checked, prompt_tokens
from mesh_llm.engine.slots import SlotError
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import RunningEngine, Supervisor
from mesh_llm.models.gguf.facts import Shape
from mesh_llm.models.gguf.header import read_header
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.llama_state import State, StateLayout, plain_layout, read_state, rows, structure

__all__ = ["embedded", "model", "supervisor"]

TAKEN = 512
MUTATIONS = 120


def layout_of(path: Path, spec: EngineSpec) -> StateLayout:
    shape = Shape(read_header(path)).plain_cache()
    assert shape is not None
    return plain_layout(*shape, spec.cache_type, streams=spec.slots, context=spec.context)


def rebuilt(layout: StateLayout, tokens: list[int], data: bytes) -> bytes:
    """A file of an engine with this layout, with rows that came from another one."""
    out, at = bytearray(), 0
    for part in structure(layout, tokens):
        if isinstance(part, int):
            out += data[at : at + part]
            at += part
        else:
            out += part
    assert at == len(data)
    return bytes(out)


async def state_of(engine: RunningEngine, layout: StateLayout) -> tuple[State, bytes]:
    """The state of the slot that holds most, and the rows of its first tokens."""
    with await saved(engine) as file:
        data = memoryview(os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0))
    state = read_state(data, layout)
    assert isinstance(state, State), state
    return state, b"".join(rows(data, state, TAKEN))


@pytest.mark.parametrize("cache_type", ["f16", "q8_0"])
async def test_an_engine_goes_on_with_the_first_tokens_of_another_ones_state(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model, cache_type: str
) -> None:
    """The tokens are those that the second engine counts itself, and it has another number of slots."""
    spec = small_spec(model("small"), context=2048, cache_type=cache_type)
    first = await started(supervisor, embedded, spec, "first")
    text, _ = await ask(first, PROMPT)
    state, moved = await state_of(first, layout_of(spec.model, spec))
    await first.stop()

    spec = small_spec(model("small"), context=2048, cache_type=cache_type, slots=1)
    second = await started(supervisor, embedded, spec, "second")
    assert second.info is not None
    body = b'{"messages": [{"role": "user", "content": "%s"}]}' % PROMPT.encode()
    tokens = await prompt_tokens(second.info, PromptElsewhere(NodeId("a" * 64), "/v1/chat/completions", body))
    assert state.tokens[: len(tokens)] == tuple(tokens)
    layout = layout_of(spec.model, spec)
    with memory_file(rebuilt(layout, tokens[:TAKEN], moved)) as file:
        assert checked(file.fileno(), layout, tokens[:TAKEN]) is None
        assert isinstance(checked(file.fileno(), layout, tokens[1 : TAKEN + 1]), Malformed)
        assert (await control(second).restore(0, file.fileno())).tokens == TAKEN
    assert await ask(second, PROMPT) == (text, TAKEN)


async def test_whatever_is_changed_the_engine_lives(
    supervisor: Supervisor, embedded: EmbeddedSource, model: Model
) -> None:
    """Flipped, cut, doubled and exchanged bytes: what is refused does not reach the engine; the rest does no harm."""
    spec = small_spec(model("small"), context=2048)
    layout = layout_of(spec.model, spec)
    engine = await started(supervisor, embedded, spec, "s")
    short, _ = await ask(engine, "and now?")
    await ask(engine, PROMPT)
    state, moved = await state_of(engine, layout)
    tokens = list(state.tokens[:TAKEN])
    good = rebuilt(layout, tokens, moved)
    structured = len(good) - len(moved)
    chance = random.Random(20)
    restored = 0
    refusals: set[str] = set()
    for number in range(MUTATIONS):
        data = bytearray(good)
        for _ in range(chance.randint(1, 4)):
            at = chance.randrange(structured if number % 3 else len(good))
            match chance.randrange(5):
                case 0 | 1:
                    data[at : at + 1] = bytes([chance.randrange(256)])
                case 2:
                    data[at : at + 4] = chance.choice([b"\0\0\0\0", b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f"])
                case 3 if not number % 5:
                    del data[at : at + chance.randint(1, 9000)]
                case _:
                    data[at] ^= 1 << chance.randrange(8)
        with memory_file(bytes(data)) as file:
            outcome = read_state(memoryview(bytes(data)), layout)
            mine = outcome.tokens if isinstance(outcome, State) else tokens
            if checked(file.fileno(), layout, mine) is not None:
                continue
            try:
                await control(engine).restore(0, file.fileno())
            except SlotError as error:
                refusals.add(str(error))
            restored += 1
    # The engine itself only refuses tokens that the model does not have.
    assert all("Invalid tokens" in refusal for refusal in refusals)
    assert restored > MUTATIONS // 10
    assert engine.running
    assert (await ask(engine, "and now?"))[0] == short
