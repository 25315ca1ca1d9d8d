"""Which models the mesh has lost: the last host died or gave up. One that a user dropped on a living node is not."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelStatus

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
