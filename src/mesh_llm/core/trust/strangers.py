"""What strangers may use of a node: quotas of requests and tokens, and when misuse cuts them off.

A stranger is a node that came to the mesh by a public listing, and whose owner this node's user has not named. All is
counted twice, for the node's key and for the address that it comes from, and both have the same quota: a new key from
the same address is no new quota. What comes by relays has no address of its own. It has half of what all strangers
together have, so that a flood of keys there leaves the other half to those who come directly.

Pure. Days are counted since the UNIX epoch, in UTC. `now` is seconds of one clock that never goes back.
"""

from collections import OrderedDict
from enum import StrEnum
from typing import Annotated

import msgspec

RELAY = "relay"
"""The source of all strangers that come by relays."""
MAX_COUNTED = 4096
"""Keys, and addresses, whose tokens of today are kept. Those that used least are dropped first."""
MAX_TOKENS = 2**53


class StrangerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """Quotas of strangers on one host (`--stranger-limit`); 0: no limit.

    Attributes:
        concurrent: requests at once, of one key, and of one address.
        tokens_per_day: of prompts and answers together, from midnight UTC, of one key, and of one address.
        all_concurrent: requests at once of all strangers together.
        all_tokens_per_day: tokens of all strangers together.
    """

    concurrent: int = 2
    tokens_per_day: int = 500_000
    all_concurrent: int = 8
    all_tokens_per_day: int = 5_000_000


NO_LIMITS = StrangerLimits(concurrent=0, tokens_per_day=0, all_concurrent=0, all_tokens_per_day=0)


class Quota(StrEnum):
    """A quota that is used up, as the code of the error that says so."""

    CONCURRENT = "stranger_concurrent"
    TOKENS = "stranger_tokens_per_day"
    ALL_CONCURRENT = "strangers_concurrent"
    ALL_TOKENS = "strangers_tokens_per_day"


Tokens = Annotated[int, msgspec.Meta(ge=0, le=MAX_TOKENS)]
_Names = Annotated[
    dict[Annotated[str, msgspec.Meta(min_length=1, max_length=64)], Tokens], msgspec.Meta(max_length=MAX_COUNTED)
]


class UsedToday(msgspec.Struct, frozen=True, kw_only=True):
    """What strangers have used on one day, as it is kept over a restart.

    Attributes:
        day: which day.
        nodes: tokens by key.
        sources: tokens by address.
        total: tokens of all, also of those that are not listed any more.
    """

    day: Annotated[int, msgspec.Meta(ge=0, le=10**7)] = 0
    nodes: _Names = {}
    sources: _Names = {}
    total: Tokens = 0


