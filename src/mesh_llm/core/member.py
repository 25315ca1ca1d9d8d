"""Another node as decisions see it: its word, whether it is doubted, and how far away it is."""

import msgspec

from mesh_llm.core.announcement import Announcement
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import ModelStatus


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A live or suspected node.

    Attributes:
        announcement: its newest word.
        suspect: it did not answer, and has not been heard to refute that.
        rtt_ms: round trip to it; 0.0 unknown.
        path: `direct`, `relay`, or `none` where there is no connection at present.
    """

    announcement: Announcement
    suspect: bool = False
    rtt_ms: float = 0.0
    path: str = "none"

    def hosts(self, model: ModelName) -> bool:
        """Whether it serves a model, or is about to."""
        return any(
            serving.model == model and serving.status in {ModelStatus.WARM, ModelStatus.LOADING}
            for serving in self.announcement.serving
        )
