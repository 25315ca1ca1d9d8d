"""Interfaces that several layers share, so that they need not import each other. The daemon binds them together."""

from collections.abc import Awaitable, Callable, MutableSequence, Sequence
from enum import StrEnum
from typing import Any, NamedTuple, Protocol, TypeVar

from mesh_llm.core.performance.prompt_cache import Mark
from mesh_llm.core.routing.ranking import RoutingSnapshot, Target
from mesh_llm.core.trust.corrections import TimedAnswer
from mesh_llm.core.types.ids import NodeId, OwnerId

_T = TypeVar("_T")


class RandomSource(Protocol):
    """Random choices, as an argument: the core never draws on its own. `random.Random(seed)` satisfies this."""

    def random(self) -> float:
        """Return a number in [0, 1)."""
        ...

    def sample(self, population: Sequence[_T], k: int, /) -> list[_T]:
        """Return k different members, in random order."""
        ...

    def shuffle(self, x: MutableSequence[Any], /) -> None:
        """Reorder in place."""
        ...


class TransportSilentError(ConnectionError):
    """The peer never accepted the stream on this transport, and answers on another one.

    It has dropped what it knew of the stream, so that the stream can be begun again at once.
    """


class ByteStream(Protocol):
    """A reliable bidirectional byte stream: TCP, or one QUIC stream. Safe for one reader and one writer at once."""

    async def read(self, limit: int) -> bytes:
        """Return 1..limit bytes as soon as there are any; b"" at the peer's clean end. Raises ConnectionError."""
        ...

    async def write(self, data: bytes) -> None:
        """Send all of `data`; returns when the stream can take more (back-pressure). Raises ConnectionError."""
        ...

    async def finish(self) -> None:
        """End this side cleanly; the other side may go on."""
        ...

    def abort(self) -> None:
        """Drop both directions at once; the peer sees an error, not a clean end. Idempotent, never raises."""
        ...


class RequestStream(ByteStream, Protocol):
    """A byte stream that brings one request and takes its answer."""

    async def finish(self, data: bytes = b"") -> None:
        """Send the last bytes, if there are any, and end this side cleanly. Raises ConnectionError."""
        ...

    def watch(self, gone: Callable[[], None]) -> None:
        """Call `gone` once, when the peer ends or drops the stream, or sends more than its request."""
        ...

    def unwatch(self) -> None:
        """Stop watching."""
        ...


class BulkStream(ByteStream, Protocol):
    """A byte stream that also carries frames and bulk data."""

    async def read_exact(self, size: int) -> bytes:
        """Return exactly `size` bytes, at most 1 MiB. Raises ConnectionError, also where the stream ends before."""
        ...

    async def read_frame(self, limit: int) -> bytes | None:
        """The next frame's payload; None at a clean end between frames. Raises ConnectionError."""
        ...

    async def write_frame(self, payload: bytes) -> None:
        """Send one frame. Raises ConnectionError."""
        ...

    async def set_priority(self, priority: int) -> None:
        """Send this stream before others of lower priority on the same connection. Streams begin with 0."""
        ...


OpenStream = Callable[[Target], Awaitable[ByteStream]]
"""Opens a stream on which HTTP/1.1 can be spoken to a target's server. Raises MeshError(target_unreachable)."""


class EngineEnd(StrEnum):
    """How a launch of an engine ended.

    RUNNING: it has not ended. EXPLAINED: it was stopped or killed, a worker of its split was lost, or the launch is
    unknown. CRASHED: it ended without being asked to. OUT_OF_MEMORY: the system killed it because memory ran out.
    """

    RUNNING = "running"
    EXPLAINED = "explained"
    CRASHED = "crashed"
    OUT_OF_MEMORY = "out_of_memory"


PromptEnded = Callable[[], None]
"""Called once when the answer to a prompt has ended, in whatever way."""


