"""Authentication of clients: Host, Origin and API key are checked before anything else of a request.

On loopback any web page that the user has open can reach this port. Two checks keep pages out: the Host must be a
loopback name or one that the user allowed (against DNS rebinding), and an Origin must be a local page or one that the
user allowed (against cross-site requests: the browser would hide the answer, but the machine would have done the work).
On other addresses a key is needed.
"""

import re
from collections.abc import Iterable

from mesh_llm.api.request import Request
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.usage import KeyRing
from mesh_llm.core.types.errors import MeshError
from mesh_llm.wire.http.http1 import (
    canonical_origin,
    host_of,
    is_loopback_address,
    is_loopback_name,
    is_own_name,
    names_host,
    split_origin,
)

_HEADER_LIST = re.compile(rb"[0-9A-Za-z\-_, ]{1,2048}")
_EXPOSED = (
    b"x-mesh-llm-node, x-mesh-llm-model, x-mesh-llm-asked-model, x-mesh-llm-error, x-mesh-llm-resumed, "
    b"x-mesh-llm-receipt, x-mesh-llm-receipt-id, x-mesh-llm-wire, retry-after"
)


def _is_local_origin(origin: bytes) -> bool:
    found = split_origin(origin.decode("latin-1"))
    return found is not None and is_loopback_name(found[1])


def _origin_refused(origin: bytes) -> MeshError:
    named = canonical_origin(origin.decode("latin-1"))
    if named is not None:
        hint = f"If you trust {named}, start mesh-llm with: --allow-origin {named}"
    else:
        hint = "A page that is opened as a file has no origin that could be allowed: serve it on localhost."
    message = "Requests from web pages of other sites are not accepted."
    return MeshError("origin_refused", message, hint, 403)


class Auth:
    """Checks clients' requests, and gives the CORS headers of the answers."""

    def __init__(self, config: ApiConfig) -> None:
        self._loopback = is_loopback_address(config.host)
        self._bound_host = config.host
        self._allowed_hosts = config.allowed_hosts
        self._allowed_origins = frozenset(config.allowed_origins)
        self._keys = KeyRing(config.keys)
        if not self._loopback and not self._keys:
            raise MeshError(
                code="api_key_required",
                message=f"Listening on {config.host} opens the API to other machines, so it needs an API key.",
                hint="Add --api-key-file FILE (or set MESH_LLM_API_KEY). Make a key with: openssl rand -hex 24",
                status=400,
            )

    @property
    def keyed(self) -> bool:
        """Every client must show an API key."""
        return bool(self._keys)

    def use_keys(self, keys: Iterable[str]) -> None:
        """Accept these keys from now on. The caller has checked that there are some where there must be."""
        self._keys.use(keys)

    def use_origins(self, origins: Iterable[str]) -> None:
        """Let pages of these origins ask from now on (`--allow-origin`)."""
        self._allowed_origins = frozenset(origins)

    def check(self, request: Request) -> None:
        """Raise unless the request is allowed. Notes the name of its key.

        Raises:
            MeshError: `bad_host` (400), `host_refused` or `origin_refused` (403), `invalid_api_key` (401).
        """
        if self._loopback:
            self._check_host(request)
        origin = request.header(b"origin")
        if origin is not None and not self._keys and not self._may_ask(origin):
            raise _origin_refused(origin)
        request.key = self._keys.name_of(_shown_keys(request)) if self._keys else ""
        if self._keys and request.path != "/health" and not request.key:
            raise MeshError(
                code="invalid_api_key",
                message="A valid API key is needed.",
                hint="Send it as `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                status=401,
            )

    def owner(self, request: Request) -> str:
        """The client whose limits a request counts against: a node, the hash of a key, or an address without a key."""
        if request.peer is not None:
            return request.peer
        return self._keys.owner_of(_shown_keys(request)) or request.address

    def preflight(self, request: Request) -> list[tuple[bytes, bytes]] | None:
        """The headers of the answer to a CORS preflight, or None if the request is none.

        A browser asks without the key that the page will show, so this demands none.

        Raises:
            MeshError: `bad_host` (400), `host_refused` or `origin_refused` (403).
        """
        if request.method != "OPTIONS" or request.header(b"access-control-request-method") is None:
            return None
        if self._loopback:
            self._check_host(request)
        origin = request.header(b"origin") or b""
        if not self._may_ask(origin):
            raise _origin_refused(origin)
        wanted = request.header(b"access-control-request-headers") or b""
        headers = [
            (b"vary", b"origin, access-control-request-headers, access-control-request-private-network"),
            (b"access-control-allow-origin", origin),
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE, OPTIONS"),
            (b"access-control-max-age", b"600"),
        ]
        if _HEADER_LIST.fullmatch(wanted):
            headers.append((b"access-control-allow-headers", wanted))
        if request.header(b"access-control-request-private-network") == b"true":
            # A page from the internet that asks an address on this machine or network: browsers want it said twice.
            headers.append((b"access-control-allow-private-network", b"true"))
        return headers

    def cors(self, request: Request) -> list[tuple[bytes, bytes]]:
        """The headers that let a page that may ask read the answer; none for requests without an origin."""
        origin = request.header(b"origin")
        if origin is None:
            return []
        headers = [(b"vary", b"origin")]
        if self._may_ask(origin):
            headers.append((b"access-control-allow-origin", origin))
            headers.append((b"access-control-expose-headers", _EXPOSED))
        return headers

    def _may_ask(self, origin: bytes) -> bool:
        return _is_local_origin(origin) or canonical_origin(origin.decode("latin-1")) in self._allowed_origins

    def _check_host(self, request: Request) -> None:
        hosts = [value for name, value in request.headers if name == b"host"]
        if len(hosts) != 1:
            # RFC 9112, section 3.2. With several, another program might use one that is not checked here.
            many = "more than one Host header" if hosts else "no Host header"
            raise MeshError(
                code="bad_host", message=f"The request has {many}.", hint="Send one: Host: localhost", status=400
            )
        host = hosts[0].strip().decode("latin-1")
        if not is_own_name(host, self._bound_host) and not names_host(host, self._allowed_hosts):
            name = host_of(host)
            hint = f"If {name} is a name of this machine, start mesh-llm with: --allow-host {name}" if name else ""
            raise MeshError(
                code="host_refused",
                message="This address answers to localhost, and to names that its user allowed.",
                hint=hint or "Ask for http://localhost:PORT/",
                status=403,
            )


def _shown_keys(request: Request) -> list[bytes]:
    shown = [value.strip() for name, value in request.headers if name == b"x-api-key"]
    for name, value in request.headers:
        if name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                shown.append(key.strip())
    return shown
