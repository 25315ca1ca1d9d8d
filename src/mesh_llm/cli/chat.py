"""A conversation with a model of the mesh, through the running node: turns, streamed answers, what each one took.

`mesh-llm chat`: talk to a model of the mesh in the terminal, or answer what is piped in.
"""

import contextlib
import http.client
import importlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, events
from mesh_llm.cli.option_types import Number
from mesh_llm.cli.output import printable, styled, tell
from mesh_llm.console.schema import Status
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home

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


_MOST_PIPED = 8 << 20
_HELP = """\
/model [NAME]    talk to another model; without a name: which there are
/system [TEXT]   set the system prompt; without a text: remove it
/again           have the last answer given again
/new             forget what was said
/quit            leave, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it leaves. A line that ends in \\ goes on in the next."""


@click.command()
@click.argument("model", required=False)
@click.option("--system", "-s", default="", metavar="TEXT", help="System prompt.")
@click.option("--temperature", "-t", type=Number(0, 5), help="Sampling temperature: 0 always takes the likeliest word.")
@click.option("--max-tokens", "-n", type=click.IntRange(min=1), metavar="N", help="Longest answer.")
def chat(model: str | None, system: str, temperature: float | None, max_tokens: int | None) -> None:
    """Talk to MODEL, or to the node's own. /help says what else there is.

    \b
      mesh-llm chat qwen                        any unique beginning of a name
      git diff | mesh-llm chat -s "Review this"   one answer to what is piped in
    """
    client = DaemonClient(Home.default())
    talk = Conversation(client, model or "", system, Sampling(temperature, max_tokens))
    if sys.stdin.isatty() and sys.stdout.isatty():
        _Terminal(talk, client).run()
        return
    text = _piped()
    if not text.strip():
        raise MeshError(code="nothing_said", message="Nothing was piped in.", hint="echo Hello | mesh-llm chat")
    for piece in talk.ask(text):
        if not piece.reasoning:
            click.echo(printable(piece.text), nl=False)
    click.echo()


def _piped() -> str:
    """What is piped in, whatever the locale: UTF-8, or where it is not, Latin-1, in which every byte is a letter.

    A model reads text: bytes such as an image's are refused. Raises MeshError(not_text).
    """
    data = sys.stdin.buffer.read(_MOST_PIPED + 1)
    if len(data) > _MOST_PIPED:
        raise MeshError(
            code="too_long", message=f"More than {_MOST_PIPED >> 20} MiB were piped in.", hint="Ask about a part of it."
        )
    if b"\0" in data:
        raise MeshError(code="not_text", message="What was piped in is not text.", hint="Pipe in text, best as UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class _Terminal:
    """The loop before a person."""

    def __init__(self, talk: Conversation, client: DaemonClient) -> None:
        self._talk = talk
        self._client = client
        self._colour = styled(sys.stdout)
        self._names: dict[str, str] = {}

    def run(self) -> None:
        """Until the user leaves."""
        status = self._status()
        talk = self._talk
        model = talk.model or next((one.name for one in status.models if one.status == "warm"), "")
        click.echo(self._dim(f"{printable(model) or 'no model is warm yet'}, through {printable(status.name)}. /help"))
        with contextlib.suppress(ImportError):
            # Gives input() a history and editing.
            importlib.import_module("readline")
        while True:
            try:
                line = self._read()
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
            except UnicodeDecodeError:
                click.echo("That line is not text in this terminal's encoding. It was not sent.", err=True)
                continue
            if not line.strip():
                continue
            if line.startswith("/"):
                if not self._command(line):
                    return
            else:
                self._answer(talk.ask(line))

    def _read(self) -> str:
        lines = [input("> ")]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(". "))
        return "\n".join(lines)

    def _command(self, line: str) -> bool:
        """Carry out a command; False: leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in {"/quit", "/exit", "/q"}:
            return False
        if name == "/model":
            self._choose(rest)
        elif name == "/system":
            self._talk.system = rest
            click.echo(self._dim("It is told that first." if rest else "It is told nothing first."))
        elif name == "/new":
            self._talk.new()
            click.echo(self._dim("Forgotten."))
        elif name == "/again":
            self._again()
        else:
            click.echo(_HELP)
        return True

    def _choose(self, name: str) -> None:
        models = self._status().models
        if name:
            self._talk.model = name
            click.echo(self._dim(f"Now {printable(name)}."))
            return
        for model in models:
            click.echo(printable(f"{model.name}  {model.status}{'  ' + model.reason if model.reason else ''}"))

    def _again(self) -> None:
        try:
            pieces = self._talk.again()
        except MeshError as error:
            tell(error)
            return
        self._answer(pieces)

    def _answer(self, pieces: Generator[Piece]) -> None:
        """Print an answer as it comes; Ctrl-C stops it, and what came of it counts."""
        try:
            # Closing it ends the request: the model's slot is free for others at once.
            with contextlib.closing(pieces):
                self._print(pieces)
        except KeyboardInterrupt:
            click.echo(self._dim(" [stopped]"), nl=False)
        except MeshError as error:
            click.echo()
            tell(error)
            return
        click.echo()
        click.echo(self._dim(self._told(self._talk.outcome)))

    def _print(self, pieces: Generator[Piece]) -> None:
        thinking = False
        for piece in pieces:
            if thinking and not piece.reasoning:
                click.echo("\n")
            thinking = piece.reasoning
            text = printable(piece.text)
            click.echo(self._dim(text) if piece.reasoning else text, nl=False)
            sys.stdout.flush()

    def _told(self, outcome: Outcome) -> str:
        words = [printable(outcome.model)] if outcome.model else []
        if outcome.tokens:
            words.append(f"{outcome.tokens} tokens")
        if outcome.tokens_per_second:
            words.append(f"{outcome.tokens_per_second:.1f} tokens/s")
        if outcome.first_seconds is not None:
            words.append(f"first after {outcome.first_seconds:.2f} s")
        if outcome.finish == "length":
            words.append("cut at the longest length")
        if outcome.node:
            words.append(f"by {printable(self._name_of(outcome.node))}")
        return ", ".join(words)

    def _name_of(self, node: str) -> str:
        if node not in self._names:
            status = self._status()
            self._names = {peer.node_id: peer.name for peer in status.peers} | {status.node_id: status.name}
        return self._names.get(node) or node[:10]

    def _status(self) -> Status:
        return self._client.get("/api/status", Status)

    def _dim(self, text: str) -> str:
        return f"\x1b[2m{text}\x1b[0m" if self._colour else text
