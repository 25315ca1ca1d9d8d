"""Who may call the management API.

The node's user proves it in one of three ways: the Unix socket (the command line; the operating system identifies the
caller), the control token in `MESH_LLM_HOME/control-token`, which only this user can read (scripts), or a session that
a link of `mesh-llm console` opened (the page). Everybody else on the machine learns that a node is here, its version,
and how to sign in.

Any web page that the user has open can send requests to loopback. Three checks stop them: the Host must be a loopback
name or a public address that the user named (DNS rebinding); an Origin must be the console's own (cross-site requests);
and Sec-Fetch-Site must not name another site, which stops for example images that would hold connections. A session
also needs a header, which another page cannot set.

On another address (`--console-listen`) names prove nothing: a request without a session or token needs an API key.
Programs send it in a header. Browsers ask the user for it as the password of HTTP basic authentication, and then send
it with every request, even with one that another page caused. So that password alone reads and opens a session, but
changes nothing.

Sessions are in memory only: a restart of the node ends them. A sign-in code is part of a link, works once, and expires
after 15 minutes. The session that it opens has two halves: a cookie that scripts cannot read (HttpOnly), and a key that
the page keeps and sends in a header. Neither half is enough. A browser sends a cookie to every port of a host, also to
a server of another user of the machine; and a script that got into the page could read what the page keeps.
"""

import base64
import binascii
import hashlib
import hmac
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from mesh_llm.core.types.errors import MeshError
from mesh_llm.wire.http.http1 import host_of, is_own_name, names_host, split_authority, split_origin

TOKEN_HEADER = "x-mesh-llm-token"  # noqa: S105 - a header's name, not a secret
SESSION_HEADER = "x-mesh-llm-session"
CODE_SECONDS = 900.0
SESSION_SECONDS = 7 * 86400.0
"""An unused session ends after this time."""
MOST_CODES = 8
MOST_SESSIONS = 64
MOST_WRONG = 20
"""Wrong codes that are answered in one minute. A right code is always accepted, so nobody can lock the user out."""
_MINUTE = 60.0
_BYTES = 32


class Access(Enum):
    """Who may make a call."""

    OPEN = "open"
    """Everybody on this machine. The answer says nothing about the node except that it is here."""
    READ = "read"
    """The node's user. Where other machines reach the console, also a browser that shows only an API key."""
    CHANGE = "change"
    """The node's user, by a proof that browsers do not send on their own. For changes and secrets."""


class Caller(Enum):
    """What a request was authenticated by."""

    ANYBODY = "anybody"
    """Nothing: the call is open."""
    USER = "user"
    """The user's own socket, or the control token."""
    SESSION = "session"
    KEY = "key"
    """An API key that a program sent; only where other machines reach the console."""
    BROWSER_KEY = "browser_key"
    """An API key that the browser sends on its own."""


@dataclass(frozen=True)
class Session:
    """The two halves of a new session."""

    cookie: str
    key: str


@dataclass
class _SessionRecord:
    """Digest of the session's key, and when it was last used."""

    key: bytes
    used: float


