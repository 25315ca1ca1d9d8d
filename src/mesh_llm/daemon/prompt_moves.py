"""Prompt caches that follow a conversation to another host of the same model: PROMPT_CACHE streams, on both sides.

A host that is to read a long prompt asks the node that got it before. The asker shows by hashes that it knows the
prompt (`wire/mesh/streams.py`), and the holder gives rows for exactly the tokens that the asker has shown to know. The
asker writes the rows into a file of its own making, and reads it strictly (`wire/llama_state.py`) before its engine
does. Any failure means that the prompt is read.
"""

import asyncio
import mmap
import os
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import msgspec
import structlog

from mesh_llm.core.performance.prompt_cache import LEAST_TOKENS, Mark, MoveSpeed
from mesh_llm.core.types.announcement import Standing
from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import PromptElsewhere, TransportSilentError
from mesh_llm.daemon.link_meter import Measured
from mesh_llm.engine.probe import post
from mesh_llm.engine.supervisor import EngineReadyInfo
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.connection import Peer
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.llama_state import (
    BLOCK_TOKENS,
    State,
    StateLayout,
    chain,
    check_numbers,
    common_tokens,
    read_state,
    rows,
    streams_of,
    structure,
)
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import ResetCode, StreamType
from mesh_llm.wire.mesh.streams import (
    MAX_CACHE_ANSWER,
    MAX_CACHE_LINKS,
    MAX_CACHE_MARKS,
    MAX_CACHE_QUESTION,
    WANTED,
    CacheOffer,
    CacheParameters,
    CacheQuestion,
    CacheRefused,
    cache_key,
    decode_cache_answer,
    decode_cache_parameters,
    decode_cache_question,
    mark_proof,
)

_PER_PEER = 2
_QUESTION_SECONDS = 5.0
_LEAST_RATE = 2e6
"""Bytes a second that an asker must take: the memory for a cache is not kept for a slower one."""
_MOST_GIVEN = 2
"""Caches that are given at once, to as many nodes: one that takes its time must not keep others waiting."""
_PIECE = 1 << 20
_BURST = 20.0
_SECONDS_A_QUESTION = 3.0
"""Questions of one peer: `_BURST` at once, then one in this many seconds."""
_MOST_PEERS = 1024
_MOST_AT_ONCE = 2
"""Caches that are fetched, and links that are measured: who sends requests may name one node after the other."""
_DISTRUST_SECONDS = 3600.0
_MEASURE_AGAIN_SECONDS = 1800.0
_RETRY_SECONDS = 60.0
_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Held:
    """The state of a slot, in a file in memory, and the layout of the engine that wrote it."""

    file: BinaryIO
    layout: StateLayout


