"""The routing table: builds the routing snapshot from this node's models and the other nodes' announcements.

A new snapshot is given out only when it routes differently from the one before.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.membership.names import names_of, own_label
from mesh_llm.core.performance.prediction import prompt_seconds
from mesh_llm.core.routing.circuit_breaker import CircuitBreaker, LaunchId, SuspectGrace
from mesh_llm.core.routing.ranking import Awaited, ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.trust.corrections import Correction, Corrections, Kind, Life, TimedAnswer
from mesh_llm.core.types.announcement import Announcement, Member, Ownership, Serving
from mesh_llm.core.types.events import (
    AnswersTimed,
    ContextRefused,
    LoadAnswered,
    PromptTaken,
    SplitFailed,
    TargetFailed,
)
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelKind, ModelStatus

_BY_PREFERENCE = (ModelStatus.WARM, ModelStatus.LOADING, ModelStatus.STOPPING, ModelStatus.FAILED, ModelStatus.COLD)
_ROUTABLE = {ModelStatus.WARM, ModelStatus.LOADING}

_ROOM = 1.5
"""A GPU with so many times the bytes of a model holds all of it, and its KV cache."""
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
        slow_prompts: as in Target.
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
    slow_prompts: float = 0.0


class _Figures(NamedTuple):
    """What this node counts on of one launch on another node, after its corrections; fields as of `Target`."""

    context: int
    tokens_per_second: float
    slow_prompts: float


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
        self.ownership = config.ownership
        """The owner of this node."""
        self._corrections = Corrections()
        self._distrusted: frozenset[tuple[ModelName, NodeId]] = frozenset()
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

    def distrust(self, hosts: Iterable[tuple[ModelName, NodeId]]) -> None:
        """Send this node's clients to none of these hosts of models, from now on, and to all others again."""
        self._distrusted = frozenset(hosts)
        self.stale = True

    def forget_corrections(self, node: NodeId, model: ModelName | None) -> None:
        """Believe what a host announces again, of one model or of all."""
        self.stale |= self._corrections.forget(node, model)

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

    def refused_context(self, event: ContextRefused, members: Sequence[Member], now: float) -> Correction | None:
        """A host refused what fits its announced context. Returns the correction if that says something new."""
        found = self._announced(event.node, event.model, event.term, members)
        if found is None:
            return None
        life, serving, _ = found
        made = self._corrections.refused(
            event.node, event.model, life, announced=serving.context, tokens=event.tokens, now=now
        )
        self.stale |= made is not None
        return made

    def took_prompt(self, event: PromptTaken, members: Sequence[Member]) -> None:
        """A host answered a prompt that is longer than its corrected context."""
        found = self._announced(event.node, event.model, event.term, members)
        if found is not None:
            self.stale |= self._corrections.taken(event.node, event.model, found[0], tokens=event.tokens)

    def timed(
        self, event: AnswersTimed, members: Sequence[Member], files: Mapping[ModelName, ModelFacts], now: float
    ) -> None:
        """Answers of other hosts came, faster or slower than announced. `files`: the models on this node."""
        for answer in event.answers:
            found = self._announced(answer.node, answer.model, answer.term, members)
            if found is None:
                continue
            life, serving, member = found
            announced = serving.tokens_per_second
            if answer.kind is Kind.PROMPTS:
                announced = _foretold(member, answer, files.values())
            self.stale |= self._corrections.timed(answer, life, announced=announced, now=now)

    def part_failed(self, event: SplitFailed, members: Sequence[Member], now: float) -> Correction | None:
        """A worker did not give the memory of its part. Returns the correction; None where it offers less by now."""
        member = next((one for one in members if one.announcement.node == event.node), None)
        if member is None or not event.memory_bytes:
            return None
        offered = _lent(member, event.model)
        life = Life(member.announcement.incarnation, 0)
        made = self._corrections.failed(
            event.node, event.model, life, announced=offered, wanted=event.memory_bytes, now=now
        )
        self.stale |= made is not None
        return made

    def _announced(
        self, node: NodeId, model: ModelName, term: int, members: Sequence[Member]
    ) -> tuple[Life, Serving, Member | None] | None:
        """What a host announces of one launch; None: it announces another one now, or none."""
        for member in members:
            if member.announcement.node == node:
                served = (one for one in member.announcement.serving if one.model == model and one.term == term)
                serving = next(served, None)
                return None if serving is None else (Life(member.announcement.incarnation, term), serving, member)
        route = self._fetched.models.get(model) if self._fetched is not None else None
        for target in route.targets if route is not None else ():
            if target.node == node and target.term == term:
                serving = Serving(
                    model=model,
                    status=target.status,
                    term=term,
                    context=target.context,
                    tokens_per_second=target.tokens_per_second,
                )
                return Life(Incarnation(0), term), serving, None
        return None

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
        times = (self._breaker.deadline(), self._suspects.deadline(), self._corrections.deadline(), *granted)
        return min((time for time in times if time is not None), default=None)

    def due(self, now: float) -> bool:
        """Whether to rebuild now."""
        expired = [key for key, entry in self._granted.items() if entry[1] <= now]
        for key in expired:
            del self._granted[key]
        if self._breaker.due(now) | self._suspects.due(now) | self._corrections.due(now) | bool(expired):
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
            owners=self._owners(routes.values(), members),
            corrections=tuple(self._corrected_hosts(members)),
            distrusted=self._distrusted,
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
        life = Life(announced.incarnation, serving.term)
        figures = self._figures(node, serving.model, life, serving.context, serving.tokens_per_second)
        if figures[:2] != (serving.context, serving.tokens_per_second):
            serving = msgspec.structs.replace(
                serving, context=figures.context, tokens_per_second=figures.tokens_per_second
            )
        return Endpoint(
            node=node,
            owner=member.label,
            serving=serving,
            slow_prompts=figures.slow_prompts,
            rtt_ms=member.rtt_ms,
            workers=_workers(announced, serving.model),
            suspect=member.suspect,
            blocked=self._suspects.expired(node, now) or self._breaker.blocks((node, serving.model), launch, now),
        )

    def _corrected_hosts(self, members: Sequence[Member]) -> Iterable[Correction]:
        for member in members:
            announced = member.announcement
            groups = [(announced.split.model, 0)] if announced.split is not None else []
            for model, term in (*groups, *((one.model, one.term) for one in self._served(member))):
                for one in self._corrections.of(announced.node, model, Life(announced.incarnation, term)):
                    # A worker that offers less now has seen it itself.
                    if one.kind is not Kind.MEMORY or _lent(member, model) >= one.seen:
                        yield one

    def _corrected(self, name: ModelName, target: Target, found: list[Correction]) -> Target:
        """A target of a fetched table; `found` gets the corrections."""
        life = Life(Incarnation(0), target.term)
        made = self._corrections.of(target.node, name, life)
        if not made:
            return target
        found += made
        figures = self._figures(target.node, name, life, target.context, target.tokens_per_second)
        return msgspec.structs.replace(target, **figures._asdict())

    def _figures(self, node: NodeId, model: ModelName, life: Life, context: int, speed: float) -> _Figures:
        """What to count on of a launch that is announced with this context and speed."""
        corrections = self._corrections
        return _Figures(
            corrections.context(node, model, life, context),
            corrections.speed(node, model, life, speed),
            corrections.slow_prompts(node, model, life),
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
        corrections: list[Correction] = []
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
            targets = tuple(self._corrected(name, target, corrections) for target in targets)
            context = min((one.context for one in targets if one.status is ModelStatus.WARM), default=route.context)
            models[name] = msgspec.structs.replace(
                route, targets=targets, status=status, reason=reason, context=min(route.context, context)
            )
        return msgspec.structs.replace(
            snapshot,
            models=models,
            default=snapshot.default or fetched.default,
            alive=fetched.alive,
            owners={**fetched.owners, **snapshot.owners},
            corrections=(*snapshot.corrections, *corrections),
        )

    def _owners(self, routes: Iterable[ModelRoute], members: Sequence[Member]) -> dict[NodeId, Ownership]:
        """The owners of the nodes that would see a prompt, and of this one: passive nodes get the table."""
        me, own = self._config.node, self.ownership
        named = {node for route in routes for target in route.targets for node in (target.node, *target.workers)}
        found = {one.announcement.node: one.announcement.ownership for one in members}
        found = {node: one for node, one in found.items() if node in named}
        return {node: one for node, one in [*found.items(), (me, own)] if one is not None}


def as_announced(snapshot: RoutingSnapshot) -> RoutingSnapshot:
    """The routes without this node's corrections, for other nodes: they are to believe what they see themselves."""
    if not snapshot.corrections:
        return snapshot
    announced = {(one.node, one.model, one.kind): one.announced for one in snapshot.corrections}
    models: dict[ModelName, ModelRoute] = {}
    for name, route in snapshot.models.items():
        targets = tuple(
            msgspec.structs.replace(
                target,
                context=int(announced.get((target.node, name, Kind.CONTEXT), target.context)),
                tokens_per_second=announced.get((target.node, name, Kind.SPEED), target.tokens_per_second),
                slow_prompts=0.0,
            )
            for target in route.targets
        )
        contexts = [target.context for target in targets if target.status is ModelStatus.WARM]
        models[name] = msgspec.structs.replace(route, targets=targets, context=min(contexts, default=route.context))
    return msgspec.structs.replace(snapshot, models=models, corrections=())


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
        slow_prompts=endpoint.slow_prompts,
    )


