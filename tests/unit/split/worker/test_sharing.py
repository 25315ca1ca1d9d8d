"""Several engines of one host over one rpc-server: weights are there once, and all else is each engine's own."""

import asyncio
import random
import struct
from collections.abc import AsyncIterator

import pytest
from blake3 import blake3
from tests.support.rpc_memory import (
    Engine,
    OnDisk,
    Pool,
    computing,
    getting,
    recomputing,
    referring,
    setting,
    tensor,
)

from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.worker import sharing
from mesh_llm.wire.ggml_rpc.protocol import Command, request
from mesh_llm.wire.ggml_rpc.tensors import Tensor
from mesh_llm.wire.ggml_rpc.tunnel import SESSION_BYTES, WAIT, Wait

FIRST, SECOND = b"\x01" * 1024, b"\x02" * 512
WEIGHTS, CACHE, SCRATCH = 4096, 2048, 8192
Buffer = tuple[int, int]


@pytest.fixture
async def scope() -> AsyncIterator[TaskScope]:
    scope = TaskScope("test")
    yield scope
    await scope.close()


def weights_of(buffer: Buffer) -> list[bytes]:
    return [setting(tensor(buffer, 0, 1024), FIRST), setting(tensor(buffer, 1024, 512), SECOND)]


async def load(engine: Engine, marker: bytes = b"m") -> tuple[Buffer, Buffer, Buffer]:
    """What llama.cpp does: weights, cache, scratch memory, and a first graph."""
    weights = await engine.allocate(WEIGHTS)
    assert await engine.tell(*weights_of(weights)), engine.refused
    cache = await engine.allocate(CACHE)
    assert await engine.tell(request(Command.BUFFER_CLEAR, struct.pack("<QB", cache[0], 0)))
    scratch = await engine.allocate(SCRATCH)
    inputs, result = tensor(scratch, 0, 64, marker), tensor(scratch, 64, 1024, marker)
    assert await engine.tell(setting(inputs, marker * 64), computing(1, tensor(weights, 0, 1024), result)), (
        engine.refused
    )
    return weights, cache, scratch


async def test_weights_are_there_once_and_all_else_twice(scope: TaskScope) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    one = await load(first)
    before = pool.server.seen.count(Command.SET_TENSOR)
    other = await load(second)
    assert one[0] == other[0]
    assert len({buffer[0] for buffer in (*one, *other)}) == 5
    # Only the second engine's input.
    assert pool.server.seen.count(Command.SET_TENSOR) == before + 1
    assert pool.server.most == WEIGHTS + 2 * (CACHE + SCRATCH)
    assert pool.server.connections == len(pool.made) == 1
    assert await second.ask(getting(tensor(other[0], 0, 1024)), 1024) == FIRST


async def test_each_other_pool_waits_until_this_one_is_gone(scope: TaskScope) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    await load(first)
    await load(second)
    waiting = scope.spawn(pool.engine(pool=b"q" * SESSION_BYTES), "another")
    await first.leave()
    assert await second.tell(recomputing(1))
    assert not waiting.done()
    await second.leave()
    await asyncio.wait([waiting])
    assert len(pool.made) == 2
    assert pool.made[0].wrong == []


@pytest.mark.parametrize("first_leaves", [True, False])
async def test_weights_live_until_the_last_engine_is_gone(scope: TaskScope, *, first_leaves: bool) -> None:
    pool = Pool(scope)
    engines = [await pool.engine(), await pool.engine()]
    (weights, *_), _ = [await load(engine, marker) for engine, marker in zip(engines, (b"a", b"b"), strict=True)]
    gone, left = engines if first_leaves else reversed(engines)
    await gone.leave()
    marker = b"b" if first_leaves else b"a"
    server = pool.server
    # Its graph was dropped when the other's memory was freed, and its engine does not know.
    assert await left.tell(recomputing(1)), left.refused
    assert server.computed[-1] == marker
    assert sum(len(memory) for _, memory in server.buffers.values()) == WEIGHTS + CACHE + SCRATCH
    assert await left.ask(getting(tensor(weights, 1024, 512)), 512) == SECOND
    # An engine that comes later has them too.
    again = await pool.engine()
    assert (await load(again, b"c"))[0] == weights
    await left.leave()
    assert await again.tell(recomputing(1)), again.refused
    await again.leave()
    assert server.wrong == []


