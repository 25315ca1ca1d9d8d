"""Who may talk to the management API.

The node's user proves it in one of three ways: a Unix socket (the command line; the operating system says who is at
its other end), the control token in `MESH_LLM_HOME/control-token`, which only this user can read (scripts), or a
session that a link of `mesh-llm console` opened (the page). To everybody else on the machine this port says that a node
is here, its version, and how to sign in.

Besides, any web page that the user has open can send requests to loopback. The Host must be a loopback name (DNS
rebinding) or that of a public address that the user named, an Origin must be our own (cross-site requests), and what
browsers say of a request's cause (Sec-Fetch-Site) stops the rest, such as images of another page that would hold
connections. A session is shown in a header too, which another page cannot set.

On another address (`--console-listen`) names tell nothing, and an API key is demanded of whoever has no session and no
token. Programs send it in a header. Browsers are asked for it as the password of HTTP basic authentication, and then
send it by themselves, also where another page causes the request: so that alone changes nothing, but opens a session.
"""

import base64
import binascii
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mesh_llm.console.calls import Access, Asker
from mesh_llm.console.sessions import Sessions
from mesh_llm.core.types.errors import MeshError
from mesh_llm.wire.http.authority import is_own_name, split_authority, split_origin

TOKEN_HEADER = "x-mesh-llm-token"  # noqa: S105 - a header's name, not a secret
SESSION_HEADER = "x-mesh-llm-session"

AcceptsKey = Callable[[Sequence[bytes]], bool]
"""Whether one of these is an API key of this node."""


@dataclass(frozen=True)
class Guard:
    """Lets requests pass.

    Attributes:
        token: the control token.
        sessions: of browsers.
        cookie: the name of the sessions' cookie.
        accepts: checks API keys, on a console that other machines reach; None on loopback.
        origins: public addresses of proxies before this console, as URLs.
        bound: the address that is listened on.
    """

    token: str
    sessions: Sessions
    cookie: str
    accepts: AcceptsKey | None = None
    origins: tuple[str, ...] = ()
    bound: str = "127.0.0.1"

    def check(self, headers: Mapping[str, str], access: Access, *, own_socket: bool = False) -> Asker:
        """Let a request pass that has these headers (names lower-case).

        Raises:
            MeshError: `host_refused`, `origin_refused` (403), `sign_in_required`, `api_key_required` (401).
        """
        if own_socket:
            return Asker.USER
        check_site(headers)
        self._check_names(headers.get("host", ""), headers.get("origin"))
        token = headers.get(TOKEN_HEADER)
        if token is not None:
            if not hmac.compare_digest(token.encode(), self.token.encode()):
                raise _sign_in()
            return Asker.USER
        if self.sessions.accepts(self.cookie_of(headers), headers.get(SESSION_HEADER, "")):
            return Asker.SESSION
        if self.accepts is not None:
            asker = self._by_key(headers, self.accepts)
            if asker is Asker.KEY or access is not Access.CHANGE:
                return asker
        elif access is Access.OPEN:
            return Asker.ANYBODY
        raise _sign_in()

    def cookie_of(self, headers: Mapping[str, str]) -> str:
        """A session's cookie, as a request shows it; empty where there is none."""
        for pair in headers.get("cookie", "").split(";"):
            name, _, value = pair.strip().partition("=")
            if name == self.cookie:
                return value
        return ""

    def _by_key(self, headers: Mapping[str, str], accepts: AcceptsKey) -> Asker:
        if accepts(_shown_keys(headers)):
            return Asker.KEY
        password = _password(headers)
        if password is None or not accepts((password,)):
            raise MeshError(
                code="api_key_required",
                message="This console needs one of the node's API keys.",
                hint="Send it as `Authorization: Bearer KEY`; a browser asks for it: any name, the key as password.",
                status=401,
            )
        return Asker.BROWSER_KEY

    def _check_names(self, host: str, origin: str | None) -> None:
        """Raise MeshError where a request came by a name that is not ours, or from another site's page."""
        public = [found for found in map(split_origin, map(_origin, self.origins)) if found is not None]
        by_loopback = is_own_name(host, self.bound)
        if self.accepts is None and not by_loopback and not _names_one(host, public):
            raise MeshError(
                code="host_refused",
                message="This address answers to localhost only.",
                hint="Open it on this machine, forward the port (ssh -L 3131:localhost:3131 HOST), or name the public "
                "address of a proxy: --console-origin https://NAME",
                status=403,
            )
        if origin is None or (given := split_origin(origin)) in public:
            return
        schemes = ("http",) if self.accepts is None else ("http", "https")
        own = by_loopback or self.accepts is not None
        if given is None or not own or given[0] not in schemes or origin.partition("://")[2].lower() != host.lower():
            raise _foreign()


def _origin(url: str) -> str:
    """The origin of a URL: scheme and authority."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0]}"


def _names_one(host: str, public: Sequence[tuple[str, str, int]]) -> bool:
    found = split_authority(host)
    return found is not None and any(found[0] == name and found[1] in {None, port} for _, name, port in public)


def _shown_keys(headers: Mapping[str, str]) -> list[bytes]:
    shown = [headers["x-api-key"].strip().encode()] if "x-api-key" in headers else []
    scheme, _, key = headers.get("authorization", "").strip().partition(" ")
    return [*shown, key.strip().encode()] if scheme.lower() == "bearer" else shown


def _password(headers: Mapping[str, str]) -> bytes | None:
    """What a browser sends after it was asked."""
    scheme, _, given = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() != "basic":
        return None
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except (binascii.Error, ValueError):
        return None


def check_site(headers: Mapping[str, str]) -> None:
    """Refuse what a browser says that another site's page caused, such as an image, which carries no Origin.

    Going to the console by a link is the user's own doing. Raises MeshError(origin_refused, 403).
    """
    elsewhere = headers.get("sec-fetch-site", "") in {"cross-site", "same-site"}
    followed = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
    if elsewhere and not followed:
        raise _foreign()


def _foreign() -> MeshError:
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
        hint="For the page: type mesh-llm console on the node's machine. For a script: send what is in "
        f"MESH_LLM_HOME/control-token as {TOKEN_HEADER}.",
        status=401,
    )
