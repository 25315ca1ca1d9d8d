"""Builds the node's status: its own state, the models and peers of the mesh, and a split model."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from mesh_llm import __version__
from mesh_llm.api.types import StatusRequests
from mesh_llm.console.status import (
    Status,
    StatusCorrection,
    StatusCutOff,
    StatusListing,
    StatusModel,
    StatusPeer,
    StatusProblem,
    StatusPromptCaches,
    StatusSplit,
    StatusSplitWorker,
    StatusWaiting,
    StatusWaitingNode,
)
from mesh_llm.core.membership.names import tell_apart
from mesh_llm.core.node import Node
from mesh_llm.core.performance.calibration import PromptSpeed
from mesh_llm.core.placement.launches import Launch
from mesh_llm.core.routing.ranking import Awaited, HealthState, ModelRoute, health
from mesh_llm.core.split.outlook import Outlook
from mesh_llm.core.trust.circle import owner_of
from mesh_llm.core.trust.corrections import Correction, describe
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus, Role, SplitLayout, SplitShare
from mesh_llm.daemon.split_host import HostSession
from mesh_llm.daemon.split_worker import loaded, part_bytes
from mesh_llm.engine.spec import EnginePart
from mesh_llm.net.admission.records import InviteRecord, WaitingNode
from mesh_llm.runtime.supervision import Supervision
from mesh_llm.split.host.worker_info import SplitStats, WorkerStats
from mesh_llm.wire.codec import copied, fingerprint


def api_base(listen: str, port: int) -> str:
    """The API's URL for clients on this machine."""
    host = "127.0.0.1" if listen in {"0.0.0.0", "::", "localhost"} else listen  # noqa: S104 - compared, not bound
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


@dataclass(frozen=True, kw_only=True)
class DaemonInfo:
    """What the core does not know about its daemon; see console.status.Status for the fields."""

    mesh_name: str
    api_port: int
    api_base: str
    ollama_base: str = ""
    pid: int
    home: str


@dataclass(frozen=True, kw_only=True)
class StatusSources:
    """What the status is read from, besides the core.

    Attributes:
        invite: for this mesh; None if this node may not invite.
        scope_of: what a node may do in the mesh, this one included; empty if that is unknown.
        transport_of: what carries streams to a node, and why it is not TCP; empty without a connection.
        requests: the API's last minute.
        uptime: seconds.
        approvals: requests to join that wait for an answer.
        split: the split model.
        listing: the public listing.
        connected: nodes with a connection to this one.
        predict: predicted tokens per second of a model that this node serves alone.
        prompts: how fast a model reads prompts here, by its name.
        guessing: how a launch, by model and term, guesses tokens ahead, in words.
        lending: as in Machine.
        engine_parts: what is built for the engine on this machine.
        prompt_caches: the saved prompt caches; None where none are saved.
        needs_key: whether requests must carry a key.
        owner: the owner whose nodes count as this node's own; empty: nobody's.
        cut_off: who is refused for a while.
        problems: of other nodes: the hosts that this one distrusts.
    """

    invite: Callable[[], InviteRecord | None]
    requests: Callable[[], StatusRequests]
    uptime: Callable[[], float]
    approvals: Callable[[], Sequence[WaitingNode]] = tuple
    split: Callable[[], StatusSplit | None] = lambda: None
    listing: Callable[[], StatusListing] = StatusListing
    connected: Callable[[], Collection[NodeId]] = tuple
    predict: Callable[[Launch], float | None] = lambda _: None
    prompts: Callable[[str], PromptSpeed] = lambda _: PromptSpeed()
    guessing: Callable[[str, int], str] = lambda _model, _term: ""
    scope_of: Callable[[NodeId], str] = lambda _: ""
    transport_of: Callable[[NodeId], tuple[str, str]] = lambda _: ("", "")
    lending: Callable[[], str] = str
    engine_parts: Callable[[], tuple[EnginePart, ...]] = tuple
    prompt_caches: Callable[[], StatusPromptCaches | None] = lambda: None
    needs_key: Callable[[], bool] = lambda: False
    owner: Callable[[], str] = str
    cut_off: Callable[[], tuple[StatusCutOff, ...]] = tuple
    problems: Callable[[], tuple[StatusProblem, ...]] = tuple


PredictSplit = Callable[[ModelFacts, SplitLayout], float | None]
"""Predicts the tokens per second of a split model."""


