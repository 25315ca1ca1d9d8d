"""What a node is told about itself before it begins. Plain values: the first line of a journal."""

import msgspec

from mesh_llm.core.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.model import LaunchOptions, Role
from mesh_llm.core.pace import Pace
from mesh_llm.core.publicity import Publicity
from mesh_llm.core.restart import RestartPolicy
from mesh_llm.core.split_word import MAX_ROUND_TRIP_MS
from mesh_llm.core.yielding import YieldPolicy


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Periods and limits of a node's own decisions, in seconds unless said otherwise.

    Attributes:
        publish_urgent: least time between announcements when what is served changes.
        publish_soft: least time between announcements when only load or demand changes.
        routes: least time between looks at other nodes' words, per hundred of them.
        settle: how long a joiner listens after the first peer before it takes a model.
        promotion_base: how long a gap must last before the first standby node fills it.
        promotion_step: how much longer each next one in rendezvous order waits, so that it hears of the one before.
        demotion_drain: how long requests may take to end when a model is given up.
        demotion_idle: how long an assigned model must be unused here before its node stands back.
        demand_time_constant: over how long demand is remembered.
        demand_per_host: requests per minute and host above which one more host is called for.
        target_block: for how long a target that failed a request is not routed to; doubles up to `target_block_most`.
        target_block_most: longest such block.
        doubt_grace: for how long a doubted node is still used where nobody else serves a model.
        stop_grace: how long after the drain the node waits for engines to end before it finishes without them.
        retry_assignment: how often a joiner that got nothing looks again.
        split_settle: for how long a new form of a split group must be the best one before its host takes it.
        listing_settle: how long a node looks around before it lists its mesh.
        listing_refresh: how often an unchanged listing is published again; it expires after twice as long.
        listing_changes: how many changes of a listing may be published in that time.
        split_grace: for how long a doubted node of a split group is still counted on.
    """

    publish_urgent: float = 0.2
    publish_soft: float = 5.0
    routes: float = 0.1
    settle: float = 1.5
    promotion_base: float = 1.0
    promotion_step: float = 5.0
    demotion_idle: float = 600.0
    demotion_drain: float = 30.0
    demand_time_constant: float = 60.0
    demand_per_host: float = 60.0
    target_block: float = 2.0
    target_block_most: float = 30.0
    doubt_grace: float = 1.0
    stop_grace: float = 5.0
    retry_assignment: float = 5.0
    split_settle: float = 1.0
    split_grace: float = 1.5
    listing_settle: float = 2.0
    listing_refresh: float = 60.0
    listing_changes: int = 6


class SplitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user fixed by hand about split models.

    Attributes:
        asked: split the first model even where it fits one node (`--split`).
        shares: relative parts of the host and the workers after it (`--tensor-split`); empty: by memory.
        max_rtt_ms: longest round trip to a node that this one pairs with (`--max-rtt`).
    """

    asked: bool = False
    shares: tuple[float, ...] = ()
    max_rtt_ms: float = MAX_ROUND_TRIP_MS


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node's fixed facts.

    Attributes:
        node: who it is.
        mesh: the mesh it belongs to.
        name: human name.
        role: SERVE, or CLIENT for a passive node.
        version: mesh-llm version.
        incarnation: life number; a restart must use a higher one (UNIX milliseconds do).
        wanted: `--model`, as served names, in order; the node serves the first.
        joins: it joins a mesh that others made: without `wanted` it is assigned a model.
        brings: a model of its own is still to be fetched: it is not assigned one.
        options: what the user fixed by hand for launches.
        epoch: UNIX seconds at `now` == 0, for time stamps that people see.
        can_fetch: models that are not on disk can be had.
        shares: this node gives its models' files to others of the mesh.
        timings: periods of decisions.
        pace: how often and how patiently nodes watch each other.
        restart: how engines that die are restarted.
        split: about split models.
        yields: when the machine is given back to its owner.
        publicity: the user's wish that the mesh be listed (`--publish`).
    """

    node: NodeId
    mesh: MeshId
    name: str = ""
    role: Role = Role.SERVE
    version: str = ""
    incarnation: Incarnation = Incarnation(1)
    wanted: tuple[ModelName, ...] = ()
    joins: bool = False
    brings: bool = False
    options: LaunchOptions = LaunchOptions()
    epoch: float = 0.0
    can_fetch: bool = False
    shares: bool = False
    timings: Timings = Timings()
    pace: Pace = Pace()
    restart: RestartPolicy = RestartPolicy()
    split: SplitOptions = SplitOptions()
    yields: YieldPolicy = YieldPolicy()
    publicity: Publicity | None = None
