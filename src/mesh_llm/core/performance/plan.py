"""The answer to `mesh-llm plan MODEL`: what would run where, whether it fits, and how fast it would be.

Thinks a model through before anything is loaded: the same rules as placement and election, on what is known now.
"""

from collections.abc import Mapping, Sequence

import msgspec

from mesh_llm.core.performance.prediction import (
    MACHINE,
    MODEL,
    Links,
    link_between,
    per_second,
    ring_seconds,
    solo_seconds,
    split_seconds,
)
from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.split.election import Elected, GroupMember, elect
from mesh_llm.core.split.layout import MemoryOffer, SplitRequest, group_fits, plan_split, shortfall
from mesh_llm.core.types.announcement import MAX_ROUND_TRIP_MS, SplitState
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts, Speed


class PlanNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node's part in a plan; the host comes first. `layers` and `ratio` of the model, `memory_bytes` for it.

    `rtt_ms`: from the asked node, as its programs experience it; 0.0 for itself, or where it was not measured.
    """

    node_id: str
    name: str
    layers: int
    ratio: float
    memory_bytes: int
    rtt_ms: float = 0.0


class PlanMachine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that the model was thought through for, whether it is to take part or not.

    Attributes:
        node_id: who.
        name: for people.
        memory_bytes: what it offers to this model.
        has_file: whether it has the model's file; others can take no part before they have it.
        fits: whether the whole model fits there.
        predicted_tps: tokens per second of one request, the whole model there; null where it does not fit or nothing
            was measured.
        basis: what most of that comes from. `model`: this very model ran there; `machine`: other models did; `probe`:
            a short measurement of the machine; `told`: its own word, from its probe and its models; or empty.
        gigabytes_per_second: how fast it reads this kind of weights for one token; null where nothing was measured.
        rtt_ms: between the asked node's programs and its own; null for the asked one, or where it did not answer.
        megabytes_per_second: from the asked node to it; null the same.
        note: why it cannot take part in a split, or why nothing is known of it; else empty.
    """

    node_id: str
    name: str
    memory_bytes: int
    has_file: bool = True
    fits: bool = False
    predicted_tps: float | None = None
    basis: str = ""
    gigabytes_per_second: float | None = None
    rtt_ms: float | None = None
    megabytes_per_second: float | None = None
    note: str = ""


