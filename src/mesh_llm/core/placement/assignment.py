"""Which model a node without one takes, and when: one node acts, not all.

All nodes compute the same rendezvous order for a model. The first node acts after a base delay, each next one a step
later, by when it has heard of the one before. So a gap is filled once, and it is filled even if the first node cannot.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import NamedTuple

import msgspec

from mesh_llm.core.config import Timings
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.errors import listed
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus, Role

_LAST = 1 << 30
_FORGET_AFTER = 3600.0
_MAX_ORPHANS = 256
_MOST_NAMED = 3


class Assigned(msgspec.Struct, frozen=True, kw_only=True):
    """Serve this model. `why` completes a sentence after "because"."""

    facts: ModelFacts
    why: str
    unserved: bool


class Unassigned(msgspec.Struct, frozen=True, kw_only=True):
    """Serve nothing. `why` is a clause for people."""

    why: str


@dataclass(frozen=True, kw_only=True)
class PlacementInputs:
    """What a decision is made from.

    Attributes:
        me: this node.
        members: all other nodes that are not dead; empty where this node is alone.
        on_disk: models here.
        known: models that any node has, by name; includes `on_disk`.
        wanted: the models that users gave to the mesh, in order.
        demand: requests per minute over the mesh, by model.
        excluded: models that this node does not take: a user dropped them, or they failed.
        fits: whether a model fits into so many bytes.
        memory_bytes: what this node has free.
        can_fetch: models that are not on disk can be fetched.
        offered: models whose files another node gives.
        strangers: members whose models this node takes up only where others serve or want them too.
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
    offered: Collection[ModelName] = ()
    strangers: Collection[NodeId] = ()

    def fits_here(self, facts: ModelFacts) -> bool:
        """Whether a model fits into this node's free memory."""
        return self.fits(facts, self.memory_bytes)

    def hosts(self) -> dict[ModelName, int]:
        """How many nodes serve each model or are about to. Suspect nodes count."""
        counts: dict[ModelName, int] = {}
        for member in self.members:
            for serving in member.announcement.serving:
                if member.hosts(serving.model):
                    counts[serving.model] = counts.get(serving.model, 0) + 1
        return counts


class _Need(NamedTuple):
    """What asked for one more host, since when, and how many hosts the model had then."""

    hosts: int
    since: float


class Assigner:
    """Decides for a node that serves nothing.

    `evaluate` may be called at any time and must be called at `deadline`. A node that joined without a model of its own
    is assigned one soon after it met the mesh; later, it fills the gaps that `_needed` finds. A node that is left alone
    fills them at once: there is nobody to wait for.
    """

    def __init__(self, timings: Timings, *, joins: bool) -> None:
        """`joins`: the node joined other nodes' mesh without a model of its own, so it is assigned one."""
        self._timings = timings
        self._joining = joins
        self._met: float | None = None
        self._needs: dict[ModelName, _Need] = {}
        self._deadline: float | None = None
        self.orphaned = OrphanedModels()
        self.waiting_reason = ""
        """Why a joining node, or one that was left alone, was assigned nothing."""

    def deadline(self) -> float | None:
        """When to evaluate again if nothing happens before."""
        return self._deadline

    def pause(self) -> None:
        """The node serves a model: nothing is to be assigned, and the first assignment is over."""
        self._joining = False
        self._needs.clear()
        self._deadline = None
        self.waiting_reason = ""

    def assign_another(self) -> None:
        """The assigned model could not be fetched."""
        self._joining = True

    def evaluate(self, inputs: PlacementInputs, now: float) -> Assigned | None:
        """Return the model to take now, or None."""
        self._deadline = None
        if not inputs.members:
            return self._evaluate_alone(inputs)
        if not self._joining:
            self.waiting_reason = ""
        if self._met is None:
            self._met = now
        settled = self._met + self._timings.settle
        if self._joining and now < settled:
            self._wake(settled)
            return None
        hosts = inputs.hosts()
        needed = {assigned.facts.name: assigned for assigned in self._needed(inputs, hosts)}
        if self._joining:
            match first_assignment(_candidates(inputs, hosts), inputs.fits_here, can_fetch=inputs.can_fetch):
                case Assigned() as first:
                    needed[first.facts.name] = first
                case Unassigned(why=why):
                    self.waiting_reason = why
                    self._wake(now + self._timings.retry_assignment)
        self._remember(needed, hosts, now)
        due = sorted((self._due(inputs, assigned), name) for name, assigned in needed.items())
        if not due:
            return None
        time, name = due[0]
        if time > now:
            self._wake(time)
            return None
        return self._take(needed[name])

    def _evaluate_alone(self, inputs: PlacementInputs) -> Assigned | None:
        """No other node is left, or none was met yet."""
        self._met = None
        self._needs.clear()
        self.waiting_reason = ""
        needed = list(self._needed(inputs, {}))
        if needed:
            # Sorting keeps the order of `_needed`: the user's, where the mesh asked for nothing more than for the rest.
            needed.sort(key=lambda one: (one.facts.name not in inputs.on_disk, -inputs.demand.get(one.facts.name, 0.0)))
            return self._take(needed[0])
        if self.orphaned.since:
            self.waiting_reason = _left_alone(inputs, sorted(self.orphaned.since))
        return None

    def _take(self, assigned: Assigned) -> Assigned:
        self._joining = False
        self.orphaned.forget(assigned.facts.name)
        return assigned

    def _needed(self, inputs: PlacementInputs, hosts: Mapping[ModelName, int]) -> Iterator[Assigned]:
        """The placement rules: models that need one more host and that this node could serve, each at most once."""
        for name in dict.fromkeys((*inputs.wanted, *sorted(self.orphaned.since))):
            if hosts.get(name, 0) == 0 and (facts := _obtainable(inputs, name)):
                lost = name in self.orphaned.since
                why = "its last host is gone" if lost else "it is wanted and nobody serves it"
                yield Assigned(facts=facts, why=why, unserved=True)
        for name, rate in overloaded(inputs.demand, hosts, self._timings.demand_per_host).items():
            if facts := _obtainable(inputs, name):
                why = f"each of its {hosts[name]} hosts is asked {rate:.0f} times a minute"
                yield Assigned(facts=facts, why=why, unserved=False)

    def _remember(self, needed: Iterable[ModelName], hosts: Mapping[ModelName, int], now: float) -> None:
        """A need counts from when it arose. It arises anew when the number of hosts changes."""
        needs: dict[ModelName, _Need] = {}
        for name in needed:
            count, before = hosts.get(name, 0), self._needs.get(name)
            needs[name] = before if before is not None and before.hosts == count else _Need(count, now)
        self._needs = needs

    def _due(self, inputs: PlacementInputs, assigned: Assigned) -> float:
        """When it is this node's turn to take a model."""
        name = assigned.facts.name
        since = self._needs[name].since
        if self._joining and not assigned.unserved:
            return since
        others = [member.announcement.node for member in inputs.members if _may_take(member, assigned.facts, inputs)]
        rank = rendezvous(name, [*others, inputs.me]).index(inputs.me)
        base = 0.0 if self._joining else self._timings.promotion_base
        return since + base + rank * self._timings.promotion_step

    def _wake(self, time: float) -> None:
        self._deadline = time if self._deadline is None else min(self._deadline, time)


