"""Raising and lowering what a member may do, while it and this node run.

A member is raised by an invite for it alone. This node sends it on a GRANT stream, and the member shows it in an
ordinary ADMIT exchange: whoever checks its new certificate needs to know nothing of grants.

A member is lowered by a ceiling, a revocation that takes a part of its scope. It names the member's key and spreads by
gossip, so the member's consent is not needed, and neither its older certificates nor other invites help it. A later
ceiling of the same node raises it again.
"""

import asyncio
from collections.abc import Callable

import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.revocations import RevocationList, set_ceiling
from mesh_llm.net.connection_manager import ConnectionManager
from mesh_llm.net.event_adapter import EventAdapter
from mesh_llm.net.quic.connection import Peer, PeerConnection
from mesh_llm.net.streams import PeerStream
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, rests_on
from mesh_llm.wire.mesh.frames import StreamType
from mesh_llm.wire.mesh.invites import Invite, Revocation, decode_invite

_ANSWER_SECONDS = 10.0
"""How long a member may take to show the invite and get its certificate."""
_INVITE_SECONDS = 600.0
"""How long the invite of a grant can be used; the member uses it at once."""

_log = structlog.get_logger(__name__)


class Grants:
    """Both sides of a grant."""

    def __init__(
        self,
        connections: ConnectionManager,
        invites: InviteBook,
        revocations: RevocationList,
        events: EventAdapter,
        revoke: Callable[[Revocation], object],
    ) -> None:
        """`revoke`: applies and spreads a revocation."""
        self._connections = connections
        self._issuer = connections.issuer
        self._credentials = connections.issuer.credentials
        self._invites = invites
        self._revocations = revocations
        self._events = events
        self._revoke = revoke

    def lower_to(self, scope: Scope, certificate: Certificate) -> None:
        """Take from a member what goes beyond this scope, in the whole mesh.

        It is said also of a member that seems to have no more: another node may have just raised it. Raises
        MeshError(not_yours) if its admission does not rest on this node.
        """
        mine = [one.ceiling for one in self._ceilings_by_me(certificate)]
        if not any(one is not None and one <= scope for one in mine):
            self._set_ceiling(scope, certificate)

    async def raise_to(self, scope: Scope, certificate: Certificate, name: str) -> None:
        """Give a member a wider scope. `name`: of the member, for messages.

        Raises MeshError: the scope is wider than this node's own; another node lowered the member; the member cannot
        be reached or does not take it.
        """
        own = self._credentials.certificate
        if own is None or (mine := self._credentials.scope) is None or scope > mine:
            word = self._credentials.scope.word if self._credentials.scope is not None else "none"
            raise refusal_error(Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"this node has scope {word}"))
        target = certificate.links[-1].node
        if target in rests_on(own.links):
            raise MeshError(
                code="not_above",
                message=f"This node was itself invited or admitted by {name}, or through it.",
                hint="Type it on the node that founded the mesh, or on another one with scope split.",
                status=403,
            )
        self._check_ceilings(scope, certificate, own, name)
        if any(one.ceiling is not None and one.ceiling < scope for one in self._ceilings_by_me(certificate)):
            self._set_ceiling(scope, certificate)
        if self._issuer.scope_of(certificate) < scope:
            await self._deliver(scope, certificate.node, name)

    async def receive(self, stream: PeerStream, peer: Peer, parameters: bytes) -> None:
        """Serve a GRANT stream: a peer offers this node a wider scope. Raises MeshError."""
        invite = decode_invite(parameters)
        own = self._credentials.certificate
        mesh = self._credentials.mesh
        if not isinstance(invite, Invite) or invite.mesh_id != mesh or invite.issuer != peer.node or own is None:
            raise MeshError(code="grant_refused", message="A grant was refused: it is no invite of its sender.")
        if invite.terms.scope <= (self._credentials.scope or own.scope):
            # It gives nothing. But the peer may know an older certificate: show it what this node has.
            await self._connections.dial(peer.node)
            await stream.finish()
            return
        outcome = await self._connections.dial(peer.node, (parameters,))
        if self._credentials.certificate == own:
            # An attempt that began before was shared, and showed other invites.
            outcome = await self._connections.dial(peer.node, (parameters,))
        if self._credentials.certificate == own:
            reason = refusal_error(outcome).message if isinstance(outcome, Refusal) else "nothing was granted."
            raise MeshError(code="grant_refused", message=f"A grant was not carried out: {reason}")
        _log.info("scope granted", by=peer.node[:10], scope=invite.terms.scope.word)
        self._events.addresses_changed(self._connections.endpoint.reachable())
        await stream.finish()
        await self._connections.present()

    def _set_ceiling(self, scope: Scope, certificate: Certificate) -> None:
        # Later than the last one also where the clock was set back.
        earlier = (one.issued + 1 for one in self._ceilings_by_me(certificate))
        now = max([int(self._issuer.clock()), *earlier])
        self._revoke(set_ceiling(self._credentials, certificate, scope, now))

    def _ceilings_by_me(self, certificate: Certificate) -> list[Revocation]:
        """At most one."""
        return [one for one in self._revocations.ceilings_of(certificate.links[-1].node) if self._is_mine(one)]

    def _is_mine(self, revocation: Revocation) -> bool:
        mesh_key = self._credentials.mesh_key
        return revocation.revoker == (mesh_key or self._credentials.key).public

    def _check_ceilings(self, scope: Scope, certificate: Certificate, own: Certificate, name: str) -> None:
        """Raise MeshError if others keep the member below this scope, whatever this node does."""
        names = rests_on(own.links) | {certificate.links[-1].node}
        for node in names:
            for one in self._revocations.ceilings_of(node):
                below = one.ceiling is not None and one.ceiling < scope
                if below and not self._is_mine(one) and (one.final or one.revoker in names):
                    who = "the node that founded the mesh" if one.final else f"the node {one.revoker.hex()[:10]}"
                    raise MeshError(
                        code="lowered_elsewhere",
                        message=f"{name} was lowered to scope {one.ceiling.word} by {who}." if one.ceiling else "",
                        hint="Only that node can raise it again.",
                        status=403,
                    )

    async def _deliver(self, scope: Scope, node: NodeId, name: str) -> None:
        invite = self._invites.create_for(node, scope, _INVITE_SECONDS)
        try:
            connection = await self._connections.get(node)
            await self._offer(connection, encode(invite))
        except ConnectionError as error:
            reason = str(error)
        else:
            if connection.peer.scope >= scope:
                return
            reason = "it did not take it"
        raise MeshError(
            code="grant_not_delivered",
            message=f"{name} did not get scope {scope.word}: {reason}.",
            hint="Try again when it can be reached. Or make an invite here, and start it again with that: "
            f"`mesh-llm invite create --scope {scope.word}`, `mesh-llm --join TOKEN`.",
            status=503,
        )

    async def _offer(self, connection: PeerConnection, invite: bytes) -> None:
        stream = await connection.open(StreamType.GRANT, invite)
        try:
            async with asyncio.timeout(_ANSWER_SECONDS):
                await stream.flush()
                await stream.read(1)
        except TimeoutError:
            raise ConnectionError(f"it did not answer within {_ANSWER_SECONDS:.0f} s") from None
        finally:
            if not stream.ended:
                stream.abort()
