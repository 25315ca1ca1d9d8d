"""What a node needs of its membership: events in, effects out, and who is there."""

from collections.abc import Sequence
from typing import Protocol

from mesh_llm.core.announcement import Announcement
from mesh_llm.core.effects import AnyEffect
from mesh_llm.core.events import AnyEvent
from mesh_llm.core.member import Member


class Peers(Protocol):
    """The other nodes."""

    @property
    def revision(self) -> int:
        """Rises whenever `members` may have changed."""
        ...

    @property
    def acquainted(self) -> bool:
        """Whether another member has told what it knows of the mesh."""
        ...

    def members(self) -> Sequence[Member]:
        """All other nodes that are neither dead nor gone, in order of their ids."""
        ...

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Take an event about peers, or the passing of time."""
        ...

    def publish(self, word: Announcement, now: float) -> list[AnyEffect]:
        """Tell the others this node's newest word about itself."""
        ...

    def leave(self, now: float) -> list[AnyEffect]:
        """Tell the others that this node goes."""
        ...

    def deadline(self) -> float | None:
        """When `handle` wants a Tick."""
        ...
