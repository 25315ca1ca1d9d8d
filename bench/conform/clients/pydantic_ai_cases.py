"""Pydantic-AI, with its models for OpenAI's and Anthropic's APIs."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

import asyncio
from typing import Any, Literal

from anthropic import AsyncAnthropic
from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, ModelSettings, NativeOutput, ToolOutput, UsageLimitExceeded, UsageLimits
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.profiles import ModelProfile
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

ASKED = "say something about the mesh"
BRIEF = ModelSettings(max_tokens=16)
LONG = ModelSettings(max_tokens=400)


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


class Weather(BaseModel):
    """What the tool is called with."""

    city: str


def _openai(url: str) -> OpenAIProvider:
    return OpenAIProvider(openai_client=AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120))


def chat(url: str = URL, model: str = MODEL) -> Any:
    """Chat completions."""
    return OpenAIChatModel(model, provider=_openai(url))


def responses(url: str = URL, model: str = MODEL) -> Any:
    """Responses."""
    return OpenAIResponsesModel(model, provider=_openai(url))


def messages(url: str = URL, model: str = MODEL) -> Any:
    """Anthropic's Messages."""
    client = AsyncAnthropic(base_url=url, api_key=KEY, max_retries=0, timeout=120)
    # It goes by a model's name; of one that it does not know it must be told.
    profile = ModelProfile(supports_json_schema_output=True)
    return AnthropicModel(model, provider=AnthropicProvider(anthropic_client=client), profile=profile)


async def streamed(model: Any) -> str:
    """The text of a streamed answer."""
    async with Agent(model, instructions="be brief").run_stream(ASKED, model_settings=BRIEF) as told:
        return "".join([part async for part in told.stream_text(delta=True)])


def tool_is_called(model: Any) -> None:
    """The model calls the tool for ever: the second call shows that the first one's result was taken."""
    called: list[str] = []
    agent = Agent(model)

    @agent.tool_plain
    def weather(city: str) -> str:
        """What the weather is like."""
        called.append(city)
        return "sunny"

    try:
        agent.run_sync(ASKED, usage_limits=UsageLimits(request_limit=2))
    except UsageLimitExceeded:
        assert called == ["Rome", "Rome"], f"{called}"
        return
    raise AssertionError("the tool was not called twice")


def tried(name: str, model: Any) -> None:
    """The same cases for one API."""

    @case(f"run, {name}")
    def _() -> None:
        told = Agent(model(), instructions="be brief").run_sync(ASKED, model_settings=BRIEF)
        assert told.output
        assert told.usage.output_tokens > 0, "no usage"

    @case(f"run_stream, {name}")
    def _() -> None:
        assert asyncio.run(streamed(model()))

    @case(f"a conversation, {name}")
    def _() -> None:
        agent = Agent(model(), instructions="be brief")
        first = agent.run_sync(ASKED, model_settings=BRIEF)
        assert agent.run_sync("go on", message_history=first.all_messages(), model_settings=BRIEF).output

    @case(f"tool_plain, {name}")
    def _() -> None:
        tool_is_called(model(TOOL_URL, TOOL_MODEL))

    @case(f"NativeOutput, {name}")
    def _() -> None:
        agent = Agent(model(), output_type=NativeOutput(Place))
        assert agent.run_sync(ASKED, model_settings=LONG).output.city in {"Rome", "Oslo"}

    @case(f"ToolOutput, {name}")
    def _() -> None:
        agent = Agent(model(TOOL_URL, TOOL_MODEL), output_type=ToolOutput(Weather, name="weather"))
        assert agent.run_sync(ASKED).output.city == "Rome"


tried("chat", chat)
tried("responses", responses)
tried("messages", messages)
run_all()