class Holdings(Protocol):
    """What this node has of prompts that were read here."""

    async def held(self, identity: bytes, knows: Callable[[bytes], bool]) -> Held | None:
        """The state that has most of a prompt; `knows`: whether the asker knows the beginning with this key."""
        ...


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is asked for.

    Attributes:
        node: the holder.
        identity: of the engine here; the holder's must be the same.
        layout: of the engine here.
        marks: the beginnings of the prompt.
        tokens: of the prompt.
    """

    node: NodeId
    identity: bytes
    layout: StateLayout
    marks: Sequence[Mark]
    tokens: Sequence[int]


@dataclass
class Moves:
    """How many caches came here and went away since the start, their bytes, and how many were not as they must be."""

    taken: int = 0
    taken_bytes: int = 0
    given: int = 0
    given_bytes: int = 0
    refused: int = 0


@dataclass
class _Known:
    """A peer: what is known of the way to it, and how many questions of it are counted."""

    speed: MoveSpeed | None = None
    measure_at: float = float("-inf")
    measuring: asyncio.Task[object] | None = None
    distrusted_until: float = float("-inf")
    questions: float = 0.0
    asked_at: float = 0.0


class _NothingError(Exception):
    """There is no cache to move; the text says why, as a clause."""


class PromptMoves:
    """Takes prompt caches from other nodes, and gives those of this node. Make it before the mesh starts."""

    def __init__(
        self,
        net: MeshNet,
        holdings: Holdings,
        measure: Callable[[NodeId], Awaitable[Measured]],
        take: Callable[[int], Awaitable[None]],
        standing: Callable[[NodeId], Standing],
        clock: Callable[[], float],
    ) -> None:
        """Answer such streams from now on.

        `measure`: measures the link to a node, or raises ConnectionError, TimeoutError. `take`: returns when so many
        bytes may be sent. `standing`: who a node is; caches come from members and go to members, never strangers.
        """
        self._net = net
        self._holdings = holdings
        self._measure = measure
        self._take = take
        self._standing = standing
        self._clock = clock
        self._peers: OrderedDict[NodeId, _Known] = OrderedDict()
        self._given_to: set[NodeId] = set()
        self._fetching = 0
        self._measuring = 0
        self._scope = TaskScope("prompt-moves")
        self.count = Moves()
        net.streams.register(StreamType.PROMPT_CACHE, self._serve, scope=Scope.SERVE, per_peer=_PER_PEER)

    async def close(self) -> None:
        """Stop measuring."""
        await self._scope.close()

    # Asking.

    async def speed_of(self, node: NodeId, seconds: float) -> MoveSpeed | None:
        """What is known of the way from a node. Where it is unknown, it is measured, and awaited for so many seconds.

        None also for a node that may not answer requests or is a stranger, and for one that sent something odd within
        the last hour.
        """
        if self._standing(node) != "member":
            return None
        known, now = self._known(node), self._clock()
        if now < known.distrusted_until:
            return None
        if now >= known.measure_at and known.measuring is None and self._measuring < _MOST_AT_ONCE:
            self._measuring += 1
            known.measuring = self._scope.spawn(self._measure_link(node, known), f"measure {node[:10]}")
        if known.speed is None and known.measuring is not None:
            await asyncio.wait({known.measuring}, timeout=seconds)
        return known.speed

    def observed(self, node: NodeId, size: int, seconds: float, restore_speed: float) -> None:
        """Moving so many bytes from a node into a slot took so long, or was given up after that."""
        known = self._known(node)
        if known.speed is not None:
            known.speed = known.speed.observed(size, seconds, restore_speed)

    async def fetch(self, wanted: Wanted, file: BinaryIO, worth: Callable[[int], bool]) -> int:
        """Fetch what another node has of a prompt, and write a whole state to `file`.

        `worth`: whether so many tokens are still worth it.

        Returns the tokens that are in it; 0: there is nothing, or nothing good. A cancelled call leaves the file of no
        use.
        """
        if self._fetching >= _MOST_AT_ONCE:
            return 0
        self._fetching += 1
        try:
            try:
                tokens = await self._fetch(wanted, file, worth)
            except TransportSilentError:
                # Only TCP to the holder is silent, and it has dropped the question: a new stream takes QUIC.
                file.seek(0)
                file.truncate()
                tokens = await self._fetch(wanted, file, worth)
        except (_NothingError, OSError) as error:
            _log.info("prompt cache not moved", node=wanted.node[:10], reason=str(error))
            return 0
        finally:
            self._fetching -= 1
        self.count.taken += 1
        self.count.taken_bytes += tokens * wanted.layout.token_bytes
        return tokens

    async def _fetch(self, wanted: Wanted, file: BinaryIO, worth: Callable[[int], bool]) -> int:
        nonce = os.urandom(16)
        key = cache_key(self._net.node_id, wanted.node, nonce)
        links = tuple(chain(wanted.tokens, key))[:MAX_CACHE_LINKS]
        marks = tuple(mark_proof(mark.key, key) for mark in wanted.marks[-MAX_CACHE_MARKS:])
        if not links or not marks:
            raise _NothingError("the prompt is too short")
        parameters = encode(CacheParameters(wanted.identity, nonce))
        stream = await self._net.open(wanted.node, StreamType.PROMPT_CACHE, parameters, Scope.SERVE)
        try:
            await stream.write_frame(encode(CacheQuestion(marks, links)))
            offer = await _answer(stream)
            tokens = wanted.tokens[: offer.tokens]
            most = len(links) * BLOCK_TOKENS
            if offer.tokens > most or offer.size != offer.tokens * wanted.layout.token_bytes:
                raise self._odd(wanted.node, f"an offer of {offer.tokens} tokens and {offer.size} bytes")
            if not worth(offer.tokens):
                raise _NothingError(f"its {offer.tokens} tokens are not worth it")
            await stream.write_frame(WANTED)
            for part in structure(wanted.layout, tokens):
                if isinstance(part, bytes):
                    file.write(part)
                else:
                    await _receive(stream, file, part)
            if await stream.read(1):
                raise self._odd(wanted.node, "more bytes than it offered")
            await stream.finish()
        finally:
            stream.abort()
        file.flush()
        outcome = await asyncio.to_thread(checked, file.fileno(), wanted.layout, tokens)
        if outcome is not None:
            raise self._odd(wanted.node, outcome.reason)
        return len(tokens)

    def _odd(self, node: NodeId, reason: str) -> _NothingError:
        """What came is not as it must be: nothing is taken from that node for a while."""
        self.count.refused += 1
        self._known(node).distrusted_until = self._clock() + _DISTRUST_SECONDS
        _log.warning("prompt cache refused", node=node[:10], reason=reason)
        return _NothingError(f"it was refused: {reason}")

    async def _measure_link(self, node: NodeId, known: _Known) -> None:
        try:
            measured = await self._measure(node)
        except (ConnectionError, TimeoutError) as error:
            _log.info("link not measured", node=node[:10], reason=str(error) or "it took too long")
            known.measure_at = self._clock() + _RETRY_SECONDS
        else:
            lag = known.speed.lag if known.speed is not None else 1.0
            known.speed = MoveSpeed(link=measured.link, lag=lag)
            known.measure_at = self._clock() + _MEASURE_AGAIN_SECONDS
            rate = round(measured.link.bytes_per_second / 1e6, 1)
            _log.info("link measured for prompt caches", node=node[:10], megabytes_per_second=rate)
        finally:
            known.measuring = None
            self._measuring -= 1

    def _known(self, node: NodeId) -> _Known:
        known = self._peers.pop(node, None) or _Known()
        self._peers[node] = known
        while len(self._peers) > _MOST_PEERS:
            self._peers.popitem(last=False)
        return known

    # Giving.

    async def _serve(self, stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        asked = decode_cache_parameters(parameters)
        if isinstance(asked, Malformed):
            raise stream.break_off(asked.reason)
        try:
            async with asyncio.timeout(_QUESTION_SECONDS):
                payload = await stream.read_frame(MAX_CACHE_QUESTION)
            question = decode_cache_question(payload) if payload is not None else Malformed("no question")
            if isinstance(question, Malformed):
                raise stream.break_off(question.reason)
            await self._give(stream, peer.node, asked, question)
        except _NothingError as error:
            await stream.write_frame(encode(CacheRefused(str(error))))
        except TimeoutError:
            stream.abort(ResetCode.TIMEOUT)
            return
        await stream.finish()

    async def _give(self, stream: PeerStream, asker: NodeId, asked: CacheParameters, question: CacheQuestion) -> None:
        if self._standing(asker) != "member":
            raise _NothingError("it gives none to nodes that came by a public listing")
        if not self._may_ask(asker):
            raise _NothingError("it asks too often")
        if asker in self._given_to or len(self._given_to) >= _MOST_GIVEN:
            raise _NothingError("other caches are given now")
        key = cache_key(asker, self._net.node_id, asked.nonce)
        proofs = frozenset(question.marks)
        self._given_to.add(asker)
        try:
            held = await self._holdings.held(asked.identity, lambda mark: mark_proof(mark, key) in proofs)
            if held is None:
                raise _NothingError("it has no such cache")
            with held.file as file:
                data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
                # It may have been saved by an engine with another number of slots.
                state = await asyncio.to_thread(read_state, data, streams_of(data, held.layout))
                if isinstance(state, Malformed):
                    # Not a fault: a cache of a kind that is not understood.
                    raise _NothingError("its cache is of another kind")
                count = common_tokens(state.tokens, question.links, key)
                if count < LEAST_TOKENS:
                    raise _NothingError("it has too little of the prompt")
                size = count * held.layout.token_bytes
                await stream.write_frame(encode(CacheOffer(count, size)))
                async with asyncio.timeout(_QUESTION_SECONDS):
                    if await stream.read_frame(len(WANTED)) != WANTED:
                        return
                await self._send(stream, data, state, count)
        finally:
            self._given_to.discard(asker)
        self.count.given += 1
        self.count.given_bytes += size
        _log.info("prompt cache given", node=asker[:10], tokens=count, bytes=size)

    async def _send(self, stream: PeerStream, data: memoryview, state: State, count: int) -> None:
        """Send the rows. Raises TimeoutError as soon as the asker is too slow, not at the end; see `_LEAST_RATE`."""
        clock = asyncio.get_running_loop().time
        sent, seconds = 0, 0.0
        for piece in _pieces(rows(data, state, count)):
            await self._take(len(piece))
            began = clock()
            async with asyncio.timeout(_QUESTION_SECONDS + sent / _LEAST_RATE - seconds):
                await stream.write(piece)
            sent, seconds = sent + len(piece), seconds + clock() - began

    def _may_ask(self, node: NodeId) -> bool:
        known, now = self._known(node), self._clock()
        known.questions = max(0.0, known.questions - (now - known.asked_at) / _SECONDS_A_QUESTION)
        known.asked_at = now
        if known.questions >= _BURST:
            return False
        known.questions += 1.0
        return True


def _pieces(parts: Iterable[memoryview]) -> Iterator[bytes]:
    """The same bytes in pieces that are worth a write."""
    waiting = bytearray()
    for part in parts:
        for at in range(0, len(part), _PIECE):
            waiting += part[at : at + _PIECE]
            if len(waiting) >= _PIECE:
                yield bytes(waiting)
                waiting.clear()
    if waiting:
        yield bytes(waiting)


async def _receive(stream: PeerStream, file: BinaryIO, size: int) -> None:
    while size:
        piece = await stream.read_exact(min(size, _PIECE))
        file.write(piece)
        size -= len(piece)


async def _answer(stream: PeerStream) -> CacheOffer:
    payload = await stream.read_frame(MAX_CACHE_ANSWER)
    answer = decode_cache_answer(payload) if payload is not None else Malformed("no answer")
    if isinstance(answer, Malformed):
        raise stream.break_off(answer.reason)
    if isinstance(answer, CacheRefused):
        raise _NothingError(answer.reason or "it gives none")
    return answer


def checked(file: int, layout: StateLayout, tokens: Sequence[int]) -> Malformed | None:
    """Read a file strictly, as the engine will: nothing but a good state of these tokens passes. Blocks."""
    data = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
    state = read_state(data, layout)
    if isinstance(state, Malformed):
        return state
    if state.tokens != tuple(tokens):
        return Malformed("its tokens are not the prompt's")
    return check_numbers(data, state, layout)


class _Prompt(msgspec.Struct):
    prompt: str


class _Tokens(msgspec.Struct):
    tokens: list[int]


async def prompt_tokens(engine: EngineReadyInfo, elsewhere: PromptElsewhere) -> list[int]:
    """The tokens of a request's prompt, as the engine counts them; empty where that cannot be said."""
    with suppress(*UNREADABLE):
        body = elsewhere.body
        if elsewhere.path == _CHAT:
            answer = await post(engine.address, "/apply-template", body, key=engine.key)
            if answer is None or answer.status != 200:
                return []
            body = answer.body
        elif elsewhere.path != _COMPLETIONS:
            return []
        text = msgspec.json.decode(body, type=_Prompt).prompt
        question = msgspec.json.encode({"content": text, "add_special": True, "parse_special": True})
        counted = await post(engine.address, "/tokenize", question, key=engine.key)
        if counted is not None and counted.status == 200:
            return msgspec.json.decode(counted.body, type=_Tokens).tokens
    return []
