"""LangChain with its package for Ollama's API."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

from typing import Any, Literal

from cases import MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from langchain.tools import tool
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_ollama import ChatOllama, OllamaEmbeddings, OllamaLLM
from pydantic import BaseModel

ASKED = "say something about the mesh"


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


@tool
def weather(city: str) -> str:
    """What the weather is like."""
    return f"sunny in {city}"


def chat(tokens: int = 8, **more: Any) -> ChatOllama:
    """The model that writes words."""
    return ChatOllama(model=MODEL, base_url=URL, num_predict=tokens, **more)


@case("ChatOllama.invoke")
def _() -> None:
    told = chat().invoke(ASKED)
    assert told.response_metadata["done_reason"] == "length"
    assert told.usage_metadata is not None
    assert told.usage_metadata["output_tokens"] == 8


@case("ChatOllama, validate_model_on_init")
def _() -> None:
    assert chat(validate_model_on_init=True).invoke(ASKED).text


@case("ChatOllama.stream")
def _() -> None:
    chunks = list(chat().stream(ASKED))
    assert "".join(chunk.text for chunk in chunks)
    assert any(chunk.usage_metadata for chunk in chunks), "no usage"


@case("ChatOllama.bind_tools")
def _() -> None:
    bound = ChatOllama(model=TOOL_MODEL, base_url=TOOL_URL).bind_tools([weather])
    told = bound.invoke(ASKED)
    assert [(call["name"], call["args"]) for call in told.tool_calls] == [("weather", {"city": "Rome"})]
    result = ToolMessage("sunny", tool_call_id=told.tool_calls[0]["id"])
    assert isinstance(bound.invoke([HumanMessage(ASKED), told, result]), AIMessage)


@case("ChatOllama.with_structured_output")
def _() -> None:
    assert isinstance(chat(400).with_structured_output(Place).invoke(ASKED), Place)


@case("OllamaLLM.invoke, stream")
def _() -> None:
    model = OllamaLLM(model=MODEL, base_url=URL, num_predict=8)
    assert model.invoke("the mesh")
    assert "".join(model.stream("the mesh"))


@case("OllamaEmbeddings")
def _() -> None:
    embeddings = OllamaEmbeddings(model=MODEL, base_url=URL)
    assert len(embeddings.embed_documents(["a", "b"])) == 2
    assert len(embeddings.embed_query("a")) > 8


run_all()
