"""What a node fetches by itself: one model at a time, that the mesh calls for and that others say where to find."""

from collections.abc import Container, Sequence

from mesh_llm.core.effects import AnyEffect, FetchModel, Notice, NoticeLevel
from mesh_llm.core.events import FetchEnded
from mesh_llm.core.holders import holders, whence
from mesh_llm.core.ids import ModelName
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.placement import Assigned
from mesh_llm.core.units import size

_MOST_FAILED = 256


class Fetches:
    """The fetch under way, and the models that could not be had."""

    def __init__(self) -> None:
        self.failed: set[ModelName] = set()
        self._current: ModelFacts | None = None
        self._whence = ""

    @property
    def busy(self) -> bool:
        """Whether something is being fetched."""
        return self._current is not None

    @property
    def coming(self) -> dict[ModelName, str]:
        """The model that will be served here once it has come, with what is to be said of it."""
        return {} if self._current is None else {self._current.name: f"it is being fetched from {self._whence}"}

    def begin(self, assigned: Assigned, members: Sequence[Member] = ()) -> list[AnyEffect]:
        """Fetch a model, having said so and from where: `members` that have it, else its source."""
        facts = self._current = assigned.facts
        self._whence = whence(holders(members, facts.name, facts.fingerprint), facts)
        amount = size(facts.size_bytes + facts.companion_bytes)
        text = f"Fetching {facts.name} ({amount}) from {self._whence} to serve it, because {assigned.why}."
        notice = Notice(level=NoticeLevel.INFO, code="model_fetching", text=text, about=facts.name)
        return [notice, FetchModel(model=facts.name, source=facts.source, fingerprint=facts.fingerprint)]

    def ended(self, event: FetchEnded, on_disk: Container[ModelName]) -> list[AnyEffect] | None:
        """A fetch ended: None if the model is here to be served; else what must be done."""
        if self._current is None or self._current.name != event.model:
            return []
        self._current = None
        problem = event.problem or ("" if event.model in on_disk else "what was found there is another model.")
        if not problem:
            return None
        if len(self.failed) >= _MOST_FAILED:
            # Names are peers' words. Which one is tried again does not matter.
            self.failed.discard(min(self.failed))
        self.failed.add(event.model)
        text = f"{event.model} could not be fetched: {problem}"
        return [Notice(level=NoticeLevel.WARNING, code="model_fetch_failed", text=text, about=event.model)]
