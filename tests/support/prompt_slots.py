"""A node whose engine has slots with texts in them, and what keeps the caches of its prompts."""

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.daemon import prompt_cache
from mesh_llm.daemon.prompt_cache import SlotCaches
from mesh_llm.engine.prompt_cache.store import PromptCacheStore
from mesh_llm.engine.slots import Moved, Slot, SlotControl, SlotError, SlotRefusedError
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo
from mesh_llm.models.p2p.digests import ChunkDigestStore

TOKENS = 4000
AT = "unix:/nowhere"


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
    refusing: list[str] = field(default_factory=list[str])

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
        if self.refusing:
            raise SlotRefusedError(self.refusing[0])
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

    def open(self, term: int, slots: FakeSlots | None = None, at: str = AT, rpc: tuple[str, ...] = ()) -> None:
        """An engine is ready."""
        self.slots = slots or FakeSlots()
        spec = EngineSpec(model=self.directory / "model", alias="m", context=8192, slots=2, rpc=rpc)
        info = EngineReadyInfo(address=at, slot_control=self.slots)
        self.caches.opened("m", term, spec, [self.directory / "model"], 10, info)

    async def turn(self, text: str, slot: int, task: int, term: int = 1) -> None:
        """A prompt is answered by a slot."""
        ended = await self.caches.begin("m", term, AT, marks(text))
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
