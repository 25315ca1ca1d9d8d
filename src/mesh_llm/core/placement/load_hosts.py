"""Which node loads a model that somebody asks for. All nodes rank alike, so that they ask the same node.

In this order: nodes where nobody has to wait for a turn; nodes with the file on disk before those that fetch it from
another node, before those that fetch it from its source; where it fits now before where something idle must be
unloaded; fast machines before slow ones; then by rendezvous, so that models spread evenly.
"""

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import NamedTuple

from mesh_llm.core.placement.assignment import rendezvous
from mesh_llm.core.placement.offload import Pools
from mesh_llm.core.types.announcement import LoadOffer, Member
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelStatus, Role

_ON_DISK, _FROM_NEIGHBOUR, _FROM_SOURCE = range(3)
_NOW, _IDLE, _IN_TURN = range(3)

Fits = Callable[[ModelFacts, Pools], bool]
"""Whether a model can be launched within this memory."""


class Place(NamedTuple):
    """A node that may load models.

    Attributes:
        node: its id.
        offer: what it offers to them.
        idle_bytes: of `offer.room_bytes`, what is free or idle.
        on_disk: the models there.
        speed: how fast it computes, in bytes of weights per second; 0 unknown.
        cards: GPUs that share its memory.
    """

    node: NodeId
    offer: LoadOffer
    idle_bytes: int
    on_disk: Collection[ModelName]
    speed: int = 0
    cards: int = 1


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
    )


def speed_of(capacity: Capacity) -> int:
    """One number for how fast a node computes."""
    return capacity.speed.full.q4


def rank_places(facts: ModelFacts, places: Iterable[Place], *, shared: bool, fits: Fits) -> Sequence[NodeId]:
    """The nodes that could load a model, the best first.

    Args:
        facts: the model.
        places: the nodes to choose among.
        shared: some node gives the model's file to others.
        fits: whether it can be launched within this memory.
    """
    known: dict[Pools, bool] = {}

    def fit(device: int, host: int, cards: int) -> bool:
        pools = Pools(device=device, host=host, cards=cards)
        if pools not in known:
            known[pools] = fits(facts, pools)
        return known[pools]

    found: dict[NodeId, tuple[bool, int, int, int]] = {}
    for place in places:
        distance, offer = _distance(facts, place, shared=shared), place.offer
        if distance is None:
            continue
        if fit(offer.free_bytes, offer.free_host_bytes, place.cards):
            level = _NOW
        elif fit(place.idle_bytes, offer.room_host_bytes, place.cards):
            level = _IDLE
        elif fit(offer.room_bytes, offer.room_host_bytes, place.cards):
            level = _IN_TURN
        else:
            continue
        # By powers of two: measured speeds of equal machines differ a little.
        pace = round(math.log2(place.speed)) if place.speed > 0 else 0
        found[place.node] = (level == _IN_TURN, distance, level, -pace)
    order = {node: rank for rank, node in enumerate(rendezvous(facts.name, found))}
    return sorted(found, key=lambda node: (found[node], order[node]))


def _distance(facts: ModelFacts, place: Place, *, shared: bool) -> int | None:
    """How far the file is from a node; None: out of reach."""
    if facts.name in place.on_disk:
        # Perhaps another file of this name: a request for the name means either.
        return _ON_DISK
    if place.offer.fetches and shared:
        return _FROM_NEIGHBOUR
    return _FROM_SOURCE if place.offer.hub and facts.source else None
