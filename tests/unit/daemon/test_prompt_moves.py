"""Caches between two nodes: what is given to whom, and what is taken of what comes."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from tests.support.bulk_pipe import BulkPipe
from tests.support.examples import examples

from mesh_llm.core.performance.prediction import Link
from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.core.types.announcement import Standing
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import TransportSilentError
from mesh_llm.daemon import prompt_moves
from mesh_llm.daemon.link_meter import Measured
from mesh_llm.daemon.prompt_moves import Held, PromptMoves, Wanted
from mesh_llm.net.mesh import MeshNet
from mesh_llm.wire.codec import encode
from mesh_llm.wire.llama_state import State, chain, plain_layout, read_state, structure
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import ResetCode, StreamType
from mesh_llm.wire.mesh.streams import (
    MAX_CACHE_ANSWER,
    MAX_CACHE_QUESTION,
    WANTED,
    CacheOffer,
    CacheParameters,
    CacheQuestion,
    CacheRefused,
    Facts,
    cache_key,
    decode_cache_answer,
    decode_cache_question,
    mark_proof,
)

ASKER, HOLDER = NodeId("a" * 64), NodeId("b" * 64)
IDENTITY = b"i" * 32
LAYOUT = plain_layout((1, 1), 8, 8, "f16", streams=2, context=4096)
TOKENS = [number % 331 for number in range(1000)]
MARKS = (Mark(b"first" + bytes(11), 100), Mark(b"whole" + bytes(11), 4000))
_TURNS = 5
"""Of the event loop, that a measurement takes."""
ALL = 768
"""Whole blocks of TOKENS."""


class Stream(BulkPipe):
    """One end of a PeerStream in memory."""

    def abort(self, code: ResetCode = ResetCode.CANCELLED) -> None:
        assert code in ResetCode
        super().abort()

    def break_off(self, reason: str) -> ConnectionError:
        self.abort()
        return ConnectionError(f"protocol error: {reason}")


def state_file(tokens: list[int], filling: bytes = b"\x11\x2c") -> BinaryIO:
    """What an engine has of these tokens."""
    file = memory()
    for part in structure(LAYOUT, tokens):
        file.write(filling * (part // 2) if isinstance(part, int) else part)
    file.flush()
    return file


def memory() -> BinaryIO:
    return os.fdopen(os.memfd_create("test"), "w+b")


@dataclass
class Holdings:
    """What the holder has: one prompt."""

    tokens: list[int] = field(default_factory=lambda: list(TOKENS))
    marks: tuple[Mark, ...] = MARKS
    asked: int = 0
    came: asyncio.Event = field(default_factory=asyncio.Event)
    wait: asyncio.Event | None = None

    async def held(self, identity: bytes, knows: Callable[[bytes], bool]) -> Held | None:
        self.asked += 1
        self.came.set()
        if self.wait is not None:
            await self.wait.wait()
        if identity != IDENTITY or not any(knows(mark.key) for mark in self.marks):
            return None
        return Held(state_file(self.tokens), LAYOUT)


Serve = Callable[[Stream, Any, bytes], Awaitable[None]]


class Net:
    """A mesh of two: streams that one opens are served by the other."""

    def __init__(self, node_id: NodeId) -> None:
        self.node_id = node_id
        self.streams = self
        self.serve: Serve | None = None
        self.other: Net | None = None
        self.served: list[asyncio.Task[None]] = []
        self.next_streams: list[tuple[Stream, Stream]] = []

    def register(self, kind: StreamType, handler: Serve, *, scope: Scope, per_peer: int) -> None:
        assert (kind, scope, per_peer) == (StreamType.PROMPT_CACHE, Scope.SERVE, 2)
        self.serve = handler

    async def open(self, node: NodeId, kind: StreamType, parameters: bytes, scope: Scope) -> Stream:
        assert self.other is not None
        assert self.other.serve is not None
        assert (node, kind, scope) == (self.other.node_id, StreamType.PROMPT_CACHE, Scope.SERVE)
        here, there = self.next_streams.pop(0) if self.next_streams else cast("tuple[Stream, Stream]", Stream.pair())
        peer = SimpleNamespace(node=self.node_id)
        self.served.append(
            asyncio.get_running_loop().create_task(self._served(self.other.serve, there, peer, parameters))
        )
        return here

    async def _served(self, serve: Serve, stream: Stream, peer: Any, parameters: bytes) -> None:
        try:
            await serve(stream, peer, parameters)
        except ConnectionError:
            stream.abort()


@dataclass
class Pair:
    """An asker and a holder."""

    asker: PromptMoves
    holder: PromptMoves
    net: Net
    holdings: Holdings
    now: list[float]
    links: list[Link | None]
    standings: dict[NodeId, Standing]
    moves: Callable[[Net], PromptMoves]
    measured: int = 0

    async def fetch(
        self, tokens: list[int] = TOKENS, marks: tuple[Mark, ...] = MARKS, identity: bytes = IDENTITY, least: int = 1
    ) -> tuple[int, bytes]:
        wanted = Wanted(node=HOLDER, identity=identity, layout=LAYOUT, marks=marks, tokens=tokens)
        with memory() as file:
            count = await self.asker.fetch(wanted, file, lambda found: found >= least)
            return count, os.pread(file.fileno(), 1 << 24, 0)

    def answer_by(self, serve: Serve) -> None:
        """The holder does something else."""
        assert self.net.other is not None
        self.net.other.serve = serve


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    one, other = Net(ASKER), Net(HOLDER)
    one.other, other.other = other, one
    now, links, holdings = [100.0], [Link(one_way_seconds=0.001, bytes_per_second=1e8)], Holdings()

    async def measure(_node: NodeId) -> Measured:
        made.measured += 1
        for _ in range(_TURNS):
            await asyncio.sleep(0)
        link = links[-1]
        if link is None:
            raise ConnectionError("gone")
        return Measured(link, Facts(), now[0])

    async def take(_size: int) -> None:
        await asyncio.sleep(0)

    def moves(net: Net) -> PromptMoves:
        return PromptMoves(cast("MeshNet", net), holdings, measure, take, standing, lambda: now[0])

    def standing(node: NodeId) -> Standing:
        return standings.get(node, "stranger")

    standings: dict[NodeId, Standing] = {ASKER: "member", HOLDER: "member"}
    made = Pair(moves(one), moves(other), one, holdings, now, list[Link | None](links), standings, moves)
    links = made.links
    yield made
    await made.asker.close()
    await made.holder.close()
    await asyncio.gather(*one.served)


async def test_what_both_know_moves_in_whole_blocks(pair: Pair) -> None:
    count, data = await pair.fetch()
    assert count == ALL
    state = read_state(memoryview(data), LAYOUT)
    assert isinstance(state, State)
    assert state.tokens == tuple(TOKENS[:ALL])
    assert (pair.asker.count.taken, pair.holder.count.given) == (1, 1)
    assert pair.holder.count.given_bytes == ALL * LAYOUT.token_bytes

    longer = [*TOKENS[:600], *range(1000, 2000)]
    count, data = await pair.fetch(longer)
    assert count == 512
    state = read_state(memoryview(data), LAYOUT)
    assert isinstance(state, State)
    assert state.tokens == tuple(TOKENS[:512])


@pytest.mark.parametrize(
    "question",
    [
        {"identity": b"x" * 32},
        {"marks": (Mark(b"other" + bytes(11), 4000),)},
        {"tokens": [*TOKENS[:300], *range(1000, 2000)]},
        {"tokens": [1, *TOKENS[1:]]},
        {"tokens": TOKENS[:100]},
        {"marks": ()},
    ],
)
async def test_someone_elses_cache_is_not_given(pair: Pair, question: dict[str, Any]) -> None:
    """Another model, a prompt of which the asker knows the request but not the tokens, or nothing of it."""
    assert (await pair.fetch(**question))[0] == 0
    assert pair.holder.count.given == 0
    assert pair.asker.count.refused == 0


async def test_a_question_of_one_node_is_of_no_use_to_another(pair: Pair) -> None:
    """Proofs that were made for this holder by another asker, or for another holder."""
    for maker, holder in ((NodeId("c" * 64), HOLDER), (ASKER, NodeId("c" * 64))):
        key = cache_key(maker, holder, b"n" * 16)
        stream = await pair.net.open(
            HOLDER, StreamType.PROMPT_CACHE, encode(CacheParameters(IDENTITY, b"n" * 16)), Scope.SERVE
        )
        question = CacheQuestion(tuple(mark_proof(mark.key, key) for mark in MARKS), tuple(chain(TOKENS, key)))
        await stream.write_frame(encode(question))
        assert isinstance(decode_cache_answer(await stream.read_frame(2048) or b""), CacheRefused)


async def test_an_offer_that_is_not_worth_it_is_left(pair: Pair) -> None:
    assert (await pair.fetch(least=ALL + 1))[0] == 0
    await asyncio.gather(*pair.net.served)
    assert pair.holder.count.given == 0


async def test_one_cache_is_given_at_a_time_and_not_too_many(pair: Pair) -> None:
    pair.holdings.wait = asyncio.Event()
    first = asyncio.get_running_loop().create_task(pair.fetch())
    await pair.holdings.came.wait()
    assert (await pair.fetch())[0] == 0
    pair.holdings.wait.set()
    assert (await first)[0] == ALL
    for _ in range(40):
        await pair.fetch()
    assert pair.holdings.asked == 19
    pair.now[0] += 30.0
    assert (await pair.fetch())[0] == ALL


class Slow(Stream):
    """A holder's end whose asker takes no bytes of a cache."""

    stuck: asyncio.Event

    async def write(self, data: bytes) -> None:
        if len(data) > MAX_CACHE_ANSWER:
            self.stuck.set()
            await asyncio.Event().wait()
        await super().write(data)