def _lent(member: Member, model: ModelName) -> int:
    """The memory that a node announces for its part of a split model."""
    state = member.announcement.split
    return state.memory_bytes if state is not None and state.model == model else 0


def _foretold(member: Member | None, answer: TimedAnswer, files: Iterable[ModelFacts]) -> float:
    """Tokens a second at which a node alone should have read a prompt; 0.0: nobody can say.

    What a prompt takes depends on more than is announced of a model: this node must have the same file. A node with a
    GPU that cannot hold the model reads it with its processor, too, and nobody else knows in which parts.
    """
    if member is None or _workers(member.announcement, answer.model):
        return 0.0
    capacity = member.announcement.capacity
    announced = next((one for one in member.announcement.on_disk if one.name == answer.model), None)
    marks = {announced.fingerprint} - {""} if announced is not None else set[str]()
    facts = next((one for one in files if one.fingerprint in marks), None)
    if facts is None or (not capacity.on_processor and capacity.memory_bytes < _ROOM * facts.size_bytes):
        return 0.0
    seconds = prompt_seconds(facts, capacity.speed, answer.tokens, answer.start)
    return answer.tokens / seconds if seconds else 0.0


def _workers(announced: Announcement, model: ModelName) -> tuple[NodeId, ...]:
    """The workers of a split model that a node announces to lead."""
    layout = announced.split.layout() if announced.split is not None and announced.split.model == model else None
    return tuple(share.node for share in layout.workers) if layout is not None else ()


def coarse_load(serving: Serving) -> float:
    """Requests in flight over slots, in quarters, at most 4.0. Finer steps would change routes with every request."""
    return min(4.0, round(4.0 * serving.in_flight / max(1, serving.slots)) / 4.0)


def _default(own: Sequence[Serving]) -> ModelName | None:
    """The model of a request without `model`: the first one here that is warm or loading, else the first one here."""
    live = [serving for serving in own if serving.status in _ROUTABLE]
    return (live or list(own))[0].model if own else None
