"""The state of an answer that may be resumed: what the client got, and what the next engine is asked. Pure.

One class for each dialect derives from ResumeState. Where an answer cannot be resumed, `forbidden_in_any_dialect`,
`ResumeState.forbidden` and `ResumeState.blocked` give the reason, in words that complete "it cannot be continued: …".
"""

from abc import ABC, abstractmethod
from typing import ClassVar, TypeAlias

import msgspec

from mesh_llm.api.json_values import Json, count, mapping
from mesh_llm.core.types.errors import UNREADABLE
from mesh_llm.wire.http.sse import SseEvent


class CannotResume(msgspec.Struct, frozen=True):
    """An answer cannot be resumed. `reason` completes "it cannot be continued: …"."""

    reason: str


def forbidden_in_any_dialect(request: Json) -> str:
    """Why a request in any dialect forbids to resume its answer; empty: it does not."""
    if any((count(request.get(name)) or 1) > 1 for name in ("n", "n_cmpl", "best_of")):
        return "the request asks for several answers at once"
    if any(request.get(name) not in (None, False, 0) for name in ("logprobs", "top_logprobs", "n_probs")):
        return "the request asks for the probabilities of its tokens"
    seed = count(request.get("seed"))
    if seed is not None and seed >= 0 and not greedy(request):
        return "it was sampled with a seed, and another engine would sample otherwise from its middle on"
    if request.get("grammar"):
        return "a grammar of the request constrains it from its beginning on"
    if any(name in request for name in ("continue_final_message", "add_generation_prompt", "echo")):
        return "the request itself sets how a message is continued"
    return ""


def greedy(request: Json) -> bool:
    """Whether sampling is deterministic."""
    temperature = count(request.get("temperature"))
    return request.get("top_k") == 1 or (temperature is not None and float(request["temperature"]) <= 0.0)


def limits(request: Json, names: tuple[str, ...]) -> dict[str, int]:
    """The limits that a request sets on its answer's length; without those that mean no limit."""
    found = {name: count(request.get(name)) for name in names}
    return {name: limit for name, limit in found.items() if limit is not None and limit >= 0}


Event: TypeAlias = tuple[str, Json]
"""An event for the client: its name (empty: none), and its data."""

_DONE = "[DONE]"
_encode = msgspec.json.encode


class ResumeState(ABC):
    """One answer that several engines generate, one after another.

    First `see` takes the events of the first engine that the client got. Then, for each further engine: `request` gives
    what to ask it, and `splice` turns each of its events into what the client gets.

    Attributes:
        given: the answer's text so far.
        reasoning: the text of its reasoning so far.
        pieces: events that carried text.
        begun: the client got an event.
        finished: the client got the reason why the answer ended.
        over: the client got the answer's formal end.
        blocked: why it cannot be resumed from here; empty where it can.
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
    @abstractmethod
    def forbidden(cls, request: Json) -> str:
        """Why a request in this dialect forbids to resume its answer; empty: it does not."""

    @property
    def texts(self) -> list[str]:
        """What was generated so far: reasoning and answer. `request` needs the number of their tokens."""
        return [text for text in (self.reasoning, self.given) if text]

    @property
    def probes(self) -> tuple[bytes, bytes] | None:
        """Two bodies for `/apply-template`: their prompts differ by what was generated, marks of reasoning included.

        None where `texts` are all that was generated.
        """
        if not self.reasoning:
            return None
        asked: Json = {name: self._request[name] for name in ("chat_template_kwargs",) if name in self._request}
        question: Json = {"role": "user", "content": "?"}
        said: Json = {"role": "assistant", "content": self.given, "reasoning_content": self.reasoning}
        return _encode(asked | {"messages": [question]}), _encode(asked | {"messages": [question, said]})

    def see(self, event: SseEvent) -> None:
        """Take an event that the client got."""
        if event.data == _DONE:
            self.over = True
            return
        decoded = _decode(event)
        if decoded is not None:
            self.begun = True
            self._note(*decoded)

    def request(self, counted: int | None) -> bytes:
        """The request that makes the next engine write on.

        Args:
            counted: tokens of `texts`, as that engine counts them; None: not known, the number of pieces is used.
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
        """What the client gets for an event of the present engine; may be empty."""
        if event.data == _DONE:
            if self.over:
                return b""
            self.over = True
            return b"data: [DONE]\n\n"
        decoded = _decode(event)
        if decoded is None:
            return b""
        pieces: list[bytes] = []
        for name, data in self._edit(*decoded):
            self._note(name, data)
            self.begun = True
            head = b"event: %b\n" % name.encode() if name else b""
            pieces.append(b"%bdata: %b\n\n" % (head, _encode(data)))
        return b"".join(pieces)

    def tail(self) -> bytes | None:
        """The formal end of an answer of which nothing else is missing; None: an engine must be asked for the rest.

        The answer counts as over then.
        """
        if self.over:
            return b""
        ending = self._tail()
        self.over = ending is not None
        return ending

    @abstractmethod
    def _tail(self) -> bytes | None:
        """`tail` of an answer that is not over."""

    @abstractmethod
    def _note(self, name: str, data: Json) -> None:
        """Remember an event that the client gets."""

    @abstractmethod
    def _edit(self, name: str, data: Json) -> list[Event]:
        """Turn an event of a further engine into the events that the client gets."""

    @abstractmethod
    def _continue(self, request: Json) -> None:
        """Put the text so far into `request`, a shallow copy of the original."""

    @property
    def _muted(self) -> bool:
        """Further text is not part of the answer: it has ended already, or its limit is reached."""
        return self._closing or self._spent

    def _generated(self, now: int) -> int:
        """Tokens of the whole answer, of which the present engine counts `now`."""
        if self._spent or (self._closing and self._fresh):
            return self._before
        return self._before + now

    def _prompt(self, now: int) -> int:
        """Tokens of the prompt, without the answer so far, which the present engine counts as prompt."""
        return max(0, now - self._counted)


def _decode(event: SseEvent) -> Event | None:
    try:
        data = mapping(msgspec.json.decode(event.data))
    except UNREADABLE:
        return None
    return (event.event, data) if data else None
