"""Carries out AskForLoad: asks another node to load a model, for as long as requests wait for it here."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import structlog

from mesh_llm.api.errors import refused_because
from mesh_llm.api.loading import LoadAnswer
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.effects import AskForLoad, EndAsk
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, LoadAnswered
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.runtime.supervision import TaskScope

_log = structlog.get_logger(__name__)

_MOST_TEXT = 1000
"""Characters of another node's reason: sums, who is kept out, and what to type."""

Ask = Callable[[Target, ModelName, Mapping[str, str]], Awaitable[LoadAnswer]]
"""Asks a node at LOAD_PATH, with more fields for the query. Raises MeshError if it will not, or does not answer."""


class LoadAsks:
    """The questions to other nodes that are open now."""

    def __init__(self, ask: Ask, post: Callable[[AnyEvent], None], *, client: bool) -> None:
        """`client`: this node is passive: the node that it asks may have another one load the model."""
        self._ask = ask
        self._post = post
        self._fields = {"anywhere": "1", "clients": "1"} if client else {}
        self._scope = TaskScope("load asks")
        self._open: dict[tuple[NodeId, ModelName], asyncio.Task[object]] = {}

    def begin(self, effect: AskForLoad) -> None:
        """Ask; LoadAnswered follows, unless `end` comes first."""
        self.end(EndAsk(node=effect.node, model=effect.model))
        name = f"{effect.model} on {effect.node[:10]}"
        self._open[effect.node, effect.model] = self._scope.spawn(self._asked(effect), name)

    def end(self, effect: EndAsk) -> None:
        """No request waits any more."""
        task = self._open.pop((effect.node, effect.model), None)
        if task is not None:
            task.cancel()

    async def close(self) -> None:
        """End all."""
        await self._scope.close()

    async def _asked(self, effect: AskForLoad) -> None:
        node, model = effect.node, effect.model
        target = Target(node=node, local=False)
        fields = {**self._fields, **({"clients": "1"} if effect.for_clients else {})}
        _log.info("asking another node to load a model", model=model, node=node)
        try:
            answer = await self._ask(target, model, fields)
        except MeshError as error:
            _log.info("another node does not load a model", model=model, node=node, reason=str(error))
            problem = refused_because(model, error.message)[:_MOST_TEXT]
            event = LoadAnswered(node=node, model=model, problem=problem, retry_after=error.retry_after or 0.0)
        else:
            event = LoadAnswered(node=node, model=model, serving=answer.serving)
        self._open.pop((node, model), None)
        self._post(event)