class StatusBuilder:
    """Builds a Status on each call of `status`."""

    def __init__(
        self, node: Node, info: DaemonInfo, sources: StatusSources, supervision: Supervision | None = None
    ) -> None:
        self._node = node
        self._info = info
        self._sources = sources
        self._supervision = supervision or Supervision()

    def status(self) -> Status:
        """The state now."""
        node, info, sources = self._node, self._info, self._sources
        state = health(node.snapshot)
        names = {**_route_owners(node), **node.names}
        vision_models = _vision_models(node)
        invite = sources.invite()
        waiting = {one.model: _waiting(one, node.config.node) for one in node.split.outlooks}
        out = {node.split.group.model: tuple(node.split.left_out(node.members).values())}
        return Status(
            version=__version__,
            node_id=node.config.node,
            mesh_id=node.config.mesh,
            mesh_name=node.listing.mesh_name or info.mesh_name,
            name=names[node.config.node],
            role=node.role.value,
            ready=state.state is HealthState.READY,
            health=state.state.value,
            api_port=info.api_port,
            api_base=info.api_base,
            ollama_base=info.ollama_base,
            needs_key=sources.needs_key(),
            owner=sources.owner(),
            token=invite.token if invite is not None else "",
            uptime_s=round(sources.uptime(), 1),
            pid=info.pid,
            home=info.home,
            memory_bytes=node.capacity.memory_bytes,
            memory_total_bytes=node.capacity.memory_total_bytes,
            host_bytes=node.capacity.host_bytes,
            devices=node.capacity.devices,
            engine=node.capacity.engine,
            models=tuple(
                self._with_launch(_model(route, names, node.config.node, vision_models, waiting.get(route.name), out))
                for route in node.snapshot.models.values()
            ),
            peers=tuple(_peer(member, sources) for member in node.members) or _known_hosts(node),
            clients=0 if node.role is Role.CLIENT else len(set(sources.connected()) - names.keys()),
            split=sources.split(),
            listing=sources.listing(),
            requests=sources.requests(),
            yield_reason=node.yield_reason,
            lending=sources.lending(),
            engine_parts=sources.engine_parts(),
            waiting=tuple(waiting.values()),
            prompt_caches=sources.prompt_caches(),
            fingerprint=fingerprint(node.config.node),
            approvals=tuple(sources.approvals()),
            problems=self._problems(),
            corrections=tuple(shown_correction(one, names, node.config.epoch) for one in node.snapshot.corrections),
            scope=sources.scope_of(node.config.node),
            token_scope=invite.scope if invite is not None else "",
            cut_off=sources.cut_off(),
        )

    def _problems(self) -> tuple[StatusProblem, ...]:
        now = self._supervision.now
        own = tuple(
            StatusProblem(what=one.what, text=one.text, since_s=round(now - one.since, 1), times=one.times)
            for one in self._supervision.problems
        )
        return (*own, *self._sources.problems())

    def _with_launch(self, model: StatusModel) -> StatusModel:
        """Add what only this node knows: of its launch, and of the requests that wait for the model."""
        launch = next((one for one in self._node.launches if one.model == model.name), None)
        waiting = self._node.waiting.get(ModelName(model.name))
        if waiting is not None:
            state = self._node.snapshot.awaited.get(ModelName(model.name), Awaited())
            text = state.problem or state.problem_here or state.text
            model = msgspec.structs.replace(model, waiting=waiting, awaited=text)
        if launch is not None and launch.status is ModelStatus.WARM:
            due = self._node.unload_at(launch)
            at = None if due is None else round(self._node.config.epoch + due, 1)
            guessing = self._sources.guessing(launch.model, launch.term)
            pinned = self._node.is_pinned(launch.model)
            model = msgspec.structs.replace(model, pinned=pinned, unload_at=at, speculation=guessing)
        if launch is not None and launch.status is ModelStatus.FAILED and launch.restart_at is not None:
            return msgspec.structs.replace(model, retry_at=round(self._node.config.epoch + launch.restart_at, 1))
        if (
            launch is None
            or not model.here
            or launch.status is not ModelStatus.WARM
            or launch.order.plan.split is not None
        ):
            return model
        measured = self._node.speeds.get(model.name)
        plan, prompts = launch.order.plan, self._sources.prompts(model.name)
        return msgspec.structs.replace(
            model,
            predicted_tps=self._sources.predict(launch),
            measured_tps=measured,
            predicted_prompt_tps=_shown(prompts.predicted),
            measured_prompt_tps=_shown(prompts.measured),
            prompt_tokens=prompts.tokens,
            cache_type=plan.cache_type,
            offload=plan.offload.text(launch.order.facts.layers) if plan.offload is not None else "",
            device_bytes=plan.memory_bytes,
            host_bytes=plan.host_bytes,
        )


