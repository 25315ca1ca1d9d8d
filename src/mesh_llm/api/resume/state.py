"""What of a request forbids that its answer is continued, and how much of its limit is left.

What the stories of all dialects have in common: what was given, what is counted, and how events are written.
"""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, TypeAlias, cast

import msgspec

from mesh_llm.wire.http.sse import SseEvent

Json: TypeAlias = dict[str, Any]

_MOST_TOKENS = 2**53


class Cannot(msgspec.Struct, frozen=True):
    """An answer cannot be continued. `reason` completes "it cannot be continued: …"."""

    reason: str


def mapping(value: object) -> Json:
    """The value, if it is a JSON object; else an empty one."""
    return cast("Json", value) if isinstance(value, dict) else {}


def items(value: object) -> list[Any]:
    """The value, if it is a JSON array; else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def text(value: object) -> str:
    """The value, if it is a string; else an empty one."""
    return value if isinstance(value, str) else ""


def count(value: object) -> int | None:
    """The value as a number of tokens, if it is one that can be."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < _MOST_TOKENS:
        return None
    return int(value)


def forbidden(request: Json) -> str:
    """What in any dialect's request forbids to continue; empty: nothing."""
    if any((count(request.get(name)) or 1) > 1 for name in ("n", "n_cmpl", "best_of")):
        return "several answers were asked for at once"
    if any(request.get(name) not in (None, False, 0) for name in ("logprobs", "top_logprobs", "n_probs")):
        return "the probabilities of its tokens were asked for"
    if _repeatable(request) and not greedy(request):
        return "it was drawn from a seed, and would be drawn otherwise from its middle on"
    if request.get("grammar"):
        return "a grammar of the request's own binds it from its beginning on"
    if any(name in request for name in ("continue_final_message", "add_generation_prompt", "echo")):
        return "its request says by itself how a message is continued"
    return ""


def _repeatable(request: Json) -> bool:
    seed = count(request.get("seed"))
    return seed is not None and seed >= 0


def greedy(request: Json) -> bool:
    """Whether nothing is left to chance."""
    temperature = count(request.get("temperature"))
    return request.get("top_k") == 1 or (temperature is not None and float(request["temperature"]) <= 0.0)


def limits(request: Json, names: tuple[str, ...]) -> dict[str, int]:
    """The limits of an answer's length that a request sets; not those that mean no limit."""
    found = {name: count(request.get(name)) for name in names}
    return {name: limit for name, limit in found.items() if limit is not None and limit >= 0}


Told: TypeAlias = tuple[str, Json]
"""An event for the client: its name (empty: none), and its data."""

_DONE = "[DONE]"
_encode = msgspec.json.encode


class Story(ABC):
    """One answer, told by one engine after another.

    First `see` takes the events that the client was given by the first engine. Then, for each further engine: `request`
    gives what to ask it, and `splice` turns each of its events into what the client gets.

    Attributes:
        given: the answer's text so far.
        reasoning: the text of its reasoning so far.
        pieces: events that carried text.
        begun: the client was given an event.
        finished: the client was told why the answer ended.
        over: the answer's formal end was given.
        blocked: why it cannot go on from here; empty where it can.
    """

    LIMITS: ClassVar[tuple[str, ...]] = ("max_tokens",)

    def __init__(self, request: Json) -> None:
        self._request = request
        self.given: str = ""
        self.reasoning: str = ""
        self.pieces: int = 0
        self.begun = False
        self.finished = False
        self.over = False
        self.blocked = ""
        self._before = 0
        self._counted = 0
        self._spent = False
        self._closing = False
        self._fresh = False

    @classmethod
    def forbidden(cls, request: Json) -> str:
        """What in the request forbids to continue; empty: nothing."""
        return forbidden(request)

    @property
    def texts(self) -> list[str]:
        """What was generated so far: reasoning and answer. Their tokens are what is to be counted for `request`."""
        return [text for text in (self.reasoning, self.given) if text]

    @property
    def probes(self) -> tuple[bytes, bytes] | None:
        """Bodies for `/apply-template`, whose prompts differ by what was generated, marks of reasoning included.

        None where `texts` are all of it.
        """
        if not self.reasoning:
            return None
        asked: Json = {name: self._request[name] for name in ("chat_template_kwargs",) if name in self._request}
        question: Json = {"role": "user", "content": "?"}
        said: Json = {"role": "assistant", "content": self.given, "reasoning_content": self.reasoning}
        return _encode(asked | {"messages": [question]}), _encode(asked | {"messages": [question, said]})

    def see(self, event: SseEvent) -> None:
        """Take an event that the client was given."""
        if event.data == _DONE:
            self.over = True
            return
        told = self._decoded(event)
        if told is not None:
            self.begun = True
            self._note(*told)

    def request(self, counted: int | None) -> bytes:
        """The request by which the next engine goes on.

        Args:
            counted: tokens of `texts`, as that engine counts them; None: unknown, then pieces stand in.
        """
        self._counted = self.pieces if counted is None else counted
        self._before = max(self.pieces, self._counted)
        self._fresh = False
        self._closing = self.finished
        request = dict(self._request)
        left = {name: limit - self._before for name, limit in limits(request, self.LIMITS).items()}
        self._spent = bool(left) and min(left.values()) <= 0
        if self.texts:
            request |= {name: max(1, rest) for name, rest in left.items()}
            self._continue(request)
        return _encode(request)

    def splice(self, event: SseEvent) -> bytes:
        """What the client gets for an event of the engine that was asked last; may be nothing."""
        if event.data == _DONE:
            if self.over:
                return b""
            self.over = True
            return b"data: [DONE]\n\n"
        told = self._decoded(event)
        if told is None:
            return b""
        pieces: list[bytes] = []
        for name, data in self._edit(*told):
            self._note(name, data)
            self.begun = True
            head = b"event: %b\n" % name.encode() if name else b""
            pieces.append(b"%bdata: %b\n\n" % (head, _encode(data)))
        return b"".join(pieces)

    def tail(self) -> bytes | None:
        """What ends an answer of which only the formal end is missing; None: an engine must be asked for the rest.

        It counts as given then.
        """
        if self.over:
            return b""
        ending = self._tail()
        self.over = ending is not None
        return ending

    @abstractmethod
    def _tail(self) -> bytes | None:
        """The same, of an answer that is not over."""

    @abstractmethod
    def _note(self, name: str, data: Json) -> None:
        """Remember an event that the client is given."""

    @abstractmethod
    def _edit(self, name: str, data: Json) -> list[Told]:
        """Turn an event of a further engine into what the client is to get."""

    @abstractmethod
    def _continue(self, request: Json) -> None:
        """Put the text so far into a request, of which this is a copy, one level deep."""

    # Helpers

    def _decoded(self, event: SseEvent) -> Told | None:
        try:
            data = mapping(msgspec.json.decode(event.data))
        except (msgspec.MsgspecError, RecursionError):
            return None
        return (event.event, data) if data else None

    @property
    def _muted(self) -> bool:
        """Further text is none of the answer: it has ended already, or its limit is reached."""
        return self._closing or self._spent

    def _generated(self, now: int) -> int:
        """Tokens of the whole answer, of which the present engine counts `now`."""
        if self._spent or (self._closing and self._fresh):
            return self._before
        return self._before + now

    def _prompt(self, now: int) -> int:
        """Tokens of the prompt, without the answer so far, which is a part of it for the present engine."""
        return max(0, now - self._counted)
