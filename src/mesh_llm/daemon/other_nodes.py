"""Who the other nodes are, for all that asks before it answers, loads, sends or shows something."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mesh_llm.core.trust.circle import Owners, Privacy, owner_of
from mesh_llm.core.types.announcement import Member, Ownership, Standing
from mesh_llm.core.types.ids import NodeId
from mesh_llm.daemon.composition import Core
from mesh_llm.wire.mesh.admission import Scope


class _Announced(NamedTuple):
    """What members announce. `unmarked`: those that list the mesh with invites without a mark; `owners`: of nodes."""

    members: Sequence[Member] = ()
    unmarked: frozenset[NodeId] = frozenset()
    owners: Mapping[NodeId, Ownership] = {}

    @classmethod
    def by(cls, members: Sequence[Member]) -> "_Announced":
        """As these members announce it."""
        announced = [one.announcement for one in members]
        unmarked = frozenset(one.node for one in announced if one.publicity and not one.publicity.marked)
        return cls(members, unmarked, {one.node: one.ownership for one in announced if one.ownership is not None})


class OtherNodes:
    """The other nodes in one life of this one. Before its core is made, all are strangers without names.

    Attributes:
        core: the core, once there is one.
        owners: this node's owner, and those that its user named.
    """

    def __init__(self) -> None:
        self.core: Core | None = None
        self.owners: Callable[[], Owners] = Owners
        self._announced = _Announced()

    def members(self) -> Sequence[Member]:
        """All nodes that the core knows."""
        return self.core.node.members if self.core is not None else ()

    def standing(self, node: NodeId) -> Standing:
        """Who another node is that asks for a model, wants its files, or has or wants a prompt cache.

        A node of this node's owner, or of an owner that its user named, is no stranger, however it came.
        """
        core = self.core
        if core is None:
            return "stranger"
        if self._announced.members is not core.node.members:
            # Asked for every request of another node: few things are announced between two of them.
            self._announced = _Announced.by(core.node.members)
        announced = self._announced
        found = core.net.standing_of(node, announced.unmarked)
        if found != "stranger":
            return found
        if owner_of(node, announced.owners, time.time()) not in (self.owners().circle(Privacy.GROUP) or ()):
            return found
        scope = core.net.scope_of(node)
        return "member" if scope is not None and scope >= Scope.SERVE else "client"

    def known(self, members: Sequence[Member]) -> frozenset[NodeId]:
        """Those of some members that are no strangers."""
        nodes = (one.announcement.node for one in members)
        return frozenset(node for node in nodes if self.standing(node) != "stranger")

    def stranger_source(self, node: NodeId) -> str | None:
        """Where a stranger comes from; None for a node that is none."""
        core = self.core
        return core.net.source_of(node) if core is not None and self.standing(node) == "stranger" else None

    def name_of(self, node: NodeId) -> str:
        """A node's name for people."""
        return (self.core.node.names.get(node) if self.core is not None else None) or node[:10]
