"""When this node writes its mesh's listing, and what: elected, below the cap, at a change, again before expiry."""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from mesh_llm.core.config import NodeConfig
from mesh_llm.core.listing.content import Listing, coarse_clients, make_listing
from mesh_llm.core.types.announcement import Announcement, Member, Publicity, elect_publisher, mesh_name
from mesh_llm.core.types.effects import AnyEffect, Notice, NoticeLevel, Publish
from mesh_llm.core.types.events import ClientsCounted, ListingOutcome, PublishRequested
from mesh_llm.core.types.ids import NodeId

_FAILURES = 2
"""Rounds in a row that no relay took before another member is asked to write the listing."""


class ListerState(StrEnum):
    """What this node does about its mesh's listing."""

    OFF = "off"
    STARTING = "starting"
    LISTED = "listed"
    RESTING = "resting"
    FULL = "full"
    FAILING = "failing"


class Lister:
    """One node's part. `consider` gives what is to be done now; `deadline` says when to ask again."""

    def __init__(self, config: NodeConfig) -> None:
        self._node = config.node
        self._timings = config.timings
        self._publicity = config.publicity
        self._settled: float | None = None
        self._listing: Listing | None = None
        self._at = float("-inf")
        self._deadline: float | None = None
        self._failures = 0
        self.state = ListerState.OFF
        self.reason = ""
        """Why no relay takes the listing, where that is so."""
        self.writer: NodeId | None = None
        """Who writes the mesh's listing, as seen here."""
        self.mesh_name = config.publicity.name if config.publicity is not None else ""
        self.clients = 0
        """Passive nodes that follow this one, as it is announced."""

    @property
    def publicity(self) -> Publicity | None:
        """This node's wish, as it is announced."""
        if self._publicity is None:
            return None
        return msgspec.structs.replace(self._publicity, failing=self._failures >= _FAILURES)

    @property
    def wish(self) -> Publicity | None:
        """The same, as the user said it."""
        return self._publicity

    def deadline(self) -> float | None:
        """When `consider` wants to be asked, whatever happens."""
        return self._deadline

    @property
    def listing(self) -> Listing | None:
        """What it last published, if it stands."""
        return self._listing

    @property
    def published_at(self) -> float | None:
        """When that was; None where it does not stand."""
        return self._at if self._listing is not None else None

    def handle(self, event: PublishRequested | ListingOutcome | ClientsCounted) -> list[AnyEffect]:
        """Take an event; what follows from it comes with the next `consider`."""
        match event:
            case PublishRequested():
                self._publicity = event.publicity
                self._failures, self.reason, self._at = 0, "", float("-inf")
            case ClientsCounted():
                self.clients = coarse_clients(event.count)
            case ListingOutcome():
                return self._told(event)
        return []

    def _told(self, outcome: ListingOutcome) -> list[AnyEffect]:
        before = self._failures
        if outcome.accepted:
            self._failures, self.reason = 0, ""
        elif self._listing is not None:
            self._failures, self.reason = before + 1, outcome.problem
        if self._listing is not None:
            self.state = ListerState.FAILING if self._failures else ListerState.LISTED
        if self._failures == 1 and not before:
            text = f"The mesh cannot be listed: {outcome.problem}. Trying on."
            return [Notice(level=NoticeLevel.WARNING, code="listing_failed", text=text)]
        if before and not self._failures:
            return [Notice(level=NoticeLevel.INFO, code="mesh_listed", text="The mesh is listed again.")]
        return []

    def consider(self, own: Announcement, members: Sequence[Member], now: float, *, stopping: bool) -> list[AnyEffect]:
        """What to publish now. `own` carries this node's wish as all others will see it."""
        self._deadline = None
        others = [member.announcement for member in members]
        writer = elect_publisher((own, *others))
        self.writer = writer.node if writer is not None else None
        self.mesh_name = mesh_name((own, *others))
        if self._settled is None:
            self._settled = now + self._timings.listing_settle
        if self._publicity is None or stopping:
            return self._withdraw(ListerState.OFF)
        if now < self._settled:
            self.state, self._deadline = ListerState.STARTING, self._settled
            return []
        if self.writer != self._node:
            return self._withdraw(ListerState.RESTING)
        listing = make_listing(self._publicity, own, others)
        if listing.full:
            return self._full(listing)
        return self._publish(listing, now)

    def _publish(self, listing: Listing, now: float) -> list[AnyEffect]:
        refresh, before = self._timings.listing_refresh, self._listing
        if before is not None:
            due = self._at + (refresh if listing == before else refresh / self._timings.listing_changes)
            if now < due:
                self._deadline = min(due, self._at + refresh)
                return []
        self._listing, self._at = listing, now
        self._deadline = now + refresh
        effects: list[AnyEffect] = [Publish(listing=listing)]
        if before is None:
            back = self.state is ListerState.FULL
            self.state = ListerState.STARTING
            text = "There is room for clients: listing the mesh again." if back else "Listing the mesh for others."
            effects.append(Notice(level=NoticeLevel.INFO, code="mesh_listing", text=text))
        return effects

    def _full(self, listing: Listing) -> list[AnyEffect]:
        effects = self._withdraw(ListerState.FULL)
        if effects:
            text = f"The mesh has {listing.clients} clients and takes {listing.max_clients}: it is no longer listed."
            effects.append(Notice(level=NoticeLevel.INFO, code="mesh_full", text=text))
        return effects

    def _withdraw(self, state: ListerState) -> list[AnyEffect]:
        self.state = state
        if self._listing is None:
            return []
        self._listing = None
        if state is not ListerState.RESTING:
            self._failures, self.reason = 0, ""
        return [Publish(listing=None)]
