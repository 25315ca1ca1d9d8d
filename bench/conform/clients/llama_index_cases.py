"""LlamaIndex with its packages for servers like OpenAI's."""

# pyright: basic, reportMissingImports=false
# The libraries are in an environment of their own.

import asyncio
from typing import Any, Literal

from cases import KEY, MODEL, TOOL_MODEL, TOOL_URL, URL, case, run_all
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

ASKED = "say something about the mesh"


class Place(BaseModel):
    """What an answer must have."""

    city: Literal["Rome", "Oslo"]


def sunny(city: str) -> str:
    """What the weather is like."""
    return f"sunny in {city}"


WEATHER = FunctionTool.from_defaults(sunny, name="weather", return_direct=True)


def llm(tokens: int = 8, *, is_chat_model: bool = True, **more: Any) -> OpenAILike:
    """The model that writes words."""
    return OpenAILike(
        model=MODEL,
        api_base=f"{URL}/v1",
        api_key=KEY,
        max_tokens=tokens,
        context_window=2048,
        is_chat_model=is_chat_model,
        max_retries=0,
        **more,
    )


def caller() -> OpenAILike:
    """The model that calls the tool."""
    return OpenAILike(
        model=TOOL_MODEL,
        api_base=f"{TOOL_URL}/v1",
        api_key=KEY,
        context_window=2048,
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
    )


def embedding() -> BaseEmbedding:
    """Embeddings of the model that writes words."""
    return OpenAILikeEmbedding(model_name=MODEL, api_base=f"{URL}/v1", api_key=KEY, max_retries=0)


@case("OpenAILike.chat")
def _() -> None:
    assert llm().chat([ChatMessage(role="system", content="be brief"), ChatMessage(content=ASKED)]).message.content


@case("OpenAILike.stream_chat")
def _() -> None:
    chunks = list(llm().stream_chat([ChatMessage(content=ASKED)]))
    assert chunks[-1].message.content == "".join(chunk.delta or "" for chunk in chunks)
    assert chunks[-1].message.content


@case("OpenAILike.astream_chat")
def _() -> None:
    async def ask() -> list[str]:
        return [chunk.delta or "" async for chunk in await llm().astream_chat([ChatMessage(content=ASKED)])]

    assert "".join(asyncio.run(ask()))


@case("OpenAILike.complete")
def _() -> None:
    assert llm(is_chat_model=False).complete("the mesh").text


@case("OpenAILike.stream_complete")
def _() -> None:
    assert "".join(chunk.delta or "" for chunk in llm(is_chat_model=False).stream_complete("the mesh"))


@case("OpenAILike.chat_with_tools")
def _() -> None:
    model = caller()
    told = model.chat_with_tools([WEATHER], user_msg=ASKED)
    [call] = model.get_tool_calls_from_response(told)
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Rome"})


@case("OpenAILike.stream_chat_with_tools")
def _() -> None:
    model = caller()
    *_, last = model.stream_chat_with_tools([WEATHER], user_msg=ASKED)
    [call] = model.get_tool_calls_from_response(last)
    assert call.tool_kwargs == {"city": "Rome"}


@case("OpenAILike.structured_predict")
def _() -> None:
    model = llm(400, should_use_structured_outputs=True)
    assert isinstance(model.structured_predict(Place, PromptTemplate(ASKED)), Place)


@case("FunctionAgent")
def _() -> None:
    async def ask() -> str:
        return str(await FunctionAgent(tools=[WEATHER], llm=caller(), streaming=False).run(ASKED))

    assert asyncio.run(ask()) == "sunny in Rome"


@case("FunctionAgent, streaming")
def _() -> None:
    async def ask() -> str:
        return str(await FunctionAgent(tools=[WEATHER], llm=caller()).run(ASKED))

    assert asyncio.run(ask()) == "sunny in Rome"


@case("OpenAILikeEmbedding")
def _() -> None:
    assert len(embedding().get_text_embedding("a")) > 8
    assert len(embedding().get_text_embedding_batch(["a", "b"])) == 2


@case("VectorStoreIndex, query engine")
def _() -> None:
    index = VectorStoreIndex.from_documents([Document(text="the mesh joins machines")], embed_model=embedding())
    assert str(index.as_query_engine(llm=llm()).query(ASKED))


run_all()
