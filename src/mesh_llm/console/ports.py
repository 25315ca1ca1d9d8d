"""What a user's own tools may ask of a running daemon: the console and the command line speak to this.

Parts of a node that the management API opens where they exist: each by its shape. Every method raises MeshError.
"""

from dataclasses import dataclass
from typing import Protocol

from mesh_llm.console.status import DownloadRecord, Library, NoticeRecord, Publication, Status
from mesh_llm.core.performance.plan import PlanAnswer
from mesh_llm.core.types.status import Decision, History
from mesh_llm.net.admission.records import InviteRecord, WaitingNode


class Management(Protocol):
    """A running daemon, as its own user sees it. Every method raises MeshError with what to do."""

    def status(self) -> Status:
        """The node's whole state now."""
        ...

    def notices(self, after: int = 0) -> list[NoticeRecord]:
        """Notices with an id above `after`, oldest first; old ones are forgotten."""
        ...

    async def next_change(self, timeout: float) -> bool:
        """Wait until the status or the notices may have changed; False when `timeout` seconds passed first."""
        ...

    async def load(self, model: str) -> str:
        """Begin to serve a model here; returns its full name. Raises model_not_found, does_not_fit."""
        ...

    async def drop(self, model: str, drain_seconds: float) -> str:
        """Stop serving a model here once its requests have ended; returns its full name."""
        ...

    async def stop(self, drain_seconds: float) -> None:
        """End the daemon; returns once it is on its way."""
        ...

    async def create_invite(self, scope: str, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite for this mesh."""
        ...

    def invites(self) -> list[InviteRecord]:
        """The invites that this node issued, newest first, without their tokens."""
        ...

    async def revoke_invite(self, invite: str) -> InviteRecord:
        """Revoke an invite by id: everybody admitted by it is cut off, and the mesh is told."""
        ...


class ModelShelf(Protocol):
    """The models that this node could serve."""

    async def library(self) -> Library:
        """What is on disk and in the catalogue, and what of it fits."""
        ...


class Downloader(Protocol):
    """Downloads that were asked for while the node runs."""

    def records(self) -> list[DownloadRecord]:
        """All of this run, newest first."""
        ...

    async def start(self, model: str, *, load: bool, hub: bool = True) -> DownloadRecord:
        """Begin to fetch a model; `load`: serve it afterwards; `hub` False: only from other nodes.

        Raises model_not_found, already_here, no_neighbour, too_many_downloads.
        """
        ...

    async def cancel(self, download: str) -> DownloadRecord:
        """Stop a download; what has arrived is kept. Raises download_not_found."""
        ...


class Approvals(Protocol):
    """Nodes that wait to be let in."""

    def waiting(self) -> list[WaitingNode]:
        """Oldest first."""
        ...

    async def approve(self, node: str, scope: str | None = None) -> WaitingNode:
        """Let one in, by its id or the beginning of it; `scope` None: as it asks. Raises not_waiting."""
        ...

    async def deny(self, node: str) -> WaitingNode:
        """Turn one away; it is told. Raises not_waiting."""
        ...


class Publisher(Protocol):
    """The mesh's public listing."""

    def publication(self) -> Publication:
        """How it is at present."""
        ...

    async def publish(self, *, on: bool) -> Publication:
        """Begin or end to be listed. Raises relay_unreachable."""
        ...


class Planner(Protocol):
    """Answers what would become of a model."""

    async def plan(self, model: str, context: int | None) -> PlanAnswer:
        """Plan a launch without doing it. Raises model_not_found."""
        ...


class Activity(Protocol):
    """What the front door remembers of its requests."""

    def decisions(self, after: int, limit: int) -> list[Decision]:
        """Those with an id above `after`, newest first, at most `limit`."""
        ...

    def history(self) -> History:
        """The last hour."""
        ...


@dataclass(frozen=True, kw_only=True)
class ConsoleParts:
    """What a node has of these; calls about the others are answered with `not_available`."""

    shelf: ModelShelf | None = None
    downloader: Downloader | None = None
    approvals: Approvals | None = None
    publisher: Publisher | None = None
    planner: Planner | None = None
    activity: Activity | None = None
