"""Which engine of a launch gets a request, and which of its slots."""

from collections.abc import Callable
from dataclasses import dataclass, field

from mesh_llm.api.router import PrefixAffinity, prompt_prefixes
from mesh_llm.api.slots import EngineSlots, asked_slot, takes_one_slot
from mesh_llm.api.upstream import Place
from mesh_llm.core.routing.ranking import Warmth
from mesh_llm.core.routing.slots import choose_slot, passes
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.engine.supervisor import EngineReadyInfo

_NAMED_FROM = 3
"""Slots of an engine from which on it matters which one gets a request: two cannot have a free one between them."""


@dataclass(eq=False)
class DispatchedEngine:
    """An engine that answers, and what is in its slots as far as they were named.

    Attributes:
        info: how it is reached.
        number: its own among those that answer, as long as it lives; from 0.
        busy: requests that it answers now, or that wait in it.
        unnamed: those of them for which it chooses the slots itself.
        taken: slots of the others.
        used: of each slot, the number of the last request in it.
        tenants: of each slot, the number of the request with which its conversation began.
    """

    info: EngineReadyInfo
    number: int = 0
    busy: int = 0
    unnamed: int = 0
    taken: set[int] = field(default_factory=set[int])
    used: list[int] = field(default_factory=list[int])
    tenants: list[int] = field(default_factory=list[int])

    def __post_init__(self) -> None:
        self.used = [0] * self.info.slots
        self.tenants = [0] * self.info.slots

    @property
    def numbered(self) -> EngineSlots:
        """Its slots among those of all: each engine has the same number of them."""
        return EngineSlots(self.info.address, self.number * self.info.slots, self.info.slots)

    @property
    def room(self) -> float:
        """The part of its slots that is free; below 0 where requests wait in it."""
        return 1.0 - self.busy / max(1, self.info.slots)

    def key(self, slot: int | None) -> NodeId:
        """What stands for the conversation in a slot; of None: for those in any."""
        return NodeId(self.info.address if slot is None else f"{self.info.address} {slot} {self.tenants[slot]}")

    def slot_for(self, warmth: dict[NodeId, Warmth]) -> int | None:
        """The slot for a request; None: the engine shall choose.

        It chooses while it works on a request for which it has chosen: nobody knows which slots those have, and a
        request for a busy slot would wait although others are free.
        """
        if self.unnamed or self.info.slots < _NAMED_FROM:
            return None
        keys = {slot: self.key(slot) for slot in range(self.info.slots)}
        known = {slot: warmth[key].prefix_bytes for slot, key in keys.items() if key in warmth}
        return choose_slot(self.used, self.taken, known)

    def take(self, slot: int | None, number: int, *, goes_on: bool) -> Callable[[], None]:
        """Begin a request; call the result when its answer has ended. `goes_on`: the slot has its conversation."""
        self.busy += 1
        if slot is None:
            self.unnamed += 1
        else:
            self.taken.add(slot)
            self.used[slot] = number
            if not goes_on:
                self.tenants[slot] = number

        def done() -> None:
            self.busy -= 1
            if slot is None:
                self.unnamed -= 1
            else:
                self.taken.discard(slot)

        return done


@dataclass(eq=False)
class Dispatch:
    """The engines of one launch that answer now. `several`: as many are meant to."""

    model: ModelName
    engines: list[DispatchedEngine] = field(default_factory=list[DispatchedEngine])
    several: bool = False
    _affinity: PrefixAffinity = field(default_factory=PrefixAffinity)
    _number: int = 0

    def number(self, engine: DispatchedEngine) -> None:
        """Give an engine that comes the lowest number that is free."""
        taken = {one.number for one in self.engines}
        engine.number = next(number for number in range(len(taken) + 1) if number not in taken)

    @property
    def numbered(self) -> list[EngineSlots]:
        """The slots of each engine, in order, if several are one: a slot keeps its number while others come and go."""
        return sorted((one.numbered for one in self.engines), key=lambda one: one.first) if self.several else []

    def place(self, path: str, body: bytes) -> Place:
        """The engine for a request: the one that has its conversation in a free slot; else the one with most room.

        The one whose slot a request asks for comes before all. Of several with the same room the one is taken that
        needs no further pass for it. Call the result's `done` when the answer has ended.
        """
        if len(self.engines) == 1 and self.engines[0].info.slots < _NAMED_FROM:
            return Place(self.engines[0].info.address, _nothing)
        prefixes = prompt_prefixes(body)
        warmth = self._affinity.warmth(self.model, prefixes)
        named = takes_one_slot(path, body)
        slots = {engine: engine.slot_for(warmth) if named else None for engine in self.engines}

        def known(engine: DispatchedEngine) -> Warmth | None:
            found = [warmth[key] for key in {engine.key(slots[engine]), engine.key(None)} if key in warmth]
            return max(found, key=lambda one: one.prefix_bytes, default=None)

        def order(engine: DispatchedEngine) -> tuple[bool, float, int, int]:
            has, slot = known(engine), slots[engine]
            here = has is not None and has.conversation and engine.room > 0.0
            more = 0 if slot is None else passes(engine.taken | {slot}) - passes(engine.taken)
            return here, engine.room, -more, 0 if has is None else has.prefix_bytes

        asked = asked_slot(body)
        having = [one for one in self.engines if asked is not None and one.numbered.has(asked)]
        chosen = max(having or self.engines, key=order)
        slot = slots[chosen]
        self._number += 1
        goes_on = slot is not None and chosen.key(slot) in warmth
        done = chosen.take(slot, self._number, goes_on=goes_on)
        self._affinity.remember(self.model, prefixes, chosen.key(slot))
        return Place(chosen.info.address, done, slot)


def _nothing() -> None:
    return None
