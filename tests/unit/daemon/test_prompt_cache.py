"""Which prompt is in which slot, when slots are saved, and when a saved cache is brought back."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.daemon import prompt_cache
from mesh_llm.daemon.prompt_cache import SlotCaches, identity_of
from mesh_llm.engine.prompt_cache.store import PromptCacheStore
from mesh_llm.engine.slots import Moved, Slot, SlotControl, SlotError
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo
from mesh_llm.models.p2p.digests import ChunkDigestStore

TOKENS = 4000


def marks(text: str) -> list[Mark]:
    """The beginnings of a conversation of one-letter messages."""
    return [Mark(text[: end + 1].encode(), 4000 * (end + 1)) for end in range(len(text))]


@dataclass(frozen=True)
class FakeSlots(SlotControl):
    """Slots whose state is a text."""

    path: Path = Path("/nowhere")
    key: str = ""
    texts: list[str] = field(default_factory=lambda: ["", ""])
    tasks: list[int] = field(default_factory=lambda: [-1, -1])
    busy: set[int] = field(default_factory=set[int])
    saves: list[str] = field(default_factory=list[str])
    saved: asyncio.Queue[str] = field(default_factory=asyncio.Queue[str])
    restored: asyncio.Queue[tuple[int, str]] = field(default_factory=asyncio.Queue[tuple[int, str]])
    broken: list[str] = field(default_factory=list[str])

    async def list(self) -> tuple[Slot, ...]:
        if self.broken:
            raise SlotError(self.broken[0])
        return tuple(
            Slot(id=number, busy=number in self.busy, task=task, tokens=TOKENS if text else 0)
            for number, (text, task) in enumerate(zip(self.texts, self.tasks, strict=True))
        )

    async def save(self, slot: int, file: int, seconds: float = 0.0) -> Moved:
        self.saves.append(self.texts[slot])
        self.saved.put_nowait(self.texts[slot])
        os.write(file, self.texts[slot].encode())
        os.lseek(file, 0, os.SEEK_SET)
        return Moved(tokens=TOKENS, size=len(self.texts[slot]))

    async def restore(self, slot: int, file: int, seconds: float = 0.0) -> Moved:
        if self.broken:
            raise SlotError(self.broken[0])
        self.texts[slot] = os.pread(file, 100, 0).decode()
        self.restored.put_nowait((slot, self.texts[slot]))
        return Moved(tokens=TOKENS, size=1)

    def answered(self, slot: int, text: str, task: int) -> None:
        self.texts[slot], self.tasks[slot] = text, task


@dataclass
class Node:
    """The caches of a node, and the slots of its engine."""

    directory: Path
    caches: SlotCaches
    slots: FakeSlots

    def open(self, term: int, slots: FakeSlots | None = None) -> None:
        """An engine is ready."""
        self.slots = slots or FakeSlots()
        spec = EngineSpec(model=self.directory / "model", alias="m", context=8192, slots=2)
        info = EngineReadyInfo(address="unix:/nowhere", slot_control=self.slots)
        self.caches.opened("m", term, spec, [self.directory / "model"], 10, info)

    async def turn(self, text: str, slot: int, task: int, term: int = 1) -> None:
        """A prompt is answered by a slot."""
        ended = await self.caches.begin("m", term, marks(text))
        self.slots.answered(slot, text, task)
        ended()

    def restored(self) -> tuple[int, str] | None:
        """What was brought back last."""
        return self.slots.restored.get_nowait() if self.slots.restored.qsize() else None


@pytest.fixture
async def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Node]:
    monkeypatch.setattr(prompt_cache, "_IDLE_SECONDS", 0.0)
    monkeypatch.setattr(prompt_cache, "_BETWEEN_SECONDS", 0.0)
    (tmp_path / "model").write_bytes(b"weights")
    store = PromptCacheStore(tmp_path / "prompts", b"s" * 32, 10**9, free=0)
    caches = SlotCaches(store, ChunkDigestStore(tmp_path / "chunks"), asyncio.get_running_loop().time)
    node = Node(tmp_path, caches, FakeSlots())
    node.open(1)
    yield node
    await caches.close()


async def test_a_request_goes_on_when_its_engine_ends_while_the_model_is_read(node: Node) -> None:
    await node.turn("a", 0, 1)
    await node.caches.save("m", 1)
    node.slots = FakeSlots()
    node.open(2)
    begun = asyncio.get_running_loop().create_task(node.caches.begin("m", 2, marks("ab")))
    await asyncio.sleep(0)
    node.caches.closed("m", 2)
    ended = await begun
    ended()
    assert node.restored() is None


async def restarted(node: Node) -> None:
    """Save, and start another engine."""
    await node.caches.save("m", 1)
    node.caches.closed("m", 1)
    node.open(2)


async def test_the_next_engine_gets_back_what_the_last_one_had(node: Node) -> None:
    await node.turn("ab", 1, 5)
    await restarted(node)
    assert node.caches.usage.count == 1
    (await node.caches.begin("m", 2, marks("abcd")))()
    assert node.restored() == (0, "ab")
    # Once it is in a slot, it is not brought back again.
    (await node.caches.begin("m", 2, marks("abX")))()
    assert node.restored() is None


async def test_an_idle_engine_is_saved_by_itself(node: Node) -> None:
    await node.turn("ab", 0, 1)
    assert await asyncio.wait_for(node.slots.saved.get(), 10) == "ab"
    # It waits for the save that is under way, and has nothing to add.
    await node.caches.save("m", 1)
    assert node.slots.saves == ["ab"]
    assert node.caches.usage.count == 1


async def test_prompts_that_end_at_once_are_found_in_their_slots(node: Node) -> None:
    first = await node.caches.begin("m", 1, marks("ab"))
    second = await node.caches.begin("m", 1, marks("xy"))
    node.slots.answered(1, "ab", 7)
    node.slots.answered(0, "xy", 8)
    second()
    first()
    await restarted(node)
    (await node.caches.begin("m", 2, marks("abc")))()
    assert node.restored() == (0, "ab")
    (await node.caches.begin("m", 2, marks("xyz")))()
    assert node.restored() == (1, "xy")


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
    (await node.caches.begin("m", 2, marks("abc")))()
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
        (await node.caches.begin("m", 1, prompt))()
    (await node.caches.begin("other", 1, marks("ab")))()
    assert not node.caches.keeps("other", 1)
    assert node.caches.keeps("m", 1)
    await restarted(node)
    assert node.caches.usage.count == 0


async def test_an_engine_that_refuses_is_asked_as_usual_and_the_cache_is_deleted(node: Node) -> None:
    await node.turn("ab", 0, 1)
    await restarted(node)

    async def refuse(slot: int, file: int, seconds: float = 0.0) -> Moved:
        raise SlotError("no available space")

    object.__setattr__(node.slots, "restore", refuse)
    (await node.caches.begin("m", 2, marks("abc")))()
    assert node.caches.usage.count == 0


async def test_an_engine_that_does_not_answer_costs_nothing(node: Node) -> None:
    node.slots.broken.append("gone")
    await node.turn("ab", 0, 1)
    await node.caches.save("m", 1)
    assert node.caches.usage.count == 0


async def test_another_model_under_the_same_name_gets_nothing(node: Node) -> None:
    await node.turn("ab", 0, 1)
    await node.caches.save("m", 1)
    node.caches.closed("m", 1)
    (node.directory / "model").write_bytes(b"other weights")
    node.open(2)
    (await node.caches.begin("m", 2, marks("abc")))()
    assert node.restored() is None


def test_what_a_state_depends_on() -> None:
    spec = EngineSpec(model=Path("/a/model"), alias="m", context=8192, slots=2)
    same: list[Callable[[], EngineSpec]] = [
        lambda: replace(spec, model=Path("/b/x"), alias="n", slots=4, threads=3, port=9),
        lambda: replace(spec, key_file=Path("/k"), socket=Path("/s"), prompt_cache_mib=0),
    ]
    other = [replace(spec, context=4096), replace(spec, cache_type="q8_0")]
    one = identity_of(spec, [b"digest"])
    assert [identity_of(make(), [b"digest"]) for make in same] == [one, one]
    assert len({one, identity_of(spec, [b"other"]), *(identity_of(spec, [b"digest"]) for spec in other)}) == 4
