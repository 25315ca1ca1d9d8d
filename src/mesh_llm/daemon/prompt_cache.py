"""Prompt caches that outlive an engine: saved when slots are idle and before engines stop, brought back when needed.

For each launch whose slots can be reached, this follows which prompt is in which slot. The API says when a prompt
begins and ends; the slots' own task numbers say the rest. Where several prompts ended at once, this may mistake one for
another: then a cache is brought back in vain. Never is an answer wrong by it, since llama-server compares the tokens.
"""

import asyncio
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import psutil
import structlog

from mesh_llm.console.schema import StatusPromptCaches
from mesh_llm.core.performance.prompt_cache import (
    LEAST_TOKENS,
    Mark,
    common,
    move_deadline,
    restore_seconds,
    worth,
    worth_moving,
)
from mesh_llm.core.types.ports import PromptElsewhere, PromptEnded
from mesh_llm.daemon.prompt_moves import Held, Moves, PromptMoves, Wanted, prompt_tokens
from mesh_llm.engine.installation import system
from mesh_llm.engine.probe import get
from mesh_llm.engine.prompt_cache.sealed import Header
from mesh_llm.engine.prompt_cache.store import Entry, PromptCacheStore, Usage
from mesh_llm.engine.slots import Slot, SlotControl, SlotError
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo
from mesh_llm.models.gguf.facts import Shape
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.wire.llama_state import BLOCK_TOKENS, StateLayout, plain_layout

DIRECTORY = "prompts"
"""In the home's cache directory."""

_IDLE_SECONDS = 3.0
"""An engine without a request for so long is idle: its slots are saved."""
_BETWEEN_SECONDS = 60.0
"""From one save to the next, while an engine is used again and again."""
_STOP_SECONDS = 20.0
_ANSWER_SECONDS = 2.0
_END_SECONDS = 0.3
"""For the API to say that a prompt has ended of which the client has the whole answer."""
_BRING_SECONDS = 30.0
_MEASURE_SHARE = 0.1
"""Of the time that reading takes: so long a link to another node may be measured first, where it is unknown."""
_GIVE_SECONDS = 2.0
"""Longest wait for a slot whose state another node asks for."""
_LEAST_BYTES = 1024
"""Of a request's prompt: a shorter one has no LEAST_TOKENS."""
_MOST_REMEMBERED = 256
_MEMORY_FACTOR = 2
"""A state is only taken into memory while so many times its size is free."""
_METRIC = re.compile(rb"^llamacpp:prompt_(tokens|seconds)_total ([0-9.e+]+)", re.MULTILINE)
_IRRELEVANT = frozenset(
    {
        *("model", "alias", "port", "socket", "key_file", "slot_socket", "slots", "devices", "threads", "gpu_layers"),
        *("cpu_moe", "batch", "micro_batch", "prompt_cache_mib", "embeddings", "pooling", "mmproj", "draft_max"),
        *("sampling", "speculation", "while_it_pays", "chat_template", "reasoning_budget"),
    }
)
"""Fields of a spec on which the state of a slot does not depend; files count by their content."""

_log = structlog.get_logger(__name__)


@dataclass(eq=False)
class _Prompt:
    """A prompt that a launch got.

    `tokens`: in its slot, once that is known; `saved`: there is nothing to do for it; `over`: set when it has ended.
    """

    marks: Sequence[Mark]
    number: int
    ended: bool = False
    tokens: int = 0
    saved: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def size(self) -> int:
        return self.marks[-1].size if self.marks else 0


