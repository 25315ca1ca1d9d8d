"""What another node has of a prompt comes into a slot here, or is given to it."""

import asyncio
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

import pytest
from tests.support.prompt_slots import AT, TOKENS, Node, marks, node
from watchfiles import awatch

from mesh_llm.core.performance.prediction import Link
from mesh_llm.core.performance.prompt_cache import MoveSpeed
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import PromptElsewhere
from mesh_llm.daemon import prompt_cache
from mesh_llm.daemon.prompt_moves import Moves, PromptMoves, Wanted
from mesh_llm.engine.probe import HttpAnswer
from mesh_llm.engine.prompt_cache.sealed import read_header, root_key
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.wire.llama_state import StateLayout, plain_layout

__all__ = ["node"]

LAYOUT = plain_layout((1,), 8, 8, "f16", streams=2, context=8192)
HOLDER = NodeId("b" * 64)


def knowing(text: str) -> Callable[[bytes], bool]:
    """One who knows the beginnings of a conversation."""
    return lambda key: key in {mark.key for mark in marks(text)}


@dataclass
class FakeMoves:
    """Another node, that has what it is told to have."""

    gives: int = 1024
    late: bool = False
    seconds: float = 0.0
    speed: MoveSpeed | None = field(
        default_factory=lambda: MoveSpeed(link=Link(one_way_seconds=0.001, bytes_per_second=1e9))
    )
    wanted: list[Wanted] = field(default_factory=list[Wanted])
    seen: list[int] = field(default_factory=list[int])
    count: Moves = field(default_factory=Moves)

    async def speed_of(self, node: NodeId, seconds: float) -> MoveSpeed | None:
        assert (node, seconds >= 0.0) == (HOLDER, True)
        return self.speed

    async def fetch(self, wanted: Wanted, file: BinaryIO, worth: Callable[[int], bool]) -> int:
        self.wanted.append(wanted)
        await asyncio.sleep(self.seconds)
        if self.late:
            raise TimeoutError
        if not worth(self.gives):
            return 0
        file.write(b"moved")
        file.flush()
        return self.gives

    def observed(self, node: NodeId, size: int, seconds: float, restore_speed: float) -> None:
        assert (node, seconds >= 0.0, restore_speed) == (HOLDER, True, 0.0)
        self.seen.append(size)


@pytest.fixture
async def moving(node: Node, monkeypatch: pytest.MonkeyPatch) -> FakeMoves:
    """An engine that has read a prompt at 400 tokens a second, and whose caches may come from elsewhere."""

    async def tokens(_engine: EngineReadyInfo, elsewhere: PromptElsewhere) -> list[int]:
        return list(range(TOKENS)) if elsewhere.body == b"body" else []

    async def metrics(_address: str, _path: str, key: str) -> HttpAnswer:
        assert not key
        return HttpAnswer(status=200, body=b"llamacpp:prompt_tokens_total 4000\nllamacpp:prompt_seconds_total 10\n")

    def layout(_spec: EngineSpec, _model: Path) -> StateLayout:
        return LAYOUT

    monkeypatch.setattr(prompt_cache, "_layout", layout)
    monkeypatch.setattr(prompt_cache, "prompt_tokens", tokens)
    monkeypatch.setattr(prompt_cache, "get", metrics)
    moves = FakeMoves()
    node.caches.moves = cast("PromptMoves", moves)
    node.open(2)
    await node.turn("x", 0, 1, term=2)
    assert await node.slots.saved.get() == "x"
    return moves


async def asked(node: Node, text: str, body: bytes = b"body") -> None:
    """A prompt begins that another node got before."""
    elsewhere = PromptElsewhere(HOLDER, "/v1/chat/completions", body)
    (await node.caches.begin("m", 2, AT, marks(text), elsewhere))()


