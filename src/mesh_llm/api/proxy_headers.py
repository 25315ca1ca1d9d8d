"""What passes from request to target and back besides the bodies: headers, and refusals that send on to another."""

from functools import lru_cache
from urllib.parse import quote

from mesh_llm.api.errors import ERROR_HEADER
from mesh_llm.api.request import Request
from mesh_llm.api.router import MODEL_HEADER
from mesh_llm.api.upstream import UpstreamResponse
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.wire.http.http1 import Headers, end_to_end, header

NODE_HEADER = b"x-mesh-llm-node"
RESUMED_HEADER = b"x-mesh-llm-resumed"
"""On an answer that other nodes were lost over before it began: how many."""
RESUME_HEADER = b"x-mesh-llm-resume"
"""On a request: `off` where its answer is not to be continued elsewhere."""

_PASSED_ON = frozenset((b"accept", b"content-type", b"user-agent", b"anthropic-version", b"anthropic-beta"))
_NOT_PASSED_BACK = frozenset((b"server", b"date", b"content-length", NODE_HEADER, MODEL_HEADER, RESUMED_HEADER))
_TRY_ELSEWHERE = frozenset((404, 429, 503))


def refusal(response: UpstreamResponse) -> MeshError | None:
    """The error, if this answer says that another target should be asked: busy, loading, or not the model's host.

    Any 503 does (an engine's too, while it loads); 404 and 429 only where they are a node's own words.
    """
    status = response.head.status
    if status not in _TRY_ELSEWHERE:
        return None
    code = header(response.head.headers, ERROR_HEADER)
    if code is None and status != 503:
        return None
    told = code.decode("ascii", "replace") if code else ""
    retry_after = header(response.head.headers, b"retry-after") or b""
    return MeshError(
        code=told or "engine_unavailable",
        message="The engine is not ready." if code is None else f"The node refused the request ({told}).",
        status=status,
        retry_after=float(retry_after) if retry_after.isdigit() and len(retry_after) < 6 else None,
    )


def target_of(request: Request) -> str:
    """The request's target in origin form."""
    return f"{request.path}?{request.query}" if request.query else request.path


@lru_cache(maxsize=1024)
def shown_name(model: ModelName) -> bytes:
    """A model's name as a header's value: visible ASCII, the rest percent-encoded."""
    return quote(model, safe="/:+@ ._-()[]").encode("ascii")


def headers_for(request: Request, model: ModelName) -> Headers:
    """Few headers go on: what describes the body and the API's version. Keys, cookies and origins stay here."""
    passed = [(name, value) for name, value in request.headers if name in _PASSED_ON]
    return (*passed, (MODEL_HEADER, shown_name(model)))


def headers_back(
    response: UpstreamResponse, target: Target, model: ModelName, cors: Headers, lost: int
) -> list[tuple[bytes, bytes]]:
    """What the asker is told beside the body. `lost`: targets that were lost over this request before."""
    head = response.head
    headers = [
        (name, value)
        for name, value in end_to_end(head.headers)
        if name not in _NOT_PASSED_BACK and not name.startswith(b"access-control-")
    ]
    if head.length is not None:
        headers.append((b"content-length", b"%d" % head.length))
    headers.append((NODE_HEADER, target.node.encode("ascii")))
    headers.append((MODEL_HEADER, shown_name(model)))
    if lost:
        headers.append((RESUMED_HEADER, b"%d" % lost))
    headers.extend(cors)
    return headers
