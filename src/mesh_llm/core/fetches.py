"""What a node fetches by itself: one model at a time, that the mesh calls for and that others say where to find."""

from collections.abc import Container

from mesh_llm.core.effects import AnyEffect, FetchModel, Notice, NoticeLevel
from mesh_llm.core.events import FetchEnded
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.placement import Assigned
from mesh_llm.core.units import size


class Fetches:
    """The fetch under way, and the models that could not be had."""

    def __init__(self) -> None:
        self.failed: set[ModelName] = set()
        self._current: ModelFacts | None = None

    @property
    def busy(self) -> bool:
        """Whether something is being fetched."""
        return self._current is not None

    @property
    def coming(self) -> dict[ModelName, str]:
        """The model that will be served here once it has come, with what is to be said of it."""
        return {} if self._current is None else {self._current.name: f"it is being fetched from {self._current.source}"}

    def begin(self, assigned: Assigned) -> list[AnyEffect]:
        """Fetch a model, having said so."""
        facts = self._current = assigned.facts
        amount = size(facts.size_bytes + facts.companion_bytes)
        text = f"Fetching {facts.name} ({amount}) from {facts.source} to serve it, because {assigned.why}."
        notice = Notice(level=NoticeLevel.INFO, code="model_fetching", text=text, about=facts.name)
        return [notice, FetchModel(model=facts.name, source=facts.source)]

    def ended(self, event: FetchEnded, on_disk: Container[ModelName]) -> list[AnyEffect] | None:
        """A fetch ended: None if the model is here to be served; else what must be done."""
        if self._current is None or self._current.name != event.model:
            return []
        self._current = None
        problem = event.problem or ("" if event.model in on_disk else "what was found there is another model.")
        if not problem:
            return None
        self.failed.add(event.model)
        text = f"{event.model} could not be fetched: {problem}"
        return [Notice(level=NoticeLevel.WARNING, code="model_fetch_failed", text=text, about=event.model)]