@pytest.fixture
def slow(pair: Pair) -> Slow:
    """The next stream of the asker to the holder; what others open is as usual."""
    here, there = Stream.pair()
    made = Slow(there._coming, there._going)  # pyright: ignore[reportPrivateUsage]
    made.stuck = asyncio.Event()
    pair.net.next_streams.append((cast("Stream", here), made))
    return made


async def test_a_slow_asker_keeps_nobody_else_waiting(pair: Pair, slow: Slow) -> None:
    waiting = asyncio.get_running_loop().create_task(pair.fetch())
    await slow.stuck.wait()
    assert pair.net.other is not None
    third = Net(NodeId("c" * 64))
    third.other = pair.net.other
    pair.standings[third.node_id] = "member"
    wanted = Wanted(node=HOLDER, identity=IDENTITY, layout=LAYOUT, marks=MARKS, tokens=TOKENS)
    other = pair.moves(third)
    with memory() as file:
        assert await other.fetch(wanted, file, lambda _: True) == ALL
    await other.close()
    await asyncio.gather(*third.served)
    slow.abort()
    waiting.cancel()
    pair.net.served.pop().cancel()


async def test_an_asker_that_takes_nothing_is_left_soon(
    pair: Pair, slow: Slow, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_moves, "_QUESTION_SECONDS", 0.5)
    # At this rate the whole cache may take hours.
    monkeypatch.setattr(prompt_moves, "_LEAST_RATE", 1.0)
    assert (await pair.fetch())[0] == 0
    assert slow.stuck.is_set()
    monkeypatch.setattr(prompt_moves, "_QUESTION_SECONDS", 30.0)
    assert (await pair.fetch())[0] == ALL


