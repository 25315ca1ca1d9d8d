"""Whether a prompt cache is worth its while: when one is kept, brought back from the disk, or moved from another node.

Reading a prompt takes as long as it has tokens; bringing its cache back takes as long as it has bytes. Both speeds are
measured on the machine; before that they are guessed, and the guesses favour reading. Nothing is moved on a guess: the
link to the other node and the speed of reading here must have been measured.
"""

from collections.abc import Iterable, Sequence

import msgspec

from mesh_llm.core.performance.prediction import Link

LEAST_TOKENS = 512
"""Shorter prompts are read again: their caches are not kept."""

LEAST_SHARE = 0.2
"""Of a prompt, the part that a cache must cover: llama-server takes a slot whose common part is above a tenth."""

READ_SPEED = 2000.0
"""Tokens a second, before a prompt was measured. Higher than most machines: what is not known is read."""

RESTORE_SPEED = 150e6
"""Bytes a second from the disk into a slot, before it was measured: decrypting, and the copy into the KV cache."""

SPLIT_RESTORE_SPEED = 10e6
"""Bytes a second into a slot of a split model, before it was measured: most go to other machines."""

GAIN = 2.0
"""How many times as fast as reading a cache must be predicted, before it is brought back."""

SETUP_SECONDS = 0.02
"""For any cache, beside its bytes: opening the file, and two questions to the engine."""

MOVE_SETUP_SECONDS = 0.15
"""For any move, beside its bytes and round trips: tokens are counted here, and a slot is found and saved there."""

MOVE_ROUND_TRIPS = 4
"""A stream is opened, a question answered, an offer taken, and the last bytes confirmed."""

CHECK_SPEED = 500e6
"""Bytes a second at which what has arrived is checked."""

_MOST_LAG, _LEAST_LAG = 16.0, 0.5
_SMOOTHING = 0.5


class Mark(msgspec.Struct, frozen=True):
    """A beginning of a prompt as a request has it: its key, the hash of all its bytes, and its length in bytes."""

    key: bytes
    size: int


class SavedPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a saved cache.

    Attributes:
        marks: the beginnings of the prompt for which it was computed, shortest first.
        tokens: tokens in it: the prompt's and the answer's.
        size: bytes.
    """

    marks: tuple[Mark, ...]
    tokens: int
    size: int


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """A saved cache for a prompt: its index among the offered ones, and the tokens that need not be read again."""

    index: int
    tokens: int


def common(prompt: Sequence[Mark], known: Iterable[Mark]) -> Mark | None:
    """The longest beginning of a prompt that is among the known ones."""
    keys = {mark.key for mark in known}
    return next((mark for mark in sorted(prompt, key=lambda one: -one.size) if mark.key in keys), None)


def choose(prompt: Sequence[Mark], saved: Sequence[SavedPrompt], warm: int = 0) -> Choice | None:
    """The saved cache that covers most of a prompt; None if none covers enough.

    Args:
        prompt: the beginnings of the prompt, shortest first; the last one is the whole.
        saved: the caches.
        warm: bytes of the prompt that the engine has in a slot already.
    """
    best: Choice | None = None
    covered = warm
    for index, one in enumerate(saved):
        mark = common(prompt, one.marks)
        if mark is None or mark.size <= covered or mark.size < LEAST_SHARE * prompt[-1].size:
            continue
        whole = max(one.marks[-1].size, 1)
        tokens = int(one.tokens * mark.size / whole * (1.0 - warm / mark.size))
        if tokens >= LEAST_TOKENS:
            best, covered = Choice(index=index, tokens=tokens), mark.size
    return best


def restore_seconds(size: int, speed: float = 0.0) -> float:
    """How long it takes to bring a cache back from the disk. `speed`: bytes a second as measured; 0: unknown."""
    return SETUP_SECONDS + size / (speed or RESTORE_SPEED)


def reading_seconds(tokens: int, speed: float = 0.0) -> float:
    """How long it takes to read so many tokens. `speed`: tokens a second as measured; 0: unknown."""
    return tokens / (speed or READ_SPEED)


def worth(seconds: float, tokens: int, read_speed: float = 0.0) -> bool:
    """Whether bringing a cache back in so many seconds is enough faster than reading its tokens again."""
    return seconds * GAIN <= reading_seconds(tokens, read_speed)


class MoveSpeed(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the way by which caches come from another node.

    Attributes:
        link: as it was measured.
        lag: how many times as long as predicted the last moves took, smoothed.
    """

    link: Link
    lag: float = 1.0

    def seconds(self, size: int, restore_speed: float = 0.0) -> float:
        """How long it takes to move a cache of so many bytes, and to bring it into a slot.

        `restore_speed`: bytes a second into a slot, as measured; 0: unknown.
        """
        return self._plain(size, restore_speed) * self.lag

    def observed(self, size: int, seconds: float, restore_speed: float = 0.0) -> "MoveSpeed":
        """A move of so many bytes took so long: the next prediction is corrected by half of the difference."""
        ratio = min(max(seconds / self._plain(size, restore_speed), _LEAST_LAG), _MOST_LAG)
        return MoveSpeed(link=self.link, lag=self.lag + _SMOOTHING * (ratio - self.lag))

    def _plain(self, size: int, restore_speed: float) -> float:
        trips = MOVE_SETUP_SECONDS + 2 * MOVE_ROUND_TRIPS * self.link.one_way_seconds
        return trips + size / self.link.bytes_per_second + size / CHECK_SPEED + restore_seconds(size, restore_speed)


def worth_moving(speed: MoveSpeed | None, tokens: int, size: int, read_speed: float, restore_speed: float) -> bool:
    """Whether to move a cache from another node rather than to read the prompt here.

    Args:
        speed: of the way to that node; None: unknown.
        tokens: that need not be read then.
        size: bytes of the whole cache.
        read_speed: tokens a second here; 0: unknown.
        restore_speed: bytes a second into a slot; 0: unknown, and guessed with care.
    """
    if speed is None or speed.link.bytes_per_second <= 0.0 or read_speed <= 0.0 or tokens < LEAST_TOKENS:
        return False
    return worth(speed.seconds(size, restore_speed), tokens, read_speed)


def move_deadline(tokens: int, read_speed: float) -> float:
    """Seconds after which a move is given up: half of what reading takes, so that a bad guess costs half as much again.

    `read_speed`: above 0.
    """
    return max(1.0, tokens / read_speed / GAIN)