@dataclass(eq=False)
class _Launch:
    """One engine whose slots can be saved.

    Attributes:
        name: its model's.
        info: how it is reached.
        spec: how it was started.
        token_bytes: bytes of KV cache a token.
        identity: what its states depend on; None if the model cannot be read.
        layout: of its states, once that is known; None where caches of its kind are not moved between nodes.
        running: prompts that have not ended, and those that have and were not found in a slot yet.
        slots: which prompt is in which slot.
        earlier: prompts that it got, the last one at the end: they may be in its own cache in memory.
        seen: the last task of each slot that is known.
        begun, ended: set when a prompt begins or ends.
        lock: for one save or restore at a time.
    """

    name: str
    info: EngineReadyInfo
    spec: EngineSpec
    token_bytes: int
    identity: asyncio.Task[bytes | None]
    running: list[_Prompt] = field(default_factory=list[_Prompt])
    slots: dict[int, _Prompt] = field(default_factory=dict[int, _Prompt])
    earlier: list[_Prompt] = field(default_factory=list[_Prompt])
    seen: dict[int, int] = field(default_factory=dict[int, int])
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    keeper: asyncio.Task[object] | None = None
    layout: StateLayout | None = None
    count: int = 0
    saved_at: float = float("-inf")
    read_speed: float = 0.0

    @property
    def control(self) -> SlotControl:
        if self.info.slot_control is None:
            raise SlotError("this engine gives no access to its slots")
        return self.info.slot_control

    async def known_identity(self) -> bytes | None:
        """Wait for the identity; None also if the launch ends before it is known."""
        await asyncio.wait({self.identity})
        return None if self.identity.cancelled() else self.identity.result()

    @property
    def identity_now(self) -> bytes | None:
        """The identity, if it is known already."""
        return self.identity.result() if self.identity.done() and not self.identity.cancelled() else None

    def warm_bytes(self, marks: Sequence[Mark]) -> int:
        """How many bytes of a prompt's beginning the engine has, in a slot or in its own cache in memory."""
        here = list(self.slots.values())
        room = self.spec.prompt_cache_mib << 20
        for prompt in reversed(self.earlier):
            if prompt in here:
                continue
            room -= prompt.tokens * self.token_bytes
            if room < 0:
                break
            here.append(prompt)
        found = common(marks, [mark for prompt in here for mark in prompt.marks])
        return found.size if found is not None else 0

    def find_prompts(self, slots: Sequence[Slot]) -> None:
        """Find the prompts that have ended in the idle slots that have worked since: the last ones in the last ones.

        A slot may be done with a prompt of which the API has not said yet that it has ended: that is waited for.
        """
        ended = sorted((one for one in self.running if one.ended), key=lambda one: -one.number)
        fresh = [slot for slot in slots if not slot.busy and slot.task != self.seen.get(slot.id, -1)]
        if len(self.running) - len(ended) > sum(slot.busy for slot in slots) and len(fresh) > len(ended):
            return
        for slot in fresh:
            self.slots.pop(slot.id, None)
            self.seen[slot.id] = slot.task
        for prompt, slot in zip(ended, sorted(fresh, key=lambda one: -one.task), strict=False):
            prompt.tokens = slot.tokens
            if prompt.marks:
                self.slots[slot.id] = prompt
                self.earlier.append(prompt)
        self.running = [one for one in self.running if not one.ended]
        del self.earlier[:-_MOST_REMEMBERED]


def identity_of(spec: EngineSpec, contents: Sequence[bytes]) -> bytes:
    """What the state of a slot depends on, as 32 bytes: the model's content, the engine's build, and its settings.

    `contents`: digests of the model's files, and of its projector.
    """
    settings = {name: value for name, value in sorted(asdict(spec).items()) if name not in _IRRELEVANT}
    digest = blake2b(f"{PACKAGE} {VERSION} {system()} {settings!r}".encode(), digest_size=32)
    for content in contents:
        digest.update(b"\0" + content)
    return digest.digest()


