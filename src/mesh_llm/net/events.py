"""What the parts of this room notice, told as core events."""

from collections.abc import Callable

import structlog

from mesh_llm.core.routing.ranking import RoutingSnapshot
from mesh_llm.core.types.events import (
    AddressesChanged,
    AdmissionEnded,
    AnyEvent,
    ClientsCounted,
    MessageReceived,
    PathChanged,
    PeerConnected,
    PeerLost,
    Readmitted,
    RejoinFailed,
    RevocationLearned,
    RoutesLearned,
    SendFailed,
    UserWarned,
)
from mesh_llm.core.types.gossip import Exchange, MeshMessage
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.quic.connection import PathSample, PeerConnection
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.wire.mesh.admission import Refusal, Scope, refusal_error

_MOST_REVOKED = 4096

OnEvent = Callable[[AnyEvent], None]

_log = structlog.get_logger(__name__)


class Teller:
    """Satisfies ConnectionEvents and the like. Passive peers come and go without the core hearing of it."""

    def __init__(self, on_event: OnEvent) -> None:
        self._on_event = on_event
        self._told: dict[NodeId, PathSample] = {}
        self._revoked: dict[NodeId, None] = {}

    def stop(self) -> None:
        """Tell nothing any more."""
        self._on_event = _nobody

    def connected(self, connection: PeerConnection) -> None:
        """A connection stands."""
        node = connection.peer.node
        if connection.peer.scope < Scope.SERVE:
            return
        self._readmitted(node)
        path = self._told[node] = connection.sample() or PathSample(0.0, relayed=False)
        self._on_event(PeerConnected(node=node, rtt_ms=path.rtt_ms, relayed=path.relayed))

    def lost(self, connection: PeerConnection, reason: str, *, clean: bool) -> None:
        """A peer's last connection ended."""
        node = connection.peer.node
        self._told.pop(node, None)
        if connection.peer.scope >= Scope.SERVE:
            self._on_event(PeerLost(node=node, reason=reason, clean=clean))

    def refused(self, node: NodeId, refusal: Refusal) -> None:
        """A peer did not let this node in."""
        _log.warning("not admitted", peer=node[:10], reason=refusal_error(refusal).message)

    def received(self, peer: NodeId, message: MeshMessage) -> None:
        """A verified message."""
        if self._revoked and isinstance(message, Exchange):
            for entry in message.entries:
                self._readmitted(entry.announcement.node)
        self._on_event(MessageReceived(peer=peer, message=message))

    def send_failed(self, peer: NodeId, reason: str) -> None:
        """Messages were lost."""
        self._on_event(SendFailed(peer=peer, reason=reason))

    def path_seen(self, connection: PeerConnection, path: PathSample) -> None:
        """A look at a peer's path; told where it is another one, or its round trip changed markedly."""
        node = connection.peer.node
        told = self._told.get(node)
        if told is not None and markedly(told, path):
            self._told[node] = path
            self._on_event(PathChanged(node=node, rtt_ms=path.rtt_ms, relayed=path.relayed))

    def addresses_changed(self, reachable: Reachable) -> None:
        """This node can be reached elsewhere, or its certificate is a new one: its word is to be told again."""
        self._on_event(AddressesChanged(addresses=reachable.addresses, relay=reachable.relay))

    def rejoin_failed(self, reason: str) -> None:
        """Nobody admitted this node."""
        self._on_event(RejoinFailed(reason=reason))

    def revoked(
        self, encoded: bytes, nodes: tuple[NodeId, ...], *, final: bool, replaces: tuple[bytes, ...] = ()
    ) -> None:
        """A revocation holds from now on. See RevocationLearned."""
        self._revoked.update(dict.fromkeys(nodes))
        while len(self._revoked) > _MOST_REVOKED:
            del self._revoked[next(iter(self._revoked))]
        self._on_event(RevocationLearned(revocation=encoded, nodes=nodes, final=final, replaces=replaces))

    def admission_ended(self, nodes: tuple[NodeId, ...]) -> None:
        """The certificates of these nodes have run out."""
        self._on_event(AdmissionEnded(nodes=nodes))

    def warn(self, code: str, text: str, about: str = "", *, serious: bool = False) -> None:
        """The user must know this."""
        _log.warning("user warned", code=code, text=text, about=about[:10])
        self._on_event(UserWarned(code=code, text=text, about=about, serious=serious))

    def _readmitted(self, node: NodeId) -> None:
        """A node is in by a verified certificate: if it was revoked before, that is not held against it any more."""
        if node in self._revoked:
            del self._revoked[node]
            self._on_event(Readmitted(node=node))

    def clients(self, count: int) -> None:
        """So many passive nodes follow this one."""
        self._on_event(ClientsCounted(count=count))

    def routes_learned(self, source: NodeId, snapshot: RoutingSnapshot) -> None:
        """A passive node fetched a table."""
        self._on_event(RoutesLearned(source=source, snapshot=snapshot))


_RTT_STEP_MS = 3.0
_RTT_STEP_SHARE = 0.25


def markedly(told: PathSample, sample: PathSample) -> bool:
    """Whether a path differs from what was told by more than its noise."""
    step = max(_RTT_STEP_MS, _RTT_STEP_SHARE * told.rtt_ms)
    return told.relayed != sample.relayed or abs(told.rtt_ms - sample.rtt_ms) >= step


def _nobody(_: AnyEvent) -> None:
    return
