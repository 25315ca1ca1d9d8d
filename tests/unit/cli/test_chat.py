"""A conversation's turns: what is kept of an answer that is whole, stopped, or broken off."""

import io
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import msgspec
import pytest

from mesh_llm.cli.chat import Conversation, Piece, Sampling
from mesh_llm.cli.client import DaemonClient
from mesh_llm.core.types.errors import MeshError


class Answer:
    """A streamed answer in pieces of a few bytes."""

    def __init__(self, body: bytes) -> None:
        self.headers = {"x-mesh-llm-node": "n" * 64, "x-mesh-llm-model": "tiny"}
        self._body = io.BytesIO(body)
        self._size = 7 if len(body) < 10_000 else 65_536

    def read1(self, _limit: int) -> bytes:
        return self._body.read(self._size)


class Client:
    """In place of the node: gives the answers in turn, and keeps what was asked."""

    def __init__(self, *answers: bytes | MeshError) -> None:
        self._answers = list(answers)
        self.asked: list[dict[str, Any]] = []
        self.open = 0

    @contextmanager
    def stream(self, method: str, path: str, body: object, *, timeout: float) -> Generator[Answer]:
        self.asked.append(msgspec.to_builtins(body))
        answer = self._answers.pop(0)
        if isinstance(answer, MeshError):
            raise answer
        self.open += 1
        try:
            yield Answer(answer)
        finally:
            self.open -= 1


def event(**fields: object) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


def words(*texts: str) -> bytes:
    chunks = [event(choices=[{"delta": {"content": text}}]) for text in texts]
    return b"".join(chunks)


DONE = b"data: [DONE]\n\n"
END = event(choices=[{"delta": {}, "finish_reason": "stop"}], timings={"predicted_per_second": 20.5})
USAGE = event(choices=[], usage={"completion_tokens": 3})


def conversation(client: Client, **options: Any) -> Conversation:
    return Conversation(cast("DaemonClient", client), **options)


def said(pieces: Generator[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def turns(talk: Conversation) -> Sequence[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in talk.turns]


def test_turns_are_sent_along_with_the_system_prompt() -> None:
    client = Client(words("Hel", "lo") + END + USAGE + DONE, words("Yes") + DONE)
    talk = conversation(client, model="t", system="Be brief.", sampling=Sampling(temperature=0.0))
    assert said(talk.ask("Hi")) == "Hello"
    assert (talk.outcome.tokens, talk.outcome.tokens_per_second, talk.outcome.finish) == (3, 20.5, "stop")
    assert (talk.outcome.model, talk.outcome.node) == ("tiny", "n" * 64)
    assert said(talk.ask("Really?")) == "Yes"
    sent = client.asked[1]
    assert [message["role"] for message in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert (sent["model"], sent["temperature"], "max_tokens" in sent) == ("t", 0.0, False)


def test_thoughts_are_no_part_of_the_answer() -> None:
    thought = event(choices=[{"delta": {"reasoning_content": "Hm."}}])
    talk = conversation(Client(thought + words("Hello") + DONE))
    assert [(piece.text, piece.reasoning) for piece in talk.ask("Hi")] == [("Hm.", True), ("Hello", False)]
    assert turns(talk) == [("user", "Hi"), ("assistant", "Hello")]


def test_a_stopped_answer_stays_as_far_as_it_came() -> None:
    client = Client(words("one ", "two ", "three") + DONE)
    talk = conversation(client)
    pieces = talk.ask("Count")
    assert next(pieces).text == "one "
    pieces.close()
    assert client.open == 0
    assert turns(talk) == [("user", "Count"), ("assistant", "one ")]


@pytest.mark.parametrize(
    "answer",
    [
        MeshError(code="no_host", message="nobody serves it"),
        words("half") + event(error={"message": "its host was lost", "code": "stream_broken"}),
        words("half"),
        b"data: not json\n\n",
        b"data: " + b"x" * (2 << 20) + b"\n\n",
        b"data: \xff\n\n",
    ],
)
def test_what_fails_is_as_if_it_had_not_been_said(answer: bytes | MeshError) -> None:
    talk = conversation(Client(words("Hello") + DONE, answer))
    said(talk.ask("Hi"))
    with pytest.raises(MeshError):
        said(talk.ask("And?"))
    assert turns(talk) == [("user", "Hi"), ("assistant", "Hello")]


def test_again_takes_the_place_of_the_last_answer_if_one_comes() -> None:
    client = Client(words("Hello") + DONE, words("Good day") + DONE, MeshError(code="x", message="x"))
    talk = conversation(client)
    with pytest.raises(MeshError, match="no question to answer"):
        talk.again()
    said(talk.ask("Hi"))
    assert said(talk.again()) == "Good day"
    assert [message["content"] for message in client.asked[1]["messages"]] == ["Hi"]
    with pytest.raises(MeshError):
        said(talk.again())
    assert turns(talk) == [("user", "Hi"), ("assistant", "Good day")]
    talk.new()
    assert turns(talk) == []
