"""Ollama's library for Python."""

from typing import Any, Literal

import ollama
from cases import MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from pydantic import BaseModel

client = ollama.Client(URL, timeout=120)
tool_client = ollama.Client(TOOL_URL, timeout=120)
ASKED: Any = [{"role": "user", "content": "say something about the mesh"}]
BRIEF: Any = {"num_predict": 8}


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


def weather(city: str) -> str:
    """What the weather is like.

    Args:
        city: where
    """
    return f"sunny in {city}"


@case("list")
def _() -> None:
    assert f"{MODEL}:latest" in [model.model for model in client.list().models]


@case("ps")
def _() -> None:
    assert client.ps().models[0].context_length == 2048


@case("show")
def _() -> None:
    assert "completion" in (client.show(MODEL).capabilities or [])
    assert "tools" in (tool_client.show(TOOL_MODEL).capabilities or [])


@case("chat")
def _() -> None:
    told = client.chat(f"{MODEL}:latest", ASKED, options=BRIEF)
    assert told.message.content
    assert (told.done, told.done_reason, told.eval_count) == (True, "length", 8)


@case("chat, stream")
def _() -> None:
    *parts, last = client.chat(MODEL, ASKED, options=BRIEF, stream=True)
    assert "".join(part.message.content or "" for part in parts)
    assert (last.done, last.done_reason) == (True, "length")


@case("chat, format")
def _() -> None:
    told = client.chat(MODEL, ASKED, format=Place.model_json_schema())
    assert Place.model_validate_json(told.message.content or "")


@case("chat, a Python function as a tool")
def _() -> None:
    told = tool_client.chat(TOOL_MODEL, ASKED, tools=[weather])
    [call] = told.message.tool_calls or []
    assert (call.function.name, call.function.arguments) == ("weather", {"city": "Rome"})
    answer: Any = {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
    assert tool_client.chat(TOOL_MODEL, [*ASKED, told.message, answer], tools=[weather]).done


@case("chat, tools, stream")
def _() -> None:
    parts = list(tool_client.chat(TOOL_MODEL, ASKED, tools=[weather], stream=True))
    assert [call.function.name for part in parts for call in part.message.tool_calls or []] == ["weather"]


@case("chat, stop")
def _() -> None:
    assert client.chat(MODEL, ASKED, options={"stop": ["a"], "num_predict": 50}).done_reason == "stop"


@case("generate")
def _() -> None:
    told = client.generate(MODEL, "the mesh", options=BRIEF)
    assert told.response
    assert told.eval_count == 8


@case("generate, stream")
def _() -> None:
    assert "".join(part.response or "" for part in client.generate(MODEL, "the mesh", options=BRIEF, stream=True))


@case("generate, raw")
def _() -> None:
    assert client.generate(MODEL, "the mesh", raw=True, options=BRIEF).response


@case("generate, suffix")
def _() -> None:
    assert tool_client.generate(TOOL_MODEL, "def f(", suffix="return 1", options=BRIEF).done


@case("generate, format")
def _() -> None:
    told = client.generate(MODEL, "a city", format=Place.model_json_schema())
    assert Place.model_validate_json(told.response or "")


@case("generate, no prompt (a load)")
def _() -> None:
    assert client.generate(MODEL).done_reason == "load"


@case("embed")
def _() -> None:
    told = client.embed(MODEL, ["a", "b"])
    assert len(told.embeddings) == 2
    assert told.prompt_eval_count


@case("embed, dimensions")
def _() -> None:
    assert len(client.embed(MODEL, "a", dimensions=4).embeddings[0]) == 4


@case("embeddings (deprecated)")
def _() -> None:
    assert len(client.embeddings(MODEL, "a").embedding) > 8


@case("errors")
def _() -> None:
    try:
        client.chat("nosuch", ASKED)
    except ollama.ResponseError as error:
        assert (error.status_code, "not found" in error.error) == (404, True), error.error
        return
    raise AssertionError("no error")


run_all()
