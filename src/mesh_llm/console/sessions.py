"""Sign-in codes and the sessions of browsers. All of it is in memory: a restart of the node ends every session.

A code is made for the user of the machine, is part of a link, and is good once, for a quarter of an hour. Whoever shows
it gets a session, which has two halves: a cookie that scripts cannot read (HttpOnly), and a key that the page keeps and
sends in a header. Neither is enough alone. A browser sends a cookie to every port of a host, so also to a server that
another user of the machine runs; and what a page keeps could be read by a script that got into it.
"""

import hashlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from mesh_llm.core.types.errors import MeshError

CODE_SECONDS = 900.0
SESSION_SECONDS = 7 * 86400.0
"""A session that nobody uses for so long ends."""
MOST_CODES = 8
MOST_SESSIONS = 64
MOST_WRONG = 20
"""Wrong codes that are looked at in a minute. A right one is always taken, so nobody can lock the user out."""
_MINUTE = 60.0
_BYTES = 32


@dataclass(frozen=True)
class Session:
    """The two halves of a new session."""

    cookie: str
    key: str


@dataclass
class _Kept:
    """Digest of the session's key, and when it was last used."""

    key: bytes
    used: float


class Sessions:
    """Codes that were given out and sessions that are open, both bounded: the oldest makes room for a new one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._codes: OrderedDict[bytes, float] = OrderedDict()
        self._sessions: OrderedDict[bytes, _Kept] = OrderedDict()
        self._wrong: deque[float] = deque(maxlen=MOST_WRONG)

    def __len__(self) -> int:
        return len(self._sessions)

    def new_code(self) -> str:
        """A code that opens one session within `CODE_SECONDS`."""
        code = secrets.token_urlsafe(_BYTES)
        self._codes[_digest(code)] = self._clock() + CODE_SECONDS
        while len(self._codes) > MOST_CODES:
            self._codes.popitem(last=False)
        return code

    def redeem(self, code: str) -> Session:
        """Open a session for a code, which is used up then.

        Raises:
            MeshError: `sign_in_code` (401), it is wrong, used or too old; `too_many_codes` (429).
        """
        now = self._clock()
        # Looked up by digest: how long that takes says nothing about the codes there are.
        if self._codes.pop(_digest(code), 0.0) > now:
            return self.open()
        if len(self._wrong) == MOST_WRONG and now - self._wrong[0] < _MINUTE:
            raise MeshError(
                code="too_many_codes",
                message="Too many wrong sign-in codes were tried.",
                hint="Wait a minute, then type mesh-llm console for a new link.",
                status=429,
            )
        self._wrong.append(now)
        raise MeshError(
            code="sign_in_code",
            message="This sign-in link was used before, or is older than 15 minutes.",
            hint="Type mesh-llm console on the node's machine for a new one.",
            status=401,
        )

    def open(self) -> Session:
        """Open a session for somebody who is known to be the user."""
        session = Session(secrets.token_urlsafe(_BYTES), secrets.token_urlsafe(_BYTES))
        self._sessions[_digest(session.cookie)] = _Kept(_digest(session.key), self._clock())
        while len(self._sessions) > MOST_SESSIONS:
            self._sessions.popitem(last=False)
        return session

    def accepts(self, cookie: str, key: str) -> bool:
        """Whether both halves belong to one open session."""
        identity, now = _digest(cookie), self._clock()
        kept = self._sessions.get(identity)
        if kept is None or not secrets.compare_digest(kept.key, _digest(key)):
            return False
        if now - kept.used > SESSION_SECONDS:
            del self._sessions[identity]
            return False
        kept.used = now
        self._sessions.move_to_end(identity)
        return True

    def is_open(self, cookie: str) -> bool:
        """Whether the session that had this cookie, and was let in by both halves, has not been ended since."""
        return _digest(cookie) in self._sessions

    def end(self, cookie: str) -> None:
        """End one session."""
        self._sessions.pop(_digest(cookie), None)

    def end_all(self) -> int:
        """End all sessions, and make all codes useless; how many sessions there were."""
        ended = len(self._sessions)
        self._sessions.clear()
        self._codes.clear()
        return ended


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()