class Sessions:
    """Issued codes and open sessions. Both are bounded: a new one replaces the oldest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._codes: OrderedDict[bytes, float] = OrderedDict()
        self._sessions: OrderedDict[bytes, _SessionRecord] = OrderedDict()
        self._wrong: deque[float] = deque(maxlen=MOST_WRONG)

    @property
    def count(self) -> int:
        """How many sessions are open. No `len()`, by which an object with none would be false."""
        return len(self._sessions)

    def new_code(self) -> str:
        """A code that opens one session within `CODE_SECONDS`."""
        code = secrets.token_urlsafe(_BYTES)
        self._codes[_digest(code)] = self._clock() + CODE_SECONDS
        while len(self._codes) > MOST_CODES:
            self._codes.popitem(last=False)
        return code

    def redeem(self, code: str) -> Session:
        """Open a session for a code; the code is used up.

        Raises:
            MeshError: `sign_in_code` (401) for a wrong, used or expired code; `too_many_codes` (429).
        """
        now = self._clock()
        # Looked up by digest, so that the time it takes reveals nothing about valid codes.
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
        """Open a session for a caller that has proved to be the user."""
        session = Session(secrets.token_urlsafe(_BYTES), secrets.token_urlsafe(_BYTES))
        self._sessions[_digest(session.cookie)] = _SessionRecord(_digest(session.key), self._clock())
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
        """Whether the session with this cookie is still open. For a request whose two halves were checked before."""
        return _digest(cookie) in self._sessions

    def end(self, cookie: str) -> None:
        """End one session."""
        self._sessions.pop(_digest(cookie), None)

    def end_all(self) -> int:
        """End all sessions and cancel all codes. Returns how many sessions were open."""
        ended = len(self._sessions)
        self._sessions.clear()
        self._codes.clear()
        return ended


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "replace")).digest()


AcceptsKey = Callable[[Sequence[bytes]], bool]
"""Whether one of these is an API key of this node."""


@dataclass(frozen=True)
class Authenticator:
    """Authenticates requests.

    Attributes:
        token: the control token.
        sessions: of browsers.
        cookie: the name of the sessions' cookie.
        accepts: checks API keys, where other machines reach the console; None on loopback.
        origins: public addresses of proxies before this console, as URLs.
        bound: the address that the console listens on.
        hosts: further names by which the console may be asked.
    """

    token: str
    sessions: Sessions
    cookie: str
    accepts: AcceptsKey | None = None
    origins: tuple[str, ...] = ()
    bound: str = "127.0.0.1"
    hosts: tuple[str, ...] = ()

    def check(self, headers: Mapping[str, str], access: Access, *, own_socket: bool = False) -> Caller:
        """Authenticate a request by its headers (names in lower case).

        Raises:
            MeshError: `host_refused`, `origin_refused` (403), `sign_in_required`, `api_key_required` (401).
        """
        if own_socket:
            return Caller.USER
        check_site(headers)
        self._check_names(headers.get("host", ""), headers.get("origin"))
        token = headers.get(TOKEN_HEADER)
        if token is not None:
            if not hmac.compare_digest(token.encode(), self.token.encode()):
                raise _sign_in()
            return Caller.USER
        if self.sessions.accepts(self.cookie_of(headers), headers.get(SESSION_HEADER, "")):
            return Caller.SESSION
        if self.accepts is not None:
            asker = self._by_key(headers, self.accepts)
            if asker is Caller.KEY or access is not Access.CHANGE:
                return asker
        elif access is Access.OPEN:
            return Caller.ANYBODY
        raise _sign_in()

    def cookie_of(self, headers: Mapping[str, str]) -> str:
        """The session cookie of a request; empty if there is none."""
        for pair in headers.get("cookie", "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self.cookie:
                return value
        return ""

    def _by_key(self, headers: Mapping[str, str], accepts: AcceptsKey) -> Caller:
        if accepts(_api_keys(headers)):
            return Caller.KEY
        password = _password(headers)
        if password is None or not accepts((password,)):
            raise MeshError(
                code="api_key_required",
                message="This console needs one of the node's API keys, without a limit.",
                hint="Send it as `Authorization: Bearer KEY`. In a browser: any user name, and the key as password.",
                status=401,
            )
        return Caller.BROWSER_KEY

    def _check_names(self, host: str, origin: str | None) -> None:
        """Raise MeshError if the request used a foreign host name, or came from the page of another site."""
        public = [found for found in map(split_origin, map(_origin, self.origins)) if found is not None]
        by_loopback = is_own_name(host, self.bound) or names_host(host, self.hosts)
        if self.accepts is None and not by_loopback and not _names_one(host, public):
            raise MeshError(
                code="host_refused",
                message="This address accepts requests to localhost only.",
                hint="Open it on this machine, or forward the port (ssh -L 3131:localhost:3131 HOST). If the name is "
                f"one of this machine, start mesh-llm with: --allow-host {host_of(host) or 'NAME'}. If it is that of a "
                f"proxy with TLS: --console-origin https://{host_of(host) or 'NAME'}",
                status=403,
            )
        if origin is None or (given := split_origin(origin)) in public:
            return
        schemes = ("http",) if self.accepts is None else ("http", "https")
        own = by_loopback or self.accepts is not None
        if given is None or not own or given[0] not in schemes or origin.partition("://")[2].lower() != host.lower():
            raise _cross_site()


def _origin(url: str) -> str:
    """The origin of a URL: scheme and authority."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _names_one(host: str, public: Sequence[tuple[str, str, int]]) -> bool:
    found = split_authority(host)
    return found is not None and any(found[0] == name and found[1] in {None, port} for _, name, port in public)


def _api_keys(headers: Mapping[str, str]) -> list[bytes]:
    shown = [headers["x-api-key"].strip().encode()] if "x-api-key" in headers else []
    scheme, _, key = headers.get("authorization", "").strip().partition(" ")
    return [*shown, key.strip().encode()] if scheme.lower() == "bearer" else shown


def _password(headers: Mapping[str, str]) -> bytes | None:
    """The password of HTTP basic authentication."""
    scheme, _, given = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None


def check_site(headers: Mapping[str, str]) -> None:
    """Refuse a request that the page of another site caused, such as an image, which carries no Origin.

    Following a link to the console is allowed. Raises MeshError(origin_refused, 403).
    """
    cross_site = headers.get("sec-fetch-site", "") in {"cross-site", "same-site"}
    followed = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    if cross_site and not followed:
        raise _cross_site()


def _cross_site() -> MeshError:
    return MeshError(
        code="origin_refused",
        message="Requests from other web pages are not accepted.",
        hint="Use the console's own page, or the mesh-llm command.",
        status=403,
    )


def _sign_in() -> MeshError:
    return MeshError(
        code="sign_in_required",
        message="Only the user who runs this node may see and change it.",
        hint="For the page: type mesh-llm console on the node's machine. For a script: send the content of "
        f"MESH_LLM_HOME/control-token as {TOKEN_HEADER}.",
        status=401,
    )
