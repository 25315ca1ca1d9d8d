"""LiteLLM as a library, with four of the APIs that it speaks."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

import os
from typing import Any, Literal

from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from pydantic import BaseModel

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it fetches a list of prices otherwise
import litellm

litellm.suppress_debug_info = True
ASKED: Any = [{"role": "user", "content": "say something about the mesh"}]
PARAMETERS: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
PREFIXES = {"openai": "/v1", "anthropic": "", "ollama_chat": ""}


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


def ask(provider: str, **more: Any) -> Any:
    """A chat with the model that writes words."""
    address = f"{URL}{PREFIXES[provider]}"
    return litellm.completion(f"{provider}/{MODEL}", ASKED, api_base=address, api_key=KEY, **more)


def ask_caller(provider: str, messages: Any = ASKED, **more: Any) -> Any:
    """A chat with the model that calls a tool."""
    address = f"{TOOL_URL}{PREFIXES[provider]}"
    name = f"{provider}/{TOOL_MODEL}"
    return litellm.completion(name, messages, api_base=address, api_key=KEY, tools=TOOLS, max_tokens=64, **more)


def tried(provider: str) -> None:
    """The same cases for one API."""

    @case(f"completion, {provider}")
    def _() -> None:
        told = ask(provider, max_tokens=8)
        assert told.choices[0].finish_reason == "length", told.choices[0].finish_reason
        assert told.usage.completion_tokens == 8

    @case(f"completion, {provider}, stream")
    def _() -> None:
        chunks = list(ask(provider, max_tokens=8, stream=True))
        assert litellm.stream_chunk_builder(chunks).choices[0].message.content

    @case(f"completion, {provider}, tools")
    def _() -> None:
        message = ask_caller(provider).choices[0].message
        assert [call.function.name for call in message.tool_calls] == ["weather"]
        answer = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "name": "weather", "content": "sunny"}
        assert ask_caller(provider, [*ASKED, message, answer]).choices

    @case(f"completion, {provider}, tools, stream")
    def _() -> None:
        whole = litellm.stream_chunk_builder(list(ask_caller(provider, stream=True)))
        [call] = whole.choices[0].message.tool_calls
        assert call.function.name == "weather"
        assert "Rome" in call.function.arguments

    if provider != "anthropic":  # for a model that it does not know it asks for a tool's call instead

        @case(f"completion, {provider}, response_format")
        def _() -> None:
            told = ask(provider, max_tokens=400, response_format=Place)
            assert Place.model_validate_json(told.choices[0].message.content)


for one in PREFIXES:
    tried(one)


@case("responses")
def _() -> None:
    told = litellm.responses(
        model=f"openai/{MODEL}", input="hello", api_base=f"{URL}/v1", api_key=KEY, max_output_tokens=8
    )
    assert told.status == "incomplete", f"status is {told.status}"


@case("responses, stream")
def _() -> None:
    events = list(
        litellm.responses(
            model=f"openai/{MODEL}", input="hello", api_base=f"{URL}/v1", api_key=KEY, max_output_tokens=8, stream=True
        )
    )
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta")


@case("text_completion")
def _() -> None:
    told = litellm.text_completion(
        prompt="the mesh", model=f"text-completion-openai/{MODEL}", api_base=f"{URL}/v1", api_key=KEY, max_tokens=4
    )
    assert told.choices[0].text


@case("embedding, openai")
def _() -> None:
    told = litellm.embedding(f"openai/{MODEL}", ["a", "b"], api_base=f"{URL}/v1", api_key=KEY)
    assert len(told.data) == 2


@case("embedding, ollama")
def _() -> None:
    told = litellm.embedding(f"ollama/{MODEL}", ["a", "b"], api_base=URL)
    assert len(told.data) == 2


@case("errors")
def _() -> None:
    try:
        litellm.completion("openai/nosuch", ASKED, api_base=f"{URL}/v1", api_key=KEY)
    except litellm.exceptions.NotFoundError:
        return
    raise AssertionError("no error")


run_all()
