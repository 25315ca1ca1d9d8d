"""Which node loads a model that somebody asks for. All nodes rank alike, so that they ask the same node.

In this order: nodes where nobody has to wait for a turn; nodes with the file on disk before those that fetch it from
another node, before those that fetch it from its source; where it fits now before where something idle must be
unloaded; where what would be unloaded is asked for least; fast machines before slow ones; then by rendezvous, so that
models spread evenly.
"""

import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from types import MappingProxyType
from typing import NamedTuple

from mesh_llm.core.placement.assignment import rendezvous
from mesh_llm.core.placement.offload import Pools
from mesh_llm.core.types.announcement import LoadOffer, Member
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelStatus, Role

_ON_DISK, _FROM_NEIGHBOUR, _FROM_SOURCE = range(3)
_NOW, _IDLE, _IN_TURN = range(3)

_MOST_REFUSALS = 1024
_PAUSE = 0.5
"""Seconds for which a refusal counts, whatever changes."""
_LEAST_RATE = 0.05
"""Requests a minute: less does not count."""

Fits = Callable[[ModelFacts, Pools], bool]
"""Whether a model can be launched within this memory."""
Rates = Callable[[AbstractSet[ModelName]], Mapping[ModelName, float]]
"""Requests a minute, over the whole mesh, for each of these models."""


def no_demand(models: AbstractSet[ModelName]) -> Mapping[ModelName, float]:
    """Nothing is known of what is asked for."""
    return dict.fromkeys(models, 0.0)


class Place(NamedTuple):
    """A node that may load models.

    Attributes:
        node: its id.
        offer: what it offers to them.
        idle_bytes: of `offer.room_bytes`, what is free or idle.
        on_disk: the models there.
        speed: how fast it computes, in bytes of weights per second; 0 unknown.
        cards: GPUs that share its memory.
        residents: what is loaded there: bytes of weights by model.
    """

    node: NodeId
    offer: LoadOffer
    idle_bytes: int
    on_disk: Collection[ModelName]
    speed: int = 0
    cards: int = 1
    residents: Mapping[ModelName, int] = MappingProxyType({})

    @property
    def room(self) -> Pools:
        """Its memory once all was unloaded that may be."""
        return Pools(device=self.offer.room_bytes, host=self.offer.room_host_bytes, cards=self.cards)


class _Refusal(NamedTuple):
    """What a node said. `facts`: what that was built on, as it was known here."""

    why: str
    since: float
    until: float
    split: bool
    facts: Hashable


class Refusals:
    """Nodes that said that they do not load a model.

    Such a node is not asked again for a while, but at most until something changes that its answer was built on.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[ModelName, NodeId], _Refusal] = {}

    def __contains__(self, key: tuple[ModelName, NodeId]) -> bool:
        return key in self._kept

    def add(
        self, model: ModelName, node: NodeId, why: str, now: float, until: float, facts: Hashable, *, split: bool
    ) -> None:
        """A node refuses. `facts`: what that is built on; `split`: other nodes' memory counted, too."""
        self._kept.pop((model, node), None)
        self._kept[model, node] = _Refusal(why, now, until, split, facts)
        if len(self._kept) > _MOST_REFUSALS:
            del self._kept[next(iter(self._kept))]

    def update(self, facts: Callable[[ModelName, NodeId, bool], Hashable], now: float) -> None:
        """Forget those whose time is over, or for which `facts` (of a model, a node, and `split`) changed.

        Each is kept for a moment: what changes all the time must not make a node ask without a pause.
        """
        self._kept = {
            (model, node): one
            for (model, node), one in self._kept.items()
            if now < one.since + _PAUSE or (now < one.until and one.facts == facts(model, node, one.split))
        }

    def why(self, model: ModelName, node: NodeId) -> str:
        """What a node said; empty: nothing that still counts."""
        kept = self._kept.get((model, node))
        return kept.why if kept is not None else ""

    def of(self, model: ModelName) -> Sequence[tuple[NodeId, str]]:
        """All that refuse a model, with what they said: the first one first."""
        return [(node, one.why) for (name, node), one in self._kept.items() if name == model]