async def test_an_engine_may_free_shared_weights_itself(scope: TaskScope) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    weights, *_ = await load(first)
    await load(second)
    free = request(Command.FREE_BUFFER, struct.pack("<Q", weights[0]))
    assert await first.tell(free)
    assert await second.ask(getting(tensor(weights, 0, 1024)), 1024) == FIRST
    assert weights[0] in pool.server.buffers
    assert await second.tell(free)
    assert weights[0] not in pool.server.buffers
    assert not await first.tell(setting(tensor(weights, 0, 1024), FIRST))
    assert "was not allocated by this session" in first.refused


@pytest.mark.parametrize("what", ["set", "get", "part", "graph", "again", "reference", "init", "free"])
async def test_weights_that_an_engine_has_freed_are_not_there_for_it_any_more(scope: TaskScope, what: str) -> None:
    digest = blake3(SECOND).digest()
    pool = Pool(scope, weights=OnDisk(SECOND))
    first, second = await pool.engine([digest]), await pool.engine([digest])
    weights, _, scratch = await load(first, b"a")
    await load(second, b"b")
    free = request(Command.FREE_BUFFER, struct.pack("<Q", weights[0]))
    assert await first.tell(free)
    there, here = tensor(weights, 0, 512), tensor(scratch, 64, 512, b"a")
    sent = {
        "set": setting(tensor(weights, 0, 1024), FIRST),
        "get": getting(there),
        "part": getting(tensor((scratch[0], weights[1]), 0, 64)),
        "graph": computing(2, there, here),
        # Computed before, with what is gone.
        "again": recomputing(1),
        "reference": referring(tensor(weights, 1024, 512), 0),
        "init": request(Command.INIT_TENSOR, there.pack()),
        "free": free,
    }
    assert not await first.tell(sent[what])
    assert first.refused
    # They are still there for the one that uses them.
    assert await second.ask(getting(tensor(weights, 0, 1024)), 1024) == FIRST
    assert await second.tell(recomputing(1)), second.refused
    assert pool.server.computed[-1] == b"b"
    assert pool.server.wrong == []


async def test_graphs_of_two_engines_have_the_same_numbers(scope: TaskScope) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    await load(first, b"a")
    *_, scratch = await load(second, b"b")
    assert await first.tell(recomputing(1))
    assert await second.tell(recomputing(1))
    assert pool.server.computed == [b"a", b"b", b"a", b"b"]
    assert Command.GRAPH_RECOMPUTE in pool.server.seen
    assert not await second.tell(recomputing(2))
    assert "was not computed before" in second.refused
    await asyncio.wait([second.life])
    assert await first.tell(recomputing(1))
    assert pool.server.wrong == []
    assert scratch[0] not in pool.server.buffers


