"""Puts together what a node says of itself to its own user."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from mesh_llm import __version__
from mesh_llm.api.types import StatusRequests
from mesh_llm.console.schema import Status, StatusListing, StatusModel, StatusPeer, StatusProblem, StatusSplit
from mesh_llm.core.node import Node
from mesh_llm.core.placement.launches import Launch
from mesh_llm.core.routing.ranking import HealthState, ModelRoute, health
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus, Role
from mesh_llm.net.admission.records import WaitingNode
from mesh_llm.runtime.supervision import Supervision
from mesh_llm.wire.codec import fingerprint


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the core does not know of its own daemon; see core.status.Status for the fields' meaning."""

    mesh_name: str
    api_port: int
    api_base: str
    pid: int
    home: str
    lending: str = ""


class StatusMaker:
    """Makes a Status from the node and its surroundings, whenever asked."""

    def __init__(
        self,
        node: Node,
        surroundings: Surroundings,
        *,
        token: Callable[[], str],
        requests: Callable[[], StatusRequests],
        uptime: Callable[[], float],
        approvals: Callable[[], tuple[WaitingNode, ...]] = tuple,
        split: Callable[[], StatusSplit | None] = lambda: None,
        listing: Callable[[], StatusListing] = StatusListing,
        connected: Callable[[], Collection[NodeId]] = tuple,
        foresee: Callable[[Launch], float | None] = lambda _: None,
        supervision: Supervision | None = None,
    ) -> None:
        """`token`: an invite for this mesh; `requests`: the front door's last minute; `uptime`: seconds.

        `connected`: nodes with a connection to this one; `foresee`: tokens per second that were foreseen of a model
        that this node serves alone; `supervision`: what does not work.
        """
        self._node = node
        self._surroundings = surroundings
        self._token = token
        self._requests = requests
        self._uptime = uptime
        self._split = split
        self._approvals = approvals
        self._listing = listing
        self._connected = connected
        self._foresee = foresee
        self._supervision = supervision or Supervision()

    def status(self) -> Status:
        """The state now."""
        node, around = self._node, self._surroundings
        state = health(node.snapshot)
        names = {member.announcement.node: member.announcement.name for member in node.members}
        names[node.config.node] = node.config.name
        seeing = _seeing(node)
        return Status(
            version=__version__,
            node_id=node.config.node,
            mesh_id=node.config.mesh,
            mesh_name=node.lister.mesh_name or around.mesh_name,
            name=node.config.name,
            role=node.role.value,
            ready=state.state is HealthState.READY,
            health=state.state.value,
            api_port=around.api_port,
            api_base=around.api_base,
            token=self._token(),
            uptime_s=round(self._uptime(), 1),
            pid=around.pid,
            home=around.home,
            memory_bytes=node.capacity.memory_bytes,
            memory_total_bytes=node.capacity.memory_total_bytes,
            devices=node.capacity.devices,
            engine=node.capacity.engine,
            models=tuple(
                self._with_launch(_model(route, names, node.config.node, seeing))
                for route in node.snapshot.models.values()
            ),
            peers=tuple(_peer(member) for member in node.members) or _hosts(node),
            clients=0 if node.role is Role.CLIENT else len(set(self._connected()) - names.keys()),
            split=self._split(),
            listing=self._listing(),
            requests=self._requests(),
            yield_reason=node.yield_reason,
            lending=around.lending,
            fingerprint=fingerprint(node.config.node),
            approvals=self._approvals(),
            problems=self._problems(),
        )

    def _problems(self) -> tuple[StatusProblem, ...]:
        now = self._supervision.now
        return tuple(
            StatusProblem(what=one.what, text=one.text, since_s=round(now - one.since, 1), times=one.times)
            for one in self._supervision.problems
        )

    def _with_launch(self, model: StatusModel) -> StatusModel:
        """The model with what was foreseen of it and what came, where this node serves all of it; or when it tries."""
        launch = next((one for one in self._node.launches if one.model == model.name), None)
        if launch is not None and launch.status is ModelStatus.FAILED and launch.restart_at is not None:
            return msgspec.structs.replace(model, retry_at=round(self._node.config.epoch + launch.restart_at, 1))
        if (
            launch is None
            or not model.here
            or launch.status is not ModelStatus.WARM
            or launch.order.plan.split is not None
        ):
            return model
        came = self._node.speeds.get(model.name)
        return msgspec.structs.replace(model, predicted_tps=self._foresee(launch), measured_tps=came)


def _seeing(node: Node) -> set[ModelName]:
    """Models that take images: whoever has them on disk tells of something that is loaded beside them."""
    disks: Iterable[Iterable[ModelFacts]] = (
        node.on_disk.values(),
        *(member.announcement.on_disk for member in node.members),
    )
    return {facts.name for disk in disks for facts in disk if facts.companion_bytes}


def _hosts(node: Node) -> tuple[StatusPeer, ...]:
    """What a passive node knows of others: who serves what, by its routes."""
    if node.role is not Role.CLIENT:
        return ()
    serving: dict[NodeId, list[ModelName]] = {}
    round_trips: dict[NodeId, float] = {}
    owners: dict[NodeId, str] = {}
    for route in node.snapshot.models.values():
        for target in route.targets:
            if target.status is ModelStatus.WARM:
                serving.setdefault(target.node, []).append(route.name)
                round_trips[target.node] = target.rtt_ms
        if len(route.targets) == 1:
            owners[route.targets[0].node] = route.owner
    return tuple(
        StatusPeer(
            node_id=host,
            name=owners.get(host, ""),
            role=Role.SERVE.value,
            state="alive",
            serving=tuple(models),
            rtt_ms=round(round_trips[host], 3),
        )
        for host, models in sorted(serving.items())
    )


def _model(route: ModelRoute, names: Mapping[NodeId, str], me: NodeId, seeing: Collection[ModelName]) -> StatusModel:
    hosts = [target for target in route.targets if target.status is ModelStatus.WARM]
    return StatusModel(
        name=route.name,
        status=route.status.value,
        hosts=tuple(names.get(target.node) or target.node[:12] for target in hosts),
        host_ids=tuple(target.node for target in hosts),
        nodes=len(hosts),
        context=route.context,
        slots=sum(target.slots for target in hosts),
        size_bytes=route.size_bytes,
        reason=route.reason,
        here=any(target.node == me for target in route.targets),
        vision=route.name in seeing,
    )


def _peer(member: Member) -> StatusPeer:
    word = member.announcement
    return StatusPeer(
        node_id=word.node,
        name=word.name,
        role=word.role.value,
        state="suspect" if member.suspect else "alive",
        serving=tuple(serving.model for serving in word.serving if serving.status is ModelStatus.WARM),
        memory_bytes=word.capacity.memory_bytes,
        rtt_ms=round(member.rtt_ms, 3),
        path=member.path,
        version=word.version,
        devices=word.capacity.devices,
        engine=word.capacity.engine,
        memory_total_bytes=word.capacity.memory_total_bytes,
    )