class OrphanedModels:
    """Models whose last host died, left or failed, with the time. A model that a user dropped is not orphaned."""

    def __init__(self) -> None:
        self.since: dict[ModelName, float] = {}
        self._hosts: dict[ModelName, set[NodeId]] = {}

    def observe(self, members: Sequence[Member], now: float, strangers: Collection[NodeId] = ()) -> None:
        """Compare the hosts of each model with those of the last call. What `strangers` serve is no loss."""
        present: dict[ModelName, set[NodeId]] = {}
        failed: set[tuple[ModelName, NodeId]] = set()
        living = {member.announcement.node for member in members}
        for member in members:
            node = member.announcement.node
            for serving in member.announcement.serving:
                if member.hosts(serving.model):
                    if node not in strangers:
                        present.setdefault(serving.model, set()).add(node)
                elif serving.status is ModelStatus.FAILED:
                    failed.add((serving.model, node))
        for model, before in self._hosts.items():
            if model not in present and any(node not in living or (model, node) in failed for node in before):
                self.since.setdefault(model, now)
        self._hosts = present
        kept = [
            (model, since)
            for model, since in self.since.items()
            if model not in present and now - since <= _FORGET_AFTER
        ]
        # Peers choose the names: beyond a bound the oldest are forgotten.
        self.since = dict(kept[-_MAX_ORPHANS:])

    def forget(self, model: ModelName) -> None:
        """This node takes the model."""
        self.since.pop(model, None)


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model for a node's first assignment.

    Attributes:
        facts: the model.
        hosts: how many live nodes serve or load it.
        on_disk: whether this node has it.
        wanted: position in the mesh's wanted list; None where it is only served.
        offered: another node gives its files.
    """

    facts: ModelFacts
    hosts: int
    on_disk: bool
    wanted: int | None = None
    offered: bool = False

    def obtainable(self, *, can_fetch: bool) -> bool:
        """Whether it is on disk, or can be fetched from a known source or another node."""
        return self.on_disk or (can_fetch and (self.offered or bool(self.facts.source)))

    @property
    def preference(self) -> tuple[bool, bool, int, int, str]:
        """The least is the best: unserved, on disk, few hosts, early in the wanted list."""
        wanted = _LAST if self.wanted is None else self.wanted
        return (self.hosts > 0, not self.on_disk, self.hosts, wanted, self.facts.name)


def first_assignment(
    candidates: Iterable[Candidate], fits: Callable[[ModelFacts], bool], *, can_fetch: bool
) -> Assigned | Unassigned:
    """Choose the first model of a node that has none: the best of those that fit and that it has or can fetch."""
    known = list(candidates)
    if not known:
        return Unassigned(why="the mesh wants no model yet")
    obtainable = [candidate for candidate in known if candidate.obtainable(can_fetch=can_fetch)]
    if not obtainable:
        return Unassigned(why=f"none of the mesh's models is on disk here ({_names(known)})")
    possible = [candidate for candidate in obtainable if fits(candidate.facts)]
    if not possible:
        return Unassigned(why=f"none of the mesh's models fits this machine's memory ({_names(obtainable)})")
    best = min(possible, key=lambda candidate: candidate.preference)
    if best.hosts == 0:
        where = "and it is on disk here" if best.on_disk else "and it fits here"
        return Assigned(facts=best.facts, why=f"nobody serves it, {where}", unserved=True)
    where = "of those on disk here" if best.on_disk else "of those that fit here"
    hosts = f"{best.hosts} node{'' if best.hosts == 1 else 's'}"
    return Assigned(facts=best.facts, why=f"it is the least served ({hosts}) {where}", unserved=False)


def rendezvous(model: ModelName, nodes: Iterable[NodeId]) -> tuple[NodeId, ...]:
    """Order nodes for a model by a hash of both. All nodes compute the same order, and models spread evenly.

    Source: rendezvous hashing (Thaler, Ravishankar 1998).
    """

    def weight(node: NodeId) -> tuple[bytes, NodeId]:
        return blake2b(f"{model}\0{node}".encode(), digest_size=8).digest(), node

    return tuple(sorted(nodes, key=weight))


def overloaded(demand: Mapping[str, float], hosts: Mapping[ModelName, int], per_host: float) -> dict[ModelName, float]:
    """Served models with more than `per_host` requests per minute and host, with that rate."""
    return {
        model: rate
        for model, count in hosts.items()
        if count > 0 and (rate := demand.get(model, 0.0) / count) > per_host
    }


def wanted_order(lists: Iterable[Sequence[ModelName]]) -> tuple[ModelName, ...]:
    """Merge the nodes' wanted lists into one: by best position, then by name. The same on every node."""
    best: dict[ModelName, int] = {}
    for names in lists:
        for position, name in enumerate(names):
            best[name] = min(position, best.get(name, position))
    return tuple(sorted(best, key=lambda name: (best[name], name)))