async def test_what_another_node_has_comes_into_a_free_slot(node: Node, moving: FakeMoves) -> None:
    await asked(node, "abcd")
    assert node.restored() == (1, "moved")
    assert [(one.node, one.layout, len(one.tokens), one.marks) for one in moving.wanted] == [
        (HOLDER, LAYOUT, TOKENS, marks("abcd"))
    ]
    assert moving.seen == [1024 * LAYOUT.token_bytes]
    # A quarter of the prompt came: of its beginnings, one is known to be here.
    await asked(node, "a")
    assert len(moving.wanted) == 1


@pytest.mark.parametrize("change", [{"gives": 0}, {"gives": 256}, {"late": True}, {"speed": None}])
async def test_a_prompt_is_read_where_moving_is_of_no_use(
    node: Node, moving: FakeMoves, change: dict[str, object]
) -> None:
    for name, value in change.items():
        setattr(moving, name, value)
    await asked(node, "abcd")
    assert node.restored() is None
    assert len(moving.wanted) == ("speed" not in change)
    # One that was late is expected to be late.
    assert bool(moving.seen) == ("late" in change)


async def test_a_node_that_says_no_late_is_expected_to_be_late(node: Node, moving: FakeMoves) -> None:
    moving.gives, moving.seconds = 0, 0.02
    moving.speed = MoveSpeed(link=Link(one_way_seconds=0.0, bytes_per_second=1e12), lag=0.01)
    await asked(node, "abcd")
    assert node.restored() is None
    assert len(moving.seen) == 1


async def test_no_request_waits_until_what_its_engine_has_is_known(
    node: Node, moving: FakeMoves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Digests of a large model's files take long. Another node's request must not make one wait for them."""
    read = threading.Event()

    def slow(_store: ChunkDigestStore, _path: Path) -> None:
        assert read.wait(60.0)
        raise OSError

    await node.caches.clear()
    monkeypatch.setattr(ChunkDigestStore, "make", slow)
    node.caches.closed("m", 2, AT)
    node.open(2)
    try:
        async with asyncio.timeout(20.0):
            await asked(node, "abcd")
    finally:
        read.set()
    assert moving.wanted == []


async def test_nothing_is_asked_for_that_is_here_or_not_understood(node: Node, moving: FakeMoves) -> None:
    await node.turn("ab", 1, 2, term=2)
    assert await node.slots.saved.get() == "ab"
    await asked(node, "ab")
    await asked(node, "cd", b"another form")
    assert moving.wanted == []


async def test_an_engine_that_refuses_what_came_reads_the_prompt(node: Node, moving: FakeMoves) -> None:
    node.slots.refusing.append("no")
    await asked(node, "abcd")
    assert len(moving.wanted) == 1
    assert node.restored() is None


@pytest.mark.usefixtures("moving")
async def test_a_node_gives_what_is_in_a_slot_or_saved_to_those_who_know_it(node: Node) -> None:
    await until_saved(node)
    identity = identity_in(node)
    held = await node.caches.held(identity, knowing("xyz"))
    assert held is not None
    with held.file as file:
        assert os.pread(file.fileno(), 10, 0) == b"x"
    assert held.layout == LAYOUT
    assert node.slots.saves == ["x", "x"]
    assert await node.caches.held(identity, knowing("y")) is None
    assert await node.caches.held(b"i" * 32, knowing("xyz")) is None

    # After the engine has ended, from the disk.
    node.caches.closed("m", 2, AT)
    held = await node.caches.held(identity, knowing("xyz"))
    assert held is not None
    with held.file as file:
        assert os.pread(file.fileno(), 10, 0) == b"x"
    assert node.slots.saves == ["x", "x"]


async def until_saved(node: Node) -> None:
    """Wait until the file of a saved cache is there: writing it is another thread's work."""
    async with asyncio.timeout(10):
        async for _ in awatch(node.directory, yield_on_timeout=True, rust_timeout=50):
            if node.caches.usage.count:
                return


def identity_in(node: Node) -> bytes:
    """Of what is saved."""
    (path,) = (node.directory / "prompts").glob("*.cache")
    with path.open("rb") as file:
        return read_header(file, root_key(b"s" * 32)).identity
