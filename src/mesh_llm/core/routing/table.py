"""The routing table: builds the routing snapshot from this node's models and the other nodes' announcements.

A new snapshot is given out only when it routes differently from the one before.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.membership.names import names_of, own_label
from mesh_llm.core.routing.circuit_breaker import CircuitBreaker, LaunchId, SuspectGrace
from mesh_llm.core.routing.ranking import Awaited, ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.announcement import Announcement, Member, Ownership, Serving
from mesh_llm.core.types.events import LoadAnswered, TargetFailed
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelKind, ModelStatus

_BY_PREFERENCE = (ModelStatus.WARM, ModelStatus.LOADING, ModelStatus.STOPPING, ModelStatus.FAILED, ModelStatus.COLD)
_ROUTABLE = {ModelStatus.WARM, ModelStatus.LOADING}
_UNREACHABLE = "its host does not answer at the moment"

_CLIENT = "This node lends nothing, because it is a client: start it without --client to help."

_GRANTED_SECONDS = 10.0
"""For how long a node's word counts that its announcement does not confirm."""

_MAX_GONE = 256
"""Models that nobody has any more, and that keep their time of creation in case they come back."""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One model on one node, this or another.

    Attributes:
        node: serves the model.
        owner: the node's name for people.
        serving: the model's state there.
        local: True for this node.
        address: `host:port` of the local engine once it is warm.
        rtt_ms: round trip; 0.0 for local.
        workers: other nodes that compute layers of it.
        suspect: the node is suspect: used only where no other node serves the model.
        blocked: a request to it failed, or it has been suspect for too long: not used.
    """

    node: NodeId
    owner: str
    serving: Serving
    local: bool = False
    address: str = ""
    rtt_ms: float = 0.0
    workers: tuple[NodeId, ...] = ()
    suspect: bool = False
    blocked: bool = False


class RoutingTable:
    """Owns the current snapshot, the circuit breaker, and the decision whether a rebuild is due."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        timings = config.timings
        self._breaker = CircuitBreaker[tuple[NodeId, ModelName]](timings.target_block, timings.target_block_most)
        self._suspects = SuspectGrace(timings.doubt_grace)
        self._created: dict[ModelName, int] = {}
        self._granted: dict[tuple[NodeId, ModelName], tuple[Serving, float]] = {}
        self._fetched: RoutingSnapshot | None = None
        self.snapshot = RoutingSnapshot(version=0, node=config.node)
        self.stale = True

    @property
    def learned(self) -> bool:
        """Whether a passive node has fetched another node's table."""
        return self._fetched is not None

    def learn(self, snapshot: RoutingSnapshot) -> None:
        """Keep the table that this passive node fetched from another node."""
        self._fetched = snapshot
        self.stale = True

    def block(self, node: NodeId, model: ModelName, launch: LaunchId, now: float) -> None:
        """A launch failed a request: send it none for a while."""
        self._breaker.trip((node, model), launch, now)
        self.stale = True

    def target_failed(self, event: TargetFailed, members: Sequence[Member], now: float) -> None:
        """A launch on another node failed a request. An event without a term means the launch that is known here."""
        incarnation, term = Incarnation(0), event.term
        for member in members:
            if member.announcement.node == event.node:
                incarnation = member.announcement.incarnation
                terms = [one.term for one in member.announcement.serving if one.model == event.model]
                term = term or (terms[0] if terms else 0)
        if incarnation == 0 and term == 0:
            route = self.snapshot.models.get(event.model)
            term = next((one.term for one in route.targets if one.node == event.node), 0) if route else 0
        self.block(event.node, event.model, LaunchId(incarnation, term), now)

    def grant(self, event: LoadAnswered, members: Sequence[Member], now: float) -> None:
        """Another node says that it has loaded a model: route there before its announcement arrives."""
        if event.serving is None or not any(member.announcement.node == event.node for member in members):
            return
        self._granted[event.node, event.model] = (event.serving, now + _GRANTED_SECONDS)
        self.stale = True

    def _served(self, member: Member) -> Iterable[Serving]:
        """What a node serves, as it announced or said since."""
        announced, node = member.announcement.serving, member.announcement.node
        granted = {model: entry[0] for (host, model), entry in self._granted.items() if host == node}
        return [*(one for one in announced if one.model not in granted), *granted.values()] if granted else announced

    def _confirm_granted(self, members: Sequence[Member]) -> None:
        """A node's word counts no more once its announcement says the same, or something later."""
        announced = {
            (member.announcement.node, one.model): one.term
            for member in members
            for one in member.announcement.serving
            if one.status is not ModelStatus.LOADING
        }
        self._granted = {key: entry for key, entry in self._granted.items() if announced.get(key, -1) < entry[0].term}

    def observe(self, members: Sequence[Member], now: float) -> None:
        """Other nodes' announcements or states changed."""
        self._suspects.observe(members, now)
        if self._granted:
            self._confirm_granted(members)
        self.stale = True

    def deadline(self) -> float | None:
        """When a block or a suspect's grace ends, or another node's word does not count any more."""
        granted = (until for _, until in self._granted.values())
        times = (self._breaker.deadline(), self._suspects.deadline(), *granted)
        return min((time for time in times if time is not None), default=None)

    def due(self, now: float) -> bool:
        """Whether to rebuild now."""
        expired = [key for key, entry in self._granted.items() if entry[1] <= now]
        for key in expired:
            del self._granted[key]
        if self._breaker.due(now) | self._suspects.due(now) | bool(expired):
            self.stale = True
        return self.stale

    def rebuild(
        self,
        *,
        own: Sequence[Serving],
        addresses: Mapping[ModelName, str],
        members: Sequence[Member],
        round_trips: Mapping[NodeId, float],
        on_disk: Mapping[ModelName, ModelFacts],
        wanted: Collection[ModelName],
        accepting: bool,
        now: float,
        awaited: Mapping[ModelName, Awaited] | None = None,
        resting: bool = False,
        workers: Mapping[ModelName, tuple[NodeId, ...]] | None = None,
    ) -> RoutingSnapshot | None:
        """Return the new snapshot, or None if it routes like the one before.

        Args:
            own: the models here.
            addresses: of the engines here, by model.
            members: the other nodes.
            round_trips: milliseconds to other nodes; a passive node puts them into a fetched table.
            on_disk: the models on this node's disk.
            wanted: the models that users gave to the mesh with `--model`.
            accepting: False while the node drains.
            now: the time.
            awaited: what becomes of the requests that wait for models.
            resting: a model was unloaded here until somebody asks for it.
            workers: other nodes that compute layers of the models here, by model.
        """
        self.stale = False
        me = self._config.node
        own_name = own_label(me, self._config.name, names_of(members))
        endpoints = [
            Endpoint(
                node=me,
                owner=own_name,
                serving=serving,
                local=True,
                address=addresses.get(serving.model, ""),
                workers=(workers or {}).get(serving.model, ()),
                blocked=self._breaker.blocks(
                    (me, serving.model), LaunchId(self._config.incarnation, serving.term), now
                ),
            )
            for serving in own
        ]
        endpoints += [self._remote(member, serving, now) for member in members for serving in self._served(member)]
        known = dict(on_disk)
        for member in members:
            for facts in member.announcement.on_disk:
                known.setdefault(facts.name, facts)
        for facts in self._config.on_demand.catalogue:
            known.setdefault(facts.name, facts)
        routes = build_routes(endpoints, known, wanted)
        snapshot = RoutingSnapshot(
            version=self.snapshot.version + 1,
            node=me,
            default=_default(own) or next((name for name in self._config.wanted if name in routes), None),
            models={name: self._dated(route, now) for name, route in routes.items()},
            accepting=accepting,
            alive=frozenset(
                member.announcement.node
                for member in members
                if member.announcement.serving and not self._suspects.expired(member.announcement.node, now)
            ),
            awaited=awaited or {},
            resting=resting,
            owners=_owners(routes.values(), members),
        )
        self._forget_created(snapshot)
        if self._fetched is not None:
            snapshot = self._with_fetched(snapshot, self._fetched, round_trips, now)
        if self.snapshot.version > 0 and same_routes(snapshot, self.snapshot):
            return None
        self.snapshot = snapshot
        return snapshot

    def _remote(self, member: Member, serving: Serving, now: float) -> Endpoint:
        announced = member.announcement
        node, launch = announced.node, LaunchId(announced.incarnation, serving.term)
        return Endpoint(
            node=node,
            owner=member.label,
            serving=serving,
            rtt_ms=member.rtt_ms,
            workers=_workers(announced, serving.model),
            suspect=member.suspect,
            blocked=self._suspects.expired(node, now) or self._breaker.blocks((node, serving.model), launch, now),
        )

    def _dated(self, route: ModelRoute, now: float) -> ModelRoute:
        created = self._created.setdefault(route.name, int(self._config.epoch + now))
        return msgspec.structs.replace(route, created=created)

    def _forget_created(self, snapshot: RoutingSnapshot) -> None:
        """Forget the times of models that nobody has any more. Peers choose the names, so their number is bounded."""
        gone = [name for name in self._created if name not in snapshot.models]
        for name in gone[: max(0, len(gone) - _MAX_GONE)]:
            del self._created[name]

    def _with_fetched(
        self, snapshot: RoutingSnapshot, fetched: RoutingSnapshot, round_trips: Mapping[NodeId, float], now: float
    ) -> RoutingSnapshot:
        models = dict(snapshot.models)
        for name, route in fetched.models.items():
            targets = tuple(
                msgspec.structs.replace(target, rtt_ms=round_trips.get(target.node, target.rtt_ms))
                for target in route.targets
                if target.node != self._config.node
                and not self._breaker.blocks((target.node, name), LaunchId(Incarnation(0), target.term), now)
            )
            warm = any(target.status is ModelStatus.WARM for target in targets)
            status = route.status if warm or route.status is not ModelStatus.WARM else ModelStatus.LOADING
            reason = route.reason if status is route.status else _UNREACHABLE
            if reason and status is ModelStatus.COLD:
                reason = f"{reason} {_CLIENT}"
            models[name] = msgspec.structs.replace(route, targets=targets, status=status, reason=reason)
        return msgspec.structs.replace(
            snapshot,
            models=models,
            default=snapshot.default or fetched.default,
            alive=fetched.alive,
            owners=fetched.owners,
        )


