"""The circle of a request: how far its prompt may go, by setting, API key and header; and what is said if nowhere.

The node that is asked chooses hosts in the circle. A host is sent the circle, and refuses where a worker of its split
model is outside: it knows its workers exactly, and being in the circle it is trusted to check.
"""

import re
import time
from collections.abc import Sequence

from mesh_llm.api.request import Request
from mesh_llm.api.types import ApiConfig, KeyLimit
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.trust.circle import MAX_OWNERS, Circle, Privacy, outsiders, strictest, within
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId, OwnerId
from mesh_llm.core.types.model import ModelStatus

PRIVACY_HEADER = b"x-mesh-llm-privacy"
"""On a client's request: own, group or any. It can only be stricter than the settings."""
OUTSIDE = "outside_circle"

_CIRCLE = re.compile(rb"-|[0-9a-f]{64}(?:,[0-9a-f]{64}){0,%d}" % (MAX_OWNERS - 1))
_SHOWN = 3
_SHOWN_ID = 10


def circle_of(request: Request, config: ApiConfig, limit: KeyLimit | None, header: bytes) -> Circle:
    """The circle of a request. `limit`: of its API key; `header`: the name of the circle's header between nodes.

    Raises:
        MeshError: `bad_privacy` or `bad_circle` (400): a request is never sent further because it is not understood.
    """
    if request.peer is not None:
        value = request.header(header)
        if value is None:
            return None
        if not _CIRCLE.fullmatch(value):
            raise MeshError("bad_circle", "The request's circle is not understood.", "", 400)
        return frozenset() if value == b"-" else frozenset(OwnerId(one.decode()) for one in value.split(b","))
    wishes = [config.privacy, *([limit.privacy] if limit is not None else [])]
    for name, value in request.headers:
        if name == PRIVACY_HEADER:
            try:
                wishes.append(Privacy(value.strip().lower().decode("latin-1")))
            except ValueError:
                raise MeshError(
                    "bad_privacy", "The header x-mesh-llm-privacy must be own, group or any.", "Send: own", 400
                ) from None
    return config.owners.circle(strictest(*wishes))


def inside(request: Request, node: NodeId) -> tuple[NodeId, ...]:
    """The nodes that see a request's prompt in any case. `node`: this one."""
    return (node,) if request.peer is None else (node, request.peer)


def may_see(request: Request, target: Target, snapshot: RoutingSnapshot) -> bool:
    """Whether a request's prompt may go to a target."""
    if request.circle is None:
        return True
    return not outsiders(target, request.circle, snapshot.owners, inside(request, snapshot.node), time.time())


def in_circle(request: Request, route: ModelRoute, snapshot: RoutingSnapshot) -> ModelRoute:
    """A model's route with only the targets to which the request's prompt may go."""
    return within(route, request.circle, snapshot, inside(request, snapshot.node), time.time())


def outside(request: Request, route: ModelRoute, snapshot: RoutingSnapshot) -> MeshError:
    """The error where a model answers, and the request's prompt may go to none of its hosts."""
    if request.peer is not None:
        return MeshError(OUTSIDE, f"A worker of {route.name} here is outside the request's circle.", "", 503)
    circle = request.circle or frozenset()
    now = time.time()
    seen = inside(request, snapshot.node)
    warm = [one for one in route.targets if one.status is ModelStatus.WARM]
    nodes = dict.fromkeys(node for one in warm for node in outsiders(one, circle, snapshot.owners, seen, now))
    return MeshError(
        OUTSIDE,
        f"The request's prompt may go to none of the nodes that answer for `{route.name}`: "
        f"{_listed(list(nodes))} outside its circle.",
        f"Serve it on this machine: mesh-llm load {route.name}. For another machine of yours: mesh-llm owner add NODE. "
        "To allow more: --privacy group with --group KEY, or --privacy any.",
        403,
        param="model",
    )


def _listed(nodes: Sequence[NodeId]) -> str:
    shown = ", ".join(node[:_SHOWN_ID] for node in nodes[:_SHOWN])
    more = len(nodes) - _SHOWN
    return f"{shown}{f' and {more} more' if more > 0 else ''} {'is' if len(nodes) == 1 else 'are'}"
