"""Thinks a model through before anything is loaded: the same rules as placement and election, on what is known now."""

from collections.abc import Mapping, Sequence

import msgspec

from mesh_llm.core.election import Candidate, Elected, elect
from mesh_llm.core.fit import DoesNotFit, plan_solo
from mesh_llm.core.ids import NodeId
from mesh_llm.core.model import LaunchOptions, LaunchPlan, ModelFacts
from mesh_llm.core.plan import Plan, PlanNode, PlanShare, PlanSplit
from mesh_llm.core.prediction import Links, link_between, per_second, ring_seconds, solo_seconds, split_seconds
from mesh_llm.core.speed import Speed
from mesh_llm.core.split_plan import Lender, SplitAsk, fits, plan_split, shortfall
from mesh_llm.core.split_word import MAX_ROUND_TRIP_MS, SplitWord


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as planning sees it.

    Attributes:
        node: who.
        name: for people.
        memory_bytes: what it offers to this model.
        rpc_version: of its engine; empty where it cannot share models.
        has_file: it has the very file.
        speed: what was measured there; None: nothing.
        note: why it did not say more.
    """

    node: NodeId
    name: str
    memory_bytes: int
    rpc_version: str = ""
    has_file: bool = True
    speed: Speed | None = None
    note: str = ""


class PlanAsk(msgspec.Struct, frozen=True, kw_only=True):
    """The question: a model, what the user fixed, and the longest round trip within a group, milliseconds."""

    facts: ModelFacts
    options: LaunchOptions = LaunchOptions()
    max_rtt_ms: float = MAX_ROUND_TRIP_MS


def make_plan(ask: PlanAsk, nodes: Sequence[Planned], links: Links) -> Plan:
    """The answer. `nodes`: the asked one first."""
    seen = {node.node: node for node in nodes}
    told = tuple(_node(ask, node, nodes[0].node, links) for node in nodes)
    solo = next((node for node in told if node.fits and node.has_file), None)
    outcome = _split(ask, nodes, links)
    split = None if isinstance(outcome, str) else _shown(ask, outcome, seen, links)
    wanted = f"{ask.facts.name} with {ask.options.context} tokens" if ask.options.context else ask.facts.name
    if solo is not None:
        kind, where, speed = "solo", (solo.name,), solo.tokens_per_second
        message = f"{wanted} fits {solo.name} alone."
    elif split is not None:
        kind, where = "split", tuple(share.name for share in split.shares)
        speed = split.tokens_per_second
        message = f"{wanted} fits no machine alone, and fits {len(where)} together: {', '.join(where)}."
    else:
        kind, where, speed = "no", (), None
        message = f"{wanted} does not fit: {outcome}."
    return Plan(
        model=ask.facts.name,
        size_bytes=ask.facts.size_bytes,
        context=ask.options.context or 0,
        fits=kind,
        where=where,
        tokens_per_second=speed,
        message=message,
        nodes=told,
        split=split,
    )


def _node(ask: PlanAsk, node: Planned, asked: NodeId, links: Links) -> PlanNode:
    alone = plan_solo(ask.facts, node.memory_bytes, ask.options)
    whole = not isinstance(alone, DoesNotFit)
    link = link_between(links, asked, node.node) if node.node != asked else None
    known = node.speed is not None and node.speed.known
    seconds = solo_seconds(ask.facts, node.speed) if whole else None
    rate = node.speed.full.of(ask.facts.weight_bits) if known and node.speed is not None else 0
    return PlanNode(
        node_id=node.node,
        name=node.name,
        memory_bytes=node.memory_bytes,
        has_file=node.has_file,
        fits=whole,
        tokens_per_second=per_second(seconds),
        gigabytes_per_second=round(rate / 1e9, 2) if rate else None,
        one_way_ms=round(link.one_way_seconds * 1e3, 3) if link is not None else None,
        megabytes_per_second=round(link.bytes_per_second / 1e6, 1) if link and link.bytes_per_second else None,
        note=node.note or ("" if node.rpc_version else "its engine cannot share models"),
    )


def _split(ask: PlanAsk, nodes: Sequence[Planned], links: Links) -> LaunchPlan | str:
    """How the host that would be elected would divide it over all; or what is missing."""
    able = [node for node in nodes if node.has_file and node.rpc_version and node.memory_bytes > 0]
    if not able:
        return shortfall(SplitAsk(facts=ask.facts, options=ask.options), [nodes[0].memory_bytes]).message
    wish = SplitAsk(facts=ask.facts, options=ask.options)
    candidates = [_candidate(ask, node, able, links) for node in able]
    outcome = elect(candidates, lambda memories: fits(wish, memories))
    memory = {node.node: node.memory_bytes for node in able}
    if not isinstance(outcome, Elected):
        return shortfall(wish, [memory[node] for node in outcome.group or (able[0].node,)]).message
    lenders = [Lender(node=node, memory_bytes=memory[node]) for node in outcome.group]
    version = next(node.rpc_version for node in able if node.node == outcome.host)
    plan = plan_split(wish, lenders, 1, version)
    if isinstance(plan, LaunchPlan) and plan.split is None:
        plan = plan_split(msgspec.structs.replace(wish, asked=True), lenders, 1, version)
    if isinstance(plan, DoesNotFit):
        return plan.message
    return plan if plan.split is not None else "there is nobody to share it with"


def _candidate(ask: PlanAsk, node: Planned, able: Sequence[Planned], links: Links) -> Candidate:
    trips: dict[NodeId, float] = {}
    for other in able:
        link = link_between(links, node.node, other.node)
        if other.node != node.node and link is not None:
            trips[other.node] = 2e3 * link.one_way_seconds
    word = SplitWord(model=ask.facts.name, memory_bytes=node.memory_bytes, max_rtt_ms=ask.max_rtt_ms, round_trips=trips)
    return Candidate(node=node.node, word=word, rpc_version=node.rpc_version, name=node.name)


def _shown(ask: PlanAsk, plan: LaunchPlan, seen: Mapping[NodeId, Planned], links: Links) -> PlanSplit | None:
    layout = plan.split
    if layout is None:
        return None
    speeds = {node.node: node.speed for node in seen.values() if node.speed is not None}
    ring = ring_seconds(layout, links)
    return PlanSplit(
        shares=tuple(
            PlanShare(
                node_id=share.node, name=seen[share.node].name, layers=share.layers, memory_bytes=share.memory_bytes
            )
            for share in layout.shares
        ),
        context=plan.context,
        slots=plan.slots,
        tokens_per_second=per_second(split_seconds(ask.facts, layout, speeds, links)),
        ring_ms=round(ring * 1e3, 3) if ring is not None else None,
    )
