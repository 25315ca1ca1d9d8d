"""What a daemon needs to say how fast things will be: this machine's speed, the ways to others, and the planner."""

from collections.abc import Callable
from contextlib import AsyncExitStack

from mesh_llm.core.events import AnyEvent
from mesh_llm.core.ids import NodeId
from mesh_llm.core.node import Node
from mesh_llm.core.speed import Speed
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.measuring import LinkMeter
from mesh_llm.daemon.planner import Planner
from mesh_llm.daemon.speeds import SpeedMeter
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.measure import Facts


class Foresight:
    """Made before the mesh is started; ended by the stack."""

    def __init__(
        self,
        net: MeshNet,
        node: Node,
        machine: Machine,
        home: Home,
        post: Callable[[AnyEvent], None],
        changed: Callable[[], None],
        stack: AsyncExitStack,
    ) -> None:
        """`changed`: the status would say something new."""
        self._speeds = SpeedMeter(home, machine, post)

        def facts(speed: Speed) -> Facts:
            trips = {member.announcement.node: member.rtt_ms for member in node.members if member.rtt_ms}
            takes = node.config.can_fetch
            return Facts(speed=speed, round_trips=trips, free_bytes=node.free_bytes, takes=takes)

        meter = LinkMeter(net, self._speeds, facts)

        def may_share(other: NodeId) -> bool:
            scope = net.scope_of(other)
            return scope is not None and scope >= Scope.SPLIT

        self._node = node
        self.planner = Planner(node, machine.shelf, self._speeds, meter, may_share, changed)
        stack.push_async_callback(self._speeds.close)
        stack.push_async_callback(self.planner.close)
        if machine.source is not None:
            meter.register()

    def begin(self, traffic: TrafficMeter) -> None:
        """The core may be told; from now on what comes is learned from."""
        self._speeds.begin(traffic.busy)
        traffic.observe = self._came

    def _came(self, model: str, tokens: int, seconds: float) -> None:
        """An answer of this node's own engine took so long, and had the machine for itself."""
        launch = next((one for one in self._node.launches if one.model == model), None)
        if launch is not None:
            self.planner.came(launch, seconds / tokens)
