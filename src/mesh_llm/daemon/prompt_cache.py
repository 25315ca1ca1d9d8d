"""Prompt caches that outlive an engine: saved when slots are idle and before engines stop, brought back when needed.

This follows which prompt is in which slot of each engine (`slot_prompts`). A split model may have several engines: what
one of them has saved, any other may bring back, also one of another group, and one of the whole model.
"""

import asyncio
import mmap
import os
import re
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import psutil
import structlog

from mesh_llm.console.status import StatusPromptCaches
from mesh_llm.core.performance.prompt_cache import (
    LEAST_TOKENS,
    RESTORE_SPEED,
    SPLIT_RESTORE_SPEED,
    Mark,
    move_deadline,
    restore_seconds,
    worth,
    worth_moving,
)
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.ports import PromptElsewhere, PromptEnded
from mesh_llm.daemon.prompt_moves import Held, Moves, PromptMoves, Wanted, prompt_tokens
from mesh_llm.daemon.slot_prompts import MOST_REMEMBERED, CachedEngine, Prompt, identity_of
from mesh_llm.engine.probe import get
from mesh_llm.engine.prompt_cache.sealed import Header
from mesh_llm.engine.prompt_cache.store import Entry, PromptCacheStore, Usage
from mesh_llm.engine.slots import Slot, SlotError, SlotRefusedError
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo
from mesh_llm.models.gguf.facts import Shape
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.llama_state import (
    BLOCK_TOKENS,
    StateLayout,
    plain_layout,
    read_state,
    rows,
    streams_of,
    structure,
)

DIRECTORY = "prompts"
"""In the home's cache directory."""

_IDLE_SECONDS = 3.0
"""An engine without a request for so long is idle: its slots are saved."""
_BETWEEN_SECONDS = 60.0
"""From one save to the next, while an engine is used again and again."""
_SPLIT_SAVE_SECONDS = 2.0
"""Longest save of a split model's slot, as predicted: a request that comes meanwhile waits for it. Not at a stop."""
_STOP_SECONDS = 20.0
_ANSWER_SECONDS = 2.0
_END_SECONDS = 0.3
"""For the API to say that a prompt has ended of which the client has the whole answer."""
_BRING_SECONDS = 30.0
_SPEEDS = 3
"""Restores that are remembered of this machine's own models, and of each split model."""
_MEASURE_SHARE = 0.1
"""Of the time that reading takes: so long a link to another node may be measured first, where it is unknown."""
_GIVE_SECONDS = 2.0
"""Longest wait for a slot whose state another node asks for."""
_LEAST_BYTES = 1024
"""Of a request's prompt: a shorter one has no LEAST_TOKENS."""
_MEMORY_FACTOR = 2
"""A state is only taken into memory while so many times its size is free."""
_METRIC = re.compile(rb"^llamacpp:prompt_(tokens|seconds)_total ([0-9.e+]+)", re.MULTILINE)

_log = structlog.get_logger(__name__)


