"""Which prompt is in which slot of one engine, and what the state of its slots depends on.

The API says when a prompt begins and ends; the slots' own task numbers say the rest. Where several prompts ended at
once, this may mistake one for another: then a cache is brought back in vain. Never is an answer wrong by it, since
llama-server compares the tokens.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import blake2b

from mesh_llm.core.performance.prompt_cache import Mark, common
from mesh_llm.engine.installation import system
from mesh_llm.engine.slots import Slot, SlotControl, SlotError
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.spec import EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo
from mesh_llm.wire.llama_state import StateLayout

MOST_REMEMBERED = 256
_IRRELEVANT = frozenset(
    {
        *("model", "alias", "port", "socket", "key_file", "slot_socket", "slots", "devices", "threads", "gpu_layers"),
        *("cpu_moe", "batch", "micro_batch", "prompt_cache_mib", "embeddings", "pooling", "mmproj", "draft_max"),
        *("sampling", "speculation", "while_it_pays", "chat_template", "reasoning_budget"),
        *("rpc", "tensor_split", "host_layers", "output_on_host", "mtp_layers"),
    }
)
"""Fields of a spec on which the state of a slot does not depend; files count by their content.

Which machines compute the layers is no matter: a state has the rows of all of them.
"""


@dataclass(eq=False)
class Prompt:
    """A prompt that an engine got.

    `wire`: how activations travelled when it was read. `tokens`: in its slot, once that is known. `saved`: there is
    nothing to do for it. `over`: set when it has ended.
    """

    marks: Sequence[Mark]
    number: int
    wire: str = ""
    ended: bool = False
    tokens: int = 0
    saved: bool = False
    over: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def size(self) -> int:
        """Bytes of the request's prompt."""
        return self.marks[-1].size if self.marks else 0


@dataclass(eq=False)
class CachedEngine:
    """One engine whose slots can be saved.

    Attributes:
        name: its model's.
        info: how it is reached.
        spec: how it was started.
        token_bytes: bytes of KV cache a token.
        identity: what its states depend on, whatever the wire; None if the model cannot be read.
        wire: how activations travel now; empty where the model is not split.
        layout: of its states, once that is known; None where caches of its kind are not moved between nodes.
        running: prompts that have not ended, and those that have and were not found in a slot yet.
        slots: which prompt is in which slot.
        earlier: prompts that it got, the last one at the end: they may be in its own cache in memory.
        seen: the last task of each slot that is known.
        rounded: how activations travelled when they were rounded last; empty where they never were.
        begun, ended: set when a prompt begins or ends.
        lock: for one save or restore at a time.
    """

    name: str
    info: EngineReadyInfo
    spec: EngineSpec
    token_bytes: int
    identity: asyncio.Task[bytes | None]
    wire: Callable[[], str] = lambda: ""
    running: list[Prompt] = field(default_factory=list[Prompt])
    slots: dict[int, Prompt] = field(default_factory=dict[int, Prompt])
    earlier: list[Prompt] = field(default_factory=list[Prompt])
    seen: dict[int, int] = field(default_factory=dict[int, int])
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    keeper: asyncio.Task[object] | None = None
    layout: StateLayout | None = None
    count: int = 0
    saved_at: float = float("-inf")
    read_speed: float = 0.0
    rounded: str = ""

    @property
    def control(self) -> SlotControl:
        """Reaches its slots. Raises SlotError."""
        if self.info.slot_control is None:
            raise SlotError("this engine gives no access to its slots")
        return self.info.slot_control

    @property
    def split_name(self) -> str:
        """The model's name if it is split over several machines, to which its caches must travel; else empty."""
        return self.name if self.spec.rpc else ""

    async def known_identity(self, wire: str | None = None) -> bytes | None:
        """Wait for the identity of a state, with this wire or that of now; None also if the engine ends before."""
        await asyncio.wait({self.identity})
        return self.identity_for(self.wire() if wire is None else wire)

    def identity_for(self, wire: str) -> bytes | None:
        """The identity of a state that was computed with this wire, if it is known already."""
        if not self.identity.done() or self.identity.cancelled():
            return None
        whole = self.identity.result()
        return None if whole is None else with_wire(whole, wire)

    @property
    def identity_now(self) -> bytes | None:
        """The identity of states that are computed now, if it is known already."""
        return self.identity_for(self.wire())

    def may_have(self, identity: bytes) -> bool:
        """Whether a state of this identity may be in one of its slots."""
        return identity in {self.identity_for(one.wire) for one in (*self.running, *self.slots.values())}

    def begin(self, marks: Sequence[Mark]) -> Callable[[], None]:
        """A prompt is about to be sent; call the result when its answer has ended."""
        self.count += 1
        # What a slot has from before the wire became f32 again is still rounded.
        self.rounded = wire if is_rounded(wire := self.wire()) else self.rounded
        begun = Prompt(marks, self.count, self.rounded or wire)
        self.running.append(begun)
        self.begun.set()

        def end() -> None:
            begun.ended = True
            begun.over.set()
            self.ended.set()

        return end

    def put(self, slot: Slot, marks: Sequence[Mark], tokens: int) -> None:
        """A saved state was brought into a slot."""
        back = Prompt(marks, self.count, self.wire(), ended=True, tokens=tokens, saved=True)
        self.slots[slot.id] = back
        self.earlier.append(back)

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
        del self.earlier[:-MOST_REMEMBERED]


def identity_of(spec: EngineSpec, contents: Sequence[bytes], slots: int = 0) -> bytes:
    """What the state of a slot depends on, as 32 bytes: the model's content, the engine's build, and its settings.

    `contents`: digests of the model's files, and of its projector. `slots`: of the engine, where a state is of use only
    with as many; 0: it is with any number.
    """
    settings = {name: value for name, value in sorted(asdict(spec).items()) if name not in _IRRELEVANT}
    about = f"{PACKAGE} {VERSION} {system()} {settings!r}"
    digest = blake2b((f"{about} {slots}" if slots else about).encode(), digest_size=32)
    for content in contents:
        digest.update(b"\0" + content)
    return digest.digest()


def with_wire(identity: bytes, wire: str) -> bytes:
    """The identity of a state for which activations were rounded on their way: it is of no use to others."""
    return identity if not is_rounded(wire) else blake2b(wire.encode(), digest_size=32, key=identity).digest()


def is_rounded(wire: str) -> bool:
    """Whether activations that travel so are not what was computed."""
    return wire not in {"", "f32"}