def build_routes(
    endpoints: Iterable[Endpoint], known: Mapping[ModelName, ModelFacts], wanted: Collection[ModelName]
) -> dict[ModelName, ModelRoute]:
    """Routes by name, for the models that some node serves, has on disk (`known`) or was asked to serve (`wanted`)."""
    by_model: dict[ModelName, list[Endpoint]] = {name: [] for name in sorted({*known, *wanted})}
    for endpoint in endpoints:
        by_model.setdefault(endpoint.serving.model, []).append(endpoint)
    return {name: _route(name, by_model[name], known.get(name)) for name in sorted(by_model)}


def same_routes(one: RoutingSnapshot, other: RoutingSnapshot) -> bool:
    """Whether two snapshots differ in nothing but their version."""
    return msgspec.structs.replace(one, version=0) == msgspec.structs.replace(other, version=0)


def _route(name: ModelName, endpoints: list[Endpoint], facts: ModelFacts | None) -> ModelRoute:
    endpoints.sort(key=lambda endpoint: (not endpoint.local, endpoint.node))
    usable = [one for one in endpoints if not one.blocked and one.serving.status in _ROUTABLE]
    warm = [one for one in usable if one.serving.status is ModelStatus.WARM]
    trusted = [one for one in warm if not one.suspect]
    if trusted:
        usable = [one for one in usable if not one.suspect]
        warm = trusted
    status = _status(endpoints, warm)
    sizes = [one.serving.size_bytes for one in endpoints]
    return ModelRoute(
        name=name,
        status=status,
        targets=tuple(_target(one) for one in usable),
        context=min((one.serving.context for one in warm), default=0),
        size_bytes=max([facts.size_bytes if facts else 0, *sizes]),
        reason="" if warm else _reason(endpoints, status),
        aliases=tuple(sorted({alias for one in endpoints for alias in one.serving.aliases} - {name})),
        owner=(warm or usable or endpoints)[0].owner if endpoints else "",
        embeddings=all(one.serving.embeddings for one in warm),
        kind=(warm or endpoints)[0].serving.kind if endpoints else facts.kind if facts else ModelKind.CHAT,
    )


