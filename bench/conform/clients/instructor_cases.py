"""Instructor, on OpenAI's and Anthropic's libraries."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

from typing import Any, Literal

import instructor
from anthropic import Anthropic
from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from openai import OpenAI
from pydantic import BaseModel, create_model

ASKED: Any = [{"role": "user", "content": "say something about the mesh"}]
# The tool has the name of the class, and the model calls `weather`.
Weather: Any = create_model("weather", city=(str, ...))


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


def openai(mode: instructor.Mode, url: str = URL) -> Any:
    """Instructor on OpenAI's library."""
    return instructor.from_openai(OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120), mode=mode)


def anthropic(mode: instructor.Mode, url: str = URL) -> Any:
    """Instructor on Anthropic's library."""
    return instructor.from_anthropic(Anthropic(base_url=url, api_key=KEY, max_retries=0, timeout=120), mode=mode)


@case("TOOLS")
def _() -> None:
    client = openai(instructor.Mode.TOOLS, TOOL_URL)
    told = client.create(model=TOOL_MODEL, messages=ASKED, response_model=Weather, max_retries=0)
    assert told.city == "Rome"


@case("JSON_SCHEMA")
def _() -> None:
    client = openai(instructor.Mode.JSON_SCHEMA)
    told, completion = client.create_with_completion(
        model=MODEL, messages=ASKED, response_model=Place, max_retries=0, max_tokens=400
    )
    assert told.city in {"Rome", "Oslo"}
    assert completion.usage.completion_tokens > 0


@case("JSON_SCHEMA, create_partial")
def _() -> None:
    client = openai(instructor.Mode.JSON_SCHEMA)
    *_, last = client.create_partial(model=MODEL, messages=ASKED, response_model=Place, max_tokens=400)
    assert last.city in {"Rome", "Oslo"}


@case("RESPONSES_TOOLS")
def _() -> None:
    client = openai(instructor.Mode.RESPONSES_TOOLS, TOOL_URL)
    told = client.responses.create(model=TOOL_MODEL, input="the weather", response_model=Weather, max_retries=0)
    assert told.city == "Rome"


@case("ANTHROPIC_TOOLS")
def _() -> None:
    client = anthropic(instructor.Mode.ANTHROPIC_TOOLS, TOOL_URL)
    told = client.create(model=TOOL_MODEL, messages=ASKED, response_model=Weather, max_retries=0, max_tokens=64)
    assert told.city == "Rome"


run_all()
