"""Who may talk to the management API: local, same-origin, and for changes only with the node's own token.

The page is served from loopback, so any web page that the user has open can send requests to it. Three checks keep
such a page out: the Host must be a loopback name (DNS rebinding), an Origin must be our own (cross-site requests),
and a change must carry the control token, which a foreign page cannot read.
"""

import hmac

from mesh_llm.core.errors import MeshError

TOKEN_HEADER = "x-mesh-llm-token"  # noqa: S105 - a header's name, not a secret
_LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


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


def check_origin(origin: str | None, host_header: str | None) -> None:
    """Refuse a request that another site's page made. Raises MeshError(origin_refused, 403)."""
    if origin is None:
        return
    scheme, _, authority = origin.partition("://")
    if scheme != "http" or authority.lower() != (host_header or "").strip().lower():
        raise MeshError(
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
