"""How many tokens an engine guesses ahead, decided before each pass through the model: guessing never costs much.

A guess is checked together with the token before it, in one pass. How much longer that takes depends on the machine,
the model and the links of a split; what it gains depends on the text. Both are measured for each pass. `GuessBudget`
keeps an account, in passes without a guess:

- A pass with a guess pays in what it gained, and takes out what it lost, against the mean of passes without a guess.
- A pass without a guess pays in a small part, so that there is a new trial from time to time.
- A guess is only as wide as the account could bear if all of it were wrong; while it bears none, nothing is guessed.
- A new answer begins with little, whatever the one before gained.

So an answer takes at most START_CREDIT passes, REFILL of its time, and a single trial longer than without guesses,
whatever its text is: about 3 % of 50 tokens, and less of longer ones. Right guesses widen the next ones, wrong ones
narrow them.
"""

import msgspec

LEAST_GAIN = 0.03
"""A guess that gains less than this part counts as a loss."""

REFILL = 0.01
"""Part of the passes without guesses that may be spent on trials."""

START_CREDIT = 1.0
"""Most passes that an answer begins with."""

MOST_CREDIT = 16.0
"""Most passes that an answer can have in its account: enough for a few wide guesses in a row."""

_LEAST_CREDIT = -1.0
"""Guesses are no wider than the account bears: it is overdrawn by more only where the machine was busy otherwise."""

LEAST_WIDTH = 4
"""Tokens of a first guess, and of one after a wrong guess, where the account bears as many."""

_LEARN = 4
"""Passes without a guess that show what these take, before the first guess."""
_FRESH = 64
"""Passes with guesses in a row after which there is one without, so that what it takes is known."""
_GUESS = 0.25
"""What a guessed token takes, in passes, before that is measured. Processors take so much, GPUs less."""
_DOUBT = 0.998
"""Part of what a guessed token takes that is still believed after one more pass without a guess."""
_SMOOTHING = 0.1
_OUTLIER = 2.0
"""A value counts as at most so many times the mean: something else may have stopped the machine."""
_MOST_ANSWERS = 32
_MOST_WIDTHS = 1024
_FORGET = 0.998
"""Of the sums that the gain is computed from, for each token."""
_MUCH = 64
"""Tokens from which a draft's reading counts by itself, and not as a part of the guess."""
_READ_AHEAD = 128
"""Tokens over which a draft that gains may earn back what it reads before it can guess."""


class Pass(msgspec.Struct, frozen=True):
    """One pass through the model.

    Attributes:
        answers: that it computed for, at once.
        tokens: that they got, together: at least one each.
        guessed: tokens that were guessed ahead, and checked in it.
        seconds: that it took, with guessing them.
    """

    answers: int
    tokens: int
    guessed: int
    seconds: float