class Silent(Stream):
    """A stream whose transport never brings it to the holder, which answers on another one."""

    async def read_frame(self, limit: int) -> bytes | None:
        raise TransportSilentError(f"{limit} bytes do not come by TCP")


@pytest.mark.parametrize(("silent", "moved"), [(1, ALL), (2, 0)])
async def test_where_only_tcp_is_silent_the_holder_is_asked_once_more(pair: Pair, silent: int, moved: int) -> None:
    for _ in range(silent):
        here, there = Stream.pair()
        lost = Silent(here._coming, here._going)  # pyright: ignore[reportPrivateUsage]
        pair.net.next_streams.append((lost, cast("Stream", there)))
    assert (await pair.fetch())[0] == moved


def offering(tokens: int, size: int, data: bytes) -> Serve:
    async def serve(stream: Stream, _peer: Any, _parameters: bytes) -> None:
        await stream.read_frame(MAX_CACHE_QUESTION)
        await stream.write_frame(encode(CacheOffer(tokens, size)))
        if await stream.read_frame(1) == WANTED:
            await stream.write(data)
        await stream.finish()

    return serve


SIZE = 512 * LAYOUT.token_bytes
ODD = {
    "more tokens than were asked for": offering(1024, 1024 * LAYOUT.token_bytes, b""),
    "a size that does not fit": offering(512, SIZE + 1, bytes(SIZE + 1)),
    "more than offered": offering(512, SIZE, bytes(SIZE + 1)),
    "no numbers": offering(512, SIZE, bytes(SIZE - 2) + b"\0\x7e"),
    "infinite numbers": offering(512, SIZE, b"\0\xfc" + bytes(SIZE - 2)),
}


