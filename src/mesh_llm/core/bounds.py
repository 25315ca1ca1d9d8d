"""How much one announcement may hold. A node trims its own word to this; the wire refuses more of others.

Sizes are estimates of the encoded form, on the large side, so that what `trimmed` returns always fits a payload.
"""

import re
from collections.abc import Iterable
from typing import TypeVar

import msgspec

from mesh_llm.core.announcement import Announcement, Serving
from mesh_llm.core.model import Capacity, ModelFacts
from mesh_llm.core.publicity import MAX_MESH_NAME, MAX_REGION, Publicity
from mesh_llm.core.split_layout import MOST_SHARES
from mesh_llm.core.split_word import MOST_ROUND_TRIPS, SplitWord

MAX_PAYLOAD = 16 * 1024
"""Bytes of one encoded announcement."""

MAX_NAME = 64
MAX_TEXT = 256
MAX_REASON = 500
MAX_CERTIFICATE = 2048
MAX_SERVING = 16
MAX_ON_DISK = 64
MAX_WANTED = 32
MAX_DEMAND = 64
MAX_ADDRESSES = 16
MAX_DEVICES = 16
MAX_ALIASES = 8

MAX_DIGESTS = 192
MAX_ENTRIES = 48
MAX_ASKED = 64
MAX_VERDICTS = 64
MAX_REVOCATIONS = 4
MAX_REVOCATION = 4096
"""Items of one message, and bytes of one revocation."""
MOST_REVOCATIONS = 4096
"""That a node keeps, and tells others of."""

ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"
LINES = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
"""Texts that do no harm to a terminal or a log; the second may hold line breaks and tabs."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_BUT_BREAKS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_Item = TypeVar("_Item")


def _text(text: str, limit: int = MAX_TEXT, harmful: re.Pattern[str] = _CONTROL) -> str:
    """Cut to `limit` characters; what UTF-8 cannot carry (lone surrogates of odd file names) becomes `?`."""
    return harmful.sub(" ", text[:limit].encode("utf-8", "replace").decode("utf-8"))


def _is_name(text: str) -> bool:
    """Whether a model's name can be told as it is. A changed one would name something else."""
    return 0 < len(text) <= MAX_TEXT and _text(text) == text


def _texts(texts: Iterable[str], count: int) -> tuple[str, ...]:
    return tuple(_text(text) for _, text in zip(range(count), texts, strict=False))


def _cost(*texts: str) -> int:
    return sum(len(text.encode("utf-8", "replace")) + 3 for text in texts)


class _Budget:
    """Bytes left; what does not fit any more is left out, in order."""

    def __init__(self, total: int) -> None:
        self.left = total

    def take(self, items: Iterable[tuple[_Item, int]]) -> tuple[_Item, ...]:
        kept: list[_Item] = []
        for item, cost in items:
            if cost > self.left:
                break
            self.left -= cost
            kept.append(item)
        return tuple(kept)


def _serving(serving: Serving) -> tuple[Serving, int]:
    aliases = _texts(serving.aliases, MAX_ALIASES)
    trimmed = msgspec.structs.replace(
        serving, reason=_text(serving.reason, MAX_REASON, _CONTROL_BUT_BREAKS), aliases=aliases
    )
    return trimmed, 80 + _cost(trimmed.model, trimmed.reason, *aliases)


def _facts(facts: ModelFacts) -> tuple[ModelFacts, int]:
    return facts, 90 + _cost(facts.name, facts.architecture, facts.fingerprint, facts.source)


def _sound(facts: ModelFacts) -> bool:
    texts = (facts.architecture, facts.fingerprint, facts.source)
    return _is_name(facts.name) and all(not text or _is_name(text) for text in texts)


def _split(word: SplitWord | None) -> SplitWord | None:
    if word is None or not _is_name(word.model) or (word.fingerprint and not _is_name(word.fingerprint)):
        return None
    nearest = sorted(word.round_trips.items(), key=lambda item: (item[1], item[0]))[:MOST_ROUND_TRIPS]
    wish = msgspec.structs.replace(word.wish, shares=word.wish.shares[:MOST_SHARES])
    return msgspec.structs.replace(word, round_trips=dict(nearest), shares=word.shares[:MOST_SHARES], wish=wish)


def _split_cost(word: SplitWord | None) -> int:
    if word is None:
        return 0
    return 160 + _cost(word.model, word.fingerprint) + 44 * len(word.round_trips) + 56 * len(word.shares)


def _publicity(publicity: Publicity | None) -> Publicity | None:
    if publicity is None:
        return None
    name, region = _text(publicity.name, MAX_MESH_NAME), _text(publicity.region, MAX_REGION)
    return msgspec.structs.replace(publicity, name=name, region=region)


def trimmed(announcement: Announcement) -> Announcement:
    """Return the announcement cut to what may be told: names first, then what is served, then what lies on disk."""
    budget = _Budget(MAX_PAYLOAD - 1024 - MAX_CERTIFICATE)
    capacity = announcement.capacity
    split = _split(announcement.split)
    budget.left -= _split_cost(split)
    devices = budget.take((device, _cost(device)) for device in _texts(capacity.devices, MAX_DEVICES))
    addresses = budget.take((address, _cost(address)) for address in _texts(announcement.addresses, MAX_ADDRESSES))
    served = [one for one in announcement.serving if _is_name(one.model)][:MAX_SERVING]
    serving = budget.take(map(_serving, served))
    wanted = budget.take((name, _cost(name)) for name in announcement.wanted[:MAX_WANTED] if _is_name(name))
    busiest = sorted(announcement.demand.items(), key=lambda item: (-item[1], item[0]))[:MAX_DEMAND]
    demand = budget.take(((name, rate), _cost(name) + 9) for name, rate in busiest if _is_name(name))
    on_disk = budget.take([_facts(one) for one in announcement.on_disk if _sound(one)][:MAX_ON_DISK])
    return msgspec.structs.replace(
        announcement,
        name=_text(announcement.name, MAX_NAME),
        version=_text(announcement.version, MAX_NAME),
        relay=_text(announcement.relay),
        serving=serving,
        on_disk=on_disk,
        wanted=wanted,
        demand=dict(demand),
        addresses=addresses,
        capacity=Capacity(
            memory_bytes=capacity.memory_bytes,
            memory_total_bytes=capacity.memory_total_bytes,
            devices=devices,
            engine=_text(capacity.engine),
            rpc_version=_text(capacity.rpc_version, MAX_NAME),
            speed=capacity.speed,
        ),
        split=split,
        publicity=_publicity(announcement.publicity),
    )
