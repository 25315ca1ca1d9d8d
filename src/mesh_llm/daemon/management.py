"""What the console and the command line may ask of this daemon: satisfies core.management.Management."""

from collections.abc import Callable
from typing import Protocol

from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent, DropRequested, LoadRequested, ModelsChanged, StopRequested
from mesh_llm.core.ids import ModelName
from mesh_llm.core.local_models import Refused
from mesh_llm.core.management import InviteRecord, NoticeRecord
from mesh_llm.core.naming import Ambiguous, NotFound, match
from mesh_llm.core.node import Node
from mesh_llm.core.status import Status
from mesh_llm.daemon.notices import Bell, NoticeBook
from mesh_llm.daemon.shelf import Shelf


class Inviter(Protocol):
    """The mesh's side of invites. Every method raises MeshError with what to do."""

    def create(self, scope: str, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite."""
        ...

    def records(self) -> list[InviteRecord]:
        """Those issued here, newest first, without their tokens."""
        ...

    def revoke(self, invite: str) -> InviteRecord:
        """Revoke one by id."""
        ...


class DaemonManagement:
    """Checks what is asked, and passes it to the core as events."""

    def __init__(
        self,
        node: Node,
        shelf: Shelf,
        *,
        post: Callable[[AnyEvent], None],
        status: Callable[[], Status],
        notices: NoticeBook,
        bell: Bell,
        inviter: Inviter,
    ) -> None:
        self._node = node
        self._shelf = shelf
        self._post = post
        self._status = status
        self._notices = notices
        self._bell = bell
        self._inviter = inviter

    def status(self) -> Status:
        """The node's whole state now."""
        return self._status()

    def notices(self, after: int = 0) -> list[NoticeRecord]:
        """Notices with an id above `after`, oldest first."""
        return self._notices.after(after)

    async def next_change(self, timeout: float) -> bool:
        """Wait until the status or the notices may have changed."""
        return await self._bell.wait(timeout)

    async def load(self, model: str) -> str:
        """Begin to serve a model here; returns its full name."""
        self._check_running()
        found = self._shelf.resolve(model)
        facts = found.facts
        name = facts.name
        plan = self._node.check_load(name, facts=facts)
        if isinstance(plan, Refused) and not (plan.code == "does_not_fit" and self._node.capacity.rpc_version):
            raise MeshError(code=plan.code, message=plan.message, hint=plan.hint, status=409)
        if name not in self._node.on_disk:
            await self._shelf.find_drafts([found])
            self._post(ModelsChanged(on_disk=self._shelf.facts(), drafts=self._shelf.drafts))
        self._post(LoadRequested(model=name))
        return name

    async def drop(self, model: str, drain_seconds: float) -> str:
        """Stop serving a model here once its requests have ended; returns its full name."""
        self._check_running()
        served = {serving.model: serving.aliases for serving in self._node.serving}
        found = match(model, served)
        if isinstance(found, Ambiguous):
            raise MeshError(
                code="model_ambiguous",
                message=f"{model} is the beginning of several models: {', '.join(found.choices)}.",
                hint="Give one of these names.",
                status=400,
            )
        if isinstance(found, NotFound):
            listed = ", ".join(served) or "none"
            raise MeshError(
                code="model_not_served",
                message=f"This node does not serve {model}.",
                hint=f"Served here: {listed}. Another node's model is dropped on that node.",
                status=404,
            )
        self._post(DropRequested(model=ModelName(found), drain_seconds=drain_seconds))
        return found

    async def stop(self, drain_seconds: float) -> None:
        """End the daemon."""
        self._post(StopRequested(drain_seconds=drain_seconds))

    async def create_invite(self, scope: str, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite for this mesh."""
        return self._inviter.create(scope, lifetime_seconds, uses)

    def invites(self) -> list[InviteRecord]:
        """The invites that this node issued, newest first, without their tokens."""
        return self._inviter.records()

    async def revoke_invite(self, invite: str) -> InviteRecord:
        """Revoke an invite by id."""
        return self._inviter.revoke(invite)

    def _check_running(self) -> None:
        if self._node.stopping:
            raise MeshError(code="stopping", message="The node is stopping.", hint="Start it again.", status=503)