class StrangerQuotas:
    """Counts the requests and tokens of strangers, and says when a quota is used up.

    A request that is let in may end, also where it passes a quota of tokens: how many it takes is known at its end.

    Attributes:
        limits: what holds from now on.
        total: tokens of today.
        running: requests that are being answered.
    """

    def __init__(self, limits: StrangerLimits, used: UsedToday | None = None) -> None:
        """`used`: what was counted before a restart."""
        used = used or UsedToday()
        self.limits = limits
        self._day: int = used.day
        self._nodes = dict(used.nodes)
        self._sources = dict(used.sources)
        self.total = used.total
        self.running = 0
        self._running: dict[str, int] = {}

    def begin(self, node: str, source: str, day: int) -> Quota | None:
        """Let a request in, and count it until `end`; or say which quota is used up.

        `source`: the address that the node comes from, or RELAY.
        """
        self._turn_to(day)
        limits, most, tokens = self.limits, *self._of_source(source)
        if _reached(self._nodes.get(node, 0), limits.tokens_per_day) or _reached(self._sources.get(source, 0), tokens):
            return Quota.TOKENS
        if _reached(self.total, limits.all_tokens_per_day):
            return Quota.ALL_TOKENS
        key, place = f"key {node}", f"from {source}"
        if _reached(self._running.get(key, 0), limits.concurrent) or _reached(self._running.get(place, 0), most):
            return Quota.CONCURRENT
        if _reached(self.running, limits.all_concurrent):
            return Quota.ALL_CONCURRENT
        self.running += 1
        for name in (key, place):
            self._running[name] = self._running.get(name, 0) + 1
        return None

    def end(self, node: str, source: str) -> None:
        """A request that was let in has ended."""
        self.running -= 1
        for name in (f"key {node}", f"from {source}"):
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]

    def used(self, node: str, source: str, day: int, tokens: int) -> None:
        """A request took so many tokens, of its prompt and its answer."""
        self._turn_to(day)
        if tokens <= 0:
            return
        self.total = min(MAX_TOKENS, self.total + tokens)
        _add(self._nodes, node, tokens)
        _add(self._sources, source, tokens)

    def today(self, day: int) -> UsedToday:
        """What has been used today."""
        self._turn_to(day)
        return UsedToday(day=self._day, nodes=dict(self._nodes), sources=dict(self._sources), total=self.total)

    def _of_source(self, source: str) -> tuple[int, int]:
        """The most requests at once, and the most tokens, of one source."""
        limits = self.limits
        if source != RELAY:
            return limits.concurrent, limits.tokens_per_day
        return -(-limits.all_concurrent // 2), -(-limits.all_tokens_per_day // 2)

    def _turn_to(self, day: int) -> None:
        if day != self._day:
            self._day, self.total = day, 0
            self._nodes.clear()
            self._sources.clear()


def _reached(count: int, limit: int) -> bool:
    return limit > 0 and count >= limit


def _add(counts: dict[str, int], name: str, tokens: int) -> None:
    counts[name] = min(MAX_TOKENS, counts.get(name, 0) + tokens)
    if len(counts) > MAX_COUNTED:
        # Whoever used most must not get rid of it by many keys that use little. Many at once: each time takes long.
        for one in sorted(counts, key=counts.__getitem__)[: MAX_COUNTED // 4]:
            if one != name:
                del counts[one]


KEY_POINTS, SOURCE_POINTS = 10.0, 30.0
"""Points at which a key, and an address, is cut off."""
_FADE = 1.0 / 6.0
"""Points that are forgotten in a second."""
CUT_OFF_SECONDS, MOST_CUT_OFF_SECONDS = 300.0, 3600.0
_FORGET_SECONDS = 86400.0
MAX_BLAMED = 4096


class CutOff(msgspec.Struct, frozen=True, kw_only=True):
    """Who is cut off, and for how long. `source`: an address with all its strangers; else the key `who`."""

    who: str
    source: bool
    seconds: float


class _Blame:
    __slots__ = ("at", "points", "times", "until")

    def __init__(self, now: float) -> None:
        self.points = 0.0
        self.times = 0
        self.at = now
        self.until = now


class Misconduct:
    """Counts what strangers do wrong, by key and by address, and says when one is cut off.

    Points fade. A cut lasts five minutes, and twice as long each further time within a day, up to an hour. What comes
    by relays is cut by key only: others come there too.
    """

    def __init__(self) -> None:
        self._blamed: OrderedDict[tuple[bool, str], _Blame] = OrderedDict()

    def blame(self, node: str, source: str, points: float, now: float) -> list[CutOff]:
        """A stranger did something wrong; returns who is cut off for that from now on."""
        found: list[CutOff] = []
        for who, is_source, most in ((node, False, KEY_POINTS), (source, True, SOURCE_POINTS)):
            if is_source and source == RELAY:
                continue
            one = self._of(who, is_source, now)
            if now < one.until:
                continue
            one.points = max(0.0, one.points - (now - one.at) * _FADE) + points
            one.at = now
            if one.points < most:
                continue
            seconds = min(MOST_CUT_OFF_SECONDS, CUT_OFF_SECONDS * 2.0 ** min(one.times, 10))
            one.times, one.points, one.until = one.times + 1, 0.0, now + seconds
            found.append(CutOff(who=who, source=is_source, seconds=seconds))
        return found

    def seconds_left(self, node: str, source: str, now: float) -> float:
        """How long a stranger is still cut off, by its key or its address; 0.0: it is not."""
        ends = (self._blamed.get((False, node)), self._blamed.get((True, source)))
        return max([0.0, *(one.until - now for one in ends if one is not None)])

    def _of(self, who: str, is_source: bool, now: float) -> _Blame:
        one = self._blamed.pop((is_source, who), None)
        if one is None or now - max(one.at, one.until) > _FORGET_SECONDS:
            one = _Blame(now)
        self._blamed[is_source, who] = one
        if len(self._blamed) > MAX_BLAMED:
            # Those that are cut off stay.
            idle = next((name for name, other in self._blamed.items() if other.until <= now and other is not one), None)
            del self._blamed[idle if idle is not None else next(iter(self._blamed))]
        return one
