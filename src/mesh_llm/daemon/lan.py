"""`--lan`: a node without a mesh finds one on this network and asks to join; a node in a mesh announces it.

The user of a running node sees the requests to join, and approves or denies them.
"""

from collections.abc import Callable, Sequence

import msgspec
import structlog

from mesh_llm import __version__
from mesh_llm.console.status import Status
from mesh_llm.core.membership.names import tell_apart
from mesh_llm.core.types.effects import KnownPeer, Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.daemon.published_state import NoticeShown, ProgressListener, PublishedState, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.discovery.lan import LanAnnouncer, LanNode, browse
from mesh_llm.net.admission.approvals import ApprovalBook, ApprovalClient
from mesh_llm.net.admission.credentials import MeshStores, SigningKey, has_other_members
from mesh_llm.net.admission.records import WaitingNode
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import fingerprint
from mesh_llm.wire.discovery import LanListing
from mesh_llm.wire.mesh.admission import MAX_ASKER_NAME, ApprovalRequest, Scope
from mesh_llm.wire.mesh.invites import format_invite

_log = structlog.get_logger(__name__)

_ANSWERS = {
    "approved": ("join_approved", "may join with scope {scope}"),
    "denied": ("join_denied", "may not join"),
    "expired": ("join_expired", "asked to join, and the request expired"),
}


class Approvals:
    """Requests to join; implements console.calls.Approvals. Without `--lan` there are none."""

    def __init__(self, book: ApprovalBook | None) -> None:
        self._book = book

    def waiting(self) -> list[WaitingNode]:
        """Requests that wait for an answer, oldest first."""
        return self._book.waiting() if self._book is not None else []

    async def approve(self, node: str, scope: str | None = None) -> WaitingNode:
        """Admit a node, by its id or the beginning of it. Raises MeshError."""
        try:
            wanted = Scope.parse(scope) if scope else None
        except ValueError as error:
            text = f"{str(error).capitalize()}."
            raise MeshError(code="invite_scope", message=text, hint="See docs/security.md.", status=400) from None
        return self._open().approve(node, wanted)

    async def deny(self, node: str) -> WaitingNode:
        """Deny a request, by the node's id or the beginning of it. The requester is notified. Raises MeshError."""
        return self._open().deny(node)

    def _open(self) -> ApprovalBook:
        if self._book is None:
            raise MeshError(
                code="lan_off",
                message="This node takes no requests to join.",
                hint="Start it with --lan; or make an invite: mesh-llm invite create",
                status=409,
            )
        return self._book


class LanPresence:
    """Announces the mesh on this network, and shows requests to join."""

    def __init__(self, net: MeshNet, status: Callable[[], Status], published: PublishedState) -> None:
        self._net = net
        self._status = status
        self._published = published
        self._scope = TaskScope("lan")

    def start(self) -> None:
        """Begin."""
        if self._net.approvals is not None:
            self._net.approvals.watch(self._show_request)
        announcer = LanAnnouncer(self._listing, lambda: self._net.reachable().addresses, self._published.changes.wait)
        self._scope.supervise(announcer.run, "announce")

    async def close(self) -> None:
        """Withdraw the announcement."""
        await self._scope.close()

    def _listing(self) -> LanListing | None:
        """The announcement; None while this node may not admit others."""
        if self._net.scope is None or self._net.scope < Scope.SERVE:
            return None
        status = self._status()
        return LanListing(
            mesh=MeshId(status.mesh_id),
            node=NodeId(status.node_id),
            mesh_name=status.mesh_name,
            name=status.name,
            version=status.version,
            models=tuple(model.name for model in status.models if model.status == "warm"),
        )

    def _show_request(self, request: WaitingNode) -> None:
        who = f"{request.name or 'a machine without a name'} at {request.address}"
        if request.state == "pending":
            code = "join_asked"
            text = f"{who} asks to join (its key: {request.id}). To admit it: mesh-llm approve {request.id}"
        else:
            code, words = _ANSWERS[request.state]
            text = f"{who} {words.format(scope=request.scope)}."
        self._published.notices.add(Notice(level=NoticeLevel.INFO, code=code, text=text, about=request.node_id))


LOOK_SECONDS = 4.0


