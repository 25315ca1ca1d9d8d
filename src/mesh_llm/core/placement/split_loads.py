"""Whether a model that requests wait for, and that fits no node alone, can be split over several nodes on demand.

The sums and the rules are those of the split election itself (`SplitGroup.prospect`). What is not known yet is waited
for: what a node offers that has just joined, a plugin that is being built, a way that is not measured, a node that does
not answer. Only what the facts exclude is refused.
"""

from collections.abc import Callable, Collection, Hashable, Sequence
from typing import NamedTuple

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.placement.launches import Origin
from mesh_llm.core.placement.local_models import LoadRefused, LocalModels
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.split.eligibility import Barred, Obstacle
from mesh_llm.core.split.group import Counted
from mesh_llm.core.split.outlook import Outlook, clause
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus, Role

_UNKNOWN_SECONDS = 30.0
"""How long something may stay unknown until the node is not counted on: its offer, a way to it, its answer, its part in
the group. Only a plugin's build may take longer: it ends, and then the node says how."""
_LOOK_AGAIN = 1.0
_STILL_SECONDS = 3.0
"""When nothing that counts has changed for so long, what is known is what there is. News takes about a second."""
_MOST_NAMED = 2
_MOST_TRIED = 8
"""Nodes of which each is looked at for itself."""

_NEW, _STOPPING = "new", "stopping"
_CLAUSES = {
    _NEW: "has not said yet what it offers",
    _STOPPING: "is unloading a model",
    Obstacle.UNREACHED: "is not reached yet",
    Obstacle.PENDING: "enters the group",
}


class _Unknown(NamedTuple):
    """What is not known of a node yet, as a key of `_CLAUSES` or an `Obstacle`, and since when it is so."""

    code: str
    life: Incarnation
    since: float

    def lasts(self, now: float) -> bool:
        """Whether it is still hoped for."""
        return self.code == Obstacle.BUILDING or now < self.since + _UNKNOWN_SECONDS


class Chance(NamedTuple):
    """Whether a model can be split.

    Attributes:
        ready: it can be, now.
        waits_for: a clause: what is waited for, as it is not known yet or changes in a moment; empty: nothing.
        outlook: why it cannot be split now; None: it can.
    """

    ready: bool
    waits_for: str = ""
    outlook: Outlook | None = None

    @property
    def possible(self) -> bool:
        """Whether it can be split, now or perhaps soon."""
        return self.ready or bool(self.waits_for)


_Look = Callable[[Counted], Outlook | None]


