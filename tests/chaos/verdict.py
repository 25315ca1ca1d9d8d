"""What the faults did to the requests that they overlapped: what is allowed, what is a violation, and the counts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.chaos.faults import Fault
from tests.chaos.load import Asked
from tests.chaos.mesh import HOSTS, SHARED
from tests.chaos.questions import End

_NEVER = {End.WRONG, End.HUNG, End.CUT}


@dataclass
class Strike:
    """One fault that was done to one node, and the requests that it overlapped. Times are monotonic."""

    fault: Fault
    node: int
    node_id: str
    began: float
    open_then: frozenset[int]
    undone: float = 0.0
    whole_again: float = 0.0
    """When every node saw everything again; 0.0: never."""
    why: str = ""

    @property
    def end(self) -> float:
        """Until when requests may have felt it."""
        return self.whole_again or self.undone or self.began


@dataclass
class Row:
    """One fault's line in the table."""

    fault: str
    times: int = 0
    requests: int = 0
    hit: int = 0
    carried_on: int = 0
    ends: Counter[End] = field(default_factory=Counter[End])
    own_clients: int = 0
    longest: float = 0.0


@dataclass
class Verdict:
    """Everything that a run found."""

    rows: dict[str, Row] = field(default_factory=dict[str, Row])
    violations: list[str] = field(default_factory=list[str])
    calm: Counter[End] = field(default_factory=Counter[End])
    """Requests that no fault overlapped."""


def conclude(asked: Sequence[Asked], strikes: Sequence[Strike]) -> Verdict:
    """Judge a run: answers of a lost host must go on, where another one could give them."""
    verdict = Verdict()
    for strike in strikes:
        row = verdict.rows.setdefault(strike.fault.name, Row(strike.fault.name))
        row.times += 1
        row.longest = max(row.longest, strike.whole_again - strike.undone)
        if not strike.whole_again:
            verdict.violations.append(f"{strike.fault.name} on node{strike.node}: not whole again: {strike.why[:2000]}")
    for index, one in enumerate(asked):
        felt = [strike for strike in strikes if strike.began <= one.ended and one.began <= strike.end]
        if not felt:
            verdict.calm[one.end or End.HUNG] += 1
        for strike in felt:
            _count(verdict, strike, index, one)
        crashes = [strike for strike in strikes if strike.fault.blames and strike.began <= one.ended]
        problem = "" if _blamed(one, felt, len(crashes)) else _problem(one, felt)
        if problem:
            verdict.violations.append(problem)
    return verdict


def _count(verdict: Verdict, strike: Strike, index: int, one: Asked) -> None:
    row = verdict.rows[strike.fault.name]
    if _at_lost_door(one, strike):
        row.own_clients += 1
        return
    row.requests += 1
    row.ends[one.end or End.HUNG] += 1
    at_node = one.host == strike.node_id or (one.question.model == SHARED and strike.node in HOSTS[SHARED])
    if index in strike.open_then and one.question.streamed and at_node and one.got.pieces:
        row.hit += 1
        row.carried_on += one.end is End.WHOLE


def _problem(one: Asked, felt: Sequence[Strike]) -> str:
    """Why a request's end must not be; empty where it may."""
    end = one.end or End.HUNG
    if end is End.WHOLE:
        return ""
    during = ", ".join(f"{strike.fault.name} on node{strike.node}" for strike in felt) or "no fault"
    question = one.question
    form = "streamed" if question.streamed else "not streamed"
    text = f"{question.model}, {question.api}, {form}, at node{one.door}, during {during}: {end}: {one.why}"
    if end is End.WRONG:
        return text
    if any(_at_lost_door(one, strike) for strike in felt):
        return ""
    if not felt or end in _NEVER:
        return text
    if any(strike.fault.blinds and strike.node == one.door for strike in felt):
        return ""
    # A model that nobody else has can be away for a moment; what it had begun to say goes on once it is back.
    if question.model == SHARED and end is End.REFUSED and not all(strike.fault.groups for strike in felt):
        return ""
    return text


def _blamed(one: Asked, felt: Sequence[Strike], crashes: int) -> bool:
    """Its engine crashed with the request on it, or such a request is refused after two crashes."""
    if one.end not in {End.REFUSED, End.BROKEN}:
        return False
    crashed = any(strike.fault.blames for strike in felt)
    if crashed and any(text in one.why for text in ("crashed while it worked", "resumed it crashed")):
        return True
    return crashes > 1 and "times while they worked on this request" in one.why


def _at_lost_door(one: Asked, strike: Strike) -> bool:
    """The client's own node was struck, and nothing but it could have answered."""
    return strike.fault.closes_door and strike.node == one.door
