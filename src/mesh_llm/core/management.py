"""What a user's own tools may ask of a running daemon: the console and the command line speak to this."""

from typing import Protocol

import msgspec

from mesh_llm.core.status import Status


class NoticeRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A notice that was given: `id` rises by one; `at` is UNIX seconds; see core.effects.Notice for the rest."""

    id: int
    at: float
    level: str
    code: str
    text: str
    about: str = ""


class InviteRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An invite that this node issued. `uses_left` None: unlimited. Times are UNIX seconds."""

    id: str
    scope: str
    created: float
    expires: float
    uses_left: int | None = None
    revoked: bool = False
    token: str = ""


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