class SlotCaches:
    """Saves and restores the slots of this node's engines; implements core.types.ports.PromptCaches."""

    def __init__(self, store: PromptCacheStore, digests: ChunkDigestStore, clock: Callable[[], float]) -> None:
        """`digests`: of model files; they are computed once for each."""
        self._store = store
        self._digests = digests
        self._clock = clock
        self._launches: dict[tuple[str, int], _Launch] = {}
        self._restore_speed = 0.0
        self._layouts: dict[bytes, StateLayout] = {}
        self._read_speeds: dict[bytes, float] = {}
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
        """A launch is ready. `files`: of its model and projector; `token_bytes`: bytes of KV cache a token."""
        if info.slot_control is None:
            return
        identity = self._scope.spawn(self._identify(model, term, spec, files), f"identify {model}#{term}")
        launch = _Launch(model, info, spec, token_bytes, identity)
        self._launches[model, term] = launch
        launch.keeper = self._scope.supervise(partial(self._keep, launch), f"keep {model}#{term}")

    def closed(self, model: str, term: int) -> None:
        """A launch has ended."""
        launch = self._launches.pop((model, term), None)
        if launch is not None:
            launch.identity.cancel()
            if launch.keeper is not None:
                launch.keeper.cancel()

    async def save(self, model: str, term: int) -> None:
        """Save what is in the slots of a launch that is about to stop; within seconds."""
        launch = self._launches.get((model, term))
        if launch is None:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(_END_SECONDS):
                for prompt in list(launch.running):
                    await prompt.over.wait()
        try:
            # An engine that hangs must not hold up the stop.
            async with asyncio.timeout(_ANSWER_SECONDS):
                await self._find_prompts(launch)
            async with asyncio.timeout(_STOP_SECONDS):
                await self._save_all(launch)
        except (SlotError, TimeoutError) as error:
            _log.warning("prompt caches not saved", model=model, reason=str(error) or "it took too long")

    # What the API reports.

    def keeps(self, model: str, term: int) -> bool:
        """Whether the prompts of a launch are saved."""
        return (model, term) in self._launches

    async def begin(
        self, model: str, term: int, prompt: Sequence[Mark], elsewhere: PromptElsewhere | None = None
    ) -> PromptEnded:
        """A prompt is about to be sent to a launch: bring back what is saved of it here, or what another node has."""
        launch = self._launches.get((model, term))
        if launch is None:
            return lambda: None
        if prompt and prompt[-1].size >= _LEAST_BYTES:
            try:
                async with asyncio.timeout(_BRING_SECONDS):
                    await self._bring_back(launch, prompt)
                    if elsewhere is not None and self.moves is not None:
                        await self._move(launch, prompt, elsewhere, self.moves)
            except (SlotError, OSError) as error:
                # A TimeoutError is an OSError too.
                _log.warning("prompt cache not used", model=model, reason=str(error) or "it took too long")
        launch.count += 1
        begun = _Prompt(prompt, launch.count)
        launch.running.append(begun)
        launch.begun.set()

        def ended() -> None:
            begun.ended = True
            begun.over.set()
            launch.ended.set()

        return ended

    # Saving.

    async def _keep(self, launch: _Launch) -> None:
        """Follow a launch's prompts, and save its slots when it is idle, until it ends."""
        while True:
            await launch.ended.wait()
            launch.ended.clear()
            try:
                if any(one.ended and one.size >= _LEAST_BYTES for one in launch.running):
                    await self._find_prompts(launch)
                    if await self._idle(launch):
                        await self._save_all(launch)
                del launch.running[:-_MOST_REMEMBERED]
            except SlotError as error:
                _log.warning("prompt caches not saved", model=launch.name, reason=str(error))

    async def _idle(self, launch: _Launch) -> bool:
        """Wait until a launch has been idle for long enough; False as soon as a prompt begins."""
        if any(not one.ended for one in launch.running):
            return False
        launch.begun.clear()
        wait = max(_IDLE_SECONDS, launch.saved_at + _BETWEEN_SECONDS - self._clock())
        return not await wait_for_event(launch.begun, wait)

    async def _find_prompts(self, launch: _Launch) -> None:
        launch.find_prompts(await launch.control.list())
        answer = await get(launch.info.address, "/metrics", key=launch.info.key)
        found = dict(_METRIC.findall(answer.body)) if answer is not None else {}
        tokens, seconds = (float(found.get(name, 0)) for name in (b"tokens", b"seconds"))
        if tokens >= LEAST_TOKENS and seconds > 0.0:
            launch.read_speed = tokens / seconds
            if (identity := launch.identity_now) is not None:
                self._read_speeds[identity] = launch.read_speed

    async def _save_all(self, launch: _Launch) -> None:
        """Save every idle slot whose prompt is long enough and not saved. Raises SlotError."""
        async with launch.lock:
            for slot in await launch.control.list():
                prompt = launch.slots.get(slot.id)
                if prompt is not None and not slot.busy and slot.task == launch.seen.get(slot.id):
                    await self._save(launch, slot, prompt)

    async def _save(self, launch: _Launch, slot: Slot, prompt: _Prompt) -> None:
        size = slot.tokens * launch.token_bytes
        identity = await launch.known_identity()
        if prompt.saved or slot.tokens < LEAST_TOKENS or identity is None or not self._has_room(size):
            return
        if self._store.covers(identity, prompt.marks):
            prompt.saved = True
            return
        with _memory_file() as state:
            moved = await launch.control.save(slot.id, state.fileno())
            if moved.tokens != slot.tokens:
                # Another prompt has come in between.
                return
            header = Header(
                identity=identity,
                marks=tuple(prompt.marks),
                tokens=moved.tokens,
                size=os.fstat(state.fileno()).st_size,
                read_speed=launch.read_speed,
                model=launch.name,
            )
            if self._scope.closed:
                return
            # A job and a file of its own: it is written to its end also if the request goes away that needs the slot.
            copy = os.fdopen(os.dup(state.fileno()), "rb")
            entry = await asyncio.shield(self._scope.spawn(self._write(header, copy), f"write {launch.name}"))
        # What cannot be written now is not tried again and again.
        prompt.saved = True
        launch.saved_at = self._clock()
        if entry is not None:
            _log.info("prompt cache saved", model=launch.name, tokens=header.tokens, bytes=entry.bytes)

    async def _write(self, header: Header, state: BinaryIO) -> Entry | None:
        with state:
            return await asyncio.to_thread(self._store.write, header, state)

    def _has_room(self, size: int) -> bool:
        return self._store.room_for(size) and psutil.virtual_memory().available > _MEMORY_FACTOR * size

    # Bringing back.

    async def _bring_back(self, launch: _Launch, marks: Sequence[Mark]) -> None:
        """Restore the saved cache that covers most of a prompt, if that is faster than reading it. Raises SlotError."""
        await asyncio.shield(self._opened)
        if not self._store.usage.count:
            return
        identity = await launch.known_identity()
        if identity is None or not self._store.has(identity):
            return
        async with launch.lock:
            found = self._store.find(identity, marks, launch.warm_bytes(marks))
            if found is None:
                return
            entry, choice = found
            header = entry.header
            seconds = restore_seconds(header.size, self._restore_speed)
            if not worth(seconds, choice.tokens, launch.read_speed or header.read_speed):
                return
            slot = await self._free_slot(launch)
            if slot is None or not self._has_room(header.size):
                return
            began = self._clock()
            with _memory_file() as state:
                if not await asyncio.to_thread(self._store.restore, entry, state):
                    return
                launch.slots.pop(slot.id, None)
                try:
                    moved = await launch.control.restore(slot.id, state.fileno())
                except SlotError:
                    await asyncio.to_thread(self._store.delete, entry)
                    raise
            took = self._clock() - began
            self._restore_speed = header.size / max(took, 0.001)
            back = _Prompt(header.marks, launch.count, ended=True, tokens=moved.tokens, saved=True)
            launch.slots[slot.id] = back
            launch.earlier.append(back)
            _log.info("prompt cache restored", model=launch.name, tokens=moved.tokens, seconds=round(took, 3))

    # Moving between nodes.

    async def _move(
        self, launch: _Launch, marks: Sequence[Mark], elsewhere: PromptElsewhere, moves: PromptMoves
    ) -> None:
        """Fetch a prompt's cache from another node, if that is faster than reading it. Raises SlotError."""
        # No request waits until a large model's files are read.
        identity, layout = launch.identity_now, launch.layout
        if identity is None or layout is None:
            return
        read_speed = launch.read_speed or self._read_speeds.get(identity, 0.0)
        # If it is not known how far the other node is, then it will be the next time.
        await moves.speed_of(elsewhere.node, 0.0)
        if not read_speed:
            return
        tokens = await prompt_tokens(launch.info, elsewhere)
        have = len(tokens) * launch.warm_bytes(marks) // max(marks[-1].size, 1)
        most = len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        if most - have < LEAST_TOKENS:
            return
        speed = await moves.speed_of(elsewhere.node, (most - have) / read_speed * _MEASURE_SHARE)
        if speed is None:
            _log.info("prompt cache not moved", model=launch.name, reason="the link is not known yet")
            return

        def is_worth(count: int) -> bool:
            return worth_moving(speed, count - have, count * layout.token_bytes, read_speed, self._restore_speed)

        if not is_worth(most) or not self._has_room(most * layout.token_bytes):
            _log.info(
                "prompt cache not moved",
                model=launch.name,
                reason="it is not worth it",
                predicted=round(speed.seconds(most * layout.token_bytes, self._restore_speed), 3),
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
                    if (waited := self._clock() - began) > speed.seconds(size, self._restore_speed):
                        # A node that says no this late is expected to be late, too.
                        moves.observed(elsewhere.node, size, waited, self._restore_speed)
                    return
                size = count * layout.token_bytes
                async with launch.lock:
                    slot = await self._free_slot(launch)
                    if slot is None:
                        return
                    launch.slots.pop(slot.id, None)
                    restored = await launch.control.restore(slot.id, state.fileno())
            except TimeoutError:
                moves.observed(elsewhere.node, size, self._clock() - began, self._restore_speed)
                raise
        took = self._clock() - began
        predicted = speed.seconds(size, self._restore_speed)
        moves.observed(elsewhere.node, size, took, self._restore_speed)
        covered = [mark for mark in marks if mark.size * len(tokens) <= marks[-1].size * count]
        back = _Prompt(covered, launch.count, ended=True, tokens=restored.tokens, saved=True)
        launch.slots[slot.id] = back
        launch.earlier.append(back)
        _log.info(
            "prompt cache moved",
            model=launch.name,
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
        for launch in [one for one in self._launches.values() if one.identity_now == identity]:
            try:
                async with asyncio.timeout(_GIVE_SECONDS), launch.lock:
                    found = await self._held_in_slot(launch, layout, knows)
                    if found is not None:
                        return found
            except (SlotError, TimeoutError) as error:
                _log.info("prompt cache not given", model=launch.name, reason=str(error) or "its slot is busy")
        entry = self._store.known_to(identity, knows)
        if entry is None or not self._has_room(entry.header.size):
            return None
        file = _memory_file()
        if await asyncio.to_thread(self._store.restore, entry, file):
            return Held(file, layout)
        file.close()
        return None

    async def _held_in_slot(self, launch: _Launch, layout: StateLayout, knows: Callable[[bytes], bool]) -> Held | None:
        """The state of the slot that has most of a prompt. Raises SlotError."""
        launch.find_prompts(slots := await launch.control.list())
        best: tuple[int, Slot] | None = None
        for slot in slots:
            prompt = launch.slots.get(slot.id)
            if prompt is None or slot.busy:
                continue
            known = max((mark.size for mark in prompt.marks if knows(mark.key)), default=0)
            if known and (best is None or known > best[0]):
                best = known, slot
        if best is None or not self._has_room(best[1].tokens * launch.token_bytes):
            return None
        file = _memory_file()
        try:
            await launch.control.save(best[1].id, file.fileno(), _GIVE_SECONDS)
        except BaseException:
            file.close()
            raise
        return Held(file, layout)

    async def _free_slot(self, launch: _Launch) -> Slot | None:
        """An idle slot: an unused one, or the least recently used, whose prompt is saved first. Raises SlotError."""
        launch.find_prompts(slots := await launch.control.list())
        idle = sorted((slot for slot in slots if not slot.busy), key=lambda one: (one.id in launch.slots, one.task))
        if not idle:
            return None
        prompt = launch.slots.get(idle[0].id)
        if prompt is not None:
            await self._save(launch, idle[0], prompt)
        return idle[0]

    async def _identify(self, model: str, term: int, spec: EngineSpec, files: Sequence[Path]) -> bytes | None:
        """Read the model's files, unless their digests are known."""
        try:
            contents = [(await asyncio.to_thread(self._digests.make, path)).name.encode() for path in files]
            layout = await asyncio.to_thread(_layout, spec, files[0])
        except OSError as error:
            _log.warning("prompt caches not saved", model=spec.alias, reason=str(error))
            return None
        identity = identity_of(spec, contents)
        launch = self._launches.get((model, term))
        if layout is not None and launch is not None:
            launch.layout = self._layouts[identity] = layout
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
