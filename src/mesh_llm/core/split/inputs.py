"""What a node decides its part in a split model from: its own state, and the groups that other nodes announce."""

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mesh_llm.core.split.eligibility import Barred, Obstacle, to_join
from mesh_llm.core.types.announcement import Member, SplitOffer, SplitState
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchOptions, ModelFacts, Speed


@dataclass(frozen=True, kw_only=True)
class SplitInputs:
    """What a decision is made from.

    Attributes:
        members: all other nodes that are not dead.
        on_disk: models here.
        elsewhere: models of groups whose files only other nodes have; empty where this node fetches nothing.
        alone: whether this node is free to hold a model alone, and may still get its file.
        busy: this node runs a model of its own.
        wanted: the model that a user of this node wants and that needs a group; None: there is none.
        options: the user's options for it.
        draft: the draft model that this node would use beside a model, if any.
        offered: bytes that this node has for a model, beside everything else.
        rpc_version: of this node's engine; empty where it cannot pair.
        on_processor, speed: as in this node's `Capacity`.
        excluded: models not to be touched here: dropped, failed, or served by this node alone.
        solo: models that some node serves whole.
        offer: what this node offers to split models; None: its admission is not known yet.
        distrusted: models on nodes that this node does not trust with them.
    """

    members: Sequence[Member]
    on_disk: Mapping[ModelName, ModelFacts]
    elsewhere: Mapping[ModelName, ModelFacts]
    alone: Callable[[ModelFacts], bool]
    busy: bool
    wanted: ModelName | None
    options: LaunchOptions
    draft: Callable[[ModelName], ModelFacts | None]
    offered: Callable[[ModelName], int]
    rpc_version: str
    on_processor: bool
    speed: Speed
    excluded: Collection[ModelName]
    solo: Collection[ModelName]
    offer: SplitOffer | None
    distrusted: Collection[tuple[ModelName, NodeId]] = ()

    def doubted(self, model: ModelName) -> frozenset[NodeId]:
        """The nodes that this node, as a host, takes for no workers of a model."""
        return frozenset(node for name, node in self.distrusted if name == model)

    def facts(self, model: ModelName) -> ModelFacts | None:
        """Of a model here, or of a group's model that is not here."""
        return self.on_disk.get(model) or self.elsewhere.get(model)

    def barred(self, facts: ModelFacts) -> Barred | None:
        """What keeps this node out of the group of a model."""
        if self.offer is None:
            return Barred(Obstacle.PENDING)
        own = self.on_disk.get(facts.name)
        return to_join(self.offer, facts, own.fingerprint if own is not None else None, self.offered(facts.name))


class AnnouncedGroup(NamedTuple):
    """A group as its members announce it.

    Attributes:
        model: its model.
        running: some member leads it.
        asked: it is to be split over all nodes (`--split`).
        computing: all nodes in its leaders' layouts.
        memories: bytes of the members that have the file, the most first.
    """

    model: ModelName
    running: bool
    asked: bool
    computing: frozenset[NodeId] = frozenset()
    memories: tuple[int, ...] = ()


def announced_groups(
    members: Sequence[Member], known: Mapping[ModelName, ModelFacts], excluded: Collection[ModelName]
) -> dict[ModelName, AnnouncedGroup]:
    """The groups that some node wants or leads, of exactly the files in `known`."""
    found: dict[ModelName, list[SplitState]] = {}
    for member in members:
        state = member.announcement.split
        if member.suspect or state is None or state.model in excluded:
            continue
        facts = known.get(state.model)
        if facts is not None and facts.fingerprint == state.fingerprint:
            found.setdefault(state.model, []).append(state)
    return {
        model: AnnouncedGroup(
            model=model,
            running=any(state.leads for state in states),
            asked=any(state.asked for state in states),
            computing=frozenset(share.node for state in states if state.leads for share in state.shares),
            memories=tuple(sorted((state.memory_bytes for state in states if not state.bare), reverse=True)),
        )
        for model, states in found.items()
        if any(state.seeds or state.leads for state in states)
    }


def models_elsewhere(members: Sequence[Member], on_disk: Container[ModelName]) -> dict[ModelName, ModelFacts]:
    """Models of groups whose file is not here, as described by the first member, by id, that has the file."""
    found: dict[ModelName, ModelFacts] = {}
    for member in sorted(members, key=lambda member: member.announcement.node):
        state = member.announcement.split
        if state is None or state.bare or state.model in on_disk or not state.fingerprint:
            continue
        for facts in member.announcement.on_disk:
            if (facts.name, facts.fingerprint) == (state.model, state.fingerprint):
                found.setdefault(state.model, facts)
    return found
