"""Which prompt is in which slot, when slots are saved, and when a saved cache is brought back."""

import asyncio
import os
import tempfile
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import msgspec
import pytest
from tests.support.prompt_slots import AT, TOKENS, FakeSlots, Node, marks, node

from mesh_llm.core.performance.prompt_cache import Mark, restore_seconds
from mesh_llm.daemon import prompt_cache
from mesh_llm.daemon.slot_prompts import identity_of
from mesh_llm.engine.probe import HttpAnswer
from mesh_llm.engine.prompt_cache.sealed import Header, read_header, root_key
from mesh_llm.engine.prompt_cache.store import SUFFIX, PromptCacheStore
from mesh_llm.engine.slots import Moved, Slot, SlotError, SlotRefusedError
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.wire.llama_state import StateLayout, plain_layout, structure

__all__ = ["node"]

LAYOUT = plain_layout((1,), 8, 8, "f16", streams=2, context=8192)


async def test_a_request_goes_on_when_its_engine_ends_while_the_model_is_read(node: Node) -> None:
    await node.turn("a", 0, 1)
    await node.caches.save("m", 1)
    node.slots = FakeSlots()
    node.open(2)
    begun = asyncio.get_running_loop().create_task(node.caches.begin("m", 2, AT, marks("ab")))
    await asyncio.sleep(0)
    node.caches.closed("m", 2, AT)
    ended = await begun
    ended()
    assert node.restored() is None


async def restarted(node: Node) -> None:
    """Save, and start another engine."""
    await node.caches.save("m", 1)
    node.caches.closed("m", 1, AT)
    node.open(2)


async def test_the_next_engine_gets_back_what_the_last_one_had(node: Node) -> None:
    await node.turn("ab", 1, 5)
    await restarted(node)
    assert node.caches.usage.count == 1
    (await node.caches.begin("m", 2, AT, marks("abcd")))()
    assert node.restored() == (0, "ab")
    # Once it is in a slot, it is not brought back again.
    (await node.caches.begin("m", 2, AT, marks("abX")))()
    assert node.restored() is None