def shown_correction(one: Correction, names: Mapping[NodeId, str], epoch: float) -> StatusCorrection:
    """A correction as it is shown. `names`: of nodes; `epoch`: UNIX seconds when the node's clock showed 0."""
    name = names.get(one.node) or one.node[:10]
    return StatusCorrection(
        node_id=one.node,
        name=name,
        model=one.model,
        kind=one.kind.value,
        announced=one.announced,
        seen=round(one.seen, 2),
        at=round(epoch + one.at, 1),
        until=round(epoch + one.until, 1),
        times=one.times,
        text=describe(one, name),
    )


def _vision_models(node: Node) -> set[ModelName]:
    """Models that take images: a node that has them on disk announces a companion file."""
    disks: Iterable[Iterable[ModelFacts]] = (
        node.on_disk.values(),
        *(member.announcement.on_disk for member in node.members),
    )
    return {facts.name for disk in disks for facts in disk if facts.companion_bytes}


def _known_hosts(node: Node) -> tuple[StatusPeer, ...]:
    """The nodes that a client knows from its routes, with what they serve."""
    if node.role is not Role.CLIENT:
        return ()
    serving: dict[NodeId, list[ModelName]] = {}
    round_trips: dict[NodeId, float] = {}
    for route in node.snapshot.models.values():
        for target in route.targets:
            if target.status is ModelStatus.WARM:
                serving.setdefault(target.node, []).append(route.name)
                round_trips[target.node] = target.rtt_ms
    owners = tell_apart(dict.fromkeys(serving, "") | _route_owners(node))
    return tuple(
        StatusPeer(
            node_id=host,
            name=owners[host],
            role=Role.SERVE.value,
            state="alive",
            serving=tuple(models),
            rtt_ms=round(round_trips[host], 3),
            owner=owner_of(host, node.snapshot.owners, time.time()) or "",
        )
        for host, models in sorted(serving.items())
    )


def _route_owners(node: Node) -> dict[NodeId, str]:
    """The names of nodes that a client knows from its routes: a route has the name of its first node only."""
    if node.role is not Role.CLIENT:
        return {}
    routes = node.snapshot.models.values()
    return {route.targets[0].node: route.owner for route in routes if len(route.targets) == 1}


def _waiting(outlook: Outlook, me: NodeId) -> StatusWaiting:
    """The sentence for this node's user that says why a model is not split."""
    return StatusWaiting(
        model=outlook.model,
        reason=outlook.sentence(me),
        need_bytes=outlook.need_bytes,
        alone_bytes=outlook.alone_bytes,
        have_bytes=outlook.have_bytes,
        nodes=tuple(
            StatusWaitingNode(
                node_id=one.node,
                name=one.name,
                memory_bytes=one.memory_bytes,
                takes_part=not one.obstacle,
                obstacle=one.obstacle,
                reason=outlook.why(one, me),
            )
            for one in outlook.participants
        ),
    )


def _model(
    route: ModelRoute,
    names: Mapping[NodeId, str],
    me: NodeId,
    vision_models: Collection[ModelName],
    waiting: StatusWaiting | None,
    left_out: Mapping[ModelName | None, tuple[str, ...]],
) -> StatusModel:
    hosts = [target for target in route.targets if target.status is ModelStatus.WARM]
    return StatusModel(
        name=route.name,
        status=route.status.value,
        left_out=left_out.get(route.name, ()),
        hosts=tuple(names.get(target.node) or target.node[:12] for target in hosts),
        host_ids=tuple(target.node for target in hosts),
        nodes=len(hosts),
        context=route.context,
        slots=sum(target.slots for target in hosts),
        size_bytes=route.size_bytes,
        reason=waiting.reason if waiting is not None and route.status is ModelStatus.COLD else route.reason,
        here=any(target.node == me for target in route.targets),
        vision=route.name in vision_models,
    )


