"""`--lan` of a running node: its mesh is announced on this network, and who asks to join is shown to the user."""

from collections.abc import Callable

import structlog

from mesh_llm.core.console_values import WaitingNode
from mesh_llm.core.effects import Notice, NoticeLevel
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.core.status import Status
from mesh_llm.daemon.notices import Bell, NoticeBook
from mesh_llm.discovery.lan_announce import LanAnnouncer
from mesh_llm.net.approvals import ApprovalBook
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.lan_listing import LanListing

_log = structlog.get_logger(__name__)

_SAID = {
    "approved": ("join_approved", "may join with scope {scope}"),
    "denied": ("join_denied", "was told that it may not join"),
    "expired": ("join_expired", "asked to join, and nobody answered in time"),
}


class Approvals:
    """What the user does about machines that ask to join; without `--lan` there are none."""

    def __init__(self, book: ApprovalBook | None) -> None:
        self._book = book

    def waiting(self) -> list[WaitingNode]:
        """Requests that wait for an answer, oldest first."""
        return self._book.waiting() if self._book is not None else []

    async def approve(self, node: str, scope: str | None = None) -> WaitingNode:
        """Let one in, by its id or the beginning of it. Raises MeshError."""
        try:
            wanted = Scope.parse(scope) if scope else None
        except ValueError as error:
            text = f"{str(error).capitalize()}."
            raise MeshError(code="invite_scope", message=text, hint="See docs/security.md.", status=400) from None
        return self._open().approve(node, wanted)

    async def deny(self, node: str) -> WaitingNode:
        """Turn one down, by its id or the beginning of it; it is told. Raises MeshError."""
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
    """See the module's text."""

    def __init__(self, net: MeshNet, status: Callable[[], Status], notices: NoticeBook, bell: Bell) -> None:
        self._net = net
        self._status = status
        self._notices = notices
        self._bell = bell
        self._scope = TaskScope("lan")

    def start(self) -> None:
        """Begin to announce, and to show requests."""
        if self._net.approvals is not None:
            self._net.approvals.watch(self._asked)
        announcer = LanAnnouncer(self._listing, lambda: self._net.reachable().addresses, self._bell.wait)
        self._scope.supervise(announcer.run, "announce")

    async def close(self) -> None:
        """Say goodbye to the network."""
        await self._scope.close()

    def _listing(self) -> LanListing | None:
        """None while this node could not let anybody in."""
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

    def _asked(self, request: WaitingNode) -> None:
        who = f"{request.name or 'a machine without a name'} at {request.address}"
        if request.state == "pending":
            code = "join_asked"
            text = f"{who} asks to join (its key: {request.id}). To let it in: mesh-llm approve {request.id}"
        else:
            code, words = _SAID[request.state]
            text = f"{who} {words.format(scope=request.scope)}."
        self._notices.add(Notice(level=NoticeLevel.INFO, code=code, text=text, about=request.node_id))
