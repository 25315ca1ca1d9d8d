"""What the console and the command line may ask of this daemon, and where the console listens."""

import re
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec

from mesh_llm.api.telemetry import TraceLog
from mesh_llm.api.types import Decision, split_key
from mesh_llm.api.usage import KeyRing
from mesh_llm.console.app import ConsoleConfig, ConsoleServer
from mesh_llm.console.auth import Sessions
from mesh_llm.console.schema import (
    CatalogueModel,
    DiskModel,
    Fit,
    Library,
    MemberRevoked,
    MemberScope,
    ModelAccepted,
    NoticeRecord,
    UnusableFile,
)
from mesh_llm.console.status import Status, StatusModel
from mesh_llm.core.membership.names import KEY_DIGITS, AmbiguousNode, UnknownNode, names_of, resolve_node, tell_apart
from mesh_llm.core.node import Node
from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.placement.local_models import LoadRefused
from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, DropRequested, LoadRequested, ModelsChanged, StopRequested
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import LaunchOptions, ModelFacts
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.daemon.published_state import NoticeLog, PublishedState
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.hub.catalog import CatalogEntry, catalog
from mesh_llm.models.library.library import LocalModel
from mesh_llm.net.admission.records import InviteRecord
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.nodes import explain_taken, free_port
from mesh_llm.wire.http.http1 import is_loopback_address
from mesh_llm.wire.mesh.admission import Scope

_KEY = re.compile(r"[0-9a-fA-F]{64}")
_KEY_SHOWN = 10
"""Digits of the key of a node whose name is not known."""