def _peer(member: Member, sources: StatusSources) -> StatusPeer:
    """A member as its status: fields of the same name are those of its announcement."""
    announcement = member.announcement
    capacity = announcement.capacity
    transport, reason = sources.transport_of(announcement.node)
    signed = {announcement.node: announcement.ownership} if announcement.ownership is not None else {}
    return copied(
        StatusPeer,
        announcement,
        node_id=announcement.node,
        name=member.label,
        role=announcement.role.value,
        state="suspect" if member.suspect else "alive",
        serving=tuple(serving.model for serving in announcement.serving if serving.status is ModelStatus.WARM),
        rtt_ms=round(member.rtt_ms, 3),
        path=member.path,
        memory_bytes=capacity.memory_bytes,
        memory_total_bytes=capacity.memory_total_bytes,
        devices=capacity.devices,
        engine=capacity.engine,
        scope=sources.scope_of(announcement.node),
        transport=transport,
        transport_reason=reason,
        owner=owner_of(announcement.node, signed, time.time()) or "",
    )


def split_status(
    node: Node,
    session: HostSession | None,
    tokens: Callable[[str], int],
    predict: PredictSplit = lambda _facts, _layout: None,
    prompts: Callable[[str], PromptSpeed] = lambda _: PromptSpeed(),
) -> StatusSplit | None:
    """The split model that this node takes part in, or one that others announce.

    Args:
        node: this node.
        session: the open tunnels; None if this node is not the host.
        tokens: how many tokens a model has generated here since the daemon began.
        predict: predicted tokens per second of a model that this node hosts.
        prompts: how fast a model reads prompts here, by its name.
    """
    found = node.split.layout(node.members)
    if found is None:
        return None
    model, layout = found
    mine = session if session is not None and session.layout == layout else None
    stats = mine.stats if mine is not None else None
    generated = tokens(model) - (mine.tokens_before if mine is not None else 0)
    facts = node.on_disk.get(model)
    speed = _speed(node, model, layout.host.node)
    predicted = predict(facts, layout) if mine is not None and facts is not None else None
    # After `predict`, which makes the forecast that both come from.
    read = prompts(model) if mine is not None else PromptSpeed()
    return StatusSplit(
        model=model,
        host=layout.host.node,
        term=layout.term,
        ratio=_ratio(layout, layout.host),
        layers=layout.host.layers,
        workers=tuple(_worker(node, layout, share, mine, stats) for share in layout.workers),
        round_trips_per_token=round(stats.total.round_trips / generated, 2)
        if stats is not None and generated
        else None,
        predicted_tps=predicted,
        measured_tps=speed or None,
        predicted_prompt_tps=_shown(read.predicted),
        measured_prompt_tps=_shown(read.measured),
        prompt_tokens=read.tokens,
        wire=mine.wire_text if mine is not None else "",
        groups=len(mine.all) if mine is not None else 0,
        groups_planned=layout.groups if mine is not None else 0,
        groups_why=layout.groups_why if mine is not None else "",
    )


def _shown(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


def _worker(
    node: Node, layout: SplitLayout, share: SplitShare, session: HostSession | None, stats: SplitStats | None
) -> StatusSplitWorker:
    member = next((one for one in node.members if one.announcement.node == share.node), None)
    name = next((name for name, known in session.names.items() if known == share.node), "") if session else ""
    done = stats.workers.get(name, WorkerStats()) if stats is not None else WorkerStats()
    pairs = [pair.reachable for pair in stats.pairs if pair.source == name] if stats is not None else []
    return StatusSplitWorker(
        node_id=share.node,
        name=member.label if member is not None else node.names.get(share.node, ""),
        ratio=_ratio(layout, share),
        layers=share.layers,
        memory_bytes=share.memory_bytes,
        rtt_ms=round(member.rtt_ms, 3) if member is not None else 0.0,
        direct_push=all(pairs) if pairs else None,
        weight_bytes_sent=done.weight_bytes_sent,
        weight_bytes_by_reference=done.weight_bytes_referenced,
        relayed=done.relayed,
        loaded=_loaded(session, share, done),
    )


def _loaded(session: HostSession | None, share: SplitShare, done: WorkerStats) -> float | None:
    if session is None:
        return None
    return 1.0 if session.loading.ended else round(loaded(done, part_bytes(session.facts, share.layers)), 3)


def _ratio(layout: SplitLayout, share: SplitShare) -> float:
    return round(share.layers / max(1, sum(one.layers for one in layout.shares)), 4)


def _speed(node: Node, model: ModelName, host: NodeId) -> float:
    """Tokens per second of one request, as the host measured it. Other nodes know it from its announcement."""
    if host == node.config.node:
        return node.speeds.get(model, 0.0)
    served = (one for member in node.members if member.announcement.node == host for one in member.announcement.serving)
    return next((one.tokens_per_second for one in served if one.model == model), 0.0)
