"""Where a prompt may go: the circle of nodes that may see it, by whose they are.

A circle is a set of owners. A node is in it if one of them has signed that the node is theirs. The node that is asked
is always in it. All nodes that would see a prompt must be: the host, and the workers of a split, which see activations.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from functools import reduce

import msgspec

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import ModelStatus

Circle = frozenset[OwnerId] | None
"""Owners whose nodes may see a prompt, beside the node that is asked. None: all nodes may."""

MAX_OWNERS = 64
"""Most owners of a circle."""


class Privacy(StrEnum):
    """How far a prompt may go (`--privacy`): nodes of one's own, of one's group, or any."""

    OWN = "own"
    GROUP = "group"
    ANY = "any"


_FROM_STRICT = (Privacy.OWN, Privacy.GROUP, Privacy.ANY)


def strictest(*wishes: Privacy) -> Privacy:
    """The strictest of several wishes: each may only narrow the others."""
    return min(wishes, key=_FROM_STRICT.index)


class Owners(msgspec.Struct, frozen=True, kw_only=True):
    """The owners that a node's user named.

    Attributes:
        own: whose node it is; empty: nobody's. Then `own` means this node alone.
        group: owners that the user trusts (`--group`).
    """

    own: str = ""
    group: tuple[OwnerId, ...] = ()

    def circle(self, privacy: Privacy) -> Circle:
        """The circle of a request."""
        if privacy is Privacy.ANY:
            return None
        own = frozenset({OwnerId(self.own)}) if self.own else frozenset[OwnerId]()
        return own if privacy is Privacy.OWN else own | frozenset(self.group)


def common(circles: Sequence[frozenset[OwnerId]]) -> frozenset[OwnerId]:
    """The owners who are in each of one or more circles."""
    return reduce(lambda one, other: one & other, circles)


def narrowest(circles: Iterable[Circle]) -> Circle:
    """The circle that is in each of several."""
    known = [one for one in circles if one is not None]
    return common(known) if known else None


def owner_of(node: NodeId, owners: Mapping[NodeId, Ownership], now: float) -> OwnerId | None:
    """Whose node it is at `now` (UNIX seconds); None: nobody's that is known."""
    found = owners.get(node)
    return found.owner if found is not None and now < found.expires else None


def outsiders(
    target: Target, circle: Circle, owners: Mapping[NodeId, Ownership], inside: Collection[NodeId], now: float
) -> tuple[NodeId, ...]:
    """The nodes that would see a prompt at a target and may not.

    Args:
        target: where the prompt would go.
        circle: of the request.
        owners: whose node each is, as verified.
        inside: nodes that see the prompt in any case: the one that is asked, and on a host the node that sent it.
        now: UNIX seconds.
    """
    if circle is None:
        return ()
    seen = (target.node, *target.workers)
    return tuple(node for node in seen if node not in inside and owner_of(node, owners, now) not in circle)


def within(
    route: ModelRoute, circle: Circle, snapshot: RoutingSnapshot, inside: Collection[NodeId], now: float
) -> ModelRoute:
    """A model's route with only the targets that may see a prompt of this circle."""
    if circle is None:
        return route
    return _only(route, tuple(one for one in route.targets if not outsiders(one, circle, snapshot.owners, inside, now)))


def without_distrusted(route: ModelRoute, snapshot: RoutingSnapshot) -> ModelRoute:
    """A model's route without the targets where a node computes whose answers were not the model's."""
    if not snapshot.distrusted:
        return route
    return _only(route, tuple(one for one in route.targets if not doubted(route.name, one, snapshot)))


def doubted(model: ModelName, target: Target, snapshot: RoutingSnapshot) -> tuple[NodeId, ...]:
    """The nodes at a target, its host or workers, that this node does not trust with a model."""
    return tuple(node for node in (target.node, *target.workers) if (model, node) in snapshot.distrusted)


def _only(route: ModelRoute, targets: tuple[Target, ...]) -> ModelRoute:
    if len(targets) == len(route.targets):
        return route
    states = {one.status for one in targets}
    status = next((state for state in (ModelStatus.WARM, ModelStatus.LOADING) if state in states), ModelStatus.COLD)
    return msgspec.structs.replace(route, targets=targets, status=status)