async def test_how_fast_prompts_are_read_is_known_in_later_lives(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that has brought back its prompts reads little itself."""
    said = b"llamacpp:prompt_tokens_total 4000\nllamacpp:prompt_seconds_total 40\n"

    async def metrics(*_: object, **__: object) -> HttpAnswer | None:
        return HttpAnswer(status=200, body=said)

    monkeypatch.setattr(prompt_cache, "get", metrics)
    await node.turn("ab", 0, 1)
    await restarted(node)
    said = b"llamacpp:prompt_tokens_total 10\nllamacpp:prompt_seconds_total 0.1\n"
    await node.turn("abc", 0, 2, term=2)
    assert node.restored() == (0, "ab")
    await node.caches.save("m", 2)
    found = [path.open("rb") for path in (node.directory / "prompts").glob("*.cache")]
    assert [read_header(file, root_key(b"s" * 32)).read_speed for file in found] == [100.0]
    for file in found:
        file.close()


async def test_a_cache_that_came_slowly_once_comes_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine was busy, perhaps. What is always slow is read instead."""
    now = [0.0]
    monkeypatch.setattr(node.caches, "_clock", lambda: now[0])
    restore = FakeSlots.restore

    async def slow(self: FakeSlots, slot: int, file: int, seconds: float = 0.0) -> Moved:
        now[0] += 1.5
        return await restore(self, slot, file, seconds)

    monkeypatch.setattr(FakeSlots, "restore", slow)
    await node.turn("ab", 0, 1)
    await node.caches.save("m", 1)
    node.caches.closed("m", 1, AT)
    came: list[bool] = []
    for term in range(2, 7):
        node.open(term)
        (await node.caches.begin("m", term, AT, marks("abc")))()
        came.append(node.restored() is not None)
        node.caches.closed("m", term, AT)
    assert came == [True, True, True, False, False]


async def test_an_idle_engine_is_saved_by_itself(node: Node) -> None:
    await node.turn("ab", 0, 1)
    assert await asyncio.wait_for(node.slots.saved.get(), 10) == "ab"
    # It waits for the save that is under way, and has nothing to add.
    await node.caches.save("m", 1)
    assert node.slots.saves == ["ab"]
    assert node.caches.usage.count == 1


async def test_a_save_goes_on_when_nobody_waits_for_it_any_more(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when its engine ends, or the request goes away that wants the slot: no half of a file stays."""
    begun, go, over = threading.Event(), threading.Event(), threading.Event()
    write = PromptCacheStore.write

    def slow(store: PromptCacheStore, header: Header, state: BinaryIO) -> object:
        begun.set()
        assert go.wait(10.0)
        try:
            return write(store, header, state)
        finally:
            over.set()

    monkeypatch.setattr(PromptCacheStore, "write", slow)
    await node.turn("abcd", 0, 1)
    await asyncio.to_thread(begun.wait, 10.0)
    node.caches.closed("m", 1, AT)
    for _ in range(5):
        await asyncio.sleep(0)
    go.set()
    assert await asyncio.to_thread(over.wait, 10.0)
    assert [path.suffix for path in (node.directory / "prompts").iterdir()] == [SUFFIX]
    assert node.caches.usage.count == 1


async def test_prompts_that_end_at_once_are_found_in_their_slots(node: Node) -> None:
    first = await node.caches.begin("m", 1, AT, marks("ab"))
    second = await node.caches.begin("m", 1, AT, marks("xy"))
    node.slots.answered(1, "ab", 7)
    node.slots.answered(0, "xy", 8)
    second()
    first()
    await restarted(node)
    (await node.caches.begin("m", 2, AT, marks("abc")))()
    assert node.restored() == (0, "ab")
    (await node.caches.begin("m", 2, AT, marks("xyz")))()
    assert node.restored() == (1, "xy")


async def test_a_slot_that_is_done_before_its_prompt_is_said_to_have_ended_is_saved(node: Node) -> None:
    """A client has its whole answer a moment before that is said; then it stops the node."""
    ended = await node.caches.begin("m", 1, AT, marks("ab"))
    node.slots.answered(0, "ab", 1)
    saving = asyncio.get_running_loop().create_task(node.caches.save("m", 1))
    await asyncio.sleep(0)
    ended()
    await saving
    assert node.caches.usage.count == 1


async def test_of_two_slots_that_are_done_at_once_none_is_lost_where_one_end_is_said_late(node: Node) -> None:
    first = await node.caches.begin("m", 1, AT, marks("ab"))
    second = await node.caches.begin("m", 1, AT, marks("xy"))
    node.slots.answered(0, "ab", 1)
    node.slots.answered(1, "xy", 2)
    first()
    await asyncio.sleep(0.05)
    second()
    await restarted(node)
    assert node.caches.usage.count == 2


async def test_a_busy_slot_is_not_saved(node: Node) -> None:
    await node.turn("ab", 0, 1)
    node.slots.busy.add(0)
    await restarted(node)
    assert node.caches.usage.count == 0


async def test_what_a_slot_has_is_saved_before_another_cache_takes_its_place(node: Node) -> None:
    await node.turn("ab", 0, 1)
    await restarted(node)
    await node.turn("uv", 0, 1, term=2)
    await node.turn("xy", 1, 2, term=2)
    saves = node.slots.saves
    (await node.caches.begin("m", 2, AT, marks("abc")))()
    assert node.restored() == (0, "ab")
    assert "uv" in saves
    assert node.caches.usage.count >= 2


async def test_a_prompt_that_a_saved_one_continues_is_not_saved_again(node: Node) -> None:
    await node.turn("abc", 0, 1)
    await restarted(node)
    await node.turn("ab", 0, 1, term=2)
    await node.caches.save("m", 2)
    assert node.slots.saves == []
    assert node.caches.usage.count == 1


async def test_short_prompts_and_others_do_not_matter(node: Node) -> None:
    for prompt in ([], [Mark(b"k", 100)]):
        (await node.caches.begin("m", 1, AT, prompt))()
    (await node.caches.begin("other", 1, AT, marks("ab")))()
    assert not node.caches.keeps("other", 1)
    assert node.caches.keeps("m", 1)
    await restarted(node)
    assert node.caches.usage.count == 0


async def test_an_engine_that_refuses_is_asked_as_usual_and_the_cache_is_deleted(node: Node) -> None:
    await node.turn("ab", 0, 1)
    await restarted(node)

    async def refuse(slot: int, file: int, seconds: float = 0.0) -> Moved:
        raise SlotRefusedError("no available space")

    object.__setattr__(node.slots, "restore", refuse)
    (await node.caches.begin("m", 2, AT, marks("abc")))()
    assert node.caches.usage.count == 0


async def test_an_engine_that_does_not_answer_costs_nothing(node: Node) -> None:
    node.slots.broken.append("gone")
    await node.turn("ab", 0, 1)
    await node.caches.save("m", 1)
    assert node.caches.usage.count == 0


async def test_another_model_under_the_same_name_gets_nothing(node: Node) -> None:
    await node.turn("ab", 0, 1)
    await node.caches.save("m", 1)
    node.caches.closed("m", 1, AT)
    (node.directory / "model").write_bytes(b"other weights")
    node.open(2)
    (await node.caches.begin("m", 2, AT, marks("abc")))()
    assert node.restored() is None


async def test_what_one_engine_of_a_split_model_saved_another_one_brings_back(node: Node) -> None:
    first = FakeSlots()
    node.open(2, first, at="unix:/e1", rpc=("unix:/tunnel-1",))
    (await node.caches.begin("m", 2, "unix:/e1", marks("ab")))()
    first.answered(0, "ab", 1)
    second = FakeSlots()
    node.open(2, second, at="unix:/e2", rpc=("unix:/tunnel-2",))
    await node.caches.save("m", 2)
    assert first.saves == ["ab"]
    # While the first one runs, and its slot is taken from there by nobody.
    (await node.caches.begin("m", 2, "unix:/e2", marks("abc")))()
    assert second.restored.get_nowait() == (0, "ab")
    # The next group has other tunnels, and the whole model none.
    for address in ("unix:/e1", "unix:/e2"):
        node.caches.closed("m", 2, address)
    assert not node.caches.keeps("m", 2)
    for term, rpc in ((3, ("unix:/tunnel-3", "unix:/tunnel-4")), (4, ())):
        node.open(term, rpc=rpc)
        (await node.caches.begin("m", term, AT, marks("abc")))()
        assert node.restored() == (0, "ab")


async def test_one_of_several_engines_that_hangs_does_not_keep_the_others_from_being_saved(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_cache, "_ANSWER_SECONDS", 0.01)
    good, hung = FakeSlots(), FakeSlots()
    for slots, text in ((hung, "xy"), (good, "ab")):
        node.open(2, slots, at=f"unix:/{text}")
        (await node.caches.begin("m", 2, f"unix:/{text}", marks(text)))()
        slots.answered(0, text, 1)

    async def hang() -> tuple[Slot, ...]:
        await asyncio.Event().wait()
        return ()

    object.__setattr__(hung, "list", hang)
    await node.caches.save("m", 2)
    assert (hung.saves, good.saves) == ([], ["ab"])


async def test_a_cache_outlives_an_engine_that_dies_while_it_is_brought_back(node: Node) -> None:
    await node.turn("ab", 0, 1)
    await restarted(node)

    async def die(slot: int, file: int, seconds: float = 0.0) -> Moved:
        raise SlotError("the engine did not answer")

    object.__setattr__(node.slots, "restore", die)
    (await node.caches.begin("m", 2, AT, marks("abc")))()
    assert node.caches.usage.count == 1
    node.caches.closed("m", 2, AT)
    node.open(3)
    (await node.caches.begin("m", 3, AT, marks("abc")))()
    assert node.restored() == (0, "ab")


async def test_what_was_computed_from_rounded_activations_is_not_taken_for_the_whole(node: Node) -> None:
    wires = ["q8", "f32", "q8"]
    node.caches.wire = lambda _: wires[0]
    await node.turn("ab", 0, 1)
    await node.caches.save("m", 1)
    node.caches.closed("m", 1, AT)
    restored: list[tuple[int, str] | None] = []
    for term in (2, 3):
        del wires[0]
        node.open(term)
        (await node.caches.begin("m", term, AT, marks("abc")))()
        restored.append(node.restored())
    assert restored == [None, (0, "ab")]


async def test_caches_of_a_split_model_travel_and_that_is_measured(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.open(2, rpc=("unix:/tunnel",))

    async def slow(slot: int, file: int, seconds: float = 0.0) -> Moved:
        await asyncio.sleep(0.05)
        os.write(file, b"ab" * 100_000)
        os.lseek(file, 0, os.SEEK_SET)
        return Moved(tokens=TOKENS, size=200_000)

    object.__setattr__(node.slots, "save", slow)
    (await node.caches.begin("m", 2, AT, marks("ab")))()
    node.slots.answered(0, "ab", 1)
    await node.caches.save("m", 2)
    (path,) = (node.directory / "prompts").glob("*.cache")
    with path.open("rb") as file:
        header = read_header(file, root_key(b"s" * 32))
    # 40,000 bytes by what a token takes, in 50 ms or more.
    assert 0 < header.move_speed <= 800_000
    assert restore_seconds(header.size, header.move_speed) > 0.25
    # Where it would take too long, only an engine that stops is saved.
    monkeypatch.setattr(prompt_cache, "_SPLIT_SAVE_SECONDS", 0.0)
    (await node.caches.begin("m", 2, AT, marks("xy")))()
    node.slots.answered(1, "xy", 2)
    engine = node.caches._engines["m", 2, AT]
    await node.caches._find_prompts(engine)
    await node.caches._save_all(engine, prompt_cache._SPLIT_SAVE_SECONDS)
    assert node.caches.usage.count == 1
    await node.caches.save("m", 2)
    assert node.caches.usage.count == 2


def test_a_state_is_written_anew_for_an_engine_with_other_slots() -> None:
    one, two, four = (msgspec.structs.replace(LAYOUT, streams=count) for count in (1, 2, 4))
    tokens = list(range(300))

    def state(layout: StateLayout) -> bytes:
        return b"".join(
            part if isinstance(part, bytes) else b"\x11\x2c" * (part // 2) for part in structure(layout, tokens)
        )

    for written in (one, two, four):
        for wanted in (one, two, four):
            with tempfile.TemporaryFile() as file:
                file.write(state(written))
                file.flush()
                with prompt_cache._fitting(file, wanted) as fitting:
                    assert os.pread(fitting.fileno(), 1 << 20, 0) == state(wanted)
    with tempfile.TemporaryFile() as file:
        file.write(state(two)[:-200])
        file.flush()
        with pytest.raises(SlotRefusedError):
            prompt_cache._fitting(file, one)


def test_what_a_state_depends_on() -> None:
    spec = EngineSpec(model=Path("/a/model"), alias="m", context=8192, slots=2)
    same: list[Callable[[], EngineSpec]] = [
        lambda: replace(spec, model=Path("/b/x"), alias="n", slots=4, threads=3, port=9),
        lambda: replace(spec, key_file=Path("/k"), socket=Path("/s"), prompt_cache_mib=0),
        lambda: replace(spec, rpc=("unix:/t",), tensor_split=(1.0, 2.0), host_layers=3, output_on_host=True),
    ]
    other = [replace(spec, context=4096), replace(spec, cache_type="q8_0")]
    one = identity_of(spec, [b"digest"])
    assert [identity_of(make(), [b"digest"]) for make in same] == [one, one, one]
    assert len({one, identity_of(spec, [b"other"]), *(identity_of(spec, [b"digest"]) for spec in other)}) == 4
    assert len({one, *(identity_of(spec, [b"digest"], slots=slots) for slots in (2, 4))}) == 3


async def test_a_prompt_comes_back_into_the_slot_that_reads_it(node: Node) -> None:
    await node.turn("ab", 0, 5)
    await restarted(node)
    node.slots.answered(0, "xy", 1)
    (await node.caches.begin("m", 2, AT, marks("abcd"), slot=1))()
    assert node.restored() == (1, "ab")
    # Not into another one where that works on something.
    node.slots.texts[1] = ""
    (await node.caches.begin("m", 2, AT, marks("xyz"), slot=0))()
    node.open(3)
    node.slots.busy.add(1)
    (await node.caches.begin("m", 3, AT, marks("abcd"), slot=1))()
    assert node.restored() is None
