"""What this node could serve, and where each model would run. Satisfies core.console_ports.ModelShelf.

What the front door remembers, with the names that people call nodes by. Satisfies core.console_ports.Activity.

What the console and the command line may ask of this daemon: satisfies core.management.Management.

What of this node the console opens, put together.

The console as the settings want it: where it listens, and what it demands of those who come from elsewhere.
"""

from collections.abc import Callable
from typing import Protocol

import msgspec

from mesh_llm.api.auth import KeyRing
from mesh_llm.api.request_trace import DecisionBook
from mesh_llm.console.ports import Activity, Approvals, ConsoleParts, Management, Planner, Publisher
from mesh_llm.console.server import ConsoleConfig, ConsoleServer
from mesh_llm.console.sessions import Sessions
from mesh_llm.console.status import (
    CatalogueModel,
    DiskModel,
    Fit,
    Library,
    NoticeRecord,
    Status,
    StatusModel,
    UnusableFile,
)
from mesh_llm.core.node import Node
from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.placement.local_models import Refused
from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, DropRequested, LoadRequested, ModelsChanged, StopRequested
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchOptions, ModelFacts
from mesh_llm.core.types.status import Decision, History
from mesh_llm.daemon.downloads import Downloads
from mesh_llm.daemon.model_registry import Machine, Shelf
from mesh_llm.daemon.notices import Bell, NoticeBook
from mesh_llm.daemon.published_state import Outlook
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.startup_models import Obtainer
from mesh_llm.models.hub.catalog import CatalogEntry, catalog
from mesh_llm.models.library.library import LocalModel
from mesh_llm.net.admission.records import InviteRecord
from mesh_llm.runtime.home import Home
from mesh_llm.wire.http.authority import is_loopback_address


class ConsoleShelf:
    """Reads what the daemon knows already; nothing is looked up on disk."""

    def __init__(self, node: Node, shelf: Shelf, status: Callable[[], Status]) -> None:
        self._node = node
        self._shelf = shelf
        self._status = status

    async def library(self) -> Library:
        """What is on disk and in the catalogue, and what of it fits."""
        library = self._shelf.library
        known = {model.name: model for model in self._status().models}
        others = sum(member.announcement.capacity.memory_bytes for member in self._node.members)
        here = self._node.capacity.memory_bytes
        return Library(
            memory_bytes=here,
            mesh_memory_bytes=here + others,
            disk=tuple(
                self._on_disk(model, known.get(model.name))
                for group in (library.models, library.drafts)
                for model in group.values()
            ),
            catalogue=tuple(self._listed(entry) for entry in catalog()),
            unusable=tuple(
                UnusableFile(name=one.name, path=str(one.path), reason=one.reason, incomplete=one.incomplete)
                for one in library.unusable
            ),
        )

    def _on_disk(self, model: LocalModel, known: StatusModel | None) -> DiskModel:
        facts = model.facts
        return DiskModel(
            name=model.name,
            kind=facts.kind.value,
            size_bytes=facts.size_bytes,
            context=facts.context_train,
            fit=self._fit(facts),
            architecture=facts.architecture,
            path=str(model.path),
            store=model.store,
            source=facts.source,
            draft=self._shelf.drafts.get(model.name, ""),
            builtin=model.builtin,
            vision=model.projector is not None,
            status=known.status if known is not None else "cold",
            here=known.here if known is not None else False,
        )

    def _listed(self, entry: CatalogEntry) -> CatalogueModel:
        have = self._shelf.library.find(entry.stem) if entry.stem else None
        return CatalogueModel(
            **msgspec.structs.asdict(entry.row()),
            fit=self._fit(entry.facts() if have is None else have.facts),
            on_disk=have.name if have is not None else "",
        )

    def _fit(self, facts: ModelFacts) -> Fit:
        """Beside what is served here now; else in the memory of others, alone or together."""
        plan = self._node.check_load(facts.name, facts=facts)
        if not isinstance(plan, Refused):
            have = self._node.capacity.memory_bytes
            return Fit(
                where="here", context=plan.context, slots=plan.slots, need_bytes=plan.memory_bytes, have_bytes=have
            )
        memories = [member.announcement.capacity.memory_bytes for member in self._node.members]
        own = self._node.capacity
        least = plan_solo(facts, 0, LaunchOptions())
        need = least.need_bytes if isinstance(least, DoesNotFit) else 0
        if not own.memory_bytes and not any(memories):
            return Fit(where="unknown", need_bytes=need, text="No node tells of memory for models.")
        elsewhere = any(memory >= need for memory in memories)
        together = bool(own.rpc_version) and own.memory_bytes + sum(memories) >= need and bool(memories)
        have = own.memory_bytes + sum(memories)
        where = "mesh" if elsewhere or together else "no"
        return Fit(where=where, need_bytes=need, have_bytes=have, text=f"{plan.message} {plan.hint}".strip())


class FrontActivity:
    """`name_of`: what a node is called."""

    def __init__(self, book: DecisionBook, name_of: Callable[[NodeId], str]) -> None:
        self._book = book
        self._name_of = name_of

    def decisions(self, after: int, limit: int) -> list[Decision]:
        """Those with an id above `after`, newest first."""
        names: dict[str, str] = {}

        def named(decision: Decision) -> Decision:
            for target in decision.targets:
                if target.node_id not in names:
                    names[target.node_id] = self._name_of(NodeId(target.node_id))
            targets = tuple(msgspec.structs.replace(one, name=names[one.node_id]) for one in decision.targets)
            return msgspec.structs.replace(decision, targets=targets)

        return [named(decision) for decision in self._book.after(after, limit)]

    def history(self) -> History:
        """The last hour."""
        return self._book.hour.history()


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


class ConsoleRooms:
    """Makes the parts that this node has: a passive one has no models of its own."""

    def __init__(
        self,
        settings: Settings,
        node: Node,
        machine: Machine,
        obtainer: Obtainer,
        post: Callable[[AnyEvent], None],
        outlook: Outlook,
        management: Management,
    ) -> None:
        self._serves = machine.source is not None
        self._shelf = ConsoleShelf(node, machine.shelf, management.status)
        self._downloads = Downloads(settings, machine, obtainer, post, outlook.bell, management.load, outlook.settled)

    async def close(self) -> None:
        """End what goes on."""
        await self._downloads.close()

    def parts(self, activity: Activity, approvals: Approvals, planner: Planner, publisher: Publisher) -> ConsoleParts:
        """For the console."""
        return ConsoleParts(
            shelf=self._shelf if self._serves else None,
            downloader=self._downloads if self._serves else None,
            activity=activity,
            approvals=approvals,
            planner=planner if self._serves else None,
            publisher=publisher if self._serves else None,
        )


def open_console(settings: Settings, home: Home, sessions: Sessions | None = None) -> ConsoleServer:
    """Bind the console. `sessions`: of browsers, which go on over a move to another mesh.

    Raises:
        MeshError: `api_key_required` where others could reach it and no key is set; `port_in_use`, `cannot_listen`.
    """
    keys = KeyRing(settings.api_keys)
    local = is_loopback_address(settings.console_listen)
    if not local and not keys:
        raise MeshError(
            code="api_key_required",
            message=f"--console-listen {settings.console_listen} opens the console to other machines: it needs a key.",
            hint="Add --api-key-file FILE, or set MESH_LLM_API_KEY; make a key with: openssl rand -hex 24",
            status=400,
        )
    config = ConsoleConfig(
        host=settings.console_listen,
        port=settings.console_port,
        page=settings.console_page,
        origins=settings.console_origins,
    )
    return ConsoleServer(config, home, sessions, None if local else keys.accepts)
