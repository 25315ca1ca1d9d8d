"""The answer of `mesh-llm plan MODEL`: what would run where, whether it fits, and how fast it would be.

It applies the rules of placement, election and layout to what is known now, and loads nothing.
"""

from collections.abc import Callable, Sequence

import msgspec

from mesh_llm.core.performance.calibration import MACHINE, MODEL
from mesh_llm.core.performance.pipeline import measured_ring
from mesh_llm.core.performance.prediction import (
    PROMPT_TOKENS,
    Links,
    link_between,
    offload_seconds,
    per_second,
    prefers_split,
    prompt_seconds,
    ring_seconds,
    solo_seconds,
)
from mesh_llm.core.performance.wire import ELEMENT_BYTES, choose_wire, wired_prompt_seconds, wired_seconds
from mesh_llm.core.placement.fit import DoesNotFit, Memory
from mesh_llm.core.placement.offload import Pools, offload_memory, plan_launch
from mesh_llm.core.split.election import Elected, TooSmall, elect
from mesh_llm.core.split.eligibility import Barred, GroupMember
from mesh_llm.core.split.layout import MemoryOffer, SplitRequest, group_fits, left_out, plan_split, shortfall
from mesh_llm.core.split.outlook import Candidate, Outlook, outlook
from mesh_llm.core.types.announcement import MAX_ROUND_TRIP_MS, SplitState
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import AUTO_WIRE, LaunchOptions, LaunchPlan, ModelFacts, Offload, Speed

ANNOUNCED = "told"
"""The basis of a prediction from what machines announce of themselves: each from its probe and its own models."""


PROMPTS = (512, PROMPT_TOKENS, 8192, 32_768, 131_072)
"""Lengths of prompts whose speed is predicted, as far as they fit the context."""


