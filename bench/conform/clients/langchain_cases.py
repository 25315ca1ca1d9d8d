"""LangChain with its packages for OpenAI's and Anthropic's APIs."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

from typing import Any, Literal

from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from langchain.agents import create_agent
from langchain.tools import tool
from langchain_anthropic import ChatAnthropic
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, create_model

ASKED = "say something about the mesh"
# The tool has the name of the class, and the model calls `weather`.
Weather: Any = create_model("weather", city=(str, ...))


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


@tool(return_direct=True)
def weather(city: str) -> str:
    """What the weather is like."""
    return f"sunny in {city}"


def openai(url: str = URL, model: str = MODEL, **more: Any) -> ChatOpenAI:
    """OpenAI's API."""
    return ChatOpenAI(model=model, base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=120, **more)


def anthropic(url: str = URL, model: str = MODEL, tokens: int = 8) -> ChatAnthropic:
    """Anthropic's API."""
    return ChatAnthropic(model=model, base_url=url, api_key=KEY, max_retries=0, timeout=120, max_tokens=tokens)  # type: ignore[call-arg]


def tool_is_called(chat: Any) -> None:
    """A call comes, and its result is taken."""
    bound = chat.bind_tools([weather])
    told = bound.invoke(ASKED)
    assert [(call["name"], call["args"]) for call in told.tool_calls] == [("weather", {"city": "Rome"})]
    result = ToolMessage("sunny", tool_call_id=told.tool_calls[0]["id"])
    assert isinstance(bound.invoke([HumanMessage(ASKED), told, result]), AIMessage)


def tool_is_streamed(chat: Any) -> None:
    """The parts of a call make a whole one."""
    whole = None
    for chunk in chat.bind_tools([weather]).stream(ASKED):
        whole = chunk if whole is None else whole + chunk
    assert whole is not None
    assert [call["args"] for call in whole.tool_calls] == [{"city": "Rome"}]


def text_is_streamed(chat: Any) -> None:
    """Text and usage come."""
    chunks = list(chat.stream(ASKED))
    assert "".join(chunk.text for chunk in chunks)
    usage = [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata]
    assert sum(usage) > 0, "no usage"


@case("ChatOpenAI.invoke")
def _() -> None:
    told = openai(max_tokens=8).invoke(ASKED)
    assert told.response_metadata["finish_reason"] == "length"
    assert told.usage_metadata is not None
    assert told.usage_metadata["output_tokens"] == 8


@case("ChatOpenAI.stream")
def _() -> None:
    text_is_streamed(openai(max_tokens=8, stream_usage=True))


@case("ChatOpenAI.batch")
def _() -> None:
    assert len(openai(max_tokens=4).batch([ASKED, ASKED, ASKED])) == 3


@case("ChatOpenAI.bind_tools")
def _() -> None:
    tool_is_called(openai(TOOL_URL, TOOL_MODEL))


@case("ChatOpenAI.bind_tools, stream")
def _() -> None:
    tool_is_streamed(openai(TOOL_URL, TOOL_MODEL))


@case("ChatOpenAI.with_structured_output")
def _() -> None:
    assert isinstance(openai(max_tokens=400).with_structured_output(Place).invoke(ASKED), Place)


@case("ChatOpenAI.with_structured_output, function_calling")
def _() -> None:
    structured = openai(TOOL_URL, TOOL_MODEL).with_structured_output(Weather, method="function_calling")
    assert structured.invoke(ASKED).city == "Rome"


@case("ChatOpenAI, logprobs")
def _() -> None:
    told = openai(max_tokens=4, logprobs=True, top_logprobs=2).invoke(ASKED)
    assert len(told.response_metadata["logprobs"]["content"][0]["top_logprobs"]) == 2


@case("ChatOpenAI, responses")
def _() -> None:
    assert openai(use_responses_api=True, max_tokens=16).invoke(ASKED).text


@case("ChatOpenAI, responses, stream")
def _() -> None:
    text_is_streamed(openai(use_responses_api=True, max_tokens=16))


@case("ChatOpenAI, responses, bind_tools")
def _() -> None:
    tool_is_called(openai(TOOL_URL, TOOL_MODEL, use_responses_api=True))


@case("ChatOpenAI, responses, bind_tools, stream")
def _() -> None:
    tool_is_streamed(openai(TOOL_URL, TOOL_MODEL, use_responses_api=True))


@case("ChatOpenAI, responses, with_structured_output")
def _() -> None:
    structured = openai(use_responses_api=True, max_tokens=400).with_structured_output(Place)
    assert isinstance(structured.invoke(ASKED), Place)


@case("create_agent")
def _() -> None:
    agent = create_agent(openai(TOOL_URL, TOOL_MODEL), tools=[weather])
    told = agent.invoke({"messages": [HumanMessage(ASKED)]})
    assert told["messages"][-1].text == "sunny in Rome"


@case("OpenAI (completions)")
def _() -> None:
    assert OpenAI(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, max_tokens=4, max_retries=0).invoke("the mesh")  # type: ignore[call-arg]


@case("OpenAIEmbeddings")
def _() -> None:
    # With `check_embedding_ctx_length` it sends numbers of another model's tokens.
    embeddings = OpenAIEmbeddings(model=MODEL, base_url=f"{URL}/v1", api_key=KEY, check_embedding_ctx_length=False)  # type: ignore[call-arg]
    assert len(embeddings.embed_documents(["a", "b"])) == 2
    assert len(embeddings.embed_query("a")) > 8


@case("ChatAnthropic.invoke")
def _() -> None:
    told = anthropic().invoke(ASKED)
    assert told.response_metadata["stop_reason"] == "max_tokens"
    assert told.usage_metadata is not None
    assert told.usage_metadata["output_tokens"] == 8


@case("ChatAnthropic.stream")
def _() -> None:
    text_is_streamed(anthropic())


@case("ChatAnthropic.bind_tools")
def _() -> None:
    tool_is_called(anthropic(TOOL_URL, TOOL_MODEL, 64))


@case("ChatAnthropic.bind_tools, stream")
def _() -> None:
    tool_is_streamed(anthropic(TOOL_URL, TOOL_MODEL, 64))


@case("ChatAnthropic.with_structured_output, json_schema")
def _() -> None:
    structured = anthropic(tokens=400).with_structured_output(Place, method="json_schema")
    assert isinstance(structured.invoke(ASKED), Place)


run_all()