def known_models(models: Iterable[ModelFacts]) -> dict[ModelName, ModelFacts]:
    """Models by name. Where several describe one model, one with a source wins."""
    return {facts.name: facts for facts in sorted(models, key=lambda facts: bool(facts.source))}


def _candidates(inputs: PlacementInputs, hosts: Mapping[ModelName, int]) -> Iterator[Candidate]:
    ranks = {name: rank for rank, name in enumerate(inputs.wanted)}
    known = [one for one in inputs.members if one.announcement.node not in inputs.strangers]
    for name in sorted({*inputs.wanted, *(one for one in hosts if any(member.hosts(one) for member in known))}):
        if name not in inputs.excluded and (facts := inputs.known.get(name)):
            yield Candidate(
                facts=facts,
                hosts=hosts.get(name, 0),
                on_disk=name in inputs.on_disk,
                wanted=ranks.get(name),
                offered=name in inputs.offered,
            )


def _obtainable(inputs: PlacementInputs, name: ModelName) -> ModelFacts | None:
    """A model that this node could serve: on disk or fetchable, not excluded, and it fits."""
    facts = inputs.on_disk.get(name)
    if facts is None and inputs.can_fetch:
        other = inputs.known.get(name)
        facts = other if other is not None and (other.source or name in inputs.offered) else None
    if facts is None or name in inputs.excluded or not inputs.fits_here(facts):
        return None
    return facts


def _left_alone(inputs: PlacementInputs, lost: Sequence[ModelName]) -> str:
    """Why a node that was left alone serves none of the models whose last host is gone."""
    missing = [name for name in lost if name not in inputs.on_disk]
    large = [name for name in lost if name in inputs.on_disk and not inputs.fits_here(inputs.on_disk[name])]
    reasons = ["no other node of the mesh is left"]
    if missing:
        reasons.append(f"not on disk here: {listed(missing, _MOST_NAMED)}")
    if large:
        reasons.append(f"too big for this machine: {listed(large, _MOST_NAMED)}")
    return "; ".join(reasons)


def _may_take(member: Member, facts: ModelFacts, inputs: PlacementInputs) -> bool:
    """Whether another node may take a model, so that its turn is waited for."""
    announced = member.announcement
    if member.suspect or announced.role is not Role.STANDBY:
        return False
    if any(serving.model == facts.name for serving in announced.serving):
        return False
    on_disk = any(other.name == facts.name for other in announced.on_disk)
    fetchable = inputs.can_fetch and (bool(facts.source) or facts.name in inputs.offered)
    return (on_disk or fetchable) and inputs.fits(facts, announced.capacity.memory_bytes)


def _names(candidates: Sequence[Candidate]) -> str:
    return listed(sorted(candidate.facts.name for candidate in candidates), _MOST_NAMED)