async def test_more_graphs_than_the_server_keeps(scope: TaskScope, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.rpc_memory._MAX_GRAPHS", 4)
    monkeypatch.setattr(sharing, "MAX_GRAPHS", 4)
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    weights, _, scratch = await load(first, b"a")
    await load(second, b"b")
    for uid in (2, 3, 4):
        assert await first.tell(computing(uid, tensor(weights, 0, 1024), tensor(scratch, 64, 1024, b"a")))
    # Those of the other one went with them.
    assert await second.tell(recomputing(1)), second.refused
    assert pool.server.computed[-1] == b"b"
    assert await first.tell(recomputing(4)), first.refused
    assert pool.server.wrong == []


def forbidden(buffer: Buffer, own: Buffer) -> dict[str, bytes]:
    """What would write to a buffer, by name."""
    there, here = tensor(buffer, 0, 512), tensor(own, 0, 512)
    return {
        "set": setting(there, b"\x07" * 512),
        "a part": setting(tensor(buffer, 0, 512), FIRST[:512]),
        "2d": request(Command.SET_TENSOR_2D, there.pack() + struct.pack("<QQQQ", 0, 4, 1, 4) + bytes(4)),
        "memset": request(Command.MEMSET_TENSOR, there.pack() + struct.pack("<QQB", 0, 512, 0)),
        "clear": request(Command.BUFFER_CLEAR, struct.pack("<QB", buffer[0], 0)),
        "copy": request(Command.COPY_TENSOR, here.pack() + there.pack()),
        "wait": request(WAIT, Wait(memoryview(there.pack()), 0, 512, 1).pack()),
        "graph": computing(9, here, there),
        "reference": referring(there, 0),
        "init": request(Command.INIT_TENSOR, tensor(buffer, 0, WEIGHTS + 64).pack()),
    }


@pytest.mark.parametrize("what", list(forbidden((1, 64), (2, 128))))
@pytest.mark.parametrize("which", ["first", "second"])
async def test_nobody_writes_to_shared_weights(scope: TaskScope, what: str, which: str) -> None:
    digest = blake3(SECOND).digest()
    pool = Pool(scope, weights=OnDisk(SECOND))
    engines = [await pool.engine([digest]), await pool.engine([digest])]
    both = [await load(engine, marker) for engine, marker in zip(engines, (b"a", b"b"), strict=True)]
    number = ["first", "second"].index(which)
    writer, reader = engines[number], engines[1 - number]
    weights, _, scratch = both[number]
    assert not await writer.tell(forbidden(weights, scratch)[what])
    assert (
        "other engines use" in writer.refused or "another engine uses" in writer.refused or "outside" in writer.refused
    )
    # The other one goes on, with its weights.
    assert await reader.ask(getting(tensor(weights, 0, 1024)), 1024) == FIRST
    assert await reader.ask(getting(tensor(weights, 1024, 512)), 512) == SECOND
    assert await reader.tell(recomputing(1)), reader.refused
    assert pool.server.wrong == []


@pytest.mark.parametrize("what", list(forbidden((1, 64), (2, 128))))
async def test_nobody_reaches_another_engines_memory(scope: TaskScope, what: str) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    *_, scratch = await load(first, b"a")
    *_, own = await load(second, b"b")
    sent = forbidden(scratch, own) | {
        "get": getting(tensor(scratch, 0, 512)),
        "source": computing(9, tensor(scratch, 0, 512), tensor(own, 0, 512)),
        "free": request(Command.FREE_BUFFER, struct.pack("<Q", scratch[0])),
        "forged address": getting(tensor((own[0], scratch[1]), 0, 512)),
    }
    names = [what] if what != "set" else ["set", "get", "source", "free", "forged address"]
    for name in names:
        thief = await pool.engine()
        *_, own = await load(thief, b"c")
        assert not await thief.tell(sent[name])
        assert (
            "allocated by this session" in thief.refused or "outside" in thief.refused or "content 0" in thief.refused
        )
    assert await first.tell(recomputing(1))
    assert await first.ask(getting(tensor(scratch, 64, 1024)), 1024) == b"a" * 1024
    assert await first.ask(getting(tensor(scratch, 0, 64)), 64) == b"a" * 64
    assert pool.server.wrong == []


async def test_other_weights_of_the_same_size_are_refused(scope: TaskScope) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    await load(first)
    weights = await second.allocate(WEIGHTS)
    assert not await second.tell(setting(tensor(weights, 0, 1024), b"\x03" * 1024))
    assert "would be changed" in second.refused
    assert await first.tell(recomputing(1))


async def test_what_is_on_disk_is_not_read_again_and_what_is_in_memory_is_offered(scope: TaskScope) -> None:
    digests = [blake3(FIRST).digest(), blake3(SECOND).digest()]
    disk = OnDisk(FIRST)
    pool = Pool(scope, weights=disk)
    first = await pool.engine(digests)
    weights = await first.allocate(WEIGHTS)
    assert first.opened.digests == digests[0]
    large = setting(tensor(weights, 1024, 512), SECOND)
    assert await first.tell(referring(tensor(weights, 0, 1024), 0), large)
    assert disk.reads == 1
    second = await pool.engine(digests)
    assert second.opened.digests == digests[0] + digests[1]
    assert await second.allocate(WEIGHTS) == weights
    seen = len(pool.server.seen)
    assert await second.tell(referring(tensor(weights, 0, 1024), 0), referring(tensor(weights, 1024, 512), 1))
    assert disk.reads == 1
    assert pool.server.seen[seen:] == [Command.GET_ALIGNMENT]
    # At another place it is another tensor.
    assert not await second.tell(referring(tensor(weights, 2048, 512), 1))


async def test_a_large_weight_is_compared_as_it_comes(scope: TaskScope) -> None:
    pool = Pool(scope, limit=1 << 26)
    first, second = await pool.engine(), await pool.engine()
    data = random.Random(5).randbytes(3 << 20)
    weights = await first.allocate(4 << 20)
    assert await first.tell(setting(tensor(weights, 0, len(data)), data))
    assert await second.allocate(4 << 20) == weights
    seen = len(pool.server.seen)
    assert await second.tell(setting(tensor(weights, 0, len(data)), data))
    assert pool.server.seen[seen:] == [Command.GET_ALIGNMENT]
    assert not await second.tell(setting(tensor(weights, 0, len(data)), data[:-1] + b"\0"))
    assert "would be changed" in second.refused


async def test_a_buffer_in_which_a_tensor_is_half_set_is_not_shared(scope: TaskScope) -> None:
    pool = Pool(scope, limit=1 << 26)
    first, second = await pool.engine(), await pool.engine()
    weights = await first.allocate(4 << 20)
    assert await first.tell(setting(tensor(weights, 3 << 20, 1024), FIRST))
    whole = setting(tensor(weights, 0, 2 << 20), bytes(2 << 20))
    for at in (0, 1000, 2000):
        # Each is taken when the one before was processed.
        await first.stream.write(whole[at : at + 1000])
    assert (await second.allocate(4 << 20))[0] != weights[0]


async def test_the_limit_is_for_all_of_them_together(scope: TaskScope) -> None:
    pool = Pool(scope, limit=WEIGHTS + 3 * CACHE)
    first, second = await pool.engine(), await pool.engine()
    weights = await first.allocate(WEIGHTS)
    assert await first.tell(*weights_of(weights))
    assert (await first.allocate(CACHE))[0]
    assert await second.allocate(WEIGHTS) == weights
    assert (await second.allocate(2 * CACHE))[0]
    assert await second.allocate(64) == (0, 0)
    await first.leave()
    assert (await second.allocate(CACHE))[0]
    assert await second.allocate(64) == (0, 0)


async def test_all_sessions_end_with_the_server(scope: TaskScope) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    await load(first)
    pool.server.crash()
    await asyncio.wait([first.life, second.life])
    assert "engine ended" in first.refused
    assert "engine ended" in second.refused
    # The next ones have another.
    await load(await pool.engine())
    assert len(pool.made) == 2


async def test_all_sessions_end_with_the_connection(scope: TaskScope) -> None:
    pool = Pool(scope)
    first, second = await pool.engine(), await pool.engine()
    await load(first)
    await pool.server.stop()
    assert not await first.tell()
    await asyncio.wait([first.life, second.life])
    assert second.refused


class _Actor:
    """An engine that sends whatever comes to its mind. `known`: every buffer that anybody ever had."""

    def __init__(self, engine: Engine, marker: bytes, known: list[Buffer]) -> None:
        self.engine = engine
        self.marker = marker
        self._known = known

    async def begin(self) -> None:
        """Load."""
        self.weights, self.cache, self.scratch = await load(self.engine, self.marker)
        self._known += [self.weights, self.cache, self.scratch]

    def _place(self, chance: random.Random, size: int) -> Tensor:
        """Mostly within its own buffers; else with the handle or the address of any other."""
        buffer = chance.choice([self.weights, self.cache, self.scratch])
        if chance.random() < 0.2:
            buffer = chance.choice(self._known)
        if chance.random() < 0.1:
            buffer = buffer[0], chance.choice(self._known)[1]
        return tensor(buffer, chance.choice([0, 64, 1024, 1536]), size, self.marker)

    def act(self, chance: random.Random) -> tuple[bytes, bool]:
        """One request that is not answered, and whether it leaves all buffers where they are."""
        size = chance.choice([64, 256])
        place, marker = self._place(chance, size), self.marker
        match chance.randrange(8):
            case 0:
                return setting(place, marker * size), True
            case 1:
                return computing(chance.randrange(1, 4), self._place(chance, size), place), True
            case 2:
                return recomputing(1), True
            case 3:
                return request(Command.BUFFER_CLEAR, struct.pack("<QB", place.buffer, marker[0])), True
            case 4:
                own = place.buffer in {self.weights[0], self.cache[0], self.scratch[0]}
                return request(Command.FREE_BUFFER, struct.pack("<Q", place.buffer)), not own
            case 5:
                return request(Command.INIT_TENSOR, place.pack()), True
            case 6:
                return chance.choice(weights_of(self.weights)), True
            case _:
                return request(Command.MEMSET_TENSOR, place.pack() + struct.pack("<QQB", 0, 64, marker[0])), True

    def check(self, buffers: dict[int, tuple[int, bytearray]]) -> None:
        """The weights are what they were, and nothing of anybody else is in its own memory."""
        assert bytes(buffers[self.weights[0]][1][:1536]) == FIRST + SECOND
        for pointer, _ in (self.cache, self.scratch):
            assert set(buffers[pointer][1]) <= {0, self.marker[0]}


@pytest.mark.parametrize("seed", range(8))
async def test_no_mixture_of_requests_reaches_what_is_anothers(scope: TaskScope, seed: int) -> None:
    chance = random.Random(seed)
    pool, known = Pool(scope), list[Buffer]()
    actors = [_Actor(await pool.engine(), marker, known) for marker in (b"a", b"b", b"c")]
    refused = passed = 0
    for actor in actors:
        await actor.begin()
    for _ in range(120):
        number = chance.randrange(3)
        # Two at once, whose requests mix as they come.
        moves = [(actor, *actor.act(chance)) for actor in (actors[number], actors[number - 1])]
        fine = await asyncio.gather(*(actor.engine.tell(frame) for actor, frame, _ in moves))
        for (actor, _, stays), passes in zip(moves, fine, strict=True):
            passed, refused = passed + passes, refused + (not passes)
            if stays and passes:
                continue
            if passes:
                await actor.engine.leave()
            place = actors.index(actor)
            actors[place] = _Actor(await pool.engine(), actor.marker, known)
            await actors[place].begin()
        assert pool.server.wrong == []
        assert len(pool.made) == 1
        for actor in actors:
            actor.check(pool.server.buffers)
    assert refused > 20
    assert passed > 40


@pytest.mark.parametrize("seed", range(6))
async def test_requests_of_several_engines_arrive_in_pieces_of_any_size(scope: TaskScope, seed: int) -> None:
    """Pieces of one engine's requests lie between those of others'. Each gets its own answers, of its own memory."""
    chance = random.Random(seed)
    pool = Pool(scope)
    engines = {marker: await pool.engine() for marker in (b"a", b"b", b"c")}
    memory = {marker: await load(engine, marker) for marker, engine in engines.items()}
    for _ in range(25):
        pieces: dict[bytes, list[bytes]] = {}
        expected: dict[bytes, bytes] = {}
        for marker, (weights, cache, scratch) in memory.items():
            size = 64 * chance.randrange(1, 9)
            # Not where the graph writes.
            buffer, at = chance.choice([(cache, 1024), (scratch, 2048)])
            place = tensor(buffer, at, size, marker)
            data = bytes([marker[0], chance.randrange(256)]) * (size // 2)
            frames = [chance.choice(weights_of(weights)), recomputing(1), setting(place, data)]
            chance.shuffle(frames)
            whole = b"".join((*frames, getting(place)))
            cuts = sorted(chance.sample(range(1, len(whole)), chance.randrange(1, 6)))
            pieces[marker] = [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
            expected[marker] = data
        while waiting := [marker for marker, left in pieces.items() if len(left) > 1]:
            marker = chance.choice(waiting)
            await engines[marker].stream.write(pieces[marker].pop(0))
        asked = [engines[marker].ask(pieces[marker][0], len(expected[marker])) for marker in engines]
        assert await asyncio.gather(*asked) == [expected[marker] for marker in engines]
    assert pool.server.wrong == []
    for marker, (weights, *_) in memory.items():
        assert bytes(pool.server.buffers[weights[0]][1][:1536]) == FIRST + SECOND
        assert engines[marker].refused == ""
