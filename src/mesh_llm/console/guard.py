"""Who may talk to the management API: local, same-origin, and for changes only with the node's own token.

The page is served from loopback, so any web page that the user has open can send requests to it. Three checks keep
such a page out: the Host must be a loopback name (DNS rebinding), an Origin must be our own (cross-site requests),
and a change must carry the control token, which a foreign page cannot read. What browsers say of a request's cause
(Sec-Fetch-Site) stops the rest, such as images of another page that would hold connections.

On another address (`--console-listen`) names tell nothing, and an API key is demanded in place of them. Programs send
it in a header, which no foreign page can. Browsers are asked for it as the password of HTTP basic authentication, and
then send it by themselves, also where another page causes the request: so that alone changes nothing.
"""

import base64
import binascii
import hmac
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mesh_llm.console.call import Access
from mesh_llm.core.errors import MeshError

TOKEN_HEADER = "x-mesh-llm-token"  # noqa: S105 - a header's name, not a secret
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})

AcceptsKey = Callable[[Sequence[bytes]], bool]
"""Whether one of these is an API key of this node."""


@dataclass(frozen=True)
class Guard:
    """Lets requests pass. `token`: the control token; `accepts`: of a console that others reach, None on loopback."""

    token: str
    accepts: AcceptsKey | None = None

    def check(self, headers: Mapping[str, str], access: Access) -> None:
        """Let a request pass that has these headers (names lower-case).

        Raises:
            MeshError: `host_refused`, `origin_refused` (403), `token_required`, `api_key_required` (401).
        """
        host = headers.get("host")
        check_site(headers)
        if self.accepts is None:
            check_host(host)
            check_origin(headers.get("origin"), host, ("http",))
            if access is Access.TOKEN:
                check_token(headers.get(TOKEN_HEADER), self.token)
            return
        check_origin(headers.get("origin"), host, ("http", "https"))
        given = headers.get(TOKEN_HEADER)
        if given is not None:
            check_token(given, self.token)
            return
        if self.accepts(_shown_keys(headers)):
            return
        password = _password(headers)
        if password is None or not self.accepts((password,)):
            raise MeshError(
                code="api_key_required",
                message="This console needs one of the node's API keys.",
                hint="Send it as `Authorization: Bearer KEY`; a browser asks for it: any name, the key as password.",
                status=401,
            )
        if access is Access.TOKEN:
            check_token(given, self.token)


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


def host_of(authority: str) -> str:
    """Return the host part of `host[:port]`, lower-case; IPv6 keeps its brackets."""
    authority = authority.strip().lower()
    if authority.startswith("["):
        return authority.partition("]")[0] + "]"
    return authority.partition(":")[0]


def check_host(host_header: str | None) -> None:
    """Refuse a request that came by a name other than loopback's. Raises MeshError(host_refused, 403)."""
    if host_header is None or host_of(host_header) not in _LOOPBACK_NAMES:
        raise MeshError(
            code="host_refused",
            message="This address answers to localhost only.",
            hint="Open http://localhost:PORT/ on this machine, or forward the port: ssh -L 3131:localhost:3131 HOST.",
            status=403,
        )


def check_origin(origin: str | None, host_header: str | None, schemes: Sequence[str]) -> None:
    """Refuse a request that another site's page made. Raises MeshError(origin_refused, 403)."""
    if origin is None:
        return
    scheme, _, authority = origin.partition("://")
    if scheme not in schemes or not authority or authority.lower() != (host_header or "").strip().lower():
        raise _foreign()


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


def check_token(given: str | None, expected: str) -> None:
    """Refuse a change without the control token. Raises MeshError(token_required, 401)."""
    if given is None or not hmac.compare_digest(given.encode(), expected.encode()):
        raise MeshError(
            code="token_required",
            message=f"Changes need the node's control token in the {TOKEN_HEADER} header.",
            hint="The mesh-llm command and the console's page send it; scripts read MESH_LLM_HOME/control-token.",
            status=401,
        )