class Inviter(Protocol):
    """The mesh's side of invites; `MeshNet` has it. Every method may raise MeshError."""

    def create_invite(self, scope: str | None, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite; `scope` None: that of the token in the status."""
        ...

    def invites(self) -> list[InviteRecord]:
        """The invites issued here, newest first, without their tokens."""
        ...

    def revoke_invite(self, invite: str) -> InviteRecord:
        """Revoke an invite by id."""
        ...

    @property
    def founder(self) -> bool:
        """Whether this node holds the mesh's own key."""
        ...

    def above(self, node: NodeId) -> tuple[NodeId, ...]:
        """The nodes that may lower or revoke a member, the founder first; none for the founder itself."""
        ...

    def revoke_node(self, node: NodeId) -> tuple[NodeId, ...]:
        """Revoke a member's admission; returns all nodes that this cut off."""
        ...

    async def grant(self, node: NodeId, name: str, scope: Scope) -> None:
        """Raise or lower what a member may do; `name`: for messages."""
        ...


class DaemonManagement:
    """Implements console.calls.Management: checks a request, and passes it to the core as an event."""

    def __init__(
        self,
        node: Node,
        registry: ModelRegistry,
        published: PublishedState,
        inviter: Inviter,
        *,
        post: Callable[[AnyEvent], None],
        status: Callable[[], Status],
    ) -> None:
        self._node = node
        self._registry = registry
        self._published = published
        self._inviter = inviter
        self._post = post
        self.status = status
        """The node's whole state now."""

    def notices(self, after: int = 0) -> list[NoticeRecord]:
        """Notices with an id above `after`, oldest first."""
        return self._published.notices.after(after)

    async def next_change(self, timeout: float) -> bool:
        """Wait until the status or the notices may have changed."""
        return await self._published.changes.wait(timeout)

    async def load(self, model: str) -> ModelAccepted:
        """Begin to serve a model here, or to wait for what it needs."""
        self._check_running()
        node = self._node
        found = self._registry.resolve(model)
        facts = found.facts
        name = facts.name
        plan = node.check_load(name, facts=facts)
        waiting = f"until the machine is free: {node.yield_reason}." if node.yield_reason else ""
        if isinstance(plan, LoadRefused):
            waiting = self._makes_room(facts) or self._may_wait(facts, plan) or waiting
        if name not in node.on_disk:
            await self._registry.find_drafts([found])
            self._post(ModelsChanged(on_disk=self._registry.facts(), drafts=self._registry.drafts))
        self._post(LoadRequested(model=name))
        return ModelAccepted(model=name, waiting=waiting)

    def _makes_room(self, facts: ModelFacts) -> str:
        """What is unloaded for a model that does not fit beside it, as a sentence; empty: nothing is."""
        if not self._node.makes_room(facts):
            return ""
        names = self._node.room_for(facts)
        return f"to make room, {' and '.join(names)} {'is' if len(names) == 1 else 'are'} unloaded first."

    def _may_wait(self, facts: ModelFacts, refused: LoadRefused) -> str:
        """What a model waits for that this node cannot serve alone; empty: other nodes can share it now.

        Raises MeshError if waiting is of no use.
        """
        node = self._node
        hint = refused.hint
        if refused.code == "does_not_fit":
            other = node.split.wanted_group
            if not node.can_split:
                why = node.split.why_not_shareable
                hint = f"It could be shared with other nodes, but this node {why}. {hint}"
            elif other not in {None, facts.name}:
                hint = f"This node already waits to share {other}, and shares one model: mesh-llm drop {other}"
            else:
                prospect = node.split_prospect(facts)
                return prospect.sentence(node.config.node) if prospect is not None else ""
        if room := node.room_for(facts, pinned=True):
            commands = "; ".join(f"mesh-llm unload {name}" for name in room)
            hint = f"To make room: {commands}. Then load it again. {hint}"
        raise MeshError(code=refused.code, message=refused.message, hint=hint, status=409)

    async def drop(self, model: str, drain_seconds: float, *, rest: bool = False) -> str:
        """Stop serving a model here once its requests have ended; returns its full name.

        `rest`: only until a request asks for it.
        """
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
            raise self._not_served(model, served, "unload" if rest else "drop")
        self._post(DropRequested(model=ModelName(found), drain_seconds=drain_seconds, rest=rest))
        return found

    def _not_served(self, model: str, served: Iterable[str], verb: str) -> MeshError:
        """No model of this node's; names the nodes that serve it, and what to type there."""
        theirs = {serving.model: serving.aliases for one in self._node.members for serving in one.announcement.serving}
        found = match(model, theirs)
        hosts = [] if isinstance(found, Ambiguous | NotFound) else [m for m in self._node.members if m.hosts(found)]
        if hosts:
            where = f"on {hosts[0].label}" if len(hosts) == 1 else "on each of them"
            message = f"This node does not serve {found}. {' and '.join(host.label for host in hosts)} "
            message += "does." if len(hosts) == 1 else "do."
            hint = f"Type {where}: mesh-llm {verb} {found}"
        else:
            message = f"This node does not serve {model}, and no other node does."
            hint = f"Served here: {', '.join(served) or 'none'}."
        return MeshError(code="model_not_served", message=message, hint=hint, status=404)

    async def stop(self, drain_seconds: float) -> None:
        """End the daemon."""
        self._post(StopRequested(drain_seconds=drain_seconds))

    async def create_invite(self, scope: str | None, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        """Issue an invite for this mesh; `scope` None: that of the token in the status."""
        return self._inviter.create_invite(scope, lifetime_seconds, uses)

    def invites(self) -> list[InviteRecord]:
        """The invites that this node issued, newest first, without their tokens."""
        return self._inviter.invites()

    async def revoke_invite(self, invite: str) -> InviteRecord:
        """Revoke an invite by id."""
        return self._inviter.revoke_invite(invite)

    async def grant(self, node: str, scope: str) -> MemberScope:
        """Raise or lower what a member may do, by its name or the beginning of its key."""
        wanted = Scope.parse(scope)
        found, names = self._member(node)
        name = names[found]
        if wanted is not Scope.SPLIT:
            self._check_above(found, names, "lower it")
        await self._inviter.grant(found, name, wanted)
        return MemberScope(node_id=found, name=name, scope=wanted.word)

    async def revoke_member(self, node: str) -> MemberRevoked:
        """Cut a member off, by its name or the beginning of its key; the founder also one that is away, by its key."""
        away = _KEY.fullmatch(node.strip()) is not None
        found, names = self._member(node, away=away)
        if not away or found in names:
            self._check_above(found, names, "cut it off")
        ended = self._inviter.revoke_node(found)
        return MemberRevoked(
            node_id=found,
            name=names.get(found, found[:_KEY_SHOWN]),
            others=tuple(names.get(one, one[:_KEY_SHOWN]) for one in ended if one != found),
            final=self._inviter.founder,
        )

    def _check_above(self, node: NodeId, names: dict[NodeId, str], what: str) -> None:
        """Raise MeshError if this node may not take from a member what it has; it names those that may."""
        above = self._inviter.above(node)
        own = self._node.config.node
        if self._inviter.founder or own in above:
            return
        name = names.get(node, node[:_KEY_SHOWN])
        if not above:
            raise MeshError(
                code="not_yours",
                message=f"{name} founded the mesh: no other node can {what}.",
                hint="To go on without it, found another mesh: stop this node, move MESH_LLM_HOME/mesh away, start it.",
                status=403,
            )
        first, *others = (names.get(one, f"the node {one[:_KEY_SHOWN]}") for one in above)
        who = ", or ".join([f"{first}, which founded the mesh", *others])
        raise MeshError(
            code="not_yours",
            message=f"This node cannot {what}: {name} was not invited or admitted by it, nor through it.",
            hint=f"Type it on {who}.",
            status=403,
        )

    def _member(self, node: str, *, away: bool = False) -> tuple[NodeId, dict[NodeId, str]]:
        """The member that a person means, and the shown names of all. Raises MeshError: node_unknown, node_ambiguous.

        `away`: a whole key is taken as it is, where no member has it.
        """
        names = dict(names_of(self._node.members))
        found = resolve_node(node, names)
        if isinstance(found, AmbiguousNode):
            raise MeshError(
                code="node_ambiguous",
                message=f"{node[:40]!r} fits several nodes: {', '.join(found.choices)}.",
                hint="Give one of these, or the beginning of a key.",
                status=409,
            )
        if isinstance(found, UnknownNode):
            wanted, own_key = node.strip().casefold(), self._node.config.node
            own = wanted == self._node.config.name.casefold() or (
                len(wanted) >= KEY_DIGITS and own_key.startswith(wanted)
            )
            if away and not own:
                return NodeId(wanted), tell_apart(names)
            raise MeshError(
                code="node_unknown",
                message=f"{node[:40]!r} is this node itself."
                if own
                else f"No member of the mesh is called {node[:40]!r}.",
                hint=f"Members: {', '.join(found.choices) or 'none'}. Type it for one of them.",
                status=404,
            )
        return found, tell_apart(names)

    def _check_running(self) -> None:
        if self._node.stopping:
            raise MeshError(code="stopping", message="The node is stopping.", hint="Start it again.", status=503)


class ModelLibrary:
    """The models that this node could serve, and where each would run. It reads nothing from disk."""

    def __init__(self, node: Node, registry: ModelRegistry, status: Callable[[], Status]) -> None:
        self._node = node
        self._registry = registry
        self._status = status

    def library(self) -> Library:
        """The models on disk and in the catalogue, and which of them fit."""
        library = self._registry.library
        known = {model.name: model for model in self._status().models}
        others = sum(member.announcement.capacity.memory_bytes for member in self._node.members)
        here = self._node.capacity.memory_bytes
        return Library(
            memory_bytes=here,
            mesh_memory_bytes=here + others,
            disk=tuple(
                self._disk_model(model, known.get(model.name))
                for group in (library.models, library.drafts)
                for model in group.values()
            ),
            catalogue=tuple(self._catalogue_model(entry) for entry in catalog()),
            unusable=tuple(
                UnusableFile(name=one.name, path=str(one.path), reason=one.reason, incomplete=one.incomplete)
                for one in library.unusable
            ),
        )

    def _disk_model(self, model: LocalModel, known: StatusModel | None) -> DiskModel:
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
            draft=self._registry.drafts.get(model.name, ""),
            builtin=model.builtin,
            vision=model.projector is not None,
            status=known.status if known is not None else "cold",
            here=known.here if known is not None else False,
        )

    def _catalogue_model(self, entry: CatalogEntry) -> CatalogueModel:
        have = self._registry.library.find(entry.stem) if entry.stem else None
        return CatalogueModel(
            **msgspec.structs.asdict(entry.row()),
            fit=self._fit(entry.facts() if have is None else have.facts),
            on_disk=have.name if have is not None else "",
        )

    def _fit(self, facts: ModelFacts) -> Fit:
        """Whether a model fits beside what is served here now; if not, whether it fits in the memory of other nodes."""
        plan = self._node.check_load(facts.name, facts=facts)
        if not isinstance(plan, LoadRefused):
            have = self._node.capacity.memory_bytes
            return Fit(
                where="here", context=plan.context, slots=plan.slots, need_bytes=plan.memory_bytes, have_bytes=have
            )
        memories = [member.announcement.capacity.memory_bytes for member in self._node.members]
        own = self._node.capacity
        least = plan_solo(facts, 0, LaunchOptions())
        need = least.need_bytes if isinstance(least, DoesNotFit) else 0
        if not own.memory_bytes and not any(memories):
            return Fit(where="unknown", need_bytes=need, text="No node offers memory for models.")
        elsewhere = any(memory >= need for memory in memories)
        enough = self._node.can_split and own.memory_bytes + sum(memories) >= need and bool(memories)
        # Memory of nodes that may not share it does not count.
        together = enough and not elsewhere and self._node.split_prospect(facts) is None
        have = own.memory_bytes + sum(memories)
        where = "mesh" if elsewhere or together else "no"
        return Fit(where=where, need_bytes=need, have_bytes=have, text=f"{plan.message} {plan.hint}".strip())


def named_decisions(book: TraceLog, name_of: Callable[[NodeId], str]) -> Callable[[int, int], list[Decision]]:
    """The API's routing decisions, with the names of the nodes."""

    def decisions(after: int, limit: int) -> list[Decision]:
        names: dict[str, str] = {}

        def named(decision: Decision) -> Decision:
            for target in decision.targets:
                if target.node_id not in names:
                    names[target.node_id] = name_of(NodeId(target.node_id))
            targets = tuple(msgspec.structs.replace(one, name=names[one.node_id]) for one in decision.targets)
            return msgspec.structs.replace(decision, targets=targets)

        return [named(decision) for decision in book.after(after, limit)]

    return decisions


def console_keys(settings: Settings) -> tuple[str, ...]:
    """The API keys that open the console to other machines: those without a limit. The others are those of guests."""
    return tuple(key for key in settings.api_keys if split_key(key)[0] not in settings.key_limits)


def make_console(
    settings: Settings,
    home: Home,
    notices: NoticeLog,
    sessions: Sessions | None = None,
    ring: KeyRing | None = None,
) -> ConsoleServer:
    """Bind the console. `sessions`: of browsers; they outlive a move to another mesh. `ring`: the keys, if they change.

    A guest takes the next free port if its own is taken, with a notice.

    Raises:
        MeshError: `api_key_required` if other machines could reach it and no key is set; `port_in_use`,
        `cannot_listen`.
    """
    keys = ring if ring is not None else KeyRing(console_keys(settings))
    local = is_loopback_address(settings.console_listen)
    if not local and not keys:
        raise MeshError(
            code="api_key_required",
            message=f"--console-listen {settings.console_listen} opens the console to other machines: it needs a key.",
            hint="Add --api-key-file FILE, or set MESH_LLM_API_KEY; make a key with: openssl rand -hex 24. "
            "A key with a limit (--key-limit) opens no console.",
            status=400,
        )
    config = ConsoleConfig(
        host=settings.console_listen,
        port=settings.console_port,
        page=settings.console_page,
        origins=settings.console_origins,
        hosts=settings.allow_hosts,
    )
    accepts = None if local else keys.accepts
    try:
        return ConsoleServer(config, home, sessions, accepts)
    except MeshError as error:
        taken = explain_taken(error, home, config.host, config.port, "--console", ("--port", settings.api_port or 0))
        if error.code != "port_in_use" or not home.is_guest:
            raise taken from error
        server = ConsoleServer(
            msgspec.structs.replace(config, port=free_port(config.host, config.port)), home, sessions, accepts
        )
        text = f"{taken.message} The console of this node is on port {server.port}."
        notices.add(Notice(level=NoticeLevel.INFO, code="console_port", text=text))
        return server
