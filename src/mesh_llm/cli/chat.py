"""`mesh-llm chat`: a conversation with a model of the mesh in the terminal, or one answer to piped text."""

import contextlib
import http.client
import importlib
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, events, node_home, node_option
from mesh_llm.cli.options import Number
from mesh_llm.cli.output import print_error, printable, styled
from mesh_llm.console.status import Status
from mesh_llm.core.types.errors import UNREADABLE, MeshError

PATH = "/v1/chat/completions"
_SILENCE = 600.0
"""Longest time without a byte, in seconds: a prompt may wait for a slot, and take long to process."""
_MOST_PIPED = 8 << 20
_HELP = """\
/model [NAME]    use another model; without NAME, list the models
/system [TEXT]   set the system prompt; without TEXT, remove it
/again           ask for the last answer again
/new             start a new conversation
/quit            quit, as Ctrl-D does
Ctrl-C stops an answer; at the prompt it quits. End a line with \\ to continue on the next."""


@click.command()
@click.argument("model", required=False)
@click.option("--system", "-s", default="", metavar="TEXT", help="System prompt.")
@click.option(
    "--temperature", "-t", type=Number(0, 5), metavar="T", help="Sampling temperature; 0 for the most likely words."
)
@click.option("--max-tokens", "-n", type=click.IntRange(min=1), metavar="N", help="Longest answer, in tokens.")
@node_option
def chat(model: str | None, system: str, temperature: float | None, max_tokens: int | None) -> None:
    """Chat with MODEL, or with the model that the running node serves. /help lists the commands.

    \b
      mesh-llm chat qwen                          any unique beginning of a name
      git diff | mesh-llm chat -s "Review this"   one answer to piped text
    """
    client = DaemonClient(node_home())
    talk = Conversation(client, model or "", system, Sampling(temperature, max_tokens))
    if sys.stdin.isatty() and sys.stdout.isatty():
        _Terminal(talk, client).run()
        return
    text = _piped()
    if not text.strip():
        raise MeshError(
            code="nothing_said", message="No text was piped in.", hint="For example: echo Hello | mesh-llm chat"
        )
    for piece in talk.ask(text):
        if not piece.reasoning:
            click.echo(printable(piece.text), nl=False)
    click.echo()


def _piped() -> str:
    """The piped text, whatever the locale: UTF-8, or Latin-1 (in which every byte is valid) if it is not UTF-8.

    Raises:
        MeshError: `not_text` for binary data, `too_long`.
    """
    data = sys.stdin.buffer.read(_MOST_PIPED + 1)
    if len(data) > _MOST_PIPED:
        raise MeshError(
            code="too_long", message=f"More than {_MOST_PIPED >> 20} MiB were piped in.", hint="Pipe in a part of it."
        )
    if b"\0" in data:
        raise MeshError(code="not_text", message="The piped data is not text.", hint="Pipe in text, best as UTF-8.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


class Message(msgspec.Struct):
    """A turn. `role`: system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Piece:
    """Some text of an answer. `reasoning`: it belongs to the model's reasoning, not to its answer."""

    text: str
    reasoning: bool = False


@dataclass
class Outcome:
    """Facts about an answer. `tokens_per_second`, `tokens`: 0 if the engine did not report. `node`: id of the host."""

    model: str = ""
    node: str = ""
    first_seconds: float | None = None
    tokens: int = 0
    tokens_per_second: float = 0.0
    finish: str = ""


@dataclass
class Sampling:
    """Sampling parameters of every request; None for the model's own."""

    temperature: float | None = None
    max_tokens: int | None = None

    def fields(self) -> dict[str, float | int]:
        """Fields of the request."""
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
    message: str = "The answer broke off."
    code: str | int | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list[_Choice])
    usage: _Usage | None = None
    timings: _Timings | None = None
    error: _Error | None = None