class PlanSplit(msgspec.Struct, frozen=True, kw_only=True):
    """How the model would be divided, also where it fits one node.

    Attributes:
        nodes: the host and then its workers, in the order in which a token visits them.
        context: tokens for each request.
        slots: requests at once.
        predicted_tps: tokens per second of one request; null where something was not measured.
        basis: as of a machine; `machine`: corrected by what split models took that the asked node hosted.
        ring_ms: the network's part of each token; null the same.
    """

    nodes: tuple[PlanNode, ...]
    context: int
    slots: int
    predicted_tps: float | None = None
    basis: str = ""
    ring_ms: float | None = None


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a model if it were loaded now, without doing anything.

    `runs`: here, split, elsewhere or no. `message` is a sentence for people, `hint` what to do where it does not run.
    `nodes`, `predicted_tps` and `basis` are of what `runs` says; speeds are null where nothing was measured that they
    could be told from. `machines`: all that were thought of, the asked one first; `split`: how it would be divided.
    """

    model: str
    runs: str
    message: str
    hint: str = ""
    size_bytes: int = 0
    context: int = 0
    slots: int = 0
    need_bytes: int = 0
    have_bytes: int = 0
    on_disk: bool = False
    nodes: tuple[PlanNode, ...] = ()
    predicted_tps: float | None = None
    basis: str = ""
    round_trips_per_token: float | None = None
    machines: tuple[PlanMachine, ...] = ()
    split: PlanSplit | None = None


TOLD = "told"
"""Where a prediction comes from what the machines say of themselves, each from its probe and its own models."""


class Planned(msgspec.Struct, frozen=True, kw_only=True):
    """A machine as planning sees it.

    Attributes:
        node: who.
        name: for people.
        memory_bytes: what it offers to this model.
        rpc_version: of its engine; empty where it cannot share models.
        has_file: it has the very file.
        gives: it gives its files to others (not with `--no-seed`).
        speed: what it does at present, by its own word; None: nothing was measured.
        alone: the same for this very model, undivided, where that is known better; None: as `speed`.
        basis: what `alone` comes from, as in core.experience; empty: its own word.
        measured_tps: tokens per second of this model as it runs there now, undivided; 0.0: not known.
        note: why it did not say more.
    """

    node: NodeId
    name: str
    memory_bytes: int
    rpc_version: str = ""
    has_file: bool = True
    gives: bool = True
    speed: Speed | None = None
    alone: Speed | None = None
    basis: str = ""
    measured_tps: float = 0.0
    note: str = ""

    def solo(self, facts: ModelFacts) -> tuple[float | None, str]:
        """Tokens per second of the whole model there, and what that comes from."""
        if self.measured_tps:
            return round(self.measured_tps, 2), MODEL
        told = per_second(solo_seconds(facts, self.alone or self.speed))
        return told, "" if told is None else self.basis or TOLD


class PlanAsk(msgspec.Struct, frozen=True, kw_only=True):
    """The question.

    Attributes:
        facts: the model.
        options: what the user fixed.
        shares: relative parts of a split by hand, the host's first.
        asked: to be split even where it fits one machine.
        max_rtt_ms: longest round trip within a group.
        split_lag: how many times as long machines were seen to take of a split model's token.
        fetch: what to give `mesh-llm download` for a model that nobody of the mesh has; then the asked node counts
            as if it had it. Empty where somebody has it.
    """

    facts: ModelFacts
    options: LaunchOptions = LaunchOptions()
    shares: tuple[float, ...] = ()
    asked: bool = False
    max_rtt_ms: float = MAX_ROUND_TRIP_MS
    split_lag: float = 1.0
    fetch: str = ""

    @property
    def split(self) -> SplitRequest:
        """The same for the rules of splitting."""
        return SplitRequest(facts=self.facts, options=self.options, shares=self.shares, asked=self.asked)


def make_plan(ask: PlanAsk, nodes: Sequence[Planned], links: Links) -> PlanAnswer:
    """The answer. `nodes`: the asked one first."""
    machines = tuple(_machine(ask, node, nodes[0].node, links) for node in nodes)
    on_disk = nodes[0].has_file
    if ask.fetch:
        nodes = [msgspec.structs.replace(nodes[0], has_file=True), *nodes[1:]]
    divided = _divide(ask, nodes, links)
    split = None if isinstance(divided, DoesNotFit) else _shown(ask, divided, nodes, links)
    solo = [node for node in nodes if node.has_file and not isinstance(_alone(ask, node), DoesNotFit)]
    base = PlanAnswer(
        model=ask.facts.name,
        runs="no",
        message="",
        size_bytes=ask.facts.size_bytes,
        on_disk=on_disk,
        hint=f"It is not here yet. Fetch it: mesh-llm download {ask.fetch}" if ask.fetch else "",
        machines=machines,
        split=split,
    )
    if solo and not (ask.asked and split is not None):
        return _solo(ask, base, solo[0], here=solo[0] is nodes[0])
    if split is not None:
        names = ", ".join(node.name for node in split.nodes)
        why = "is to be split" if solo else "fits no machine alone"
        return msgspec.structs.replace(
            base,
            runs="split",
            message=f"{ask.facts.name} {why}, and fits {len(split.nodes)} nodes together: {names}.",
            context=split.context,
            slots=split.slots,
            need_bytes=sum(node.memory_bytes for node in split.nodes),
            have_bytes=sum(node.memory_bytes for node in nodes),
            nodes=split.nodes,
            predicted_tps=split.predicted_tps,
            basis=split.basis,
            round_trips_per_token=1.0,
        )
    missing = divided if isinstance(divided, DoesNotFit) else shortfall(ask.split, [nodes[0].memory_bytes])
    return msgspec.structs.replace(
        base,
        message=f"{ask.facts.name} does not fit: {missing.message}.",
        hint=missing.hint,
        context=missing.context,
        slots=missing.slots,
        need_bytes=missing.need_bytes,
        have_bytes=missing.have_bytes,
    )


def _alone(ask: PlanAsk, node: Planned) -> LaunchPlan | DoesNotFit:
    return plan_solo(ask.facts, node.memory_bytes, ask.options)


def _solo(ask: PlanAsk, base: PlanAnswer, node: Planned, *, here: bool) -> PlanAnswer:
    plan = _alone(ask, node)
    if isinstance(plan, DoesNotFit):
        return base
    layers = ask.facts.layers
    predicted, basis = node.solo(ask.facts)
    part = PlanNode(node_id=node.node, name=node.name, layers=layers, ratio=1.0, memory_bytes=plan.memory_bytes)
    return msgspec.structs.replace(
        base,
        runs="here" if here else "elsewhere",
        message=f"{ask.facts.name} fits {node.name} alone.",
        context=plan.context,
        slots=plan.slots,
        need_bytes=plan.memory_bytes,
        have_bytes=node.memory_bytes,
        nodes=(part,),
        predicted_tps=predicted,
        basis=basis,
    )


def _machine(ask: PlanAsk, node: Planned, asked: NodeId, links: Links) -> PlanMachine:
    whole = not isinstance(_alone(ask, node), DoesNotFit)
    link = link_between(links, asked, node.node) if node.node != asked else None
    predicted, basis = node.solo(ask.facts) if whole else (None, "")
    rate = node.speed.full.of(ask.facts.weight_bits) if node.speed is not None else 0
    return PlanMachine(
        node_id=node.node,
        name=node.name,
        memory_bytes=node.memory_bytes,
        has_file=node.has_file,
        fits=whole,
        predicted_tps=predicted,
        basis=basis,
        gigabytes_per_second=round(rate / 1e9, 2) if rate else None,
        rtt_ms=round(link.one_way_seconds * 2e3, 3) if link is not None else None,
        megabytes_per_second=round(link.bytes_per_second / 1e6, 1) if link and link.bytes_per_second else None,
        note=node.note or ("" if node.rpc_version else "its engine cannot share models"),
    )


def _divide(ask: PlanAsk, nodes: Sequence[Planned], links: Links) -> LaunchPlan | DoesNotFit:
    """How the host that would be elected would lay it out; over all where one would do."""
    wish = ask.split
    able = [node for node in nodes if node.rpc_version and node.memory_bytes > 0]
    if not any(node.has_file for node in able):
        return shortfall(wish, [nodes[0].memory_bytes])
    memory = {node.node: node.memory_bytes for node in able}
    outcome = elect([_candidate(ask, node, able, links) for node in able], lambda memories: group_fits(wish, memories))
    if not isinstance(outcome, Elected):
        return shortfall(wish, [memory[node] for node in outcome.group or (able[0].node,)])
    lenders = [MemoryOffer(node=node, memory_bytes=memory[node]) for node in outcome.group]
    version = next(node.rpc_version for node in able if node.node == outcome.host)
    plan = plan_split(wish, lenders, 1, version)
    if isinstance(plan, LaunchPlan) and plan.split is None:
        plan = plan_split(msgspec.structs.replace(wish, asked=True), lenders, 1, version)
    return plan


def _candidate(ask: PlanAsk, node: Planned, able: Sequence[Planned], links: Links) -> GroupMember:
    trips: dict[NodeId, float] = {}
    for other in able:
        link = link_between(links, node.node, other.node)
        if other.node != node.node and link is not None:
            trips[other.node] = 2e3 * link.one_way_seconds
    word = SplitState(
        model=ask.facts.name,
        memory_bytes=node.memory_bytes,
        max_rtt_ms=ask.max_rtt_ms,
        round_trips=trips,
        bare=not node.has_file,
    )
    return GroupMember(node=node.node, state=word, rpc_version=node.rpc_version, name=node.name, gives=node.gives)


def _shown(ask: PlanAsk, plan: LaunchPlan, nodes: Sequence[Planned], links: Links) -> PlanSplit | None:
    layout = plan.split
    if layout is None:
        return None
    seen: Mapping[NodeId, Planned] = {node.node: node for node in nodes}
    speeds = {node.node: node.speed for node in nodes if node.speed is not None}
    parts: list[PlanNode] = []
    for share in layout.shares:
        link = link_between(links, nodes[0].node, share.node)
        parts.append(
            PlanNode(
                node_id=share.node,
                name=seen[share.node].name,
                layers=share.layers,
                ratio=round(share.layers / max(1, ask.facts.layers), 4),
                memory_bytes=share.memory_bytes,
                rtt_ms=round(link.one_way_seconds * 2e3, 3) if link is not None else 0.0,
            )
        )
    ring = ring_seconds(layout, links)
    seconds = split_seconds(ask.facts, layout, speeds, links)
    return PlanSplit(
        nodes=tuple(parts),
        context=plan.context,
        slots=plan.slots,
        predicted_tps=None if seconds is None else per_second(seconds.total(ask.split_lag)),
        basis="" if seconds is None else MACHINE if ask.split_lag != 1.0 else TOLD,
        ring_ms=round(ring * 1e3, 3) if ring is not None else None,
    )
