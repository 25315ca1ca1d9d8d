"""A group or one GPU with its processor: which would answer a model faster, that is larger than video memory?

Predicted from what the nodes announce: the speeds of GPUs and processors, the memory that they offer, and the round
trips to them. Where something is not known, the group is preferred: all of it computes in memory of its own.
"""

from collections.abc import Sequence
from itertools import combinations

from mesh_llm.core.performance.prediction import Link, offload_seconds, prefers_split, split_seconds
from mesh_llm.core.placement.fit import DoesNotFit
from mesh_llm.core.placement.launches import LaunchOrder
from mesh_llm.core.split.layout import MemoryOffer, SplitRequest, plan_split
from mesh_llm.core.types.announcement import MAX_ROUND_TRIP_MS, Member
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import MAX_SPLIT_NODES, Capacity, ModelFacts

_PROGRAM_SECONDS = 0.0002
"""What programs add to a packet's way, at least."""


def faster_alone(order: LaunchOrder, me: MemoryOffer, capacity: Capacity, members: Sequence[Member]) -> bool:
    """Whether this node's GPU and its processor answer faster than the group that it could host.

    Args:
        order: the launch on this node alone.
        me: what this node offers to a split model.
        capacity: of this node.
        members: all other nodes.
    """
    offload = order.plan.offload
    if offload is None:
        return True
    alone = offload_seconds(order.facts, offload, capacity.speed, capacity.host_speed)
    return not prefers_split(_together(order, me, capacity, members), alone)


def _together(order: LaunchOrder, me: MemoryOffer, capacity: Capacity, members: Sequence[Member]) -> float | None:
    """Seconds of a token over this node and the members that may help; None where that is not known."""
    facts = order.facts
    helpers = [member for member in members if _could_help(member, facts, capacity.rpc_version)]
    helpers.sort(key=lambda member: (-_offered(member, facts.name), member.announcement.node))
    del helpers[MAX_SPLIT_NODES - 1 :]
    offers = [MemoryOffer(node=one.announcement.node, memory_bytes=_offered(one, facts.name)) for one in helpers]
    request = SplitRequest(facts=facts, options=order.options)
    plan = plan_split(request, [me, *offers], 0, capacity.rpc_version)
    if isinstance(plan, DoesNotFit) or plan.split is None:
        return None
    ways = {one.announcement.node: one.rtt_ms / 2e3 + _PROGRAM_SECONDS for one in helpers}
    links: dict[tuple[NodeId, NodeId], Link] = {
        (me.node, node): Link(one_way_seconds=way) for node, way in ways.items()
    }
    for (one, near), (other, far) in combinations(ways.items(), 2):
        # Two others are taken to be as far from each other as the farther one is from here.
        links[one, other] = Link(one_way_seconds=max(near, far))
    speeds = {one.announcement.node: one.announcement.capacity.speed for one in helpers} | {me.node: capacity.speed}
    seconds = split_seconds(facts, plan.split, speeds, links)
    return None if seconds is None else seconds.total()


def _could_help(member: Member, facts: ModelFacts, rpc_version: str) -> bool:
    """Whether a member may compute a part of a model, as far as it says so, and its speed and distance are known."""
    announced, offer = member.announcement, member.announcement.offer
    if member.suspect or offer is None or offer.obstacle or facts.name in offer.declined:
        return False
    near = 0.0 < member.rtt_ms <= MAX_ROUND_TRIP_MS
    return near and announced.capacity.speed.known and announced.capacity.rpc_version == rpc_version


def _offered(member: Member, model: ModelName) -> int:
    """Bytes that a member has for a model."""
    state, offer = member.announcement.split, member.announcement.offer
    if state is not None and state.model == model:
        return state.memory_bytes
    return offer.memory_bytes if offer is not None else 0
