"""How many tokens an engine guesses ahead, decided before each pass through the model: guessing never costs much.

A guess is checked together with the token before it, in one pass. How much longer that takes depends on the machine,
the model and the links of a split; what it gains depends on the text. Both are measured for each pass. `GuessBudget`
keeps an account, in passes without a guess:

- A pass with a guess pays in what it gained, and takes out what it lost, against the mean of passes without a guess.
- A pass without a guess pays in a small part, so that there is a new trial from time to time.
- A guess is only as wide as the account could bear if all of it were wrong; while it bears none, nothing is guessed.
- A new answer begins with little, whatever the one before gained.

So an answer takes at most START_CREDIT passes, REFILL of its time, and a single trial longer than without guesses,
whatever its text is: about 3 % of 50 tokens, and less of longer ones. Right guesses widen the next ones. After a wrong
one the next is as wide as gains most, if as many places are right as of late.

A draft reads a prompt before its first guess. The engine takes the time of that by itself, and it is an account of its
own: it is known from the first time on, serves all guesses that follow, and says nothing of what a guess takes.

- The first reading is free: nobody knows yet what it takes. It leaves enough for a guess.
- Others are done where the account, or what a draft gained of late, bears them.
- Where neither does, a small part of each pass is saved for one: so a draft that had bad luck gets another chance, and
  one that is always wrong costs REFILL more.
"""

from collections import deque
from statistics import median_low

import msgspec

LEAST_GAIN = 0.03
"""A guess that gains less than this part counts as a loss."""

REFILL = 0.01
"""Part of the passes without guesses that may be spent on trials."""

START_CREDIT = 1.0
"""Most passes that an answer begins with."""

MOST_CREDIT = 16.0
"""Most passes that an answer can have in its account: enough for a few wide guesses in a row."""

_LEAST_CREDIT = -0.25
"""Guesses are no wider than the account bears: it is overdrawn by more only where the machine was busy otherwise."""

FIRST_WIDTH = 4
"""Tokens of an engine's first guesses, before it is known what they take."""