@pytest.mark.parametrize("lie", ODD.values(), ids=ODD)
async def test_what_is_odd_is_refused_and_its_sender_not_asked_again(pair: Pair, lie: Serve) -> None:
    assert await pair.asker.speed_of(HOLDER, 1.0) is not None
    pair.answer_by(lie)
    assert (await pair.fetch())[0] == 0
    assert pair.asker.count.refused == 1
    assert await pair.asker.speed_of(HOLDER, 1.0) is None
    pair.now[0] += 3601.0
    assert await pair.asker.speed_of(HOLDER, 1.0) is not None


async def test_what_ends_too_early_is_not_used(pair: Pair) -> None:
    pair.answer_by(offering(512, SIZE, bytes(SIZE - 1)))
    assert (await pair.fetch())[0] == 0
    assert pair.asker.count.taken == 0


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=40).map(lambda text: encode(CacheRefused(text.hex())))))
@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_answer_of_a_holder_does_no_harm(pair: Pair, answer: bytes) -> None:
    async def serve(stream: Stream, _peer: Any, _parameters: bytes) -> None:
        await stream.read_frame(MAX_CACHE_QUESTION)
        await stream.write_frame(answer)
        await stream.finish()

    pair.answer_by(serve)
    assert (await pair.fetch())[0] == 0


