"""When this node publishes its mesh's listing: as the elected publisher, at a change, and again before it expires."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.listing.content import MAX_LISTED_MODELS, ListedModel, Listing
from mesh_llm.core.placement.assignment import wanted_order
from mesh_llm.core.types.announcement import Announcement, ListingPolicy, Member, elect_publisher, mesh_name
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel, Publish
from mesh_llm.core.types.events import ClientsCounted, ListingOutcome, PublishRequested
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelKind, ModelStatus

_LOAD_STEPS = 10

_FAILURES = 2
"""After so many rounds in a row that no relay accepted, another member should publish the listing."""


class ListingState(StrEnum):
    """What this node does about its mesh's listing."""

    OFF = "off"
    STARTING = "starting"
    LISTED = "listed"
    RESTING = "resting"
    FULL = "full"
    FAILING = "failing"


class ListingPublisher:
    """One node's part in listing the mesh. `evaluate` returns what to do now, `deadline` when to call it again."""

    def __init__(self, config: NodeConfig) -> None:
        self._node = config.node
        self._timings = config.timings
        self._marked = config.marks_listings
        self.policy = config.publicity
        """How the user wants the mesh listed; None: not at all."""
        self._settled: float | None = None
        self.listing: Listing | None = None
        """The listing that this node last published, if it is still valid."""
        self._at = float("-inf")
        self._deadline: float | None = None
        self._failures = 0
        self.state = ListingState.OFF
        self.reason = ""
        """Why no relay accepts the listing; else empty."""
        self.publisher: NodeId | None = None
        """The member that publishes the mesh's listing, as seen here."""
        self.mesh_name = config.publicity.name if config.publicity is not None else ""
        self.clients = 0
        """Passive nodes that follow this one, as announced."""

    @property
    def announced_policy(self) -> ListingPolicy | None:
        """The policy as this node announces it."""
        if self.policy is None:
            return None
        return msgspec.structs.replace(self.policy, failing=self._failures >= _FAILURES, marked=self._marked)

    def deadline(self) -> float | None:
        """When to evaluate again if nothing happens before."""
        return self._deadline

    @property
    def published_at(self) -> float | None:
        """When it was published; None where none is valid."""
        return self._at if self.listing is not None else None

    def handle(self, event: PublishRequested | ListingOutcome | ClientsCounted) -> list[AnyEffect]:
        """Take an event. The next `evaluate` acts on it."""
        match event:
            case PublishRequested():
                self.policy = event.publicity
                self._failures, self.reason, self._at = 0, "", float("-inf")
            case ClientsCounted():
                self.clients = coarse_clients(event.count)
            case ListingOutcome():
                return self._outcome(event)
        return []

    def _outcome(self, outcome: ListingOutcome) -> list[AnyEffect]:
        before = self._failures
        if outcome.accepted:
            self._failures, self.reason = 0, ""
        elif self.listing is not None:
            self._failures, self.reason = before + 1, outcome.problem
        if self.listing is not None:
            self.state = ListingState.FAILING if self._failures else ListingState.LISTED
        if self._failures == 1 and not before:
            text = f"The mesh cannot be listed: {outcome.problem}. Trying on."
            return [Notice(level=NoticeLevel.WARNING, code="listing_failed", text=text)]
        if before and not self._failures:
            return [Notice(level=NoticeLevel.INFO, code="mesh_listed", text="The mesh is listed again.")]
        return []

    def evaluate(self, own: Announcement, members: Sequence[Member], now: float, *, stopping: bool) -> list[AnyEffect]:
        """What to publish now. `own` carries this node's policy as all others will see it."""
        self._deadline = None
        others = [member.announcement for member in members]
        writer = elect_publisher((own, *others))
        self.publisher = writer.node if writer is not None else None
        self.mesh_name = mesh_name((own, *others))
        if self._settled is None:
            self._settled = now + self._timings.listing_settle
        if self.policy is None or stopping:
            return self._withdraw(ListingState.OFF)
        if now < self._settled:
            self.state, self._deadline = ListingState.STARTING, self._settled
            return []
        if self.publisher != self._node:
            return self._withdraw(ListingState.RESTING)
        listing = make_listing(self.policy, own, others)
        if listing.full:
            return self._full(listing)
        return self._publish(listing, now)

    def _publish(self, listing: Listing, now: float) -> list[AnyEffect]:
        refresh, before = self._timings.listing_refresh, self.listing
        if before is not None:
            due = self._at + (refresh if listing == before else refresh / self._timings.listing_changes)
            if now < due:
                self._deadline = min(due, self._at + refresh)
                return []
        self.listing, self._at = listing, now
        self._deadline = now + refresh
        effects: list[AnyEffect] = [Publish(listing=listing)]
        if before is None:
            back = self.state is ListingState.FULL
            self.state = ListingState.STARTING
            text = "There is room for clients: listing the mesh again." if back else "Listing the mesh for others."
            effects.append(Notice(level=NoticeLevel.INFO, code="mesh_listing", text=text))
        return effects

    def _full(self, listing: Listing) -> list[AnyEffect]:
        effects = self._withdraw(ListingState.FULL)
        if effects:
            text = f"The mesh has {listing.clients} clients and takes {listing.max_clients}: it is no longer listed."
            effects.append(Notice(level=NoticeLevel.INFO, code="mesh_full", text=text))
        return effects

    def _withdraw(self, state: ListingState) -> list[AnyEffect]:
        self.state = state
        if self.listing is None:
            return []
        self.listing = None
        if state is not ListingState.RESTING:
            self._failures, self.reason = 0, ""
        return [Publish(listing=None)]


def make_listing(policy: ListingPolicy, own: Announcement, others: Sequence[Announcement]) -> Listing:
    """The listing that the node of `own` publishes for the mesh of itself and the others."""
    announced = (own, *others)
    known = {facts.name: facts.context_train for one in announced for facts in one.on_disk}
    contexts: dict[ModelName, int] = {}
    flying = slots = 0
    for one in announced:
        for served in one.serving:
            if served.status is ModelStatus.WARM:
                contexts[served.model] = min(served.context, contexts.get(served.model, served.context))
                flying += served.in_flight
                slots += served.slots
    on_disk = {facts.name for one in announced for facts in one.on_disk if facts.kind is not ModelKind.DRAFT}
    return Listing(
        mesh=own.mesh,
        name=policy.name,
        region=policy.region,
        max_clients=policy.max_clients,
        scope=policy.scope,
        version=own.version,
        nodes=len(announced),
        clients=sum(one.clients for one in announced),
        load=min(1.0, round(flying / slots * _LOAD_STEPS) / _LOAD_STEPS) if slots else 0.0,
        memory_bytes=sum(one.capacity.memory_bytes for one in announced),
        serving=_models(sorted(contexts), contexts),
        wanted=_models((name for name in wanted_order(one.wanted for one in announced) if name not in contexts), known),
        on_disk=_models(sorted(on_disk), known),
    )


def coarse_clients(count: int) -> int:
    """A number of clients as it is announced: above 100 in steps of a tenth, so that it changes seldom."""
    step = 1
    while count // step >= 100:
        step *= 10
    return count // step * step


def _models(names: Iterable[ModelName], contexts: dict[ModelName, int]) -> tuple[ListedModel, ...]:
    return tuple(ListedModel(name=name, context=contexts.get(name, 0)) for name in [*names][:MAX_LISTED_MODELS])
