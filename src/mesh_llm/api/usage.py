"""What the clients of each API key have used, and the limits of keys.

Keys have names: `--api-key laptop:SECRET`. Several keys may share a name, and keys without one share `unnamed`. Counts
survive a restart in a file that names no key's secret. The day of a limit is that of UTC.
"""

import datetime
import hashlib
import hmac
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import msgspec

from mesh_llm.api.telemetry import CLIENT_GONE, Metrics
from mesh_llm.api.types import KeyLimit, KeyUsage, split_key
from mesh_llm.core.types.errors import MeshError, duration
from mesh_llm.runtime.state_file import StateFile, read_state

_MAX_NAMES = 256
_MAX_FILE = 256 * 1024
_ABOUT = "what API keys have used"
_DAY = 86400
_RETRY_CONCURRENT = 2.0


class UtcDay(NamedTuple):
    """A day of UTC, by which tokens are counted. `number`: days since 1970; `left`: seconds until the next begins."""

    number: int
    left: float


def utc_day(seconds: float) -> UtcDay:
    """The day at a time in UNIX seconds. A clock that is set before 1970 counts as the first."""
    number, passed = divmod(max(0.0, seconds), _DAY)
    return UtcDay(int(number), _DAY - passed)


class KeyRing:
    """Checks keys in a time that reveals nothing of them: compares digests of equal length, every one each time."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys: list[tuple[bytes, str, str]] = []
        self.use(keys)

    def use(self, keys: Iterable[str]) -> None:
        """Accept these keys, and no others, from now on.

        A key that was written with a colon before names existed is still accepted as a whole.
        """
        self._keys = []
        for key in keys:
            name, secret = split_key(key)
            owner = _digest(secret.encode()).hex()
            self._keys += [(_digest(one.encode()), name, owner) for one in dict.fromkeys((secret, key))]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def accepts(self, shown: Iterable[bytes]) -> bool:
        """Whether one of the keys that a request shows is accepted."""
        return bool(self.name_of(shown))

    def name_of(self, shown: Iterable[bytes]) -> str:
        """The name of an accepted key among those that a request shows; empty if there is none."""
        return self._find(shown)[0]

    def owner_of(self, shown: Iterable[bytes]) -> str:
        """The hash of that key, the same however it is written; empty if there is none.

        What a request shows beside it does not count: a client could be somebody else each time.
        """
        return self._find(shown)[1]

    def _find(self, shown: Iterable[bytes]) -> tuple[str, str]:
        found = ("", "")
        for candidate in map(_digest, shown):
            for digest, name, owner in self._keys:
                # Every one is compared, whichever matched before.
                if hmac.compare_digest(candidate, digest):
                    found = (name, owner)
        return found


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class _Counts(msgspec.Struct):
    """Of one name. `day`: since the UNIX epoch; `today`: tokens of that day."""

    requests: int = 0
    failed: int = 0
    prompt: int = 0
    generated: int = 0
    day: int = 0
    today: int = 0


class _File(msgspec.Struct):
    keys: dict[str, _Counts] = {}


class UsageBook:
    """Counts requests and tokens of each key's name, and refuses what is above a limit.

    A request that is let in may end, also where it passes the limit of tokens.

    Attributes:
        file: keeps the counts.
    """

    def __init__(
        self,
        metrics: Metrics,
        file: Path | None = None,
        limits: Mapping[str, KeyLimit] | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`file`: where the counts are kept; None: in memory only. `wall_clock`: UNIX seconds."""
        self._metrics = metrics
        self.file = StateFile(file, _ABOUT, self._to_save)
        self._limits: Mapping[str, KeyLimit] = limits or {}
        self._wall_clock = wall_clock
        self._running: dict[str, int] = {}
        saved, _ = read_state(file, _File, _MAX_FILE, _ABOUT)
        self._counts = dict(list(saved.keys.items())[:_MAX_NAMES]) if saved is not None else {}
        for name, counts in self._counts.items():
            metrics.key_used(name, "before", counts.requests, counts.prompt, counts.generated)

    def use_limits(self, limits: Mapping[str, KeyLimit]) -> None:
        """Keep to these limits from now on."""
        self._limits = limits

    def limit(self, name: str) -> KeyLimit | None:
        """The limits of the keys of this name, if they have any."""
        return self._limits.get(name)

    def limited(self, name: str) -> bool:
        """Whether the keys of this name have a limit."""
        limit = self._limits.get(name)
        return limit is not None and bool(limit.tokens_per_day or limit.concurrent)

    @contextmanager
    def admit(self, name: str) -> Generator[None]:
        """Let a request of a key in for as long as the block lasts. Without a key (`name` empty) nothing is counted.

        Raises:
            MeshError: `key_tokens_per_day`, `key_concurrent` (429).
        """
        if not name:
            yield
            return
        self._check(name)
        self._running[name] = self._running.get(name, 0) + 1
        try:
            yield
        finally:
            self._running[name] -= 1
            if not self._running[name]:
                del self._running[name]

    def ended(self, name: str, *, status: int, prompt: int, generated: int) -> None:
        """A request of a key has ended: `status` as the client got it, and the tokens of the prompt and the answer."""
        if not name or (name not in self._counts and len(self._counts) >= _MAX_NAMES):
            return
        counts = self._counts.setdefault(name, _Counts())
        counts.requests += 1
        counts.failed += status >= 400 and status != CLIENT_GONE
        counts.prompt += prompt
        counts.generated += generated
        self._of_today(counts)
        counts.today += prompt + generated
        self._metrics.key_used(name, f"{status // 100}xx" if status != CLIENT_GONE else "499", 1, prompt, generated)
        self.file.changed()

    def usage(self) -> tuple[KeyUsage, ...]:
        """What each name has used, with its limits, by name."""
        return tuple(self._usage(name) for name in sorted({*self._counts, *self._limits}))

    def _to_save(self) -> _File | None:
        return _File(self._counts) if self._counts else None

    def _usage(self, name: str) -> KeyUsage:
        counts, limit = self._counts.get(name, _Counts()), self._limits.get(name, KeyLimit())
        self._of_today(counts)
        return KeyUsage(
            name=name,
            requests=counts.requests,
            failed=counts.failed,
            prompt_tokens=counts.prompt,
            tokens=counts.generated,
            tokens_today=counts.today,
            running=self._running.get(name, 0),
            tokens_per_day=limit.tokens_per_day,
            concurrent=limit.concurrent,
        )

    def _of_today(self, counts: _Counts) -> None:
        day = utc_day(self._wall_clock()).number
        if counts.day != day:
            counts.day, counts.today = day, 0

    def _check(self, name: str) -> None:
        limit = self._limits.get(name)
        if limit is None:
            return
        counts = self._counts.get(name, _Counts())
        self._of_today(counts)
        if limit.tokens_per_day and counts.today >= limit.tokens_per_day:
            now = self._wall_clock()
            left = utc_day(now).left
            day = datetime.datetime.fromtimestamp(now + left, datetime.UTC).date()
            raise MeshError(
                code="key_tokens_per_day",
                message=f"The API key `{name}` has used its {limit.tokens_per_day} tokens of today "
                f"(tokens_per_day of --key-limit).",
                hint=f"The limit starts again at 00:00 UTC on {day}, in {duration(left)}.",
                status=429,
                retry_after=left,
            )
        if limit.concurrent and self._running.get(name, 0) >= limit.concurrent:
            raise MeshError(
                code="key_concurrent",
                message=f"The API key `{name}` has {limit.concurrent} requests running, as many as it may have at once "
                f"(concurrent of --key-limit).",
                hint="Ask again when one of them has ended.",
                status=429,
                retry_after=_RETRY_CONCURRENT,
            )
