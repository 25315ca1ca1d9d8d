"""What is recorded of one request for its receipt: the hosts that got it, and digests of what passed.

Only requests that ask for a receipt have a recording; the others are relayed as ever.
"""

import os
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from hashlib import sha256

from mesh_llm.api.telemetry import CLIENT_GONE, TARGET_LOST
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.types import Usage
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.receipt import CHALLENGE_BYTES, MAX_STEPS, RECEIPT_ID_BYTES, Announced, Outcome, Served, Step
from mesh_llm.wire.http.http1 import Headers, header
from mesh_llm.wire.mesh.receipts import parse_first_text, request_digest, step_digest

PART_HEADER = b"x-mesh-llm-receipt-part"
"""On a request to another node: the challenge, and the digest of the step before if there is one, in hex."""
FIRST_HEADER = b"x-mesh-llm-receipt-first"
"""Of an interim response between nodes: the first part that a host signs, before its engine has the prompt."""
_PART = re.compile(rb"([0-9a-f]{32})\.((?:[0-9a-f]{64})?)")
_REFUSALS = frozenset((404, 429, 503))

WallClock = Callable[[], float]
"""UNIX seconds."""


class Passing:
    """Digest, length and token counts of content that passes in pieces."""

    __slots__ = ("_hash", "_transcript", "size")

    def __init__(self) -> None:
        self._hash = sha256()
        self._transcript = Transcript()
        self.size = 0

    def take(self, data: bytes) -> None:
        """The next piece."""
        self._hash.update(data)
        self.size += len(data)
        self._transcript.add(data)

    @property
    def digest(self) -> bytes:
        """Of what has passed so far."""
        return self._hash.digest()

    def usage(self) -> Usage:
        """The engine's token counts, as far as they have passed."""
        return self._transcript.usage()


@dataclass(eq=False)
class StepRecord:
    """One host that gets the request; `answer` is what comes from it. Fields as of core.types.receipt.Step.

    Attributes:
        began: UNIX milliseconds.
        first: the host's first part, with its signature, as it came; empty: none came.
    """

    target: Target
    model: ModelName
    previous: bytes
    request: bytes
    announced: Announced
    began: int
    challenge: bytes = field(default_factory=lambda: os.urandom(CHALLENGE_BYTES))
    answer: Passing = field(default_factory=Passing)
    outcome: Outcome | None = None
    status: int = 0
    first: bytes = b""

    @property
    def header(self) -> tuple[bytes, bytes]:
        """What the host is sent, so that it signs its part."""
        return PART_HEADER, f"{self.challenge.hex()}.{self.previous.hex()}".encode()

    def hinted(self, headers: Headers) -> None:
        """The host sent headers before its answer."""
        value = header(headers, FIRST_HEADER)
        if value is not None:
            self.first = parse_first_text(value)

    def ended(self, status: int) -> None:
        """The attempt is over, with this status of telemetry. Only the first call counts."""
        if self.outcome is not None:
            return
        if status == TARGET_LOST:
            self.outcome = Outcome.LOST
        elif status == CLIENT_GONE:
            self.outcome = Outcome.LEFT
        else:
            self.status = self.status or status
            self.outcome = Outcome.REFUSED if self.status in _REFUSALS else Outcome.ANSWERED

    def step(self, statement: bytes = b"", signature: bytes = b"", *, with_first: bool = False) -> Step:
        """The finished step, with what its host signed.

        `with_first`: it has the first part in any case. Else only that of a host that did not come to the answer's end.
        """
        unfinished = self.outcome in (Outcome.LOST, Outcome.LEFT)
        return Step(
            node=self.target.node,
            outcome=self.outcome or Outcome.ANSWERED,
            challenge=self.challenge,
            previous=self.previous,
            request=self.request,
            answer=self.answer.digest,
            answer_bytes=self.answer.size,
            status=self.status,
            fingerprint=self.announced.fingerprint,
            # A passive node has no announcements, but routes.
            workers=self.announced.workers or self.target.workers,
            statement=statement,
            signature=signature,
            first=self.first if unfinished or with_first else b"",
        )