def place_of(member: Member) -> Place | None:
    """Another node as a place; None if it loads nothing for this node."""
    announced = member.announcement
    offer = announced.loads
    if offer is None or member.suspect or announced.role is Role.CLIENT:
        return None
    idle = sum(one.size_bytes for one in announced.serving if one.status is ModelStatus.WARM and not one.in_flight)
    return Place(
        node=announced.node,
        offer=offer,
        idle_bytes=min(offer.room_bytes, offer.free_bytes + idle),
        on_disk=frozenset(facts.name for facts in announced.on_disk),
        speed=speed_of(announced.capacity),
        cards=max(1, len(announced.capacity.devices)),
        residents={one.model: one.size_bytes for one in announced.serving if one.status is ModelStatus.WARM},
    )


def speed_of(capacity: Capacity) -> int:
    """One number for how fast a node computes."""
    return capacity.speed.full.q4


def rank_places(
    facts: ModelFacts, places: Iterable[Place], *, shared: bool, fits: Fits, demand: Rates = no_demand
) -> Sequence[NodeId]:
    """The nodes that could load a model, the best first.

    Args:
        facts: the model.
        places: the nodes to choose among.
        shared: some node gives the model's file to others.
        fits: whether it can be launched within this memory.
        demand: how much the mesh asks for models.
    """
    known: dict[Pools, bool] = {}

    def fit(device: int, host: int, cards: int) -> bool:
        pools = Pools(device=device, host=host, cards=cards)
        if pools not in known:
            known[pools] = fits(facts, pools)
        return known[pools]

    near = [(place, distance) for place in places if (distance := _distance(facts, place, shared=shared)) is not None]
    rates = demand({model for place, _ in near for model in place.residents})
    found: dict[NodeId, tuple[bool, int, int, int, int]] = {}
    for place, distance in near:
        offer = place.offer
        if fit(offer.free_bytes, offer.free_host_bytes, place.cards):
            level = _NOW
        elif fit(place.idle_bytes, offer.room_host_bytes, place.cards):
            level = _IDLE
        elif fit(offer.room_bytes, offer.room_host_bytes, place.cards):
            level = _IN_TURN
        else:
            continue
        # By powers of two: measured speeds of equal machines differ a little, and so does what is known of demand.
        pace = round(math.log2(place.speed)) if place.speed > 0 else 0
        missed = 0 if level == _NOW else _missed(facts, place, rates)
        found[place.node] = (level == _IN_TURN, distance, level, missed, -pace)
    order = {node: rank for rank, node in enumerate(rendezvous(facts.name, found))}
    return sorted(found, key=lambda node: (found[node], order[node]))


def _missed(facts: ModelFacts, place: Place, rates: Mapping[ModelName, float]) -> int:
    """How much is asked for what would have to be unloaded, if that is what is asked for least: in powers of two."""
    short, rate = facts.size_bytes - place.offer.free_bytes - place.offer.free_host_bytes, 0.0
    for model in sorted(place.residents, key=lambda one: (rates.get(one, 0.0), one)):
        rate += rates.get(model, 0.0)
        short -= place.residents[model]
        if short <= 0:
            break
    return round(math.log2(rate / _LEAST_RATE)) if rate > _LEAST_RATE else 0


def _distance(facts: ModelFacts, place: Place, *, shared: bool) -> int | None:
    """How far the file is from a node; None: out of reach."""
    if facts.name in place.on_disk:
        # Perhaps another file of this name: a request for the name means either.
        return _ON_DISK
    if place.offer.fetches and shared:
        return _FROM_NEIGHBOUR
    return _FROM_SOURCE if place.offer.hub and facts.source else None
