"""Peers as a test wants them: no gossip, just members that are set."""

from collections.abc import Sequence

from mesh_llm.core.types.announcement import Announcement, Member
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.events import AnyEvent


class FakePeers:
    """Satisfies `core.node.Peers`."""

    def __init__(self) -> None:
        self.revision = 0
        self.present: list[Member] = []
        self.published: list[Announcement] = []
        self.seen: list[AnyEvent] = []
        self.left = False
        self.synced = False

    def set(self, *members: Member) -> None:
        self.present = list(members)
        self.revision += 1

    def members(self) -> Sequence[Member]:
        return self.present

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        self.seen.append(event)
        return []

    def publish(self, announcement: Announcement, now: float) -> list[AnyEffect]:
        self.published.append(announcement)
        return []

    def leave(self, now: float) -> list[AnyEffect]:
        self.left = True
        return []

    def deadline(self) -> float | None:
        return None