class SlotCaches:
    """Saves and restores the slots of this node's engines; implements core.types.ports.PromptCaches."""

    def __init__(self, store: PromptCacheStore, digests: ChunkDigestStore, clock: Callable[[], float]) -> None:
        """`digests`: of model files; they are computed once for each."""
        self._store = store
        self._digests = digests
        self._clock = clock
        self._engines: dict[tuple[str, int, str], CachedEngine] = {}
        self._restore_speeds: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_SPEEDS))
        self._layouts: dict[bytes, StateLayout] = {}
        self._read_speeds: dict[bytes, float] = {}
        self._reading = asyncio.Lock()
        self.wire: Callable[[ModelName], str] = lambda _: ""
        """How activations of a model that is split here travel, in words; empty for other models."""
        self.moves: PromptMoves | None = None
        """By which caches follow conversations between nodes; set once this node is part of a mesh."""
        self._scope = TaskScope("prompt-caches")
        self._opened = self._scope.spawn(asyncio.to_thread(store.open), "open")

    @property
    def usage(self) -> Usage:
        """What is saved."""
        return self._store.usage

    async def clear(self) -> Usage:
        """Delete all that is saved; returns what there was."""
        return await asyncio.to_thread(self._store.clear)

    async def close(self) -> None:
        """Stop. What was not saved is lost."""
        await self._scope.close()

    # What the engines report.

    def opened(
        self, model: str, term: int, spec: EngineSpec, files: Sequence[Path], token_bytes: int, info: EngineReadyInfo
    ) -> None:
        """An engine of a launch is ready: the only one, or one of several.

        `files`: of its model and projector; `token_bytes`: bytes of KV cache a token.
        """
        if info.slot_control is None:
            return
        key = model, term, info.address
        identity = self._scope.spawn(self._identify(key, spec, files), f"identify {model}#{term}")
        engine = CachedEngine(model, info, spec, token_bytes, identity, partial(self._wire, model))
        self._engines[key] = engine
        engine.keeper = self._scope.supervise(partial(self._keep, engine), f"keep {model}#{term}")

    def closed(self, model: str, term: int, address: str) -> None:
        """The engine at an address has ended."""
        engine = self._engines.pop((model, term, address), None)
        if engine is not None:
            engine.identity.cancel()
            if engine.keeper is not None:
                engine.keeper.cancel()

    async def save(self, model: str, term: int) -> None:
        """Save what is in the slots of a launch that is about to stop; within seconds."""
        engines = self._engines_of(model, term)
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                for prompt in [one for engine in engines for one in engine.running]:
                    await prompt.over.wait()
        found = await asyncio.gather(*(self._found_in_time(engine) for engine in engines))
        try:
            # One after the other: each state is in memory once more while it is written.
            async with asyncio.timeout(_STOP_SECONDS):
                for engine in [one for one, answers in zip(engines, found, strict=True) if answers]:
                    await self._save_all(engine, _STOP_SECONDS)
        except (SlotError, TimeoutError) as error:
            _log.warning("prompt caches not saved", model=model, reason=str(error) or "it took too long")

    async def _found_in_time(self, engine: CachedEngine) -> bool:
        """Find an engine's prompts before it stops. One that hangs must not hold up the stop."""
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._find_prompts(engine)
        except (SlotError, TimeoutError) as error:
            _log.warning("prompt caches not saved", model=engine.name, reason=str(error) or "it took too long")
            return False
        return True

    def _engines_of(self, model: str, term: int) -> list[CachedEngine]:
        return [engine for key, engine in self._engines.items() if key[:2] == (model, term)]

    def _wire(self, model: str) -> str:
        return self.wire(ModelName(model))

    # What the API reports.

    def keeps(self, model: str, term: int) -> bool:
        """Whether the prompts of a launch are saved."""
        return bool(self._engines_of(model, term))

    async def begin(
        self,
        model: str,
        term: int,
        engine: str,
        prompt: Sequence[Mark],
        elsewhere: PromptElsewhere | None = None,
        slot: int | None = None,
    ) -> PromptEnded:
        """A prompt is about to be sent to an engine: bring back what is saved of it here, or what another node has."""
        known = self._engines.get((model, term, engine))
        if known is None:
            return lambda: None
        if prompt and prompt[-1].size >= _LEAST_BYTES:
            try:
                async with asyncio.timeout(_BRING_SECONDS):
                    await self._bring_back(known, prompt, slot)
                    if elsewhere is not None and self.moves is not None:
                        await self._move(known, prompt, elsewhere, self.moves, slot)
            except (SlotError, OSError) as error:
                # A TimeoutError is an OSError too.
                _log.warning("prompt cache not used", model=model, reason=str(error) or "it took too long")
        return known.begin(prompt)

    # Saving.

    async def _keep(self, engine: CachedEngine) -> None:
        """Follow an engine's prompts, and save its slots when it is idle, until it ends."""
        while True:
            await engine.ended.wait()
            engine.ended.clear()
            try:
                if any(one.ended and one.size >= _LEAST_BYTES for one in engine.running):
                    await self._find_prompts(engine)
                    if await self._idle(engine):
                        await self._save_all(engine, _SPLIT_SAVE_SECONDS)
                del engine.running[:-MOST_REMEMBERED]
            except SlotError as error:
                _log.warning("prompt caches not saved", model=engine.name, reason=str(error))

    async def _idle(self, engine: CachedEngine) -> bool:
        """Wait until an engine has been idle for long enough; False as soon as a prompt begins."""
        if any(not one.ended for one in engine.running):
            return False
        engine.begun.clear()
        wait = max(_IDLE_SECONDS, engine.saved_at + _BETWEEN_SECONDS - self._clock())
        return not await wait_for_event(engine.begun, wait)

    async def _find_prompts(self, engine: CachedEngine) -> None:
        engine.find_prompts(await engine.control.list())
        answer = await get(engine.info.address, "/metrics", key=engine.info.key)
        found = dict(_METRIC.findall(answer.body)) if answer is not None else {}
        tokens, seconds = (float(found.get(name, 0)) for name in (b"tokens", b"seconds"))
        if tokens >= LEAST_TOKENS and seconds > 0.0:
            engine.read_speed = tokens / seconds
            if (identity := engine.identity_now) is not None:
                self._read_speeds[identity] = engine.read_speed

    async def _save_all(self, engine: CachedEngine, seconds: float) -> None:
        """Save every idle slot whose prompt is long enough and not saved. Raises SlotError.

        `seconds`: longest for a slot of a split model, as predicted.
        """
        async with engine.lock:
            for slot in await engine.control.list():
                prompt = engine.slots.get(slot.id)
                if prompt is not None and not slot.busy and slot.task == engine.seen.get(slot.id):
                    await self._save(engine, slot, prompt, seconds)

    async def _save(self, engine: CachedEngine, slot: Slot, prompt: Prompt, seconds: float) -> None:
        size = slot.tokens * engine.token_bytes
        if engine.split_name and restore_seconds(size, self._restore_speed(engine)) > seconds:
            return
        identity = await engine.known_identity(prompt.wire)
        if prompt.saved or slot.tokens < LEAST_TOKENS or identity is None or not self._has_room(size):
            return
        if self._store.covers(identity, prompt.marks):
            prompt.saved = True
            return
        began = self._clock()
        with _memory_file() as state:
            moved = await engine.control.save(slot.id, state.fileno())
            took = self._clock() - began
            if moved.tokens != slot.tokens:
                # Another prompt has come in between.
                return
            # A split model's state is on several machines, from which it came now.
            move_speed = size / max(took, 0.001) if engine.split_name else 0.0
            if move_speed:
                self._restore_speeds[engine.split_name].append(move_speed)
            header = Header(
                identity=identity,
                marks=tuple(prompt.marks),
                tokens=moved.tokens,
                size=os.fstat(state.fileno()).st_size,
                read_speed=engine.read_speed or self._read_speeds.get(identity, 0.0),
                move_speed=move_speed,
                model=engine.name,
            )
            if engine.layout is not None:
                self._layouts[identity] = engine.layout
            if self._scope.closed:
                return
            # A job and a file of its own: it is written to its end also if the request goes away that needs the slot.
            copy = os.fdopen(os.dup(state.fileno()), "rb")
            entry = await asyncio.shield(self._scope.spawn(self._write(header, copy), f"write {engine.name}"))
        # What cannot be written now is not tried again and again.
        prompt.saved = True
        engine.saved_at = self._clock()
        if entry is not None:
            _log.info("prompt cache saved", model=engine.name, tokens=header.tokens, bytes=entry.bytes)

    async def _write(self, header: Header, state: BinaryIO) -> Entry | None:
        with state:
            return await asyncio.to_thread(self._store.write, header, state)

    def _has_room(self, size: int) -> bool:
        return self._store.room_for(size) and psutil.virtual_memory().available > _MEMORY_FACTOR * size

    # Bringing back.

    async def _bring_back(self, engine: CachedEngine, marks: Sequence[Mark], into: int | None) -> None:
        """Restore the saved cache that covers most of a prompt, if that is faster than reading it. Raises SlotError."""
        await asyncio.shield(self._opened)
        if not self._store.usage.count:
            return
        identity = await engine.known_identity()
        if identity is None or not self._store.has(identity):
            return
        async with engine.lock:
            found = self._store.find(identity, marks, engine.warm_bytes(marks))
            if found is None:
                return
            entry, choice = found
            header = entry.header
            seconds = restore_seconds(header.size, self._restore_speed(engine, header))
            # An engine that has read little since it began says nothing of its speed; it was known before.
            if header.read_speed:
                self._read_speeds.setdefault(identity, header.read_speed)
            if not worth(seconds, choice.tokens, engine.read_speed or self._read_speeds.get(identity, 0.0)):
                return
            slot = await self._free_slot(engine, into)
            if slot is None or not self._has_room(header.size):
                return
            began = self._clock()
            with _memory_file() as state:
                if not await asyncio.to_thread(self._store.restore, entry, state):
                    return
                engine.slots.pop(slot.id, None)
                try:
                    with await asyncio.to_thread(_fitting, state, engine.layout) as fitting:
                        moved = await engine.control.restore(slot.id, fitting.fileno())
                except SlotRefusedError:
                    await asyncio.to_thread(self._store.delete, entry)
                    raise
            took = self._clock() - began
            self._restore_speeds[engine.split_name].append(header.size / max(took, 0.001))
            engine.put(slot, header.marks, moved.tokens)
            _log.info("prompt cache restored", model=engine.name, tokens=moved.tokens, seconds=round(took, 3))

    def _restore_speed(self, engine: CachedEngine, header: Header | None = None) -> float:
        """Bytes a second into a slot, as far as it was measured; 0.0: unknown.

        Of a whole model the best of the last times: the machine may have been busy, and what is taken for slow is not
        tried again. Of a split model too, to bring one back (`header`), but the last time for a save: others wait then.
        """
        known = self._restore_speeds.get(engine.split_name)
        if not engine.split_name:
            return max(*known, RESTORE_SPEED if len(known) < _SPEEDS else 0.0) if known else 0.0
        if known:
            return known[-1] if header is None else max(known)
        return (header.move_speed if header is not None else 0.0) or SPLIT_RESTORE_SPEED

    # Moving between nodes.

    async def _move(
        self,
        engine: CachedEngine,
        marks: Sequence[Mark],
        elsewhere: PromptElsewhere,
        moves: PromptMoves,
        into: int | None,
    ) -> None:
        """Fetch a prompt's cache from another node, if that is faster than reading it. Raises SlotError."""
        # No request waits until a large model's files are read.
        identity, layout = engine.identity_now, engine.layout
        if identity is None or layout is None:
            return
        read_speed = engine.read_speed or self._read_speeds.get(identity, 0.0)
        # If it is not known how far the other node is, then it will be the next time.
        await moves.speed_of(elsewhere.node, 0.0)
        if not read_speed:
            return
        tokens = await prompt_tokens(engine.info, elsewhere)
        have = len(tokens) * engine.warm_bytes(marks) // max(marks[-1].size, 1)
        most = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if most - have < LEAST_TOKENS:
            return
        speed = await moves.speed_of(elsewhere.node, (most - have) / read_speed * _MEASURE_SHARE)
        if speed is None:
            _log.info("prompt cache not moved", model=engine.name, reason="the link is not known yet")
            return
        into_slot = self._restore_speed(engine)

        def is_worth(count: int) -> bool:
            return worth_moving(speed, count - have, count * layout.token_bytes, read_speed, into_slot)

        if not is_worth(most) or not self._has_room(most * layout.token_bytes):
            _log.info(
                "prompt cache not moved",
                model=engine.name,
                reason="it is not worth it",
                predicted=round(speed.seconds(most * layout.token_bytes, into_slot), 3),
                reading=round((most - have) / read_speed, 3),
            )
            return
        wanted = Wanted(node=elsewhere.node, identity=identity, layout=layout, marks=marks, tokens=tokens)
        began = self._clock()
        count, size = 0, most * layout.token_bytes
        with _memory_file() as state:
            try:
                async with asyncio.timeout(move_deadline(most - have, read_speed)):
                    count = await moves.fetch(wanted, state, is_worth)
                if not count:
                    if (waited := self._clock() - began) > speed.seconds(size, into_slot):
                        # A node that says no this late is expected to be late, too.
                        moves.observed(elsewhere.node, size, waited, into_slot)
                    return
                size = count * layout.token_bytes
                async with engine.lock:
                    slot = await self._free_slot(engine, into)
                    if slot is None:
                        return
                    engine.slots.pop(slot.id, None)
                    restored = await engine.control.restore(slot.id, state.fileno())
            except TimeoutError:
                moves.observed(elsewhere.node, size, self._clock() - began, into_slot)
                raise
        took = self._clock() - began
        predicted = speed.seconds(size, into_slot)
        moves.observed(elsewhere.node, size, took, into_slot)
        covered = [mark for mark in marks if mark.size * len(tokens) <= marks[-1].size * count]
        engine.put(slot, covered, restored.tokens)
        _log.info(
            "prompt cache moved",
            model=engine.name,
            node=elsewhere.node[:10],
            tokens=restored.tokens,
            bytes=size,
            seconds=round(took, 3),
            predicted=round(predicted, 3),
            reading=round((count - have) / read_speed, 3),
        )

    async def held(self, identity: bytes, knows: Callable[[bytes], bool]) -> Held | None:
        """What this node has of a prompt, for a node that shows to know it: of an engine's slot, or from the disk."""
        layout = self._layouts.get(identity)
        if layout is None:
            return None
        for engine, slot in await self._known_slots(identity, knows):
            try:
                async with asyncio.timeout(_GIVE_SECONDS), engine.lock:
                    if self._has_room(slot.tokens * engine.token_bytes):
                        return Held(await self._taken(engine, slot), layout)
            except (SlotError, TimeoutError) as error:
                _log.info("prompt cache not given", model=engine.name, reason=str(error) or "its slot is busy")
        entry = self._store.known_to(identity, knows)
        if entry is None or not self._has_room(entry.header.size):
            return None
        file = _memory_file()
        if await asyncio.to_thread(self._store.restore, entry, file):
            return Held(file, layout)
        file.close()
        return None

    async def _known_slots(self, identity: bytes, knows: Callable[[bytes], bool]) -> list[tuple[CachedEngine, Slot]]:
        """The idle slots of all engines that have something of a prompt; the one that has most comes first."""
        found: list[tuple[int, CachedEngine, Slot]] = []
        for engine in [one for one in self._engines.values() if one.may_have(identity)]:
            try:
                async with asyncio.timeout(_GIVE_SECONDS), engine.lock:
                    engine.find_prompts(slots := await engine.control.list())
            except (SlotError, TimeoutError) as error:
                _log.info("prompt cache not given", model=engine.name, reason=str(error) or "it does not answer")
                continue
            for slot in slots:
                prompt = engine.slots.get(slot.id)
                if prompt is not None and not slot.busy and engine.identity_for(prompt.wire) == identity:
                    known = max((mark.size for mark in prompt.marks if knows(mark.key)), default=0)
                    if known:
                        found.append((known, engine, slot))
        return [(engine, slot) for _, engine, slot in sorted(found, key=lambda one: -one[0])]

    async def _taken(self, engine: CachedEngine, slot: Slot) -> BinaryIO:
        """A slot's state. Raises SlotError."""
        file = _memory_file()
        try:
            await engine.control.save(slot.id, file.fileno(), _GIVE_SECONDS)
        except BaseException:
            file.close()
            raise
        return file

    async def _free_slot(self, engine: CachedEngine, named: int | None) -> Slot | None:
        """An idle slot, whose prompt is saved first. Raises SlotError.

        `named`: that one; None: an unused one, or the least recently used.
        """
        engine.find_prompts(slots := await engine.control.list())
        free = (slot for slot in slots if not slot.busy and named in {None, slot.id})
        idle = sorted(free, key=lambda one: (one.id in engine.slots, one.task))
        if not idle:
            return None
        prompt = engine.slots.get(idle[0].id)
        if prompt is not None:
            await self._save(engine, idle[0], prompt, _SPLIT_SAVE_SECONDS)
        return idle[0]

    async def _identify(self, key: tuple[str, int, str], spec: EngineSpec, files: Sequence[Path]) -> bytes | None:
        """Read the model's files, unless their digests are known."""
        try:
            # Several engines of one model are ready at about the same time: the first one reads, the others find it.
            async with self._reading:
                contents = [(await asyncio.to_thread(self._digests.make, path)).name.encode() for path in files]
            layout = await asyncio.to_thread(_layout, spec, files[0])
        except OSError as error:
            _log.warning("prompt caches not saved", model=spec.alias, reason=str(error))
            return None
        # A state that is not understood cannot be written anew for another number of slots.
        identity = identity_of(spec, contents, slots=spec.slots if layout is None else 0)
        engine = self._engines.get(key)
        if layout is not None and engine is not None:
            engine.layout = self._layouts[identity] = layout
        return identity


