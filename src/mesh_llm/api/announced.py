"""Checks what other nodes announce against what they do: contexts that refuse what fits, and speeds that never come.

Only what this node sees counts: a host may say of itself what it likes. Bytes bound the tokens that it claims, and
times are taken here, without the round trip. What follows is decided in `core/trust/corrections.py`.
"""

import re
from typing import NamedTuple

from mesh_llm.api.errors import ContextExceededError
from mesh_llm.api.request import ModelRequest
from mesh_llm.api.transcript import Transcript
from mesh_llm.api.types import Usage
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.corrections import Kind, TimedAnswer
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.ports import Traffic

_MOST_ADDED = 4096
"""Tokens that a chat template adds to a prompt, on the large side."""
_BYTES_PER_TOKEN = 4
_LEAST_BYTES = 2
"""Of a prompt for each of its tokens: a host that claims more tokens is not believed to have read them."""
_OTHER_THAN_TEXT = (b"image", b"audio", b"video", b"file_")
"""In a request whose prompt may be longer than its bytes."""

_LEAST_TOKENS = 24
"""A shorter answer says little about speed."""
_LEAST_PROMPT = 512
_BUSY = 0.5
"""Load from which on others' requests slow a host's answers."""

_LIMIT = re.compile(
    rb'"(?:max_tokens|max_completion_tokens|max_output_tokens|n_predict|num_predict)"\s*:\s*(\d{1,9})[^\d]'
)
_ENDED_BY_LENGTH = (b'"finish_reason":"length"', b'"stop_reason":"max_tokens"', b'"incomplete_details":{')
_NEAR = 8
"""Tokens by which two answers that were broken off may differ, and still have ended at the same context."""
_APART = 64
"""Tokens by which their prompts must differ: an engine may also limit the tokens of an answer."""
_MOST_CUT = 64


def overstated(target: Target, error: ContextExceededError, body: bytes) -> int | None:
    """The context that a host really has, where it refused a prompt that fits what it announces; None: it does not fit.

    What the host says of the prompt's length is believed if so many bytes can be so many tokens.
    """
    if target.local or not target.context or any(sign in body for sign in _OTHER_THAN_TEXT):
        return None
    estimate = max(1, len(body) // _BYTES_PER_TOKEN)
    most = len(body) + _MOST_ADDED
    tokens = error.prompt_tokens if 0 < error.prompt_tokens <= most else 0
    if not tokens and most >= target.context:
        # It did not say how long the prompt is, and it may be as long.
        tokens = 0 if 0 < error.context < target.context else target.context
    if tokens >= target.context:
        return None
    context = min(tokens or estimate, target.context - 1)
    return min(context, error.context) if error.context else context


class Answered(NamedTuple):
    """An answer that ended well.

    Attributes:
        usage: as the host counted it.
        transcript: what passed of it.
        sent_at, first_byte_at, ended_at: on one clock, when the request was sent, and its answer began and ended.
        busy: requests of this node that the host had at the end, this one included.
    """

    usage: Usage
    transcript: Transcript
    sent_at: float
    first_byte_at: float
    ended_at: float
    busy: int


class HostChecks:
    """Compares what other hosts do with what they announce. Nothing of a request's text is kept."""

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._cut: dict[tuple[NodeId, ModelName, int], tuple[int, int]] = {}

    def refused(self, job: ModelRequest, target: Target, error: ContextExceededError) -> None:
        """A host refused a prompt as too long."""
        tokens = overstated(target, error, job.body)
        if tokens is not None:
            self._traffic.refused_context(job.model, target, tokens)

    def answered(self, job: ModelRequest, target: Target, answer: Answered) -> None:
        """Another node's answer has ended well."""
        usage = answer.usage
        if target.context and min(usage.prompt, len(job.body) // _LEAST_BYTES) >= target.context:
            self._traffic.took_prompt(job.model, target, usage.prompt)
        self._check_end(job, target, answer)
        if answer.busy <= 1 and target.load < _BUSY:
            self._time(job, target, answer)

    def _check_end(self, job: ModelRequest, target: Target, answer: Answered) -> None:
        """Whether an answer ended where the host's context should not end yet.

        Two must have ended after as many tokens, prompt included, with prompts of other lengths.
        """
        usage = answer.usage
        used = usage.prompt + usage.generated
        if not 0 < used < target.context - _NEAR or not answer.transcript.ends_with_any(_ENDED_BY_LENGTH):
            return
        limits = [int(found) for found in _LIMIT.findall(job.body)]
        if any(limit <= usage.generated + _NEAR for limit in limits):
            return
        key = (target.node, job.model, target.term)
        before = self._cut.pop(key, None)
        while len(self._cut) >= _MOST_CUT:
            del self._cut[next(iter(self._cut))]
        self._cut[key] = (usage.prompt, used)
        if before is not None and abs(before[1] - used) <= _NEAR and abs(before[0] - usage.prompt) >= _APART:
            self._traffic.refused_context(job.model, target, used)

    def _time(self, job: ModelRequest, target: Target, answer: Answered) -> None:
        usage, transcript = answer.usage, answer.transcript
        timed: list[TimedAnswer] = []

        def add(kind: Kind, tokens: int, seconds: float, said: float, lump: float = 1.0, start: int = 0) -> None:
            timed.append(
                TimedAnswer(
                    node=target.node,
                    model=job.model,
                    term=target.term,
                    kind=kind,
                    tokens=tokens,
                    seen=round(tokens / seconds, 3),
                    said=round(said, 3),
                    lump=round(lump, 2),
                    start=start,
                )
            )

        came = min(usage.generated or transcript.events, transcript.events)
        seconds = answer.ended_at - answer.first_byte_at
        if came >= _LEAST_TOKENS and seconds > 0.0:
            said = usage.generated / usage.seconds if usage.seconds else 0.0
            add(Kind.SPEED, came - 1, seconds, said, transcript.events / max(1, transcript.pieces))
        read = min(usage.prompt, len(job.body) // _LEAST_BYTES) - usage.cached
        waited = answer.first_byte_at - answer.sent_at - target.rtt_ms / 1000.0
        if read >= _LEAST_PROMPT and waited > 0.0 and came >= _LEAST_TOKENS:
            said = (usage.prompt - usage.cached) / usage.prompt_seconds if usage.prompt_seconds else 0.0
            add(Kind.PROMPTS, read, waited, said, start=usage.cached)
        for one in timed:
            self._traffic.timed(one)
