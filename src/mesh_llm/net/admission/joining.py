"""Getting in, and getting in again: invites and last-known peers are tried until one admits this node."""

import asyncio
from collections.abc import Iterable, Sequence

import msgspec
import structlog

from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.credentials import PEERS_FILE, Standing
from mesh_llm.net.peers import AddressBook
from mesh_llm.net.quic.connection import PeerConnection
from mesh_llm.net.quic.connections import Connections
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import MAX_INVITES, Reason, Refusal, Subject, refusal_error
from mesh_llm.wire.mesh.invites import Contact, Invite, unpack_address

MAX_AT_ONCE = 8
MAX_KEPT = 64
_MOST_ADDRESSES = 16
_MAY_PASS = frozenset({"node_busy", "certificate_other_version"})
"""Refusals that end by themselves: later, or when the node that invited this one is back."""

_log = structlog.get_logger(__name__)


def worth_keeping(present: Iterable[KnownPeer], before: Iterable[KnownPeer]) -> tuple[KnownPeer, ...]:
    """Peers for the next life: those who are there, then those who were; first all that can be dialled.

    While a node stops, the others hang up one after the other. The last one there may be a passive node, which nobody
    can dial: it must not be all that is remembered.
    """
    found: dict[NodeId, KnownPeer] = {}
    for peer in (*present, *before):
        if peer.node not in found or not (found[peer.node].addresses or found[peer.node].relay):
            found[peer.node] = peer
    ordered = sorted(found.values(), key=lambda peer: not (peer.addresses or peer.relay))
    return tuple(ordered[:MAX_KEPT])


class JoinReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an attempt to join.

    Attributes:
        admitted: the peer that let this node in; None where none did.
        problems: of tokens and peers, worst first; there may be some although it worked.
        hopeless: nothing but a new token can help: no peer was merely out of reach.
    """

    admitted: NodeId | None = None
    problems: tuple[MeshError, ...] = ()
    hopeless: bool = False

    def raise_for_user(self) -> None:
        """Raise the first problem where nobody admitted this node."""
        if self.admitted is None and self.problems:
            raise self.problems[0]


class Joiner:
    """See the module's text. `tokens`: what `--join` brought, parsed."""

    def __init__(
        self, standing: Standing, connections: Connections, book: AddressBook, tokens: list[Invite | Refusal]
    ) -> None:
        self._standing = standing
        self._connections = connections
        self._book = book
        self._kept: tuple[KnownPeer, ...] | None = None
        self._unreadable = [entry for entry in tokens if isinstance(entry, Refusal)]
        invites = [entry for entry in tokens if isinstance(entry, Invite)]
        mine = [invite for invite in invites if invite.mesh_id == standing.mesh]
        # The widest first: the first one that is accepted counts.
        self._invites = sorted(mine, key=lambda invite: -invite.terms.scope)
        self._unreadable += [
            Refusal(Reason.OTHER_MESH, Subject.INVITE, f"mesh {invite.mesh_id[:10]}, not {standing.mesh[:10]}")
            for invite in invites
            if invite.mesh_id != standing.mesh
        ]
        for invite in self._invites:
            for contact in invite.terms.contacts:
                self._learn(contact)
        self._recall()
        self._shown = tuple(encode(invite) for invite in self._invites[:MAX_INVITES])
        connections.introduce(self._shown)

    def add(self, invite: Invite) -> tuple[KnownPeer, ...]:
        """A further token of this mesh was found: its nodes are tried first from now on; those that are new."""
        known = {peer.node for peer in self.contacts()}
        self._invites = [invite, *(entry for entry in self._invites if entry.id != invite.id)][:MAX_INVITES]
        for contact in invite.terms.contacts:
            self._learn(contact)
        self._shown = tuple(encode(entry) for entry in self._invites)
        self._connections.introduce(self._shown)
        return tuple(peer for peer in self.contacts() if peer.node not in known)

    def contacts(self) -> tuple[KnownPeer, ...]:
        """The nodes that the tokens name, this one excepted."""
        nodes = [contact.node.hex() for invite in self._invites for contact in invite.terms.contacts]
        return tuple(self._book.find(NodeId(node)) for node in dict.fromkeys(nodes) if not self._is_me(node))

    def last_known(self) -> tuple[KnownPeer, ...]:
        """Peers of an earlier life, and those of this one."""
        if self._kept is None:
            self._kept = self._read()
        return self._kept

    def _read(self) -> tuple[KnownPeer, ...]:
        data = self._standing.store.read(PEERS_FILE)
        if data is None:
            return ()
        try:
            return msgspec.json.decode(data, type=tuple[KnownPeer, ...])
        except msgspec.MsgspecError as error:
            _log.warning("the list of last-known peers is damaged", reason=str(error))
            return ()

    def keep(self, present: Sequence[KnownPeer], heard: Sequence[KnownPeer]) -> None:
        """Remember for the next life who is there, and who was heard of, the likeliest last.

        Asked often: it is written where it would say something new, not for another order. Of a mesh larger than what
        is kept, who was heard of last changes all the time; there only who is there counts.
        """
        kept = self.last_known()
        peers = worth_keeping(present, (*heard, *kept))
        known = set(kept)
        there = {peer.node for peer in present}
        if any(peer not in known and (len(kept) < MAX_KEPT or peer.node in there) for peer in peers):
            self._kept = tuple(peers)
            self._standing.store.try_write(PEERS_FILE, msgspec.json.encode(peers))

    async def join(self, peers: Iterable[KnownPeer] = ()) -> JoinReport:
        """Try the tokens' nodes, then these and the last-known peers, several at once, until one admits this node."""
        for peer in peers:
            self._book.learn(peer.node, peer.addresses, peer.relay)
        known = [peer.node for peer in (*self.contacts(), *peers, *self.last_known())]
        nodes = [node for node in dict.fromkeys(known) if not self._is_me(node)]
        unreadable = [refusal_error(refusal) for refusal in self._unreadable]
        if not nodes:
            return JoinReport(problems=tuple(unreadable), hopeless=bool(unreadable))
        return await self._try(nodes, unreadable)

    async def _try(self, nodes: list[NodeId], unreadable: list[MeshError]) -> JoinReport:
        queue = list(nodes)
        refused: list[MeshError] = []
        lost: list[MeshError] = []
        async with TaskScope("join") as scope:
            running: set[asyncio.Task[PeerConnection | Refusal | ConnectionError]] = set()
            while queue or running:
                while queue and len(running) < MAX_AT_ONCE:
                    node = queue.pop(0)
                    running.add(scope.spawn(self._attempt(node), node[:8]))
                done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    outcome = task.result()
                    if isinstance(outcome, PeerConnection):
                        return JoinReport(admitted=outcome.peer.node, problems=tuple(unreadable))
                    if isinstance(outcome, Refusal):
                        refused.append(refusal_error(outcome))
                        continue
                    lost.append(_unreachable(outcome))
        hopeless = not lost and all(error.code not in _MAY_PASS for error in refused)
        return JoinReport(problems=(*refused, *unreadable, *lost), hopeless=hopeless)

    async def _attempt(self, node: NodeId) -> PeerConnection | Refusal | ConnectionError:
        try:
            return await self._connections.dial(node, self._shown)
        except ConnectionError as error:
            return error

    def known(self) -> tuple[KnownPeer, ...]:
        """Whom to look for: the tokens' nodes and those of an earlier life, where they may be."""
        return tuple(self._book.find(peer.node) for peer in (*self.contacts(), *self.last_known()))

    def _recall(self) -> None:
        """Add where peers were in an earlier life to where the tokens say they are: either may be the newer word.

        A token tells where its nodes were when it was made, and a node that was restarted is elsewhere.
        """
        for peer in self.last_known():
            told = self._book.find(peer.node)
            addresses = tuple(dict.fromkeys((*peer.addresses, *told.addresses)))
            self._book.learn(peer.node, addresses[:_MOST_ADDRESSES], peer.relay or told.relay)

    def _learn(self, contact: Contact) -> None:
        addresses: list[str] = []
        for packed in contact.addresses:
            try:
                addresses.append(unpack_address(packed))
            except ValueError:
                _log.debug("an address of the invite is none", contact=contact.node.hex()[:10])
        self._book.learn(NodeId(contact.node.hex()), tuple(addresses), contact.relay)

    def _is_me(self, node: str) -> bool:
        return node == self._standing.key.node_id


def _unreachable(error: ConnectionError) -> MeshError:
    return MeshError(
        code="mesh_unreachable",
        message=f"No node of the mesh can be reached: {error}.",
        hint="Check that one of them runs, and that the network lets UDP through. This node keeps trying.",
        status=503,
        retry_after=5.0,
    )