_LEARN = 4
"""Passes without a guess that show what these take, before the first guess."""
_FRESH = 64
"""Passes with guesses in a row after which there is one without, so that what it takes is known."""
_FIRST = 8
"""Passes without a guess of which the fastest one counts: an engine's first ones are slow."""
_WRONG = 4
"""Passes in a row with no right guess after which there is one without: it may take less than is believed."""
_GUESS = 0.25
"""What a guessed token takes, in passes, before that is measured. Processors take so much, GPUs less."""
_SURE = 5
"""Values of what a guessed token takes before more than _GUESS is believed: something else may have taken the time."""
_FEW = 2
"""Of these values, before guesses are wider than the first one."""
_LEAST_GUESS = 1 / 64
"""Least that a guessed token is believed to take. One that seems to take nothing was in a pass that was lucky."""
_DOUBT = 0.998
"""Part of what a guessed token takes that is still believed after one more pass without a guess."""
_STALE = 0.5
"""What is believed by less than this part is forgotten at the next trial."""
_VALUES = 5
"""Of which the median is taken: what took longer or less once says little."""
_SMOOTHING = 0.1
_OUTLIER = 2.0
"""A value counts as at most so many times the mean: something else may have stopped the machine."""
_KEPT = 0.97
"""Of what is known of guessed places, for each new one."""
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
        read: tokens that a draft read for it before it guessed, since it had missed them.
        reading: seconds that this took; they are not in `seconds`.
    """

    answers: int
    tokens: int
    guessed: int
    seconds: float
    read: int = 0
    reading: float = 0.0


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
        self._width = self._best = min(FIRST_WIDTH, self._most)
        # A guess: three of four are right.
        self._right, self._tested = 3.0, 4.0
        self._credit = START_CREDIT
        self._plain: dict[int, _Mean] = {}
        self._guess: dict[int, _Median] = {}
        self._in_a_row = self._wrong_in_a_row = 0
        self._worth = 0.0
        self._spent = 0.0
        self._guessed = 0
        self._accepted = 0
        self._token_gain = 0.0
        self._reading = _Median()
        self._saved = 0.0
        self._saves = False
        self._waits = False
        self._widths: set[tuple[int, int]] = set()

    def began(self, answers: int) -> None:
        """An answer begins; `answers` run with it. What others gained is not for it to lose, if it is alone."""
        if answers <= 1:
            self._credit = min(self._credit, START_CREDIT)
            self._width = self._best

    def passed(self, one: Pass) -> None:
        """A pass is over. One whose time is not known is not to be reported."""
        if one.answers < 1 or one.tokens < one.answers or one.seconds <= 0.0:
            return
        key = min(one.answers, _MOST_ANSWERS)
        plain = self._plain.setdefault(key, _Mean())
        reading = max(0.0, one.reading)
        taken = one.seconds + reading
        if not one.guessed:
            plain.add(one.seconds)
            self._in_a_row = self._wrong_in_a_row = 0
            self._pay_in(REFILL)
            self._pay_for_reading(one.read, reading, plain, self._each(key))
            if self._saves:
                self._saved += REFILL
            if self._waits and key in self._guess:
                # What was measured may have been the machine's, or of other lengths of text: try again some day.
                self._guess[key].doubt(_DOUBT)
            self._count(taken, taken, one.tokens)
            return
        self._in_a_row += 1
        accepted = one.tokens - one.answers
        self._wrong_in_a_row = 0 if accepted else self._wrong_in_a_row + 1
        self._guessed += one.guessed
        self._accepted += accepted
        if not plain.count:
            return
        worth = one.tokens / one.answers
        # What a draft guesses wrongly or rightly it reads again, each time: that is a part of the guess.
        spent = (one.seconds if one.read >= _MUCH else taken) / plain.value
        guess = self._guess.setdefault(key, _Median())
        usual = guess.value if guess.count >= _LEARN else max(guess.value, _GUESS)
        each = max(_LEAST_GUESS, (spent - 1.0) / one.guessed)
        new = self._is_new(one.answers, one.guessed)
        # A first pass of a width takes longer: the engine built a graph, and in a split every worker got and checked
        # it. All others may be longer because the machine did something else.
        checking = min(spent, 1.0 + usual * one.guessed * (1.0 if new else _OUTLIER))
        if not new or each < usual:
            guess.add(each)
        self._pay_in(worth / (1.0 + LEAST_GAIN) - checking)
        self._pay_for_reading(one.read, reading, plain, self._each(key))
        self._token_gain += _SMOOTHING * ((worth - checking) / one.tokens - self._token_gain)
        self._count(worth * plain.value, taken, one.tokens)
        self._turn(accepted, one, self._each(key))

    def width(self, answers: int, unread: int = 0) -> int:
        """Most tokens to guess for each answer at the next pass; 0: none.

        Args:
            answers: that the pass computes for.
            unread: tokens that a draft would have to read first.
        """
        self._saves = self._waits = False
        key = min(answers, _MOST_ANSWERS)
        plain = self._plain.get(key)
        if plain is None or plain.count < _LEARN:
            return 0
        if self._in_a_row >= _FRESH or self._wrong_in_a_row >= _WRONG:
            return 0
        each = max(answers, 1) * self._each(key)
        credit = max(0.0, self._credit)
        borne = self._most if each * self._most <= credit else int(credit / each)
        reading = self._reading.value * unread / plain.value if unread >= _MUCH else 0.0
        self._saves = reading > credit + max(0.0, self._token_gain) * _READ_AHEAD + self._saved
        self._waits = self._saves or not borne
        if self._waits:
            return 0
        width = min(self._width, borne)
        guess = self._guess.get(key)
        if guess is None or guess.count < _FEW:
            width = min(width, FIRST_WIDTH)
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

    def _each(self, answers: int) -> float:
        """What a guessed token takes, in passes, as it is believed now."""
        guess = self._guess.get(answers)
        if guess is None or not guess.count:
            return _GUESS
        return max(_LEAST_GUESS, guess.value if guess.count >= _SURE else min(guess.value, _GUESS))

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

    def _turn(self, accepted: int, one: Pass, each: float) -> None:
        """Widen the next guess after a right one; after a wrong one, take the width that gains most.

        A place is tested where all before it were right. `each`: what a guessed token takes.
        """
        tested = min(accepted + one.answers, one.guessed)
        kept = _KEPT**tested
        self._right = kept * self._right + accepted
        self._tested = kept * self._tested + tested
        self._best = self._best_width(min(0.99, self._right / self._tested), each * one.answers)
        if accepted == one.guessed:
            self._width = min(self._most, max(self._width, 2 * accepted // one.answers))
        else:
            self._width = self._best

    def _best_width(self, right: float, each: float) -> int:
        """The width that gives most tokens for its time, if this part of places is right."""
        widths = (min(1 << power, self._most) for power in range(self._most.bit_length() + 1))
        return max(widths, key=lambda width: (1.0 - right ** (width + 1)) / (1.0 - right) / (1.0 + each * width))

    def _pay_for_reading(self, read: int, seconds: float, plain: "_Mean", guess: float) -> None:
        """A draft has read: first from what was saved for it, then from the account.

        What it has read is of no use without a guess: `guess` passes are left for one, if they are there.
        """
        if read < _MUCH or seconds <= 0.0:
            return
        self._reading.add(seconds / read)
        passes = seconds / plain.value - self._saved
        self._saved = 0.0
        self._credit -= min(max(0.0, passes), max(0.0, self._credit - guess))


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
        elif self.count <= _FIRST:
            self.value = min(self.value, value)
        else:
            self.value += _SMOOTHING * (min(value, _OUTLIER * self.value) - self.value)


class _Median:
    """The median of the last few values, less where it is doubted; 0.0 without any."""

    __slots__ = ("_believed", "_values", "value")

    def __init__(self) -> None:
        self._values = deque[float](maxlen=_VALUES)
        self._believed = 1.0
        self.value = 0.0

    @property
    def count(self) -> int:
        return len(self._values)

    def add(self, value: float) -> None:
        if self._believed < _STALE:
            self._values.clear()
        self._believed = 1.0
        self._values.append(value)
        # Of an even number the lower one: something else may have stopped the machine.
        self.value = median_low(self._values)

    def doubt(self, part: float) -> None:
        """Believe only so much of it from now on."""
        self._believed *= part
        self.value *= part
