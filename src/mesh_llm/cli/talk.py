"""A conversation with a model of the mesh, through the running node: turns, streamed answers, what each one took."""

import http.client
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import msgspec

from mesh_llm.cli.client import DaemonClient, events
from mesh_llm.core.errors import MeshError

PATH = "/v1/chat/completions"
_SILENCE = 600.0
"""A prompt may wait for a slot and take long to read: seconds without a byte."""


class Message(msgspec.Struct):
    """A turn. `role`: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Piece:
    """Some text of an answer; `reasoning`: the model thinks aloud, which is no part of the answer."""

    text: str
    reasoning: bool = False


@dataclass
class Outcome:
    """What an answer took. `tokens_per_second` and `tokens` 0: the engine did not say. `node`: id of who answered."""

    model: str = ""
    node: str = ""
    first_seconds: float | None = None
    tokens: int = 0
    tokens_per_second: float = 0.0
    finish: str = ""


@dataclass
class Sampling:
    """What is asked for with every turn; None: the model's own."""

    temperature: float | None = None
    max_tokens: int | None = None

    def fields(self) -> dict[str, float | int]:
        """As fields of the request."""
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return {name: value for name, value in given.items() if value is not None}


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0


class _Timings(msgspec.Struct):
    predicted_per_second: float = 0.0


class _Error(msgspec.Struct):
    message: str = "the answer broke off"
    code: str | int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: _Error | None = None


@dataclass
class Conversation:
    """The turns so far. `model` empty: the node's own.

    `again` and `ask` give the answer piece by piece. An answer that is left in the middle (the generator is closed)
    stays as far as it came; one that fails leaves the conversation as it was before.
    """

    client: DaemonClient
    model: str = ""
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    turns: list[Message] = field(default_factory=list[Message])
    outcome: Outcome = field(default_factory=Outcome)
    clock: Callable[[], float] = time.monotonic

    def new(self) -> None:
        """Begin anew, with the same system prompt."""
        self.turns.clear()

    def ask(self, text: str) -> Generator[Piece]:
        """Say something. Raises MeshError."""
        before = list(self.turns)
        self.turns.append(Message("user", text))
        return self._answer(before)

    def again(self) -> Generator[Piece]:
        """Have the last answer given again. Raises MeshError(nothing_said) where there is none."""
        before = list(self.turns)
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        if not self.turns:
            raise MeshError(code="nothing_said", message="Nothing was said yet.", hint="Say something first.")
        return self._answer(before)

    def _answer(self, before: list[Message]) -> Generator[Piece]:
        """`before`: the turns to go back to where no answer comes, or it fails."""
        system = [Message("system", self.system)] if self.system else []
        body: dict[str, object] = {
            "messages": [*system, *self.turns],
            "stream": True,
            "stream_options": {"include_usage": True},
            **self.sampling.fields(),
        }
        if self.model:
            body["model"] = self.model
        said: list[str] = []
        self.outcome = Outcome()
        counts = True
        try:
            for piece in self._pieces(body):
                if not piece.reasoning:
                    said.append(piece.text)
                yield piece
        except MeshError:
            counts = False
            raise
        finally:
            if counts and said:
                self.turns.append(Message("assistant", "".join(said)))
            else:
                self.turns[:] = before

    def _pieces(self, body: dict[str, object]) -> Generator[Piece]:
        began = self.clock()
        with self.client.stream("POST", PATH, body, timeout=_SILENCE) as answer:
            outcome = self.outcome
            outcome.node = answer.headers.get("x-mesh-llm-node", "")
            outcome.model = answer.headers.get("x-mesh-llm-model", "") or self.model
            for chunk in _chunks(answer):
                if chunk.usage is not None:
                    outcome.tokens = chunk.usage.completion_tokens
                if chunk.timings is not None:
                    outcome.tokens_per_second = chunk.timings.predicted_per_second
                for choice in chunk.choices:
                    outcome.finish = choice.finish_reason or outcome.finish
                    for text, reasoning in (
                        (choice.delta.reasoning_content, True),
                        (choice.delta.content, False),
                    ):
                        if text:
                            if outcome.first_seconds is None:
                                outcome.first_seconds = self.clock() - began
                            yield Piece(text, reasoning)


def _chunks(answer: http.client.HTTPResponse) -> Iterator[_Chunk]:
    """The chunks of a streamed answer. Raises MeshError where it breaks off."""
    for event in events(answer):
        if event.data == "[DONE]":
            return
        try:
            chunk = msgspec.json.decode(event.data, type=_Chunk)
        except msgspec.MsgspecError as error:
            raise MeshError(code="no_answer", message=f"The engine's answer makes no sense: {error}.") from error
        if chunk.error is not None:
            raise MeshError(
                code=str(chunk.error.code or "broken_off"),
                message=chunk.error.message,
                hint="Ask again: another node may answer.",
            )
        yield chunk
    raise MeshError(
        code="broken_off", message="The answer broke off before its end.", hint="Ask again: another node may answer."
    )