class Guesses(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine's guesses.

    Attributes:
        gain: part by which it is faster than without them, of late; None before it has guessed anything.
        guessed: tokens that were guessed since the engine started, in passes that were measured.
        accepted: of these, how many were right.
        waits: it guesses nothing now, because it lost by it.
        pass_ms: milliseconds of a pass without a guess, for one answer; 0.0: not known.
    """

    gain: float | None = None
    guessed: int = 0
    accepted: int = 0
    waits: bool = False
    pass_ms: float = 0.0


class GuessBudget:
    """The account of one engine."""

    def __init__(self, most: int) -> None:
        """`most`: tokens of the widest guess."""
        self._most = max(1, most)
        self._width = min(LEAST_WIDTH, self._most)
        self._credit = START_CREDIT
        self._plain: dict[int, _Mean] = {}
        self._guess: dict[int, _Mean] = {}
        self._in_a_row = 0
        self._worth = 0.0
        self._spent = 0.0
        self._guessed = 0
        self._accepted = 0
        self._token_gain = 0.0
        self._reading = _Mean()
        self._to_read = 0
        self._waits = False
        self._widths: set[tuple[int, int]] = set()

    def began(self, answers: int) -> None:
        """An answer begins; `answers` run with it. What others gained is not for it to lose, if it is alone."""
        if answers <= 1:
            self._credit = min(self._credit, START_CREDIT)
            self._width = min(LEAST_WIDTH, self._most)

    def passed(self, one: Pass) -> None:
        """A pass is over. One whose time is not known is not to be reported."""
        if one.answers < 1 or one.tokens < one.answers or one.seconds <= 0.0:
            return
        key = min(one.answers, _MOST_ANSWERS)
        plain = self._plain.setdefault(key, _Mean())
        if not one.guessed:
            plain.add(one.seconds)
            self._in_a_row = 0
            self._pay_in(REFILL)
            if self._waits and key in self._guess:
                # What was measured may have been the machine's, or of other lengths of text: try again some day.
                self._guess[key].value *= _DOUBT
            self._count(one.seconds, one.seconds, one.tokens)
            return
        self._in_a_row += 1
        accepted = one.tokens - one.answers
        self._guessed += one.guessed
        self._accepted += accepted
        self._turn(accepted, one)
        if not plain.count:
            return
        worth = one.tokens / one.answers
        spent = one.seconds / plain.value
        # What a draft reads serves all guesses that follow: it takes what is there, and does not overdraw the account.
        reading = self._read(spent - 1.0)
        guess = self._guess.setdefault(key, _Mean())
        usual = guess.value if guess.count >= _LEARN else max(guess.value, _GUESS)
        checking = min(spent - reading, _OUTLIER * (1.0 + usual * one.guessed))
        if self._is_new(one.answers, one.guessed):
            # The engine built a graph, and in a split every worker got and checked it: once for each width.
            checking = min(checking, 1.0 + usual * one.guessed)
        else:
            guess.add(max(0.0, checking - 1.0) / one.guessed)
        self._pay_in(worth / (1.0 + LEAST_GAIN) - checking)
        self._credit -= min(reading, max(0.0, self._credit))
        self._token_gain += _SMOOTHING * ((worth - checking) / one.tokens - self._token_gain)
        self._count(worth * plain.value, one.seconds, one.tokens)

    def width(self, answers: int, unread: int = 0) -> int:
        """Most tokens to guess for each answer at the next pass; 0: none.

        Args:
            answers: that the pass computes for.
            unread: tokens that a draft would have to read first.
        """
        self._to_read, self._waits = 0, False
        key = min(answers, _MOST_ANSWERS)
        plain = self._plain.get(key)
        if plain is None or plain.count < _LEARN or self._in_a_row >= _FRESH:
            return 0
        guess = self._guess.get(key)
        each = max(answers, 1) * (_GUESS if guess is None or not guess.count else guess.value)
        credit = max(0.0, self._credit)
        borne = self._most if each * self._most <= credit else int(credit / each)
        reading = self._reading.value * unread if unread >= _MUCH else 0.0
        self._waits = not borne or reading > self._credit + max(0.0, self._token_gain) * _READ_AHEAD
        if self._waits:
            return 0
        self._to_read = unread if unread >= _MUCH else 0
        width = min(self._width, borne)
        # Each width has a graph of its own: few widths are soon known to all that compute them.
        return width if width == self._most else 1 << width.bit_length() - 1

    @property
    def guesses(self) -> Guesses:
        """What is known now."""
        plain = self._plain.get(1)
        return Guesses(
            gain=self._worth / self._spent - 1.0 if self._guessed and self._spent > 0.0 else None,
            guessed=self._guessed,
            accepted=self._accepted,
            waits=self._waits,
            pass_ms=0.0 if plain is None else round(plain.value * 1e3, 3),
        )

    def _is_new(self, answers: int, guessed: int) -> bool:
        """Whether a batch of so many tokens is the first of its size."""
        if (answers, guessed) in self._widths or len(self._widths) >= _MOST_WIDTHS:
            return False
        self._widths.add((answers, guessed))
        return True

    def _pay_in(self, passes: float) -> None:
        self._credit = max(_LEAST_CREDIT, min(MOST_CREDIT, self._credit + passes))

    def _count(self, worth: float, spent: float, tokens: int) -> None:
        kept = _FORGET**tokens
        self._worth = kept * self._worth + worth
        self._spent = kept * self._spent + spent

    def _turn(self, accepted: int, one: Pass) -> None:
        """Widen the next guess after a right one; after a wrong one, guess as many as were right."""
        right = accepted // one.answers
        if accepted == one.guessed:
            self._width = min(self._most, max(self._width, 2 * right))
        else:
            self._width = min(self._most, max(LEAST_WIDTH, right + 1))

    def _read(self, extra: float) -> float:
        """Of the passes that one took longer than one without a guess: those in which a draft read, if it did."""
        if not self._to_read or extra <= 0.0:
            return 0.0
        self._reading.add(extra / self._to_read)
        return extra


class _Mean:
    """A mean in which new values weigh more; of the first few values, the least."""

    __slots__ = ("count", "value")

    def __init__(self) -> None:
        self.count = 0
        self.value = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        if self.count == 1:
            self.value = value
        elif self.count <= _LEARN:
            self.value = min(self.value, value)
        else:
            self.value += _SMOOTHING * (min(value, _OUTLIER * self.value) - self.value)
