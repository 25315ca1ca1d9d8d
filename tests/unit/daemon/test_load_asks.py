import asyncio
from collections.abc import Mapping

from mesh_llm.api.errors import load_refused
from mesh_llm.api.loading import LoadAnswer
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.effects import AskForLoad, EndAsk
from mesh_llm.core.types.events import AnyEvent, LoadAnswered
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.daemon.load_asks import LoadAsks

NODE, MODEL = NodeId("b" * 64), ModelName("red")


class Asked:
    """Another node that answers when a test says so."""

    def __init__(self, *, client: bool = False) -> None:
        self.fields: list[Mapping[str, str]] = []
        self.answer: asyncio.Future[LoadAnswer] = asyncio.get_running_loop().create_future()
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.posted: list[AnyEvent] = []
        self.heard = asyncio.Event()
        self.asks = LoadAsks(self._ask, self._post, client=client)

    async def _ask(self, target: Target, model: ModelName, fields: Mapping[str, str]) -> LoadAnswer:
        assert (target.node, model) == (NODE, MODEL)
        self.fields.append(fields)
        self.begun.set()
        try:
            return await self.answer
        finally:
            self.ended.set()

    def _post(self, event: AnyEvent) -> None:
        self.posted.append(event)
        self.heard.set()


async def test_the_answer_is_reported() -> None:
    asked = Asked()
    asked.asks.begin(AskForLoad(node=NODE, model=MODEL, for_clients=True))
    asked.answer.set_result(LoadAnswer(MODEL, 3, 512, 2))
    await asked.heard.wait()
    (event,) = asked.posted
    assert isinstance(event, LoadAnswered)
    assert event.serving is not None
    assert (event.problem, event.serving.term, event.serving.context) == ("", 3, 512)
    assert asked.fields == [{"clients": "1"}]
    await asked.asks.close()


async def test_a_refusal_is_reported_with_its_time() -> None:
    asked = Asked(client=True)
    asked.asks.begin(AskForLoad(node=NODE, model=MODEL))
    asked.answer.set_exception(load_refused(MODEL, "it does not fit"))
    await asked.heard.wait()
    # The reason alone: the client's own node says again that nobody serves the model.
    assert asked.posted == [LoadAnswered(node=NODE, model=MODEL, problem="it does not fit.", retry_after=30.0)]
    assert asked.fields == [{"anywhere": "1", "clients": "1"}]
    await asked.asks.close()


async def test_nobody_asks_any_more() -> None:
    asked = Asked()
    asked.asks.begin(AskForLoad(node=NODE, model=MODEL))
    await asked.begun.wait()
    asked.asks.end(EndAsk(node=NODE, model=MODEL))
    await asked.ended.wait()
    assert asked.posted == []
    await asked.asks.close()
