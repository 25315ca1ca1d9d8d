"""Whether guessing tokens ahead pays, from the answers of one model: its gain, when to stop, and when to try again.

An engine checks a guess together with the token before it. So an answer of `tokens` tokens, of which `accepted` were
guessed rightly, takes `tokens - accepted` passes. A pass takes as long as a token without guesses (in a split model
with the round trip to its workers), and each guessed token adds its part of drafting and checking. Both are learned
from the answers themselves, by least squares, in which newer answers weigh more.
"""

import msgspec

LEAST_GAIN = 0.03
"""A gain below it is not worth guessing."""

RESUME_GAIN = 0.06
"""A gain that guesses must have in a trial to go on. Above LEAST_GAIN, so that they are not switched to and fro."""

_MOST_GAIN = 64.0
_FORGET = 0.9
"""Weight of what was known, for each answer."""
_LEAST_TOKENS = 16
"""Shorter answers say little."""
_ENOUGH_TOKENS = 256
"""Tokens after which a phase is judged."""
_PLAIN_TOKENS = 64
"""Tokens without guesses that show what a pass costs, where all answers with guesses are alike."""
_FIRST_REST_TOKENS = 2048
_MOST_REST_TOKENS = 1 << 17


class Answer(msgspec.Struct, frozen=True):
    """One answer that ran alone: `tokens` generated in `seconds`; of `guessed` tokens, `accepted` were right."""

    tokens: int
    seconds: float
    guessed: int = 0
    accepted: int = 0

    @property
    def passes(self) -> int:
        """Passes through the model."""
        return max(1, self.tokens - self.accepted)


class Cost(msgspec.Struct, frozen=True):
    """Sums of a least-squares fit of `seconds = passes * pass_seconds + guessed * guess_seconds`."""

    pp: float = 0.0
    pg: float = 0.0
    gg: float = 0.0
    ps: float = 0.0
    gs: float = 0.0

    def learned(self, answer: Answer) -> "Cost":
        """The fit with one more answer."""
        weight = 1.0 / answer.passes
        return Cost(
            _FORGET * self.pp + weight * answer.passes**2,
            _FORGET * self.pg + weight * answer.passes * answer.guessed,
            _FORGET * self.gg + weight * answer.guessed**2,
            _FORGET * self.ps + weight * answer.passes * answer.seconds,
            _FORGET * self.gs + weight * answer.guessed * answer.seconds,
        )

    def pass_seconds(self) -> float | None:
        """Seconds of a pass without guesses; None while answers were too alike to tell the two parts."""
        if self.pp <= 0.0:
            return None
        if self.gg <= 0.0:
            return self.ps / self.pp
        apart = self.pp * self.gg - self.pg**2
        if apart < 1e-2 * self.pp * self.gg:
            return None
        # Neither part is negative: a pass is no faster with guesses.
        return min(self.ps / self.pp, max(0.0, (self.ps * self.gg - self.gs * self.pg) / apart))


class Speculating(msgspec.Struct, frozen=True):
    """What is known of one model's speculation.

    Attributes:
        on: it guesses.
        cost: the fit so far.
        tokens: tokens of this phase.
        seconds: seconds of this phase.
        rest: tokens without guesses until the next trial.
        trial: this phase is a trial after a rest.
    """

    on: bool = True
    cost: Cost = Cost()
    tokens: int = 0
    seconds: float = 0.0
    rest: int = _FIRST_REST_TOKENS
    trial: bool = False

    @property
    def gain(self) -> float | None:
        """Part by which answers of this phase were faster than without guesses; None while that is not known."""
        plain = self.cost.pass_seconds()
        if not self.on or plain is None or not self.tokens or self.seconds <= 0.0:
            return None
        return min(_MOST_GAIN, self.tokens * plain / self.seconds - 1.0)


def after(state: Speculating, answer: Answer) -> Speculating:
    """What is known, and whether to guess, after one more answer. Pure; an answer that says nothing changes nothing."""
    if answer.tokens < _LEAST_TOKENS or answer.seconds <= 0.0 or answer.accepted > answer.guessed:
        return state
    cost = state.cost.learned(answer)
    if state.on and not answer.guessed:
        # Nothing was there to guess, or a request did not want it: it only shows what a pass costs.
        return msgspec.structs.replace(state, cost=cost)
    now = msgspec.structs.replace(
        state,
        cost=cost,
        tokens=state.tokens + answer.tokens,
        seconds=state.seconds + answer.seconds,
    )
    if not now.on:
        if now.tokens < now.rest:
            return now
        return msgspec.structs.replace(now, on=True, trial=True, tokens=0, seconds=0.0)
    gain = now.gain
    if now.tokens < _ENOUGH_TOKENS:
        return now
    if gain is None:
        return msgspec.structs.replace(now, on=False, trial=False, tokens=0, seconds=0.0, rest=_PLAIN_TOKENS)
    if gain < (RESUME_GAIN if now.trial else LEAST_GAIN):
        rest = min(_MOST_REST_TOKENS, max(_FIRST_REST_TOKENS, now.rest * 2)) if now.trial else _FIRST_REST_TOKENS
        return msgspec.structs.replace(now, on=False, trial=False, tokens=0, seconds=0.0, rest=rest)
    # A new phase, so that what changes is soon seen.
    return msgspec.structs.replace(now, trial=False, tokens=answer.tokens, seconds=answer.seconds)