class Recording:
    """One request for which a receipt is made: a client's, or a part of another node's.

    Attributes:
        id: of the receipt.
        path: of the client's request.
        owner: who may read the receipt.
        asker: the node whose request this is; None: a client's.
        challenge, previous: what that node sent along.
        request: digest of the request, once its content was read.
        answer: what is sent back.
        status: of the answer; 0: none has begun.
        steps: the hosts that got the request.
        whole: the answer was sent to its end.
        served: what is served here, as it was signed in the first part; None: none was.
        begins: signs the first part, for another node's request, before an engine here gets the prompt; None elsewhere.
        began, ended: UNIX milliseconds; `ended` 0: not yet.
    """

    def __init__(
        self,
        path: str,
        wall_clock: WallClock,
        announced: Callable[[ModelName, NodeId], Announced],
        prepare: Callable[[ModelName], None],
    ) -> None:
        """`announced`: what a host has announced about a model. `prepare`: an engine here is about to get a prompt."""
        self.id = os.urandom(RECEIPT_ID_BYTES)
        self.path = path
        self.owner = ""
        self.asker: NodeId | None = None
        self.challenge = b""
        self.previous = b""
        self.request = b""
        self.answer = Passing()
        self.status = 0
        self.steps: list[StepRecord] = []
        self.too_many = False
        """More hosts got the request than a receipt names."""
        self.whole = False
        self.served: Served | None = None
        self.begins: Callable[[], Awaitable[None]] | None = None
        self.ended = 0
        self._wall_clock = wall_clock
        self._announced = announced
        self._prepare = prepare
        self.began = self._now()

    def for_peer(self, asker: NodeId, value: bytes) -> bool:
        """It is a part of another node's receipt, whose header has this value. False: the header makes no sense."""
        found = _PART.fullmatch(value)
        if found is None:
            return False
        self.asker, self.challenge = asker, bytes.fromhex(found[1].decode())
        self.previous = bytes.fromhex(found[2].decode())
        return True

    def got(self, method: str, target: str, content: bytes) -> None:
        """The request's content was read. A dialect may make another request of it; the first one counts."""
        if not self.request:
            own = self.asker is None
            self.request = sha256(content).digest() if own else request_digest(method, target, content)

    def begin(self, target: Target, model: ModelName, method: str, path: str, content: bytes) -> StepRecord:
        """A host is about to be sent the request."""
        last = self.steps[-1] if self.steps else None
        if last is not None:
            last.ended(TARGET_LOST)
        if target.local:
            self._prepare(model)
        step = StepRecord(
            target,
            model,
            step_digest(last.step()) if last is not None else b"",
            request_digest(method, path, content),
            self._announced(model, target.node),
            self._now(),
        )
        if len(self.steps) < MAX_STEPS:
            self.steps.append(step)
        else:
            self.too_many = True
        return step

    def unsent(self, step: StepRecord) -> None:
        """Nothing of the request reached that host."""
        if self.steps and self.steps[-1] is step:
            self.steps.pop()

    def attempt_ended(self, status: int) -> None:
        """The attempt at the present host is over, with this status of telemetry."""
        if self.steps:
            self.steps[-1].ended(status)

    def close(self, *, whole: bool) -> None:
        """The answer has been sent, to its end or not. Only the first call counts."""
        if not self.ended:
            self.whole = whole
            self.ended = max(self.began, self._now())
            self.attempt_ended(self.status if whole else CLIENT_GONE)

    def _now(self) -> int:
        return int(self._wall_clock() * 1000)


def with_part(headers: Headers, step: StepRecord) -> Headers:
    """The headers of a request to this host."""
    return headers if step.target.local else (*headers, step.header)
