"""Slots in llama.cpp's own API: naming one in a request, and those of several engines of this node as one model's.

A node names the slot in which an engine shall answer a request (llama-server's field `id_slot`).

`GET /slots` shows all slots and `GET /props` counts them; each has one number, whichever engine has it. A request that
asks for a slot (`id_slot`) reaches the engine that has it, and an answer names the slot by the same number. Engines
know only their own slots, which each of them counts from 0.
"""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from mesh_llm.core.types.errors import UNREADABLE

_NAMED = frozenset(("/v1/chat/completions", "/chat/completions", "/v1/completions", "/completion", "/completions"))
"""Paths whose requests keep the field. llama-server drops it from those of /v1/messages."""
SLOTS, PROPS = "/slots", "/props"
_NAMING = frozenset({"/completion", "/completions", "/infill"})
"""Paths whose answers name the slot (`id_slot`)."""
_FAIL = "fail_on_no_slot"
ANY_SLOT = -1
"""The engine chooses, as it does where a slot is asked for that it does not have."""
_ASKED = b"_slot"
_NUMBER = re.compile(rb'("id_slot"\s*:\s*)(\d+)')
_NAME = rb'"id_slot"'
_BEGUN = re.compile(
    _NAME + rb"\s*(?::\s*\d*)?\Z|(?:" + b"|".join(_NAME[:length] for length in range(1, len(_NAME))) + rb")\Z"
)
"""What may be the beginning of a slot's number, at the end of a piece."""
_UNAVAILABLE = b'{"error":{"code":503,"message":"no slot available","type":"unavailable_error"}}'

_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


class _Asked(msgspec.Struct):
    n: int | None = None
    n_cmpl: int | None = None
    id_slot: int | None = None
    prompt: msgspec.Raw = msgspec.Raw()


_asked = msgspec.json.Decoder(_Asked)


def takes_one_slot(path: str, body: bytes) -> bool:
    """Whether a request is answered in one slot, which may be named: one prompt, one answer, no slot of its own choice.

    A list as a prompt is one prompt only if all in it are numbers of tokens.
    """
    if path not in _NAMED:
        return False
    try:
        asked = _asked.decode(body)
    except UNREADABLE:
        return False
    prompt = bytes(asked.prompt).lstrip()
    several = prompt.startswith(b"[") and any(sign in prompt[1:] for sign in (b"[", b'"', b"{"))
    return asked.id_slot is None and not several and {asked.n, asked.n_cmpl} <= {None, 1}


def with_slot(body: bytes, slot: int) -> bytes:
    """The body of a request that `takes_one_slot`, with the slot."""
    before, brace, after = body.partition(b"{")
    comma = b"" if after.lstrip().startswith(b"}") else b","
    return b'%b%b"id_slot":%d%b%b' % (before, brace, slot, comma, after)


class EngineSlots(NamedTuple):
    """One engine of several: its address, the number of its first slot, and how many it has."""

    address: str
    first: int
    total: int

    def has(self, slot: int) -> bool:
        """Whether a slot, by its number in the model, is this engine's."""
        return self.first <= slot < self.first + self.total


class _Wish(msgspec.Struct):
    id_slot: int = ANY_SLOT


_wish = msgspec.json.Decoder(_Wish)


def asked_slot(body: bytes) -> int | None:
    """The slot that a request asks for; None where any will do. Quick, also for long prompts."""
    if _ASKED not in body:
        return None
    try:
        slot = _wish.decode(body).id_slot
    except UNREADABLE:
        # The engine says what is wrong with it.
        return None
    return slot if slot >= 0 else None


def asking_for(body: bytes, slot: int) -> bytes:
    """The body of a request that asks for another slot."""
    return msgspec.json.encode(_fields.decode(body) | {"id_slot": msgspec.Raw(b"%d" % slot)})


def names_slots(path: str) -> bool:
    """Whether the answers of a path name the slot that gave them."""
    return path in _NAMING


def is_gathered(path: str) -> bool:
    """Whether the answer is made of the answers of all engines."""
    return path in {SLOTS, PROPS}


def asked_of_each(target: str) -> str:
    """What each engine is asked; whether no slot is free is known when all have answered."""
    path, _, query = target.partition("?")
    kept = [one for one in query.split("&") if one and one.partition("=")[0] != _FAIL]
    return f"{path}?{'&'.join(kept)}" if kept else path


def gathered(target: str, answers: Sequence[tuple[EngineSlots, bytes]]) -> tuple[int, bytes]:
    """Status and body of one answer, made of those of the engines, in the order of their slots.

    Raises:
        One of UNREADABLE: an engine answered something else.
    """
    path, _, query = target.partition("?")
    if path == PROPS:
        props = _fields.decode(answers[0][1])
        total = sum(engine.total for engine, _ in answers)
        return 200, msgspec.json.encode(props | {"total_slots": msgspec.Raw(b"%d" % total)})
    slots = [
        slot | {"id": engine.first + int(slot.get("id", 0))}
        for engine, body in answers
        for slot in msgspec.json.decode(body, type=list[dict[str, Any]])
    ]
    fails = any(one.partition("=")[0] == _FAIL for one in query.split("&"))
    if fails and all(slot.get("is_processing") for slot in slots):
        return 503, _UNAVAILABLE
    return 200, msgspec.json.encode(slots)


class SlotNumbers:
    """Rewrites the number of the slot in an answer, as its pieces come.

    The text of an answer has its quotes escaped, so it is never taken for a field.
    """

    __slots__ = ("_first", "_held")

    def __init__(self, first: int) -> None:
        """`first`: the number of the engine's first slot."""
        self._first = first
        self._held = b""

    def cut(self, data: bytes) -> bytes:
        """Take the next bytes; return all but what may be the beginning of a number."""
        data = self._held + data
        begun = _BEGUN.search(data)
        end = len(data) if begun is None else begun.start()
        self._held = data[end:]
        return self._renumbered(data[:end])

    def rest(self) -> bytes:
        """What was held back, at the answer's end."""
        rest, self._held = self._held, b""
        return self._renumbered(rest)

    def _renumbered(self, data: bytes) -> bytes:
        return _NUMBER.sub(lambda found: found[1] + b"%d" % (self._first + int(found[2])), data)