class PlanPrompt(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt of `tokens` tokens: how many of them are read per second, and when the answer's first token comes."""

    tokens: int
    tokens_per_second: float
    first_token_s: float


class PlanNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node's part in a plan; the host comes first. `layers` and `ratio` of the model, `memory_bytes` for it.

    `rtt_ms`: from the asked node, as programs experience it; 0.0 for the asked node, or where it was not measured.
    """

    node_id: str
    name: str
    layers: int
    ratio: float
    memory_bytes: int
    rtt_ms: float = 0.0


class PlanMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes of a launch in one memory, by part; `have_bytes`: what the memory offers."""

    weights: int = 0
    cache: int = 0
    compute: int = 0
    total_bytes: int = 0
    have_bytes: int = 0


class PlanOffload(msgspec.Struct, frozen=True, kw_only=True):
    """A model that is larger than video memory: what the GPU computes and what the processor.

    `gpu_layers`: of `layers`, from the last; `cpu_moe`: layers whose experts are in main memory, from the first; `text`
    says both in words. `gpu` and `memory`: what it takes of video memory and of main memory.
    """

    text: str
    layers: int
    gpu_layers: int
    cpu_moe: int
    gpu: PlanMemory
    memory: PlanMemory


class PlanMachine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that the plan considered, whether it takes part or not.

    Attributes:
        node_id: its id.
        name: for people.
        memory_bytes: what it offers to this model.
        has_file: whether it has the model's file.
        fits: whether the whole model fits there.
        predicted_tps: tokens per second of one request with the whole model there; null where it does not fit or
            nothing was measured.
        basis: where most of the prediction comes from. `model`: this very model ran there; `machine`: other models did;
            `probe`: a short measurement of the machine; `told`: what the machine announces, from its probe and its
            models; or empty.
        gigabytes_per_second: how fast it reads this kind of weights for one token; null where nothing was measured.
        rtt_ms: between programs on the asked node and there; null for the asked node, or where it did not answer.
        megabytes_per_second: from the asked node to it; null the same.
        note: why it cannot take part in a split, and what to type; or why nothing is known of it; else empty.
        takes_part: nothing keeps it from sharing the model.
        host_bytes: beside a GPU: main memory that it offers to this model.
        offload: what its GPU computes and what its processor, in words, where the model needs both; else empty.
        prompt_tps: tokens per second of a prompt of `prompt_tokens` tokens with the whole model there; null as
            `predicted_tps`, and where the model needs GPU and processor.
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
    takes_part: bool = True
    host_bytes: int = 0
    offload: str = ""
    prompt_tps: float | None = None


class PlanSplit(msgspec.Struct, frozen=True, kw_only=True):
    """How the model would be divided, also where it fits one node.

    Attributes:
        nodes: the host, then its workers in the order in which a token visits them.
        context: tokens for each request.
        slots: requests at once.
        micro_batch: tokens of a prompt that all machines compute at once; 0: as many as usual.
        wire: how activations would travel, in words, as in `f32` or `f16 for prompts, f32 for tokens`.
        predicted_tps: tokens per second of one request; null where something was not measured.
        basis: as of a machine. `machine`: corrected by split models that the asked node hosted.
        ring_ms: the network's part of each token; null where something was not measured.
        prompt_tps: tokens per second of a prompt of `prompt_tokens` tokens; null as `predicted_tps`.
        first_token_s: seconds until such a prompt is read.
        prompts: the same of shorter and longer ones; the longest fills the context.
        full_tps: tokens per second of one request at the end of a full context; null as `predicted_tps`.
        groups: engines of the host over the workers, each with an equal part of the slots.
        groups_why: why that many, as a clause.
        together_tps: tokens per second of all requests, with one in every slot; null as `predicted_tps`.
    """

    nodes: tuple[PlanNode, ...]
    context: int
    slots: int
    predicted_tps: float | None = None
    basis: str = ""
    ring_ms: float | None = None
    prompt_tps: float | None = None
    first_token_s: float | None = None
    prompts: tuple[PlanPrompt, ...] = ()
    full_tps: float | None = None
    micro_batch: int = 0
    wire: str = "f32"
    groups: int = 1
    groups_why: str = ""
    together_tps: float | None = None


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a model if it were loaded now. Nothing is loaded.

    `runs`: here, split, elsewhere or no. `message` is a sentence for people, `hint` what to do where it does not run.
    `nodes`, `predicted_tps` and `basis` belong to what `runs` says; a speed is null where it cannot be predicted. So do
    `prompt_tps`, tokens per second of a prompt of `prompt_tokens` tokens, `first_token_s`, when it is read, and
    `prompts`, the same of shorter and longer ones, of which the longest fills the context. `predicted_tps` is for the
    first tokens of a conversation, `full_tps` for those at the end of a full context. `machines`: all that were
    considered, the asked one first; `split`: how the model would be divided. `cache_type`: of the KV cache, where the
    model runs on one node; `offload`: what of it runs on that node's processor, beside its GPU.
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
    cache_type: str = ""
    offload: PlanOffload | None = None
    prompt_tokens: int = PROMPT_TOKENS
    prompt_tps: float | None = None
    first_token_s: float | None = None
    prompts: tuple[PlanPrompt, ...] = ()
    full_tps: float | None = None


class PlanInput(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one machine.

    Attributes:
        node: its id.
        name: for people.
        memory_bytes: what it offers to this model.
        rpc_version: of its engine; empty where it cannot share models.
        has_file: it has exactly this file.
        gives: it gives its files to others (not with `--no-share`).
        speed: its present speed, as it announces it; None: nothing was measured.
        alone: its speed for this very model, undivided, where that is known better; None: as `speed`.
        basis: where `alone` comes from: PROBE, MACHINE or MODEL; empty: announced.
        measured_tps: tokens per second of this model as it runs there now, undivided; 0.0: not known.
        note: why nothing more is known.
        barred: what keeps it from sharing the model; None: nothing.
        since: its incarnation.
        host_bytes: main memory that it offers to this model beside a GPU's.
        host_speed: of its processor, where it has a GPU; None: nothing was measured.
        cards: its devices.
        on_processor: as in `Capacity`.
        max_rtt_ms: longest round trip that it permits in a group; 0.0: as the asked node.
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
    barred: Barred | None = None
    since: int = 0
    host_bytes: int = 0
    host_speed: Speed | None = None
    cards: int = 1
    on_processor: bool = False
    max_rtt_ms: float = 0.0

    @property
    def pools(self) -> Pools:
        """Its memory for this model."""
        return Pools(device=self.memory_bytes, host=self.host_bytes, cards=self.cards)

    def seconds(self, facts: ModelFacts, offload: Offload | None, context: int = 0) -> float | None:
        """Predicted seconds of a token of the whole model there, after `context` others; None: nothing was measured."""
        speed = self.alone or self.speed
        if offload is None:
            return solo_seconds(facts, speed, context)
        return offload_seconds(facts, offload, speed, self.host_speed, context)

    def prompt_seconds(self, facts: ModelFacts, offload: Offload | None, tokens: int = PROMPT_TOKENS) -> float | None:
        """Predicted seconds of a prompt, the whole model there; None where nothing was measured."""
        if offload is not None and offload.divided(facts.layers):
            return None
        return prompt_seconds(facts, self.alone or self.speed, tokens)

    def solo(self, facts: ModelFacts, offload: Offload | None = None, context: int = 0) -> tuple[float | None, str]:
        """Tokens per second of the whole model there, after `context` others, and the basis of that."""
        predicted = self.seconds(facts, offload, context)
        if self.measured_tps:
            # Measured in conversations that had just begun, as most are.
            first = self.seconds(facts, offload)
            slower = first / predicted if first is not None and predicted is not None else 1.0
            return round(self.measured_tps * slower, 2), MODEL
        return per_second(predicted), "" if predicted is None else self.basis or ANNOUNCED


class PlanRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The question.

    Attributes:
        facts: the model.
        options: what the user fixed.
        shares: relative parts of a split fixed by hand, the host's first.
        asked: split it even where it fits one machine.
        max_rtt_ms: longest round trip within a group.
        split_lag: how many times as long machines were observed to take for a split model's token.
        split_prompt_lag: the same for its prompts.
        wire: how activations travel: a WireFormat, or `auto`.
        groups: most engines of the host (`--groups`); None: as many as pay.
        fetch: the argument of `mesh-llm download` for a model that no node has; the asked node then counts as if it
            had the file. Empty where some node has it.
    """

    facts: ModelFacts
    options: LaunchOptions = LaunchOptions()
    shares: tuple[float, ...] = ()
    asked: bool = False
    max_rtt_ms: float = MAX_ROUND_TRIP_MS
    split_lag: float = 1.0
    split_prompt_lag: float = 1.0
    wire: str = AUTO_WIRE
    groups: int | None = None
    fetch: str = ""

    @property
    def split(self) -> SplitRequest:
        """The question for the rules of splitting."""
        return SplitRequest(
            facts=self.facts, options=self.options, shares=self.shares, asked=self.asked, groups=self.groups
        )


def make_plan(request: PlanRequest, nodes: Sequence[PlanInput], links: Links) -> PlanAnswer:
    """Answer the question. `nodes`: the asked one first."""
    known, on_disk = nodes, nodes[0].has_file
    if request.fetch:
        nodes = [msgspec.structs.replace(nodes[0], has_file=True), *nodes[1:]]
    outcome, view = _elect(request, nodes, links)
    notes = {one.node: view.why(one, nodes[0].node) for one in view.participants}
    divided = _divide(request, outcome, nodes, links)
    if divided is not None:
        offers = _offers(outcome, nodes)
        notes |= {one.node: f"computes nothing of it: {one.reason}" for one in left_out(request.split, offers, divided)}
    machines = tuple(_machine(request, node, nodes[0].node, links, notes.get(node.node, "")) for node in known)
    split = None if divided is None else _split_answer(request, divided, nodes, links)
    solo = _able_alone(request, nodes, split)
    base = PlanAnswer(
        model=request.facts.name,
        runs="no",
        message="",
        size_bytes=request.facts.size_bytes,
        on_disk=on_disk,
        hint=f"It is not here yet. Fetch it: mesh-llm download {request.fetch}" if request.fetch else "",
        machines=machines,
        split=split,
    )
    if solo and not (request.asked and split is not None):
        return _solo(request, base, solo[0], here=solo[0] is nodes[0])
    if split is not None:
        names = ", ".join(node.name for node in split.nodes)
        why = "is to be split" if solo else "fits no machine alone"
        return msgspec.structs.replace(
            base,
            runs="split",
            message=f"{request.facts.name} {why}, and fits {len(split.nodes)} nodes together: {names}.",
            context=split.context,
            slots=split.slots,
            need_bytes=sum(node.memory_bytes for node in split.nodes),
            have_bytes=view.have_bytes,
            nodes=split.nodes,
            predicted_tps=split.predicted_tps,
            basis=split.basis,
            round_trips_per_token=1.0,
            prompt_tps=split.prompt_tps,
            first_token_s=split.first_token_s,
            prompts=split.prompts,
            full_tps=split.full_tps,
        )
    missing = shortfall(request.split, [nodes[0].memory_bytes])
    return msgspec.structs.replace(
        base,
        message=f"{request.facts.name} does not fit: {view.sum()}",
        hint=" ".join(view.explained(nodes[0].node)),
        context=missing.context,
        slots=missing.slots,
        need_bytes=view.need_bytes,
        have_bytes=view.have_bytes,
    )


def _alone(request: PlanRequest, node: PlanInput) -> LaunchPlan | DoesNotFit:
    return plan_launch(request.facts, node.pools, request.options)


def _able_alone(request: PlanRequest, nodes: Sequence[PlanInput], split: PlanSplit | None) -> list[PlanInput]:
    """The nodes that would serve the whole model, those whose devices hold it first.

    A node that needs its processor beside its GPU does that only for its own user, and where no group is faster.
    """
    plans = [(node, plan) for node in nodes if node.has_file and isinstance(plan := _alone(request, node), LaunchPlan)]
    layers = request.facts.layers
    whole = [node for node, plan in plans if plan.offload is None or not plan.offload.divided(layers)]
    divided = split.predicted_tps if split is not None else None
    by_hand = request.options.gpu_layers is not None or request.options.cpu_moe is not None
    partly = [
        node
        for node, plan in plans
        if node is nodes[0]
        and plan.offload is not None
        and plan.offload.divided(layers)
        and (
            split is None
            or by_hand
            or not prefers_split(1.0 / divided if divided else None, node.seconds(request.facts, plan.offload))
        )
    ]
    return [*whole, *partly]


def _solo(request: PlanRequest, base: PlanAnswer, node: PlanInput, *, here: bool) -> PlanAnswer:
    plan = _alone(request, node)
    if isinstance(plan, DoesNotFit):
        return base
    layers, offload = request.facts.layers, plan.offload
    predicted, basis = node.solo(request.facts, offload)
    prompt = node.prompt_seconds(request.facts, offload)
    part = PlanNode(node_id=node.node, name=node.name, layers=layers, ratio=1.0, memory_bytes=plan.memory_bytes)
    return msgspec.structs.replace(
        base,
        runs="here" if here else "elsewhere",
        message=f"{request.facts.name} fits {node.name} alone."
        if offload is None
        else f"{request.facts.name} fits {node.name} alone, beyond its GPU: {_divided_at(offload, layers, predicted)}.",
        context=plan.context,
        slots=plan.slots,
        need_bytes=plan.memory_bytes,
        have_bytes=node.memory_bytes,
        nodes=(part,),
        predicted_tps=predicted,
        basis=basis,
        cache_type=plan.cache_type,
        offload=None if offload is None else _offloaded(request, node, plan, offload),
        prompt_tps=_prompt_rate(prompt),
        first_token_s=_shown_seconds(prompt),
        prompts=_prompts(plan.context, lambda tokens: node.prompt_seconds(request.facts, offload, tokens)),
        full_tps=node.solo(request.facts, offload, plan.context)[0],
    )


def _prompts(context: int, seconds: Callable[[int], float | None]) -> tuple[PlanPrompt, ...]:
    """Prompts of different lengths, by the seconds of one; empty where that is not known."""
    lengths = [tokens for tokens in PROMPTS if tokens < context] + [context]
    known = [(tokens, taken) for tokens in lengths if (taken := seconds(tokens))]
    return tuple(
        PlanPrompt(tokens=tokens, tokens_per_second=round(tokens / taken, 2), first_token_s=round(taken, 3))
        for tokens, taken in known
    )


def _prompt_rate(seconds: float | None) -> float | None:
    """Tokens per second of a prompt that is read in so long."""
    return None if seconds is None else per_second(seconds / PROMPT_TOKENS)


def _shown_seconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 3)


def _divided_at(offload: Offload, layers: int, predicted: float | None) -> str:
    speed = "" if predicted is None else f": about {predicted:.{0 if predicted >= 10 else 1}f} tokens/s"
    return offload.text(layers) + speed


def _offloaded(request: PlanRequest, node: PlanInput, plan: LaunchPlan, offload: Offload) -> PlanOffload:
    sums = offload_memory(request.facts, plan, node.cards)

    def shown(memory: Memory, have: int) -> PlanMemory:
        return PlanMemory(
            weights=memory.weights,
            cache=memory.cache,
            compute=memory.compute + memory.other,
            total_bytes=memory.total,
            have_bytes=have,
        )

    return PlanOffload(
        text=offload.text(request.facts.layers),
        layers=request.facts.layers,
        gpu_layers=offload.gpu_layers,
        cpu_moe=offload.cpu_moe,
        gpu=shown(sums.device, node.memory_bytes),
        memory=shown(sums.host, node.host_bytes),
    )


def _machine(request: PlanRequest, node: PlanInput, asked: NodeId, links: Links, obstacle: str) -> PlanMachine:
    """`obstacle`: what keeps it from sharing the model, in words."""
    plan = _alone(request, node)
    offload = None if isinstance(plan, DoesNotFit) else plan.offload
    link = link_between(links, asked, node.node) if node.node != asked else None
    predicted, basis = (None, "") if isinstance(plan, DoesNotFit) else node.solo(request.facts, offload)
    rate = node.speed.full.of(request.facts.weight_bits) if node.speed is not None else 0
    return PlanMachine(
        node_id=node.node,
        name=node.name,
        memory_bytes=node.memory_bytes,
        has_file=node.has_file,
        fits=not isinstance(plan, DoesNotFit),
        predicted_tps=predicted,
        basis=basis,
        gigabytes_per_second=round(rate / 1e9, 2) if rate else None,
        rtt_ms=round(link.one_way_seconds * 2e3, 3) if link is not None else None,
        megabytes_per_second=round(link.bytes_per_second / 1e6, 1) if link and link.bytes_per_second else None,
        note=obstacle or node.note,
        takes_part=not obstacle,
        host_bytes=node.host_bytes,
        offload="" if offload is None else offload.text(request.facts.layers),
        prompt_tps=None if isinstance(plan, DoesNotFit) else _prompt_rate(node.prompt_seconds(request.facts, offload)),
    )


def _elect(request: PlanRequest, nodes: Sequence[PlanInput], links: Links) -> tuple[Elected | TooSmall, Outlook]:
    """Who would host the model over all nodes, and what that means for each."""
    wanted = request.split
    able = [node for node in nodes if node.barred is None]
    members = {node.node: _group_member(request, node, able, links) for node in able}
    outcome = elect(list(members.values()), lambda memories: group_fits(wanted, memories))
    candidates = [
        Candidate(
            node=node.node,
            name=node.name,
            since=node.since,
            memory_bytes=node.memory_bytes,
            member=members.get(node.node),
            barred=node.barred,
            wants=place == 0,
        )
        for place, node in enumerate(nodes)
    ]
    return outcome, outlook(wanted, candidates, outcome)


def _divide(
    request: PlanRequest, outcome: Elected | TooSmall, nodes: Sequence[PlanInput], links: Links
) -> LaunchPlan | None:
    """The layout of the host that would be elected; over the whole group even where one node is enough."""
    if not isinstance(outcome, Elected):
        return None
    wanted = msgspec.structs.replace(request.split, links=links)
    offers = _offers(outcome, nodes)
    version = next(node.rpc_version for node in nodes if node.node == outcome.host)
    plan = plan_split(wanted, offers, 1, version)
    if isinstance(plan, LaunchPlan) and plan.split is None:
        plan = plan_split(msgspec.structs.replace(wanted, asked=True), offers, 1, version)
    return None if isinstance(plan, DoesNotFit) else plan


def _offers(outcome: Elected | TooSmall, nodes: Sequence[PlanInput]) -> list[MemoryOffer]:
    return [
        MemoryOffer(
            node=node.node,
            memory_bytes=node.memory_bytes,
            on_processor=node.on_processor,
            speed=node.speed or Speed(),
        )
        for node in _in_order(outcome, nodes)
    ]


def _in_order(outcome: Elected | TooSmall, nodes: Sequence[PlanInput]) -> list[PlanInput]:
    """The elected group, its host first."""
    known = {node.node: node for node in nodes}
    return [known[node] for node in outcome.group]


def _group_member(request: PlanRequest, node: PlanInput, able: Sequence[PlanInput], links: Links) -> GroupMember:
    round_trips: dict[NodeId, float] = {}
    for other in able:
        link = link_between(links, node.node, other.node)
        if other.node != node.node and link is not None:
            round_trips[other.node] = 2e3 * link.one_way_seconds
    state = SplitState(
        model=request.facts.name,
        memory_bytes=node.memory_bytes,
        max_rtt_ms=node.max_rtt_ms or request.max_rtt_ms,
        round_trips=round_trips,
        bare=not node.has_file,
    )
    return GroupMember(node=node.node, state=state, rpc_version=node.rpc_version, name=node.name, gives=node.gives)


def _split_answer(request: PlanRequest, plan: LaunchPlan, nodes: Sequence[PlanInput], links: Links) -> PlanSplit | None:
    layout = plan.split
    if layout is None:
        return None
    by_node = {node.node: node for node in nodes}
    speeds = {node.node: node.speed for node in nodes if node.speed is not None}
    parts: list[PlanNode] = []
    for share in layout.shares:
        link = link_between(links, nodes[0].node, share.node)
        parts.append(
            PlanNode(
                node_id=share.node,
                name=by_node[share.node].name,
                layers=share.layers,
                ratio=round(share.layers / max(1, request.facts.layers), 4),
                memory_bytes=share.memory_bytes,
                rtt_ms=round(link.one_way_seconds * 2e3, 3) if link is not None else 0.0,
            )
        )
    way = ring_seconds(layout, links)
    wire = choose_wire(request.wire, request.facts, layout, speeds, links)
    seconds = wired_seconds(request.facts, layout, speeds, links, wire)
    full = wired_seconds(request.facts, layout, speeds, links, wire, plan.context)

    def prompt(tokens: int) -> float | None:
        found = wired_prompt_seconds(request.facts, layout, speeds, links, wire, tokens)
        return None if found is None else found.total(request.split_prompt_lag)

    read = prompt(PROMPT_TOKENS)
    element = ELEMENT_BYTES[wire.tokens]
    ring = measured_ring(request.facts, layout, speeds, links, element_bytes=element, lag=request.split_lag)
    together = None if ring is None else ring.tokens_per_second(plan.slots, layout.groups)
    return PlanSplit(
        nodes=tuple(parts),
        context=plan.context,
        slots=plan.slots,
        predicted_tps=None if seconds is None else per_second(seconds.total(request.split_lag)),
        basis="" if seconds is None else MACHINE if request.split_lag != 1.0 else ANNOUNCED,
        ring_ms=round(way * 1e3, 3) if way is not None else None,
        prompt_tps=_prompt_rate(read),
        first_token_s=_shown_seconds(read),
        prompts=_prompts(plan.context, prompt),
        full_tps=None if full is None else per_second(full.total(request.split_lag)),
        micro_batch=layout.micro_batch,
        wire=wire.text,
        groups=layout.groups,
        groups_why=layout.groups_why,
        together_tps=None if together is None else round(together, 2),
    )
