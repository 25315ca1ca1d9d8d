"""The circle of a request: how far its prompt may go, by setting, API key and header; and what is said if nowhere.

A host that this node distrusts for a model (`core/trust/canary_plan.py`) gets no request of its clients for it either.

The node that is asked chooses hosts in the circle. A host is sent the circle, and refuses where a worker of its split
model is outside: it knows its workers exactly, and being in the circle it is trusted to check.
"""

import re
import time
from collections.abc import Sequence

from mesh_llm.api.request import Request
from mesh_llm.api.types import KeyLimit
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.trust.circle import (
    MAX_OWNERS,
    Circle,
    Owners,
    Privacy,
    doubted,
    outsiders,
    strictest,
    within,
    without_distrusted,
)
from mesh_llm.core.types.errors import MeshError, listed
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import ModelStatus

PRIVACY_HEADER = b"x-mesh-llm-privacy"
"""On a client's request: own, group or any. It can only be stricter than the settings."""
OUTSIDE = "outside_circle"
DISTRUSTED = "host_distrusted"

_CIRCLE = re.compile(rb"-|[0-9a-f]{64}(?:,[0-9a-f]{64}){0,%d}" % (MAX_OWNERS - 1))
_SHOWN = 3
_SHOWN_ID = 10


def circle_of(request: Request, privacy: Privacy, owners: Owners, limit: KeyLimit | None, header: bytes) -> Circle:
    """The circle of a request.

    `privacy`: the node's setting. `limit`: of the API key. `header`: the name of the circle's header between nodes.

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
    wishes = [privacy, *([limit.privacy] if limit is not None else [])]
    for name, value in request.headers:
        if name == PRIVACY_HEADER:
            try:
                wishes.append(Privacy(value.strip().lower().decode("latin-1")))
            except ValueError:
                raise MeshError(
                    "bad_privacy", "The header x-mesh-llm-privacy must be own, group or any.", "Send: own", 400
                ) from None
    return owners.circle(strictest(*wishes))


def inside(request: Request, node: NodeId) -> tuple[NodeId, ...]:
    """The nodes that see a request's prompt in any case. `node`: this one."""
    return (node,) if request.peer is None else (node, request.peer)


def may_see(request: Request, target: Target, model: ModelName, snapshot: RoutingSnapshot) -> bool:
    """Whether a request's prompt may go to a target of a model."""
    if request.peer is None and doubted(model, target, snapshot):
        return False
    if request.circle is None:
        return True
    return not outsiders(target, request.circle, snapshot.owners, inside(request, snapshot.node), time.time())


def check_turn(request: Request, target: Target, model: ModelName, snapshot: RoutingSnapshot) -> None:
    """Look once more before a prompt is sent: while it waited for a place, its target may have left its circle.

    Raises:
        MeshError: `outside_circle` (503): it may be asked elsewhere.
    """
    if not may_see(request, target, model, snapshot):
        who = target.node[:_SHOWN_ID]
        raise MeshError(OUTSIDE, f"While the request waited, {who} left the nodes that may see its prompt.", "", 503)


def in_circle(request: Request, route: ModelRoute, snapshot: RoutingSnapshot) -> ModelRoute:
    """A model's route with only the targets to which the request's prompt may go."""
    if request.peer is None:
        route = without_distrusted(route, snapshot)
    return within(route, request.circle, snapshot, inside(request, snapshot.node), time.time())


def outside(request: Request, route: ModelRoute, snapshot: RoutingSnapshot, why_not_here: str = "") -> MeshError:
    """The error where a model answers, and the request's prompt may go to none of its hosts.

    `why_not_here`: why this node does not load the model, as a clause.
    """
    if request.peer is not None:
        return MeshError(OUTSIDE, f"A worker of {route.name} here is outside the request's circle.", "", 503)
    now = time.time()
    seen = inside(request, snapshot.node)
    hosts = [one for one in route.targets if one.local or one.status is ModelStatus.WARM]
    warm = [one for one in hosts if one.status is ModelStatus.WARM]
    inner = [one for one in warm if not outsiders(one, request.circle, snapshot.owners, seen, now)]
    liars = dict.fromkeys(node for one in inner for node in doubted(route.name, one, snapshot))
    if liars:
        # They are in the circle, so it is not for that.
        return _distrusted(route.name, list(liars))
    circle = request.circle or frozenset()
    nodes = dict.fromkeys(node for one in hosts for node in outsiders(one, circle, snapshot.owners, seen, now))
    return MeshError(
        OUTSIDE,
        f"The request's prompt may go to none of the nodes that answer for `{route.name}`: "
        f"{_are(list(nodes))} outside its circle."
        + (f" This node does not load it: {why_not_here.rstrip('.')}." if why_not_here else ""),
        f"Serve it on this machine: mesh-llm load {route.name}. For another machine of yours: mesh-llm owner add NODE. "
        "To allow more: --privacy group with --group KEY, or --privacy any.",
        403,
        param="model",
    )


def _distrusted(model: ModelName, nodes: Sequence[NodeId]) -> MeshError:
    those = "A node that computes" if len(nodes) == 1 else "Nodes that compute"
    return MeshError(
        DISTRUSTED,
        f"{those} `{model}` gave other answers than that model's file gives: {_are(nodes)} not trusted here.",
        f"See: mesh-llm trust list. Serve it on this machine: mesh-llm load {model}. "
        f"To use that node all the same: mesh-llm trust forget {nodes[0][:_SHOWN_ID]}",
        403,
        param="model",
    )


def _are(nodes: Sequence[NodeId]) -> str:
    shown = listed([node[:_SHOWN_ID] for node in nodes], _SHOWN)
    return f"{shown} {'is' if len(nodes) == 1 else 'are'}"
