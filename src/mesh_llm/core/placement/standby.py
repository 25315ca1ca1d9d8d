"""Which models the mesh has lost: the last host died or gave up. One that a user dropped on a living node is not.

When a node without a model takes one. One node acts, not all.

Every node computes the same rendezvous order for a model; the first acts after a base delay, each next one a step
later, by when it has heard of the one before. So a gap is filled once, and filled even if the first in order cannot.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from mesh_llm.core.config import Timings
from mesh_llm.core.placement.assignment import Assigned, Candidate, Unassigned, assign, overloaded, rendezvous
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus, Role

_FORGET_LOST = 3600.0
_MOST_LOST = 256
"""Names are peers' words: of more lost models the oldest are forgotten."""


@dataclass(kw_only=True)
class Losses:
    """Models whose last host died, left or gave up; when that was seen."""

    lost: dict[ModelName, float] = field(default_factory=dict[ModelName, float])
    _hosts: dict[ModelName, set[NodeId]] = field(default_factory=dict[ModelName, set[NodeId]])

    def observe(self, members: Sequence[Member], now: float) -> None:
        """Compare who serves what with what was seen before."""
        present: dict[ModelName, set[NodeId]] = {}
        failed: set[tuple[ModelName, NodeId]] = set()
        living = {member.announcement.node for member in members}
        for member in members:
            node = member.announcement.node
            for serving in member.announcement.serving:
                if member.hosts(serving.model):
                    present.setdefault(serving.model, set()).add(node)
                elif serving.status is ModelStatus.FAILED:
                    failed.add((serving.model, node))
        for model, before in self._hosts.items():
            if model not in present and any(node not in living or (model, node) in failed for node in before):
                self.lost.setdefault(model, now)
        for model in present:
            self.lost.pop(model, None)
        for model in [model for model, since in self.lost.items() if now - since > _FORGET_LOST]:
            del self.lost[model]
        for model in list(self.lost)[: max(0, len(self.lost) - _MOST_LOST)]:
            del self.lost[model]
        self._hosts = present


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What a decision is made from.

    Attributes:
        me: this node.
        members: all other nodes that are not dead.
        on_disk: models here.
        known: models that anybody has, by name; `on_disk` included.
        wanted: the mesh's wanted models, in order.
        demand: requests per minute over the mesh.
        excluded: models not to be taken here: dropped by the user, or given up.
        fits: whether a model fits into so many bytes beside nothing else.
        memory_bytes: what this node has free.
        can_fetch: models that are not on disk can be had.
        shared: models that another node gives the files of.
    """

    me: NodeId
    members: Sequence[Member]
    on_disk: Mapping[ModelName, ModelFacts]
    known: Mapping[ModelName, ModelFacts]
    wanted: Sequence[ModelName]
    demand: Mapping[str, float]
    excluded: Collection[ModelName]
    fits: Callable[[ModelFacts, int], bool]
    memory_bytes: int
    can_fetch: bool = False
    shared: Collection[ModelName] = ()

    def hosts(self) -> dict[ModelName, int]:
        """How many nodes serve each model, or are about to; a doubted one counts until it is dead."""
        counts: dict[ModelName, int] = {}
        for member in self.members:
            for serving in member.announcement.serving:
                if member.hosts(serving.model):
                    counts[serving.model] = counts.get(serving.model, 0) + 1
        return counts


@dataclass(frozen=True)
class _Call:
    hosts: int
    since: float


class Standby:
    """Decides for a node that serves nothing. `look` may be called at any time; `deadline` says when it should be."""

    def __init__(self, timings: Timings, *, joins: bool) -> None:
        """`joins`: the node came without a model of its own into others' mesh, so it is to be assigned one."""
        self._timings = timings
        self._unassigned = joins
        self._met: float | None = None
        self._calls: dict[ModelName, _Call] = {}
        self._deadline: float | None = None
        self.losses = Losses()
        self.waiting_because = ""
        self._said = ""

    def deadline(self) -> float | None:
        """When to look again, if nothing happens before."""
        return self._deadline

    def rest(self) -> None:
        """The node serves something: there is nothing to decide, now or for its first assignment."""
        self._unassigned = False
        self._calls.clear()
        self._deadline = None
        self.waiting_because = ""

    def tell(self) -> list[AnyEffect]:
        """Say why a joiner has nothing, once for each reason."""
        why = self.waiting_because
        if not why or why == self._said:
            return []
        self._said = why
        return [Notice(level=NoticeLevel.INFO, code="standing_by", text=f"Standing by: {why}.")]

    def again(self) -> None:
        """What the node took could not be had: it is to be assigned another."""
        self._unassigned = True

    def look(self, situation: Situation, now: float) -> Assigned | None:
        """Return the model to take now, or None. `waiting_because` says why a joiner has nothing."""
        self._deadline = None
        if not situation.members:
            self._met = None
            self._calls.clear()
            return None
        if self._met is None:
            self._met = now
        settled = self._met + self._timings.settle
        if self._unassigned and now < settled:
            self._wake(settled)
            return None
        hosts = situation.hosts()
        called = self._called(situation, hosts)
        first = self._assignment(situation, hosts, now) if self._unassigned else None
        if first is not None:
            called[first.facts.name] = first
        self._remember(called, hosts, now)
        due = sorted((self._due(situation, assigned), name) for name, assigned in called.items())
        if not due:
            return None
        time, name = due[0]
        if time > now:
            self._wake(time)
            return None
        self._unassigned = False
        self.losses.lost.pop(name, None)
        return called[name]

    def _called(self, situation: Situation, hosts: Mapping[ModelName, int]) -> dict[ModelName, Assigned]:
        called: dict[ModelName, Assigned] = {}
        for name in (*situation.wanted, *sorted(self.losses.lost)):
            if hosts.get(name, 0) == 0 and (facts := self._possible(situation, name)):
                why = "its last host is gone" if name in self.losses.lost else "it is wanted and nobody serves it"
                called.setdefault(name, Assigned(facts=facts, why=why, unserved=True))
        for name, rate in overloaded(situation.demand, hosts, self._timings.demand_per_host).items():
            if facts := self._possible(situation, name):
                why = f"each of its {hosts[name]} hosts is asked {rate:.0f} times a minute"
                called.setdefault(name, Assigned(facts=facts, why=why, unserved=False))
        return called

    def _possible(self, situation: Situation, name: ModelName) -> ModelFacts | None:
        facts = situation.on_disk.get(name)
        if facts is None and situation.can_fetch:
            other = situation.known.get(name)
            facts = other if other is not None and (other.source or name in situation.shared) else None
        if facts is None or name in situation.excluded or not situation.fits(facts, situation.memory_bytes):
            return None
        return facts

    def _assignment(self, situation: Situation, hosts: Mapping[ModelName, int], now: float) -> Assigned | None:
        ranks = {name: rank for rank, name in enumerate(situation.wanted)}
        candidates = [
            Candidate(
                facts=facts,
                hosts=hosts.get(name, 0),
                on_disk=name in situation.on_disk,
                wanted=ranks.get(name),
                shared=name in situation.shared,
            )
            for name in sorted({*situation.wanted, *hosts})
            if name not in situation.excluded and (facts := situation.known.get(name))
        ]
        match assign(
            candidates,
            lambda facts: situation.fits(facts, situation.memory_bytes),
            can_fetch=situation.can_fetch,
        ):
            case Assigned() as assigned:
                return assigned
            case Unassigned(why=why):
                self.waiting_because = why
                self._wake(now + self._timings.retry_assignment)
                return None

    def _remember(self, called: Mapping[ModelName, Assigned], hosts: Mapping[ModelName, int], now: float) -> None:
        calls: dict[ModelName, _Call] = {}
        for name in called:
            count = hosts.get(name, 0)
            before = self._calls.get(name)
            calls[name] = before if before is not None and before.hosts == count else _Call(count, now)
        self._calls = calls

    def _due(self, situation: Situation, assigned: Assigned) -> float:
        name = assigned.facts.name
        since = self._calls[name].since
        if self._unassigned and not assigned.unserved:
            return since
        others = [
            member.announcement.node for member in situation.members if _may_take(member, assigned.facts, situation)
        ]
        rank = rendezvous(name, [*others, situation.me]).index(situation.me)
        base = 0.0 if self._unassigned else self._timings.promotion_base
        return since + base + rank * self._timings.promotion_step

    def _wake(self, time: float) -> None:
        self._deadline = time if self._deadline is None else min(self._deadline, time)


def _may_take(member: Member, facts: ModelFacts, situation: Situation) -> bool:
    word = member.announcement
    if member.suspect or word.role is not Role.STANDBY:
        return False
    if any(serving.model == facts.name for serving in word.serving):
        return False
    on_disk = any(other.name == facts.name for other in word.on_disk)
    obtainable = bool(facts.source) or facts.name in situation.shared
    return (on_disk or (situation.can_fetch and obtainable)) and situation.fits(facts, word.capacity.memory_bytes)
