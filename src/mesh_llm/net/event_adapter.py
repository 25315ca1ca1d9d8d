"""Turns what the transports notice into events for the core, and into warnings for the user."""

import math
import time
from collections.abc import Callable

import msgspec
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
    ScopeLimited,
    SendFailed,
    UserWarned,
)
from mesh_llm.core.types.gossip import Exchange, MeshMessage
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import DUPLICATE_KEY_REPORT_SECONDS
from mesh_llm.net.quic.connection import PathSample, PeerConnection
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate

_MOST_REVOKED = 4096
_RTT_STEP_MS = 3.0
_RTT_STEP_SHARE = 0.25
_ENDS_MEMBERSHIP = frozenset({Reason.REVOKED, Reason.EXPIRED, Reason.OTHER_VERSION})

OnEvent = Callable[[AnyEvent], None]

_log = structlog.get_logger(__name__)


class EventAdapter:
    """Calls `on_event` on the event loop. Passive peers are left out: the core does not track them."""

    def __init__(self, on_event: OnEvent, own: NodeId) -> None:
        self._on_event = on_event
        self._own = own
        self._paths: dict[NodeId, PathSample] = {}
        """The path that was last reported for each connected peer."""
        self._revoked: dict[NodeId, None] = {}
        self._limited: dict[NodeId, Scope] = {}
        """Members that announce more than they may, and what they may."""
        self._refusals: set[Refusal] = set()
        self._duplicate_key_reported = -math.inf

    def stop(self) -> None:
        """Send no more events."""
        self._on_event = _ignore

    # Connections

    def connected(self, connection: PeerConnection) -> None:
        """A peer has a new connection."""
        node = connection.peer.node
        if connection.peer.scope < Scope.SERVE:
            return
        self._readmitted(node)
        path = self._paths[node] = connection.sample() or PathSample(0.0, relayed=False)
        self._on_event(PeerConnected(node=node, rtt_ms=path.rtt_ms, relayed=path.relayed))

    def lost(self, connection: PeerConnection, reason: str, *, clean: bool) -> None:
        """A peer's last connection ended."""
        node = connection.peer.node
        self._paths.pop(node, None)
        if connection.peer.scope >= Scope.SERVE:
            self._on_event(PeerLost(node=node, reason=reason, clean=clean))

    def refused(self, node: NodeId, refusal: Refusal) -> None:
        """A peer did not admit this node."""
        _log.warning("not admitted", peer=node[:10], reason=refusal_error(refusal).message)
        if refusal.subject is Subject.CERTIFICATE and refusal.reason in _ENDS_MEMBERSHIP:
            self.own_admission_ended(refusal)

    def duplicate_key(self, node: NodeId, addresses: tuple[str, ...]) -> None:
        """Two processes use one key at once: that of a peer, seen at these addresses, or this node's own."""
        fix = (
            "Stop mesh-llm on one of the two, move the file `key` out of its MESH_LLM_HOME (or set another "
            "MESH_LLM_HOME), and start it again with an invite: `mesh-llm --join TOKEN`."
        )
        if node == self._own:
            if time.monotonic() - self._duplicate_key_reported < DUPLICATE_KEY_REPORT_SECONDS:
                return
            self._duplicate_key_reported = time.monotonic()
            text = f"Another machine runs with a copy of this node's key, so neither can be reached reliably. {fix}"
        else:
            where = " and ".join(addresses)
            text = f"Two machines use the key of one node ({node[:10]}), at {where}: a home was copied. {fix}"
        self._warn("duplicate_identity", text, node, serious=True)

    def path_sampled(self, connection: PeerConnection, path: PathSample) -> bool:
        """A peer's path was sampled; reported when it changed noticeably. Returns whether it did."""
        node = connection.peer.node
        reported = self._paths.get(node)
        if reported is None or not changed_noticeably(reported, path):
            return False
        self._paths[node] = path
        self._on_event(PathChanged(node=node, rtt_ms=path.rtt_ms, relayed=path.relayed))
        return True

    def addresses_changed(self, reachable: Reachable) -> None:
        """This node's addresses or its certificate changed: the core announces itself again."""
        self._on_event(AddressesChanged(addresses=reachable.addresses, relay=reachable.relay))

    def rejoin_failed(self, reason: str) -> None:
        """No peer admitted this node."""
        self._on_event(RejoinFailed(reason=reason))

    # Gossip and routes

    def received(self, peer: NodeId, message: MeshMessage) -> None:
        """A message arrived, and everything in it that can be forged was verified."""
        if self._revoked and isinstance(message, Exchange):
            for entry in message.entries:
                self._readmitted(entry.announcement.node)
        self._on_event(MessageReceived(peer=peer, message=message))

    def send_failed(self, peer: NodeId, reason: str) -> None:
        """Messages to a peer were lost: there is no connection, and none could be made."""
        self._on_event(SendFailed(peer=peer, reason=reason))

    def clients(self, count: int) -> None:
        """The number of passive nodes that follow this one changed."""
        self._on_event(ClientsCounted(count=count))

    def routes_learned(self, source: NodeId, snapshot: RoutingSnapshot) -> None:
        """This passive node fetched a routing table."""
        self._on_event(RoutesLearned(source=source, snapshot=snapshot))

    # Admissions

    def revoked(
        self, encoded: bytes, nodes: tuple[NodeId, ...], *, final: bool, replaces: tuple[bytes, ...] = ()
    ) -> None:
        """A revocation holds from now on. See RevocationLearned."""
        self._revoked.update(dict.fromkeys(nodes))
        while len(self._revoked) > _MOST_REVOKED:
            del self._revoked[next(iter(self._revoked))]
        self._on_event(RevocationLearned(revocation=encoded, nodes=nodes, final=final, replaces=replaces))

    def scope_checked(self, node: NodeId, scope: Scope, *, claims: bool) -> None:
        """What a member may do; `claims`: it announces that it takes part in split models. Reported if that differs."""
        before = self._limited.pop(node, None)
        if scope < Scope.SPLIT and (claims or before is not None):
            self._limited[node] = scope
            if len(self._limited) > _MOST_REVOKED:
                del self._limited[next(iter(self._limited))]
            if scope != before:
                self._on_event(ScopeLimited(node=node, scope=scope.word))
        elif before is not None:
            self._on_event(ScopeLimited(node=node, scope=""))

    def admissions_ended(self, nodes: tuple[NodeId, ...]) -> None:
        """The certificates of these nodes expired."""
        self._on_event(AdmissionEnded(nodes=nodes))

    def own_admission_ended(self, refusal: Refusal) -> None:
        """This node is no longer a member, by its own check or a peer's. Warns once for each cause."""
        cause = msgspec.structs.replace(refusal, detail="")
        if cause not in self._refusals:
            self._refusals.add(cause)
            error = refusal_error(cause)
            self._warn(error.code, f"{error.message} {error.hint}", serious=True)

    def own_admission_ends_soon(self, certificate: Certificate) -> None:
        """This node's certificate could not be renewed and ends soon."""
        inviter = certificate.links[-1].inviter or b""
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(certificate.expires))
        self._warn(
            "admission_ends",
            f"This node's admission to the mesh ends at {end}, and could not be renewed: neither the node that invited "
            f"it ({inviter.hex()[:10]}) nor one above that could be reached. Start one of these, or join by an invite "
            "of another member: `mesh-llm --join TOKEN`.",
        )

    def _readmitted(self, node: NodeId) -> None:
        """A node showed a valid certificate: an earlier revocation no longer counts against it."""
        if node in self._revoked:
            del self._revoked[node]
            self._on_event(Readmitted(node=node))

    def _warn(self, code: str, text: str, about: str = "", *, serious: bool = False) -> None:
        _log.warning("user warned", code=code, text=text, about=about[:10])
        self._on_event(UserWarned(code=code, text=text, about=about, serious=serious))


def changed_noticeably(reported: PathSample, sample: PathSample) -> bool:
    """Whether a path differs from the reported one by more than its noise."""
    step = max(_RTT_STEP_MS, _RTT_STEP_SHARE * reported.rtt_ms)
    return reported.relayed != sample.relayed or abs(reported.rtt_ms - sample.rtt_ms) >= step


def _ignore(_: AnyEvent) -> None:
    return