@dataclass
class Conversation:
    """The turns so far. `model`: empty for the one that the node serves.

    `ask` and `again` yield the answer in pieces. An answer that is stopped (the generator is closed) stays in the
    conversation as far as it came. One that fails leaves the conversation as it was.
    """

    client: DaemonClient
    model: str = ""
    system: str = ""
    sampling: Sampling = field(default_factory=Sampling)
    turns: list[Message] = field(default_factory=list[Message])
    outcome: Outcome = field(default_factory=Outcome)
    clock: Callable[[], float] = time.monotonic

    def new(self) -> None:
        """Start a new conversation with the same system prompt."""
        self.turns.clear()

    def ask(self, text: str) -> Generator[Piece]:
        """Add a question, and yield its answer. Raises MeshError."""
        before = list(self.turns)
        self.turns.append(Message("user", text))
        return self._answer(before)

    def again(self) -> Generator[Piece]:
        """Drop the last answer, and yield another. Raises MeshError(nothing_said) if there is no question."""
        before = list(self.turns)
        if self.turns and self.turns[-1].role == "assistant":
            self.turns.pop()
        if not self.turns:
            raise MeshError(
                code="nothing_said", message="There is no question to answer again.", hint="Ask something first."
            )
        return self._answer(before)

    def _answer(self, before: list[Message]) -> Generator[Piece]:
        """`before`: the turns to return to if the answer fails or is empty."""
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
    """The chunks of a streamed answer. Raises MeshError if it breaks off."""
    for event in events(answer):
        if event.data == "[DONE]":
            return
        try:
            chunk = msgspec.json.decode(event.data, type=_Chunk)
        except UNREADABLE as error:
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


class _Terminal:
    """The conversation on a terminal."""

    def __init__(self, talk: Conversation, client: DaemonClient) -> None:
        self._talk = talk
        self._client = client
        self._colour = styled(sys.stdout)
        self._names: dict[str, str] = {}

    def run(self) -> None:
        """Read and answer until the user quits."""
        status = self._status()
        talk = self._talk
        model = talk.model or next((one.name for one in status.models if one.status == "warm"), "")
        click.echo(self._dim(f"{printable(model) or 'no model is warm yet'}, through {printable(status.name)}. /help"))
        with contextlib.suppress(ImportError):
            # Gives input() history and editing.
            importlib.import_module("readline")
        while True:
            try:
                line = self._read()
            except (EOFError, KeyboardInterrupt):
                click.echo()
                return
            except UnicodeDecodeError:
                click.echo("That line is not valid in this terminal's encoding. It was not sent.", err=True)
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
        """Run a command; False to quit."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name in {"/quit", "/exit", "/q"}:
            return False
        if name == "/model":
            self._choose(rest)
        elif name == "/system":
            self._talk.system = rest
            click.echo(self._dim("System prompt set." if rest else "System prompt removed."))
        elif name == "/new":
            self._talk.new()
            click.echo(self._dim("New conversation."))
        elif name == "/again":
            self._again()
        else:
            click.echo(_HELP)
        return True

    def _choose(self, name: str) -> None:
        models = self._status().models
        if name:
            self._talk.model = name
            click.echo(self._dim(f"Now using {printable(name)}."))
            return
        for model in models:
            click.echo(printable(f"{model.name}  {model.status}{'  ' + model.reason if model.reason else ''}"))

    def _again(self) -> None:
        try:
            pieces = self._talk.again()
        except MeshError as error:
            print_error(error)
            return
        self._answer(pieces)

    def _answer(self, pieces: Generator[Piece]) -> None:
        """Print an answer as it arrives. Ctrl-C stops it, and what has arrived stays in the conversation."""
        try:
            # Closing the generator ends the request, and frees the slot at once.
            with contextlib.closing(pieces):
                self._print(pieces)
        except KeyboardInterrupt:
            click.echo(self._dim(" [stopped]"), nl=False)
        except MeshError as error:
            click.echo()
            print_error(error)
            return
        click.echo()
        click.echo(self._dim(self._summary(self._talk.outcome)))

    def _print(self, pieces: Generator[Piece]) -> None:
        thinking = False
        for piece in pieces:
            if thinking and not piece.reasoning:
                click.echo("\n")
            thinking = piece.reasoning
            text = printable(piece.text)
            click.echo(self._dim(text) if piece.reasoning else text, nl=False)
            sys.stdout.flush()

    def _summary(self, outcome: Outcome) -> str:
        words = [printable(outcome.model)] if outcome.model else []
        if outcome.tokens:
            words.append(f"{outcome.tokens} tokens")
        if outcome.tokens_per_second:
            words.append(f"{outcome.tokens_per_second:.1f} tokens/s")
        if outcome.first_seconds is not None:
            words.append(f"first after {outcome.first_seconds:.2f} s")
        if outcome.finish == "length":
            words.append("cut at --max-tokens or the context")
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
