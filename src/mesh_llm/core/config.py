"""Configuration of a node: plain values that do not change while it runs. The first line of its journal."""

import math
from typing import Literal

import msgspec

from mesh_llm.core.types.announcement import MAX_ROUND_TRIP_MS, ListingPolicy, LoadScope, Ownership
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import AUTO_WIRE, LaunchOptions, ModelFacts, Role, WireFormat
from mesh_llm.core.types.model_settings import ModelSettings, settings_of


class MembershipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Periods and limits of membership, in seconds unless said otherwise.

    The defaults suit a LAN and a WAN alike, because waits scale with the round trip. SWIM (2002) and Lifeguard (2018)
    explain the terms.

    Attributes:
        step: between two exchanges that a node starts, each with the next member of a shuffled round.
        burst: exchanges that urgent news may start ahead of their time; later ones pay for them.
        spacing: least time between two exchanges started.
        patience: shortest wait for an answer.
        impatience: longest wait for an answer, before local health is counted in. A slower answer counts until the last
            stage of the probe has failed: about three times as late.
        dial: added to a wait where no connection is known to stand.
        relays: members asked for an indirect probe.
        suspicion: shortest time between suspicion and death, in a mesh of up to ten; grows with log10 of its size.
        stretch: how many times longer that takes while nobody else confirms.
        confirmations: independent accusers after which the shortest time holds.
        tombstone: how long dead nodes and nodes that left are remembered.
        retransmit: times that each node passes a verdict on, times log10 of the mesh's size.
        eager: times that each node pushes an announcement whole that is new to it.
        numbered: times that it sends only its digest after that.
        window: digests per exchange.
        entries: most announcements per message.
        entry_bytes: most bytes of others' announcements per message.
        verdicts: most verdicts per message.
        check: between two checks of doubtful members that hearsay caused, on average.
        checks: as many may be made at once.
        introductions: members to which a newcomer introduces itself as soon as it hears of them.
        retry_first, retry_most: between attempts to reach a member directly that only others reach; doubles.
        heal_first, heal_most: between attempts to reach members that died; doubles.
        rejoin_first, rejoin_most: the same for a node without any peer.
        former: dead members that are still tried.
        members: most members and tombstones.
        paths: most connections remembered.
        late: a deadline missed by more than this means that this node slept or was starved, not the others.
        immune_after: refutations after which hearsay about a node is checked before it is believed.
        immune_for: how long that holds.
        soft: least time between announcements that differ only in load, per member of the mesh.
    """

    step: float = 0.4
    burst: int = 3
    spacing: float = 0.05
    patience: float = 0.4
    impatience: float = 0.8
    dial: float = 1.0
    relays: int = 3
    suspicion: float = 4.0
    stretch: float = 3.0
    confirmations: int = 3
    tombstone: float = 900.0
    retransmit: float = 4.0
    eager: int = 3
    numbered: int = 2
    window: int = 32
    entries: int = 24
    entry_bytes: int = 24 * 1024
    verdicts: int = 24
    check: float = 0.05
    checks: float = 32.0
    introductions: int = 16
    retry_first: float = 1.0
    retry_most: float = 60.0
    heal_first: float = 2.0
    heal_most: float = 30.0
    rejoin_first: float = 1.0
    rejoin_most: float = 60.0
    former: int = 64
    members: int = 4096
    paths: int = 4096
    late: float = 1.0
    immune_after: int = 3
    immune_for: float = 60.0
    soft: float = 0.05

    def retransmissions(self, size: int) -> int:
        """How many times each node of a mesh of `size` passes a verdict on (SWIM's lambda log n)."""
        return math.ceil(self.retransmit * max(1.0, math.log10(size + 1)))


class Timings(msgspec.Struct, frozen=True, kw_only=True):
    """Periods and limits of a node's own decisions, in seconds unless said otherwise.

    Attributes:
        publish_urgent: least time between announcements when what is served changes.
        publish_soft: least time between announcements when only load or demand changes.
        routes: least time between two evaluations of other nodes' announcements, per hundred of them.
        settle: how long a joiner listens after the first peer before it takes a model.
        promotion_base: how long a gap must last before the first standby node fills it.
        promotion_step: how much longer each next node in rendezvous order waits, so that it hears of the one before.
        demotion_drain: how long requests may take to end when a model is evicted.
        demotion_idle: how long an assigned model must be unused here before it is evicted.
        demand_time_constant: over how long demand is remembered.
        demand_per_host: requests per minute and host above which one more host is needed.
        target_block: how long a target that failed a request gets no requests; doubles up to `target_block_most`.
        target_block_most: longest such block.
        doubt_grace: how long a suspect is still used where nobody else serves a model.
        stop_grace: how long the node waits for engines after the drain before it finishes without them.
        retry_assignment: how often a joiner without a model tries again.
        split_settle: how long a new layout of a split group must be the best one before its host takes it.
        listing_settle: how long a node waits before it lists its mesh.
        listing_refresh: how often an unchanged listing is published again; it expires after twice as long.
        listing_changes: how many changes of a listing may be published in that time.
        split_grace: how long a suspect of a split group keeps its part.
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


MINUTES_A_DAY = 24 * 60


class RestartPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When an engine that ended unasked is started again. Times in seconds.

    Attributes:
        first_delay: before the first restart.
        factor: each further delay is this many times as long.
        longest_delay: no delay is longer.
        window: only deaths within this time count together.
        deaths: this many deaths within the window are a crash loop.
        never_ready: this many launches in a row that died while loading are a crash loop, too.
        first_pause: how long a model is given up after its first crash loop; each further crash loop doubles it.
        longest_pause: no pause is longer.
        calm: this long after a pause without another crash loop, the next pause is `first_pause` again.
    """

    first_delay: float = 0.5
    factor: float = 2.0
    longest_delay: float = 30.0
    window: float = 120.0
    deaths: int = 4
    never_ready: int = 2
    first_pause: float = 60.0
    longest_pause: float = 3600.0
    calm: float = 1800.0


class YieldPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """When the node yields its machine to its owner (`--yield`). The default never yields.

    Attributes:
        load: yield while other programs use more than this part of the processors, 0.0 to 1.0; 0.0: ignore load.
        battery: yield while the machine runs on battery.
        fullscreen: yield while a program fills the screen.
        schedule: yield within these spans of local time, (begin, end) in minutes of the day, end excluded. A span may
            pass midnight.
        patience: seconds that a load must last before it counts.
        back_after: seconds without any reason before the node serves again. The end of a schedule needs none.
        drain: seconds that requests in progress may take before they are cut or moved.
    """

    load: float = 0.0
    battery: bool = False
    fullscreen: bool = False
    schedule: tuple[tuple[int, int], ...] = ()
    patience: float = 4.0
    back_after: float = 30.0
    drain: float = 5.0

    @property
    def watches(self) -> bool:
        """Whether any reason to yield is configured."""
        return bool(self.load or self.battery or self.fullscreen or self.schedule)


class OnDemandPolicy(msgspec.Struct, frozen=True, kw_only=True):
    """Which models the node loads because somebody asks for them, and when it unloads what nobody asks for.

    A model's own settings (`ttl`, `pin`, `min_lifetime` of ModelSettings) come before the rules here.

    Attributes:
        scope: for whom (`--on-demand`).
        hub: models of the catalogue that are on no disk are fetched, too (`--fetch-on-demand`).
        catalogue: with `hub`: those models.
        pinned: models that are never unloaded to make room or because they are idle (`--pin`).
        ttl: seconds without a request after which a model is unloaded (`--ttl`); 0: never; None: after `idle`, and only
            a model that no user asked to serve here.
        idle: see `ttl`.
        min_lifetime: seconds after its load in which a model is not unloaded to make room (`--min-lifetime`); None: as
            long as its load took, at least `shortest` and at most `longest`.
        shortest, longest: see `min_lifetime`.
        turn_loads: a model that is being used goes on for as long as so many of its loads take, while another one
            waits for its memory.
        longest_turn: but not for more seconds, unless its `min_lifetime` is longer.
        contended: seconds for which turns are twice as long after a model was asked for again within two turns of being
            unloaded for another one.
        linger: seconds after a request in which its model counts as used.
        refused: seconds for which a node that could not load a model is not asked again.
    """

    scope: LoadScope = "off"
    hub: bool = False
    catalogue: tuple[ModelFacts, ...] = ()
    pinned: tuple[str, ...] = ()
    ttl: float | None = None
    idle: float = 1800.0
    min_lifetime: float | None = None
    shortest: float = 1.0
    longest: float = 60.0
    turn_loads: float = 4.0
    longest_turn: float = 120.0
    contended: float = 300.0
    linger: float = 1.0
    refused: float = 15.0


class SplitOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the user fixed by hand about split models.

    Attributes:
        asked: split the first model even where it fits one node (`--split`).
        shares: relative parts of the host and the workers after it (`--tensor-split`); empty: by memory.
        max_rtt_ms: longest round trip to a node that this one pairs with (`--max-rtt`).
        groups: most engines over a split model that this node hosts (`--groups`); None: as many as pay.
        wire: how activations travel where this node is the host (`--wire`): a WireFormat, or `auto`.
    """

    asked: bool = False
    shares: tuple[float, ...] = ()
    max_rtt_ms: float = MAX_ROUND_TRIP_MS
    groups: int | None = None
    wire: WireFormat | Literal["auto"] = AUTO_WIRE


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One node's configuration.

    Attributes:
        node: its id.
        mesh: its mesh's id.
        name: human name.
        role: SERVE, or CLIENT for a passive node.
        version: mesh-llm version.
        incarnation: life number; a restart must use a higher one (UNIX milliseconds do).
        wanted: `--model`, as served names, in order; the node serves the first.
        joins: it joins a mesh that exists: without `wanted` it is assigned a model.
        brings: its own model is still being fetched, so it is assigned none.
        options: what the user fixed by hand for launches.
        models: settings of single models at the start, by name; `LocalModels.settings_of` has the present ones.
        epoch: UNIX seconds at `now` == 0, for time stamps that people see.
        can_fetch: models that are not on disk may be fetched.
        shares: it gives its models' files to other members.
        timings: periods of decisions.
        pace: periods and limits of membership.
        restart: how engines that die are restarted.
        split: what the user fixed by hand about split models.
        yields: when it yields the machine to its owner.
        publicity: the user's wish that the mesh be listed (`--publish`).
        marks_listings: all invites that this node published have the mark of public ones.
        on_demand: models that are loaded because somebody asks for them.
        ownership: whose node this is.
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
    models: dict[str, ModelSettings] = {}
    epoch: float = 0.0
    can_fetch: bool = False
    shares: bool = False
    timings: Timings = Timings()
    pace: MembershipConfig = MembershipConfig()
    restart: RestartPolicy = RestartPolicy()
    split: SplitOptions = SplitOptions()
    yields: YieldPolicy = YieldPolicy()
    publicity: ListingPolicy | None = None
    marks_listings: bool = False
    on_demand: OnDemandPolicy = OnDemandPolicy()
    ownership: Ownership | None = None

    def settings_of(self, model: ModelName) -> ModelSettings:
        """The settings of a model at the start of the node."""
        return settings_of(model, self.models)