def _status(endpoints: list[Endpoint], warm: list[Endpoint]) -> ModelStatus:
    if warm:
        return ModelStatus.WARM
    states = {one.serving.status for one in endpoints}
    if ModelStatus.WARM in states:
        # It is warm but blocked for a moment: clients retry, as while it loads.
        return ModelStatus.LOADING
    return next((status for status in _BY_PREFERENCE if status in states), ModelStatus.COLD)


def _reason(endpoints: list[Endpoint], status: ModelStatus) -> str:
    if any(one.blocked and one.serving.status is ModelStatus.WARM for one in endpoints):
        return _UNREACHABLE
    return next((one.serving.reason for one in endpoints if one.serving.status is status), "")


def _target(endpoint: Endpoint) -> Target:
    serving = endpoint.serving
    return Target(
        node=endpoint.node,
        local=endpoint.local,
        address=endpoint.address,
        status=serving.status,
        slots=serving.slots,
        context=serving.context,
        load=coarse_load(serving),
        tokens_per_second=serving.tokens_per_second,
        rtt_ms=0.0 if endpoint.local else endpoint.rtt_ms,
        term=serving.term,
        workers=endpoint.workers,
    )


def _workers(announced: Announcement, model: ModelName) -> tuple[NodeId, ...]:
    """The workers of a split model that a node announces to lead."""
    layout = announced.split.layout() if announced.split is not None and announced.split.model == model else None
    return tuple(share.node for share in layout.workers) if layout is not None else ()


def _owners(routes: Iterable[ModelRoute], members: Sequence[Member]) -> dict[NodeId, Ownership]:
    """Whose the nodes are that would see a prompt."""
    named = {node for route in routes for target in route.targets for node in (target.node, *target.workers)}
    return {
        member.announcement.node: member.announcement.ownership
        for member in members
        if member.announcement.ownership is not None and member.announcement.node in named
    }


def coarse_load(serving: Serving) -> float:
    """Requests in flight over slots, in quarters, at most 4.0. Finer steps would change routes with every request."""
    return min(4.0, round(4.0 * serving.in_flight / max(1, serving.slots)) / 4.0)


def _default(own: Sequence[Serving]) -> ModelName | None:
    """The model of a request without `model`: the first one here that is warm or loading, else the first one here."""
    live = [serving for serving in own if serving.status in _ROUTABLE]
    return (live or list(own))[0].model if own else None