class SplitLoads:
    """The splits that requests ask for: whether they are possible, and the one that was begun for them."""

    def __init__(self, config: NodeConfig, models: LocalModels, split: SplitController) -> None:
        self._config = config
        self._models = models
        self._split = split
        self._members: Sequence[Member] | None = None
        self._seen = 0
        self._unknown: dict[NodeId, _Unknown] = {}
        self._absent: dict[NodeId, float] = {}
        self._names: dict[NodeId, str] = {}
        self._now = 0.0
        self._begun: ModelName | None = None
        self._found: dict[Hashable, Chance] = {}
        self._found_for: Hashable = None
        self._facts: Hashable = None
        self._changed_at = 0.0

    def observe(self, members: Sequence[Member], now: float) -> None:
        """Note what is not known of the other nodes."""
        self._now = now
        own = self._own_unknown()
        found = {self._config.node: (own, self._config.incarnation)} if own else {}
        if members is not self._members:
            self._members, self._seen = members, self._seen + 1
            self._names = {one.announcement.node: one.label for one in members}
            self._facts, before = tuple(_counts(one) for one in members), self._facts
            if self._facts != before:
                self._changed_at = now
            for member in members:
                code = _unknown(member)
                if code:
                    found[member.announcement.node] = (code, member.announcement.incarnation)
        else:
            found |= {node: one[:2] for node, one in self._unknown.items() if node != self._config.node}
        self._unknown = {node: self._since(node, code, life) for node, (code, life) in found.items()}
        self._absent = {node: self._absent.get(node, now) for node in self._pending(members)}

    def _since(self, node: NodeId, code: str, life: Incarnation) -> _Unknown:
        before = self._unknown.get(node)
        same = before is not None and (before.code, before.life) == (code, life)
        return before if same and before is not None else _Unknown(code, life, self._now)

    def _own_unknown(self) -> str:
        """What is not known of this node itself."""
        if not self._split.admitted:
            return _NEW
        return Obstacle.BUILDING if self._models.rpc.obstacle == Obstacle.BUILDING else ""

    def _pending(self, members: Sequence[Member]) -> list[NodeId]:
        """The nodes that could have entered the group of the model that was begun, and have not."""
        model = self._split.group.model
        if model is None or model != self._begun:
            return []
        states = ((one.announcement.node, one.announcement.split) for one in members)
        return [node for node, state in states if state is None or state.model != model]

    @property
    def facts(self) -> Hashable:
        """All that the possibility of a split is built on. It changes when another answer may be right."""
        models, scope = self._models, self._split.scope
        own = (models.capacity.memory_bytes, models.launches.reserved_bytes(), models.rpc, scope, self._split.admitted)
        return (self._facts, own, self._split.lending is not None, models.group_model)

    def still(self, since: float, asking: Collection[NodeId]) -> bool:
        """Whether a no may be given: what counts has been the same for a while, or was looked at for as long.

        `since`: when it was first asked for. `asking`: members that ask; one that is not known here has just joined.
        """
        if self._now >= since + _STILL_SECONDS:
            return True
        known = all(one in self._names for one in asking)
        return known and self._now >= self._changed_at + _STILL_SECONDS

    # Whether it is possible.

    def chance(self, facts: ModelFacts, without: Collection[ModelName] = ()) -> Chance:
        """Whether this node, which has a model's file, can begin to split it. `without`: what is unloaded first."""
        members = self._members or ()

        def look(counted: Counted) -> Outlook | None:
            return self._split.prospect(facts, members, counted=counted, without=without)

        return self._chance((facts.name, tuple(without)), look)

    def chance_elsewhere(self, facts: ModelFacts) -> Chance:
        """Whether another node that has the file can perhaps split a model; that node decides it exactly."""
        members = self._members or ()

        def look(counted: Counted) -> Outlook | None:
            return self._split.prospect_elsewhere(facts, members, counted)

        return self._chance((facts.name, None), look)

    def _chance(self, key: Hashable, look: _Look) -> Chance:
        absent = frozenset(node for node, since in self._absent.items() if self._now >= since + _UNKNOWN_SECONDS)
        lasting = (node for node, one in self._unknown.items() if one.lasts(self._now))
        hoped = frozenset(node for node in lasting if node not in absent)
        found_for = (self._seen, self.facts, hoped, absent)
        if self._found_for != found_for:
            self._found, self._found_for = {}, found_for
        if key not in self._found:
            self._found[key] = self._look(look, hoped, absent)
        return self._found[key]

    def _look(self, look: _Look, hoped: Collection[NodeId], absent: Collection[NodeId]) -> Chance:
        outlook = look(Counted(absent=absent))
        if outlook is None:
            return Chance(ready=True)
        if not hoped or look(Counted(hoped=hoped, absent=absent)) is not None:
            return Chance(ready=False, outlook=outlook)
        # Where one of them is enough, only that one is named.
        tried = sorted(hoped) if len(hoped) <= _MOST_TRIED else []
        one = next((node for node in tried if look(Counted(hoped={node}, absent=absent)) is None), None)
        return Chance(ready=False, waits_for=self._clauses(hoped if one is None else {one}), outlook=outlook)

    def _clauses(self, nodes: Collection[NodeId]) -> str:
        told: list[str] = []
        for node in sorted(nodes)[:_MOST_NAMED]:
            code = self._unknown[node].code
            said = _CLAUSES.get(code) or clause(Barred(code))
            if node == self._config.node:
                told.append("this node is not in the mesh yet" if code == _NEW else f"this node {said}")
            else:
                told.append(f"{self._names.get(node, node[:10])} {said}")
        if len(nodes) > _MOST_NAMED:
            told.append(f"{len(nodes) - _MOST_NAMED} more are not known well enough yet")
        return ", and ".join(told)

    def can_begin(self, model: ModelName, refused: LoadRefused) -> bool:
        """Whether this node may split a model at all: it can share models, and takes no part in another one."""
        return self._other(model) is None and self._models.needs_group(model, refused)

    def _other(self, model: ModelName) -> ModelName | None:
        """Another model that this node splits, or computes layers of."""
        lending = self._split.lending
        taken = (self._models.group_model, lending.model if lending is not None else None)
        return next((one for one in taken if one is not None and one != model), None)

    def may_host(self, member: Member) -> bool:
        """Whether another node may begin a split, as far as is known."""
        offer, unknown = member.announcement.offer, self._unknown.get(member.announcement.node)
        if member.suspect or offer is None:
            return unknown is not None and unknown.code == _NEW and unknown.lasts(self._now)
        return offer.obstacle in {"", Obstacle.BUILDING}

    @staticmethod
    def may_take_part(member: Member) -> bool:
        """Whether another node may become a worker of a split, as far as it says."""
        announced = member.announcement
        if announced.role is Role.CLIENT:
            return False
        return announced.offer is None or announced.offer.obstacle in {"", Obstacle.BUILDING, Obstacle.YIELDING}

    def why_not(self, facts: ModelFacts, text: str, outlook: Outlook | None = None) -> str:
        """Why a model is loaded on no node: `text`, why not on this one; why it is not split, and what to type."""
        other = self._other(facts.name)
        if other is not None:
            return f"{text}; it is not split either while this node takes part in {other}: mesh-llm drop {other}"
        if facts.name not in self._models.on_disk:
            return text
        found = outlook or self._split.prospect(facts, self._members or ())
        return text if found is None else f"{text}. Split over several nodes, {self.short(found)}"

    def short(self, outlook: Outlook) -> str:
        """An outlook as a clause and sentences that follow it."""
        return " ".join([outlook.sum(), *outlook.explained(self._config.node)]).rstrip(".")

    def wakes(self) -> float:
        """When to look again while something is waited for, though nothing happened."""
        ends = [one.since + _UNKNOWN_SECONDS for one in self._unknown.values() if one.lasts(self._now)]
        return min([self._now + _LOOK_AGAIN, *(end for end in ends if end > self._now)])

    # What was begun.

    def begin(self, model: ModelName, now: float) -> list[AnyEffect]:
        """Want a group for a model, because requests ask for it."""
        models = self._models
        if models.group_model != model and model not in models.wanted:
            self._begun = model
        effects = models.load(model, None, now)
        if self._begun == model:
            models.group_origin = Origin.DEMAND
        return effects

    def end(self, model: ModelName) -> None:
        """Nobody waits for a model any more, or it cannot be split. What runs, or is the user's, stays."""
        if self._begun != model or self._models.launches.get(model) is not None or self._split.lending is not None:
            return
        states = (one.announcement.split for one in self._members or () if not one.suspect)
        if not any(state is not None and state.model == model and state.leads for state in states):
            self._begun = None
            self._models.end_group(model)


def _unknown(member: Member) -> str:
    """What is not known of a node yet, or changes in a moment; empty: nothing."""
    announced = member.announcement
    if announced.role is Role.CLIENT:
        return ""
    if announced.offer is None:
        return _NEW
    if member.suspect:
        return Obstacle.SILENT
    if announced.offer.obstacle:
        return Obstacle.BUILDING if announced.offer.obstacle == Obstacle.BUILDING else ""
    if member.rtt_ms <= 0.0:
        return Obstacle.UNREACHED
    return _STOPPING if any(one.status is ModelStatus.STOPPING for one in announced.serving) else ""


def _counts(member: Member) -> Hashable:
    """What the possibility of a split is built on, of one node."""
    announced = member.announcement
    return (
        announced.node,
        announced.incarnation,
        member.suspect,
        member.rtt_ms > 0.0,
        announced.offer,
        announced.capacity.rpc_version,
    )