def caches_status(caches: SlotCaches, usage: Usage, limit: int) -> StatusPromptCaches:
    """For the status: what is saved, of how many bytes at most, and what was moved."""
    moves = caches.moves.count if caches.moves is not None else Moves()
    return StatusPromptCaches(
        count=usage.count,
        bytes=usage.bytes,
        limit=limit,
        moved_in=moves.taken,
        moved_out=moves.given,
        moved_bytes=moves.taken_bytes + moves.given_bytes,
        refused=moves.refused,
    )


def _layout(spec: EngineSpec, model: Path) -> StateLayout | None:
    """How the engine lays out a slot's state; None where that is not known. Blocks. Raises OSError."""
    try:
        shape = Shape(read_header(model)).plain_cache()
    except GgufError:
        return None
    if shape is None:
        return None
    return plain_layout(*shape, spec.cache_type, streams=spec.slots, context=spec.context)


def _memory_file() -> BinaryIO:
    """A file in memory that ends with its last descriptor."""
    return os.fdopen(os.memfd_create("slot", os.MFD_CLOEXEC), "w+b")


def _fitting(state: BinaryIO, layout: StateLayout | None) -> BinaryIO:
    """A saved state as an engine with this layout takes it: an engine with other slots wrote other streams. Blocks.

    Raises:
        SlotRefusedError: it is not as it must be.
    """
    if layout is None:
        return state
    data = memoryview(mmap.mmap(state.fileno(), 0, access=mmap.ACCESS_READ))
    own = streams_of(data, layout)
    if own.streams == layout.streams:
        return state
    found = read_state(data, own)
    if isinstance(found, Malformed):
        raise SlotRefusedError(found.reason)
    pieces = rows(data, found, len(found.tokens))
    fitting = _memory_file()
    for part in structure(layout, found.tokens):
        if isinstance(part, bytes):
            fitting.write(part)
            continue
        written = 0
        while written < part:
            written += fitting.write(next(pieces))
    fitting.flush()
    return fitting