async def join_by_lan(
    settings: Settings, key: SigningKey, home: Home | None, on_progress: ProgressListener
) -> Settings:
    """The settings with an invite, if `--lan` found a mesh and its user admitted this machine.

    They are unchanged if there is a token, if this node's mesh has other nodes, or if no mesh was found: then this node
    begins one. `home` None: nothing is kept.

    Raises:
        MeshError: several meshes were found and none was named; the request was denied or not answered; a client found
            no mesh.
    """
    if not settings.lan or settings.join or has_other_members(MeshStores(home.mesh if home is not None else None)):
        return settings
    on_progress(Stage(name="lan", text="looking for a mesh on this network", done=False))
    found = [node for node in await _look(settings) if node.listing.node != key.node_id]
    if not found:
        if settings.client:
            raise MeshError(
                code="lan_nothing_found",
                message="No mesh was found on this network.",
                hint="Start a node of it with --lan; or join with an invite: mesh-llm --client --join TOKEN",
                status=503,
            )
        on_progress(Stage(name="lan", text="no mesh on this network yet; this node begins one", done=True))
        return settings
    nodes = choose(found, settings.mesh_name)
    scope = Scope.CLIENT if settings.client else Scope.SERVE
    asking = ApprovalClient(
        key,
        nodes[0].listing.mesh,
        ApprovalRequest(settings.node_name[:MAX_ASKER_NAME], scope),
        version=__version__,
        endpoint=EndpointSettings(relay=False),
    )
    names = {node.listing.node: node.listing.name for node in nodes}

    def waiting(node: NodeId) -> None:
        where = names.get(node) or node[:10]
        text = (
            f"{where} (key {fingerprint(node)}) was asked. Admit this machine there:"
            f" mesh-llm approve {fingerprint(key.node_id)}"
        )
        on_progress(NoticeShown(level=NoticeLevel.INFO, code="lan_asked", text=text))

    on_progress(Stage(name="lan", text=f"asking to join {_label(nodes[0])}", done=False))
    invite = await asking.run([KnownPeer(node=node.listing.node, addresses=node.addresses) for node in nodes], waiting)
    on_progress(Stage(name="lan", text=f"admitted as {invite.terms.scope.word}", done=True))
    return msgspec.structs.replace(settings, join=(format_invite(invite),))


async def _look(settings: Settings) -> list[LanNode]:
    try:
        return await browse(LOOK_SECONDS)
    except MeshError:
        # A node that serves works without a network. The announcer reports that there is none.
        if settings.client:
            raise
        return []


def choose(found: Sequence[LanNode], wanted: str) -> list[LanNode]:
    """The nodes of the mesh to ask: by its name, also as `discover --lan` shows it, or the beginning of its key.

    Without either, those of the only mesh. Raises MeshError(lan_not_found, lan_several).
    """
    names = {node.listing.mesh: node.listing.mesh_name for node in found}
    names |= {node.listing.mesh: node.listing.mesh_name for node in found if node.listing.mesh_name}
    shown = tell_apart(names)
    meshes: dict[MeshId, list[LanNode]] = {}
    for node in found:
        if not wanted or _is(node, wanted) or shown[node.listing.mesh].casefold() == wanted.casefold():
            meshes.setdefault(node.listing.mesh, []).append(node)
    listed = "; ".join(sorted({_label(node) for node in found}))[:1000]
    if not meshes:
        raise MeshError(
            code="lan_not_found",
            message=f"No mesh called {wanted} was found on this network.",
            hint=f"Found: {listed}.",
            status=404,
        )
    if len(meshes) > 1:
        raise MeshError(
            code="lan_several",
            message=f"{len(meshes)} meshes were found on this network: {listed}.",
            hint="Say which one with --mesh-name NAME, or with the beginning of its id; see mesh-llm discover --lan",
            status=409,
        )
    return next(iter(meshes.values()))


def _is(node: LanNode, wanted: str) -> bool:
    text = wanted.casefold()
    return node.listing.mesh_name.casefold() == text or (len(text) >= 6 and node.listing.mesh.startswith(text))


def _label(node: LanNode) -> str:
    return f"{node.listing.mesh_name or 'unnamed'} ({node.listing.mesh[:10]}, on {node.listing.name or 'a node'})"
