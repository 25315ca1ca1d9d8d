"""OpenAI's Agents SDK, by way of chat completions and of Responses."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

import asyncio
from typing import Literal

from agents import (
    Agent,
    MaxTurnsExceeded,
    ModelBehaviorError,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    SQLiteSession,
    function_tool,
    set_tracing_disabled,
)
from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from openai import AsyncOpenAI
from pydantic import BaseModel

set_tracing_disabled(disabled=True)
ASKED = "say something about the mesh"
BRIEF = ModelSettings(max_tokens=8)
ENDED = ModelSettings(max_tokens=400, extra_body={"stop": ["a"]})


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


@function_tool
def weather(city: str) -> str:
    """What the weather is like."""
    return f"sunny in {city}"


def client(url: str = URL) -> AsyncOpenAI:
    """A client for one case: each has an event loop of its own."""
    return AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120)


def chat(**more: object) -> Agent:
    """An agent that asks for chat completions."""
    return Agent(name="a", instructions="be brief", model=OpenAIChatCompletionsModel(MODEL, client()), **more)  # type: ignore[arg-type]


def responses(**more: object) -> Agent:
    """An agent that asks for Responses."""
    return Agent(name="a", instructions="be brief", model=OpenAIResponsesModel(MODEL, client()), **more)  # type: ignore[arg-type]


def caller(kind: type[OpenAIChatCompletionsModel | OpenAIResponsesModel], **more: object) -> Agent:
    """An agent that calls the tool."""
    return Agent(name="a", model=kind(TOOL_MODEL, client(TOOL_URL)), tools=[weather], **more)  # type: ignore[arg-type]


async def streamed(agent: Agent) -> str:
    """The text of a streamed answer, from its events."""
    told = Runner.run_streamed(agent, ASKED)
    parts = [
        event.data.delta
        async for event in told.stream_events()
        if event.type == "raw_response_event" and event.data.type == "response.output_text.delta"
    ]
    assert told.final_output == "".join(parts), "the events are not the answer"
    return "".join(parts)


def result_is_sent_back(agent: Agent) -> None:
    """The model calls the tool for ever: a second turn shows that the first call's result was taken."""
    try:
        Runner.run_sync(agent, ASKED, max_turns=2)
    except MaxTurnsExceeded:
        return
    raise AssertionError("the tool was not called twice")


@case("run, chat")
def _() -> None:
    told = Runner.run_sync(chat(model_settings=BRIEF), ASKED)
    assert told.final_output
    assert told.context_wrapper.usage.output_tokens == 8


@case("run_streamed, chat")
def _() -> None:
    assert asyncio.run(streamed(chat(model_settings=BRIEF)))


@case("output_type, chat")
def _() -> None:
    told = Runner.run_sync(chat(output_type=Place, model_settings=ModelSettings(max_tokens=400)), ASKED)
    assert told.final_output.city in {"Rome", "Oslo"}


@case("function_tool, chat")
def _() -> None:
    told = Runner.run_sync(caller(OpenAIChatCompletionsModel, tool_use_behavior="stop_on_first_tool"), ASKED)
    assert told.final_output == "sunny in Rome", told.final_output


@case("a tool's result, chat")
def _() -> None:
    result_is_sent_back(caller(OpenAIChatCompletionsModel))


@case("SQLiteSession, chat")
def _() -> None:
    session = SQLiteSession("s")
    agent = chat(model_settings=BRIEF)
    for _ in range(2):
        assert Runner.run_sync(agent, ASKED, session=session).final_output
    assert len(asyncio.run(session.get_items())) == 4


@case("run, responses")
def _() -> None:
    assert Runner.run_sync(responses(model_settings=ENDED), ASKED).final_output


@case("run_streamed, responses")
def _() -> None:
    assert asyncio.run(streamed(responses(model_settings=ENDED)))


@case("output_type, responses")
def _() -> None:
    told = Runner.run_sync(responses(output_type=Place, model_settings=ModelSettings(max_tokens=400)), ASKED)
    assert told.final_output.city in {"Rome", "Oslo"}


@case("function_tool, responses")
def _() -> None:
    told = Runner.run_sync(caller(OpenAIResponsesModel, tool_use_behavior="stop_on_first_tool"), ASKED)
    assert told.final_output == "sunny in Rome", told.final_output


@case("a tool's result, responses")
def _() -> None:
    result_is_sent_back(caller(OpenAIResponsesModel))


@case("to_input_list, responses")
def _() -> None:
    agent = responses(model_settings=ENDED)
    first = Runner.run_sync(agent, ASKED)
    assert Runner.run_sync(agent, [*first.to_input_list(), {"role": "user", "content": "go on"}]).final_output


@case("previous_response_id, responses")
def _() -> None:
    agent = responses(model_settings=ENDED)
    first = Runner.run_sync(agent, ASKED)
    assert Runner.run_sync(agent, "go on", previous_response_id=first.last_response_id).final_output


@case("a limit, responses")
def _() -> None:
    # The library refuses an answer that is cut at its limit; of chat completions it takes one.
    try:
        Runner.run_sync(responses(model_settings=BRIEF), ASKED)
    except ModelBehaviorError as error:
        assert "max_output_tokens" in str(error)
        return
    raise AssertionError("a cut answer counts as complete")


run_all()
