"""A node's part in a split group, as it travels within its announcement."""

import math
from typing import Annotated, TypeAlias

import msgspec

from mesh_llm.core import bounds
from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.split_layout import MOST_SHARES, SplitShare
from mesh_llm.core.split_word import MAX_ROUND_TRIP_MS, MOST_ROUND_TRIPS, SplitWish, SplitWord
from mesh_llm.wire.signing import Key

_MAX_NUMBER = 2**53
_MAX_MILLISECONDS = 1e6
_MAX_PART = 1e12

_Number: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=_MAX_NUMBER)]
_Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_MILLISECONDS)]
_Part: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=_MAX_PART)]
_Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]
_Model: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=bounds.MAX_TEXT, pattern=bounds.ONE_LINE)]


class _Share(msgspec.Struct, frozen=True, array_like=True):
    node: Key
    layers: _Number
    memory_bytes: _Number = 0


class _Distance(msgspec.Struct, frozen=True, array_like=True):
    node: Key
    milliseconds: _Milliseconds


class _Wish(msgspec.Struct, frozen=True, array_like=True):
    context: _Number = 0
    slots: _Number = 0
    shares: Annotated[tuple[_Part, ...], msgspec.Meta(max_length=MOST_SHARES)] = ()


class WireSplit(msgspec.Struct, frozen=True, array_like=True):
    """core.split_word.SplitWord, field by field; an array that may grow."""

    model: _Model
    fingerprint: _Text = ""
    memory_bytes: _Number = 0
    seeds: bool = False
    asked: bool = False
    max_rtt_ms: _Milliseconds = MAX_ROUND_TRIP_MS
    round_trips: Annotated[tuple[_Distance, ...], msgspec.Meta(max_length=MOST_ROUND_TRIPS)] = ()
    term: _Number = 0
    leads: bool = False
    shares: Annotated[tuple[_Share, ...], msgspec.Meta(max_length=MOST_SHARES)] = ()
    wish: _Wish = _Wish()
    bare_of: _Text = ""
    """The fingerprint of who has not got the file. Not in `fingerprint`: earlier versions would elect such a node."""


def split_out(word: SplitWord) -> WireSplit:
    """As it travels."""
    return WireSplit(
        word.model,
        "" if word.bare else word.fingerprint,
        _number(word.memory_bytes),
        word.seeds,
        word.asked,
        _bounded(word.max_rtt_ms, _MAX_MILLISECONDS),
        tuple(
            _Distance(bytes.fromhex(node), _bounded(word.round_trips[node], _MAX_MILLISECONDS))
            for node in sorted(word.round_trips)
        ),
        _number(word.term),
        word.leads,
        tuple(
            _Share(bytes.fromhex(share.node), _number(share.layers), _number(share.memory_bytes))
            for share in word.shares
        ),
        _Wish(
            _number(word.wish.context),
            _number(word.wish.slots),
            tuple(_bounded(part, _MAX_PART) for part in word.wish.shares),
        ),
        word.fingerprint if word.bare else "",
    )


def split_in(wire: WireSplit) -> SplitWord:
    """The opposite."""
    return SplitWord(
        model=ModelName(wire.model),
        fingerprint=wire.bare_of or wire.fingerprint,
        memory_bytes=wire.memory_bytes,
        seeds=wire.seeds,
        asked=wire.asked,
        max_rtt_ms=wire.max_rtt_ms,
        round_trips={NodeId(entry.node.hex()): entry.milliseconds for entry in wire.round_trips},
        term=wire.term,
        leads=wire.leads,
        shares=tuple(
            SplitShare(node=NodeId(share.node.hex()), layers=share.layers, memory_bytes=share.memory_bytes)
            for share in wire.shares
        ),
        wish=SplitWish(context=wire.wish.context, slots=wire.wish.slots, shares=wire.wish.shares),
        bare=bool(wire.bare_of),
    )


def _number(value: int) -> int:
    return min(max(0, value), _MAX_NUMBER)


def _bounded(value: float, most: float) -> float:
    return min(max(0.0, value), most) if math.isfinite(value) else 0.0
