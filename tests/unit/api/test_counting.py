"""What was generated is counted with the marks around reasoning, where the engine's template shows them."""

import json
from typing import Any

import msgspec
import pytest
from tests.support.answering_engine import AnsweringEngine, tokens_of
from tests.support.api_harness import ELSEWHERE, THERE, remote, route, running_api
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.config import ApiConfig

CHAT = "/v1/chat/completions"
THOUGHT = "let me think"
ASKED: dict[str, Any] = {
    "model": "tiny", "stream": True, "temperature": 0, "max_tokens": 100,
    "messages": [{"role": "user", "content": "Tell me a story"}],
}  # fmt: skip


def templated(messages: list[dict[str, Any]]) -> str:
    """The prompt of a template that marks reasoning."""
    told = ""
    for message in messages:
        thought = message.get("reasoning_content")
        told += f"<{message['role']}>" + (f"<think> {thought} </think> " if thought else "") + message["content"]
    return told


async def counted_texts(template: bytes | None, dies_after: int) -> tuple[list[str], int]:
    """Let an answer break off; give what the next engine was asked to count, and the limit that it was given.

    Args:
        template: what it answers to `/apply-template`; None: as a template does.
        dies_after: events before the first engine dies.
    """
    texts: list[str] = []
    limits: list[int] = []
    engine = AnsweringEngine("a", reasoning=THOUGHT)

    async def first(call: Call) -> None:
        await call.begin_stream()
        for event in engine.stream(CHAT, json.loads(call.body))[:dies_after]:
            await call.send(b"%x\r\n%b\r\n" % (len(event), event))
        call.die()

    async def second(call: Call) -> None:
        asked = json.loads(call.body)
        if call.target == "/apply-template":
            prompt = json.dumps({"prompt": templated(asked["messages"])}).encode() if template is None else template
            await call.respond(prompt, kind=b"application/json")
        elif call.target == "/tokenize":
            texts.append(asked["content"])
            tokens = list(range(len(tokens_of(asked["content"]))))
            await call.respond(json.dumps({"tokens": tokens}).encode(), kind=b"application/json")
        else:
            limits.append(asked["max_tokens"])
            await call.begin_stream()
            for event in engine.stream(call.target, asked):
                await call.send(b"%x\r\n%b\r\n" % (len(event), event))
            await call.end_stream()

    settings = ApiConfig(port=0, resume_wait=0.0)
    async with fake_upstream(first) as one, fake_upstream(second) as two, running_api(config=settings) as api:
        api.routes.set(route("tiny", remote(THERE), msgspec.structs.replace(remote(ELSEWHERE), load=0.9)))
        api.mesh.nodes = {THERE: one.address, ELSEWHERE: two.address}
        answer = await api.post(json.dumps(ASKED).encode(), CHAT)
        assert b"continued by" in answer.content
        assert b'"finish_reason":"stop"' in answer.content.replace(b" ", b"")
    [limit] = limits
    return texts, limit


async def test_closing_marks_of_reasoning_count():
    # One event opens the answer, three are of the reasoning, two of the text.
    texts, limit = await counted_texts(None, 6)
    assert texts == [f"<assistant><think> {THOUGHT} </think> Once upon"]
    assert limit == 100 - len(tokens_of(texts[0]))


@pytest.mark.parametrize(
    "template",
    [
        pytest.param(b'{"prompt": "?"}', id="it shows no answer"),
        pytest.param(b'{"error": {"code": 404}}', id="it has no such call"),
        pytest.param(b"\xff", id="it answers nonsense"),
    ],
)
async def test_where_no_template_shows_the_marks_the_texts_are_counted(template: bytes):
    texts, limit = await counted_texts(template, 6)
    assert texts == [THOUGHT, "Once upon"]
    assert limit == 100 - 5