@given(st.binary(max_size=200), st.binary(max_size=300))
@examples(60, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_any_question_is_refused_or_broken_off(pair: Pair, parameters: bytes, question: bytes) -> None:
    stream = await pair.net.open(HOLDER, StreamType.PROMPT_CACHE, parameters, Scope.SERVE)
    await stream.write_frame(question)
    await stream.finish()
    await asyncio.gather(*pair.net.served)
    assert pair.holdings.asked == 0


async def test_an_asker_that_says_nothing_is_left(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_moves, "_QUESTION_SECONDS", 0.05)
    parameters = encode(CacheParameters(IDENTITY, b"n" * 16))
    silent = await pair.net.open(HOLDER, StreamType.PROMPT_CACHE, parameters, Scope.SERVE)
    with pytest.raises(ConnectionError):
        await silent.read(1)


async def test_a_holder_that_waits_for_an_answer_gives_up(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_moves, "_QUESTION_SECONDS", 0.05)
    key = cache_key(ASKER, HOLDER, b"n" * 16)
    parameters = encode(CacheParameters(IDENTITY, b"n" * 16))
    silent = await pair.net.open(HOLDER, StreamType.PROMPT_CACHE, parameters, Scope.SERVE)
    question = CacheQuestion(tuple(mark_proof(mark.key, key) for mark in MARKS), tuple(chain(TOKENS, key)))
    assert decode_cache_question(encode(question)) == question
    await silent.write_frame(encode(question))
    assert isinstance(decode_cache_answer(await silent.read_frame(2048) or b""), CacheOffer)
    with pytest.raises(ConnectionError):
        await silent.read(1)
    monkeypatch.setattr(prompt_moves, "_QUESTION_SECONDS", 30.0)
    assert (await pair.fetch())[0] == ALL


async def test_a_link_is_measured_once_and_corrected_by_moves(pair: Pair) -> None:
    assert await pair.asker.speed_of(HOLDER, 0.0) is None
    speed = await pair.asker.speed_of(HOLDER, 1.0)
    assert speed is not None
    assert pair.measured == 1
    predicted = speed.seconds(10**8)
    pair.asker.observed(HOLDER, 10**8, 3 * predicted, 0.0)
    corrected = await pair.asker.speed_of(HOLDER, 0.0)
    assert corrected is not None
    assert corrected.seconds(10**8) == pytest.approx(2 * predicted)
    pair.now[0] += 1801.0
    pair.links.append(Link(one_way_seconds=0.001, bytes_per_second=1e7))
    assert await pair.asker.speed_of(HOLDER, 0.0) == corrected
    for _ in range(2 * _TURNS):
        await asyncio.sleep(0)
    again = await pair.asker.speed_of(HOLDER, 0.0)
    assert again is not None
    assert (again.link.bytes_per_second, again.lag) == (1e7, corrected.lag)


async def test_only_members_that_may_answer_are_asked(pair: Pair) -> None:
    """A peer can name any node: those that are not known are not even dialled."""
    assert await pair.asker.speed_of(NodeId("d" * 64), 1.0) is None
    for standing in ("client", "stranger"):
        pair.standings[HOLDER] = standing
        assert await pair.asker.speed_of(HOLDER, 1.0) is None
    assert pair.measured == 0


async def test_strangers_are_given_nothing_and_learn_nothing(pair: Pair) -> None:
    """One that came by a public listing may serve, but is not told whether somebody's prompt was seen here."""
    for standing in ("client", "stranger"):
        pair.standings[ASKER] = standing
        assert (await pair.fetch())[0] == 0
    assert (pair.holdings.asked, pair.holder.count.given) == (0, 0)
    pair.standings[ASKER] = "member"
    assert (await pair.fetch())[0] == ALL


async def test_few_links_are_measured_at_once_whoever_is_named(pair: Pair) -> None:
    """Each takes megabytes: one who sends requests must not have a host pour into all members together."""
    named = [NodeId(f"{number:064x}") for number in range(20)]
    pair.standings.update(dict.fromkeys(named, "member"))
    for node in named:
        assert await pair.asker.speed_of(node, 0.0) is None
    for _ in range(2 * _TURNS):
        await asyncio.sleep(0)
    assert pair.measured == 2
    for node in named:
        await pair.asker.speed_of(node, 1.0)
    assert pair.measured == 20


async def test_a_link_that_cannot_be_measured_moves_nothing(pair: Pair) -> None:
    pair.links.append(None)
    assert await pair.asker.speed_of(HOLDER, 1.0) is None
    assert await pair.asker.speed_of(HOLDER, 1.0) is None
    assert pair.measured == 1
    pair.now[0] += 61.0
    pair.links.append(Link(one_way_seconds=0.001, bytes_per_second=1e8))
    assert await pair.asker.speed_of(HOLDER, 1.0) is not None