class PromptElsewhere(NamedTuple):
    """Another node that got more of a prompt than this one, and the request by which the prompt can be found there.

    Attributes:
        node: it has the prompt's cache, or had it.
        path: of the request, as the engine gets it.
        body: of the request, as the engine gets it.
    """

    node: NodeId
    path: str
    body: bytes


class PromptCaches(Protocol):
    """Brings back what was saved of a prompt here, or on another node, before an engine of this node reads it."""

    def keeps(self, model: str, term: int) -> bool:
        """Whether the prompts of a launch here are saved at all."""
        ...

    async def begin(
        self,
        model: str,
        term: int,
        engine: str,
        prompt: Sequence[Mark],
        elsewhere: PromptElsewhere | None = None,
        slot: int | None = None,
    ) -> PromptEnded:
        """A prompt is about to be sent to an engine here. Takes seconds at most, and never raises.

        Args:
            model: of the launch.
            term: the launch's number.
            engine: address of the engine, which may be one of several of the launch.
            prompt: its beginnings, shortest first; empty where it is not one that could go on.
            elsewhere: a node that got more of it; None: none is known.
            slot: in which it will be read; None: the engine chooses.
        """
        ...


class Guessing(Protocol):
    """Whether the engines here guess tokens ahead: for a guessed token, llama-server knows no log probabilities."""

    def active(self, model: str, term: int) -> bool:
        """Whether a launch here guesses, and can be switched."""
        ...

    async def pause(self, model: str, term: int) -> Callable[[], None]:
        """Let a launch here guess nothing until the result is called. Never raises."""
        ...


class LoadAsker(NamedTuple):
    """Who waits for a model.

    Attributes:
        peer: the node that asks this one to load it; None: a client of this node.
        anywhere: any node of the mesh may load it, not only this one.
        for_clients: it is for passive clients only.
        circle: owners whose nodes may see the prompt that waits; None: all may.
    """

    peer: NodeId | None = None
    anywhere: bool = True
    for_clients: bool = False
    circle: frozenset[OwnerId] | None = None


class Traffic(Protocol):
    """Receives what happened to requests; the daemon makes events of it. Cheap, never blocks."""

    def started(self, model: str, target: Target) -> None:
        """A request was sent to a target."""
        ...

    def finished(
        self, model: str, target: Target, *, ok: bool, tokens: int, seconds: float, guessed: int = 0, prompt: int = 0
    ) -> None:
        """A request ended (`ok` False: the target failed it); `tokens` generated in `seconds` of generation.

        `guessed`: tokens that the engine guessed ahead for it; `prompt`: tokens of its prompt.
        """
        ...

    def read(self, model: str, target: Target, tokens: int, seconds: float, cached: int = 0) -> None:
        """After `finished`: the target read so many new tokens of the request's prompt, after `cached` others."""
        ...

    def unreachable(self, model: str, target: Target, reason: str) -> None:
        """A target could not be reached, or died. The request is not at fault."""
        ...

    def refused_context(self, model: str, target: Target, tokens: int) -> None:
        """A target refused a prompt of about so many tokens, or broke an answer off there. It announces more."""
        ...

    def took_prompt(self, model: str, target: Target, tokens: int) -> None:
        """A target answered a prompt that is longer than its context is known to be here."""
        ...

    def timed(self, answer: TimedAnswer) -> None:
        """Another node's answer was timed."""
        ...

    def wanted(self, model: str) -> None:
        """A request asked for a model, served or not."""
        ...

    def awaiting(self, model: str, asker: LoadAsker, change: int) -> None:
        """One request more (`change` 1) or less (-1) waits for a model that does not answer yet."""
        ...


class Routes(Protocol):
    """The current routes. Reading is an attribute access."""

    @property
    def current(self) -> RoutingSnapshot:
        """The snapshot by which a request is routed; never mutated."""
        ...

    async def newer(self, version: int) -> None:
        """Return once the current snapshot's version is above `version`."""
        ...

    async def settled(self) -> None:
        """Return once a joining node knows what its mesh has: after seconds at most, and at once later on."""
        ...
