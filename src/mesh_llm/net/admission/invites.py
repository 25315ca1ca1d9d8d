"""Writing revocations: with the mesh's own key where this node holds it, else as the one who gave.

Invites that this node made: kept over restarts, listed, counted, revoked.
"""

import math
import os
from collections.abc import Callable

import msgspec
import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.credentials import INVITES_FILE, Standing
from mesh_llm.net.admission.records import InviteRecord
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.runtime.supervision import why
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, Link, rests_on
from mesh_llm.wire.mesh.invites import (
    NONCE_BYTES,
    Contact,
    Invite,
    InviteTerms,
    Revocation,
    RevocationKind,
    format_invite,
    invite_id,
    issue_invite,
    pack_address,
    parse_invite,
    revoke,
)


def revoke_invite(standing: Standing, identifier: bytes, nonce: bytes, now: float) -> Revocation:
    """Take back an invite that this node issued. Raises MeshError where the node was never admitted."""
    certificate = standing.certificate
    if certificate is None:
        raise refusal_error(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
    return _write(standing, RevocationKind.INVITE, identifier, certificate.links, nonce, now)


def revoke_node(standing: Standing, certificate: Certificate, now: float) -> Revocation:
    """Take back the admission of one node. Raises MeshError(not_yours) where this node had no part in it."""
    links = certificate.links
    if standing.mesh_key is None and standing.key.public not in rests_on(links) - {links[-1].node}:
        raise MeshError(
            code="not_yours",
            message=f"The node {certificate.node[:10]} was not invited or admitted by this one, nor through it.",
            hint="Revoke it on the node that invited it, or on the one that founded the mesh.",
            status=403,
        )
    return _write(standing, RevocationKind.NODE, links[-1].node, links, bytes(NONCE_BYTES), now)


def _write(
    standing: Standing, kind: RevocationKind, target: bytes, chain: tuple[Link, ...], nonce: bytes, now: float
) -> Revocation:
    mesh = bytes.fromhex(standing.mesh)
    if standing.mesh_key is not None:
        key, chain = standing.mesh_key, ()
    else:
        key = standing.key
    return revoke(mesh, kind, target, revoker=key.public, issued=int(now), sign=key.sign, chain=chain, nonce=nonce)


DEFAULT_SCOPE = Scope.SERVE
"""Of the token printed at start. It lends no RPC: that can run code on the lender, so it is given knowingly."""
DEFAULT_LIFETIME = 30 * 86400
PUBLISHED_LIFETIME = 86400
"""Of the token in a public listing: short, since it cannot be told who has read it."""
MAX_LIFETIME = 366 * 86400
MAX_INVITES = 1000
MAX_EXPIRED = 1000
_MAX_CONTACT_ADDRESSES = 4

_log = structlog.get_logger(__name__)


class _Kept(msgspec.Struct, kw_only=True):
    """An invite as it is kept. `standing`: the token that is printed at start; `published`: one in a public listing.

    `admitted`: who used a limited one.
    """

    id: str
    nonce: str
    scope: str
    created: float
    expires: float
    uses: int
    token: str
    standing: bool = False
    published: bool = False
    revoked: bool = False
    admitted: list[str] = []


class InviteBook:
    """The invites of one node in one mesh. Times are UNIX seconds; `clock` gives them."""

    def __init__(self, standing: Standing, reachable: Callable[[], Reachable], clock: Callable[[], float]) -> None:
        self._standing = standing
        self._reachable = reachable
        self._clock = clock
        self._kept: dict[str, _Kept] = {entry.id: entry for entry in self._read()}

    def create(self, scope: Scope, lifetime: float, uses: int | None = None) -> InviteRecord:
        """Issue one. Raises MeshError: lifetime or uses out of range, or wider than this node's own scope.

        It ends with this node's own admission at the latest: look at the record's `expires`.
        """
        return _record(self._create(scope, lifetime, uses or 0), with_token=True)

    def create_for(self, node: NodeId, scope: Scope, lifetime: float) -> Invite:
        """Issue one that admits this node and no other. Raises MeshError as `create`."""
        entry = self._create(scope, lifetime, 1)
        entry.admitted.append(node)
        self._write_or_undo(lambda: self._kept.pop(entry.id))
        invite = parse_invite(entry.token)
        assert isinstance(invite, Invite)  # noqa: S101 - it was printed a moment ago
        return invite

    def issued(self, invite: bytes) -> bool:
        """Whether this node issued the invite of this id, and has not revoked it."""
        entry = self._kept.get(invite.hex())
        return entry is not None and not entry.revoked

    def records(self) -> list[InviteRecord]:
        """All of them, newest first, without their tokens."""
        entries = sorted(self._kept.values(), key=lambda entry: entry.created, reverse=True)
        return [_record(entry, with_token=False) for entry in entries]

    def token(self) -> str:
        """The token for people to copy, the same until half its life is over or this node's addresses change.

        Empty where this node may not invite: a client, or one that is not admitted yet.
        """
        scope = self._standing.scope
        if scope is None or scope < Scope.SERVE or self._limit() <= self._clock():
            return ""
        standing = [entry for entry in self._kept.values() if entry.standing]
        if good := self._still_good(standing, DEFAULT_LIFETIME):
            return good.token
        try:
            made = self._create(DEFAULT_SCOPE, DEFAULT_LIFETIME, 0, keep=False)
        except MeshError as error:
            _log.warning("no invite can be made", reason=str(error))
            return ""
        made.standing = True
        self._try_write()
        return made.token

    def published(self, scope: Scope) -> str:
        """The token for a public listing; a new one when half of its life is over. Raises MeshError."""
        shown = [entry for entry in self._kept.values() if entry.published and entry.scope == scope.word]
        if good := self._still_good(shown, PUBLISHED_LIFETIME):
            return good.token
        made = self._create(scope, PUBLISHED_LIFETIME, 0, keep=False)
        made.published = True
        self._try_write()
        return made.token

    def _still_good(self, entries: list[_Kept], lifetime: float) -> _Kept | None:
        """One that leads to where this node is now, and has half its life before it."""
        now, contact = self._clock(), self._contact()
        lifetime = min(lifetime, self._limit() - now)
        for entry in entries:
            if not entry.revoked and entry.expires - now > max(0.0, lifetime / 2):
                invite = parse_invite(entry.token)
                if isinstance(invite, Invite) and invite.terms.contacts[0] == contact and self._current(invite):
                    return entry
        return None

    def _current(self, invite: Invite) -> bool:
        """Whether an invite rests on what this node's admission rests on now: it may have come in again by another."""
        own = self._standing.certificate
        return not invite.chain or (own is not None and rests_on(invite.chain) == rests_on(own.links))

    def redeem(self, invite: Invite, node: NodeId) -> Refusal | None:
        """Count a use of an invite that is limited. None: it is admitted. A node counts once."""
        if not invite.terms.uses:
            return None
        entry = self._kept.get(invite.id.hex())
        if invite.issuer != self._standing.key.node_id or entry is None:
            return Refusal(Reason.NOT_ISSUER, Subject.INVITE)
        if node in entry.admitted:
            return None
        if len(entry.admitted) >= invite.terms.uses:
            return Refusal(Reason.USES_EXHAUSTED, Subject.INVITE, f"{invite.terms.uses} of {invite.terms.uses} used")
        entry.admitted.append(node)
        try:
            self._write_or_undo(lambda: entry.admitted.remove(node))
        except MeshError:
            # Who is not counted is not let in: after a restart the invite would admit one more.
            return Refusal(Reason.BUSY, Subject.INVITE, "its use cannot be written down")
        return None

    def revoke(self, name: str) -> tuple[InviteRecord, Revocation]:
        """Take one back, by its id or the beginning of it. Raises MeshError(invite_unknown, invite_ambiguous)."""
        entry = self._find(name)
        identifier, nonce = bytes.fromhex(entry.id), bytes.fromhex(entry.nonce)
        revocation = revoke_invite(self._standing, identifier, nonce, self._clock())
        entry.revoked = True
        # It holds from now on, whatever the disk says.
        self._try_write()
        return _record(entry, with_token=False), revocation

    def _create(self, scope: Scope, lifetime: float, uses: int, *, keep: bool = True) -> _Kept:
        if not 60 <= lifetime <= MAX_LIFETIME:
            raise MeshError(
                code="invite_lifetime",
                message="An invite lasts between a minute and a year.",
                hint="As in `mesh-llm invite create --expires 7d`.",
                status=400,
            )
        if not 0 <= uses <= 1_000_000:
            raise MeshError(
                code="invite_uses",
                message="An invite has 1 to 1,000,000 uses.",
                hint="Or leave --uses out.",
                status=400,
            )
        self._forget_old()
        now = self._clock()
        if self._limit() <= now:
            raise refusal_error(Refusal(Reason.EXPIRED, Subject.CERTIFICATE))
        if sum(entry.expires > now for entry in self._kept.values()) >= MAX_INVITES:
            raise MeshError(
                code="too_many_invites",
                message=f"This node has {MAX_INVITES} invites that still hold.",
                hint="Revoke some: `mesh-llm invite list`, `mesh-llm invite revoke ID`.",
                status=409,
            )
        invite = self._issue(scope, int(min(now + lifetime, self._limit())), uses)
        entry = _Kept(
            id=invite.id.hex(),
            nonce=invite.terms.nonce.hex(),
            scope=scope.word,
            created=now,
            expires=invite.terms.expires,
            uses=uses,
            token=format_invite(invite),
        )
        self._kept[entry.id] = entry
        if keep:
            self._write_or_undo(lambda: self._kept.pop(entry.id))
        return entry

    def _issue(self, scope: Scope, expires: int, uses: int) -> Invite:
        standing = self._standing
        nonce = os.urandom(NONCE_BYTES)
        if standing.mesh_key is not None:
            terms = InviteTerms(standing.mesh_key.public, (self._contact(),), nonce, scope, expires, uses)
            issued = issue_invite(terms, None, standing.mesh_key.sign)
        elif standing.certificate is not None:
            terms = InviteTerms(standing.certificate.mesh, (self._contact(),), nonce, scope, expires, uses)
            issued = issue_invite(terms, standing.certificate, standing.key.sign)
        else:
            issued = Refusal(Reason.NOTHING_SHOWN, Subject.NODE)
        if isinstance(issued, Refusal):
            raise refusal_error(issued)
        return issued

    def _limit(self) -> float:
        """When invites of this node end at the latest, UNIX seconds: with its own admission."""
        standing = self._standing
        if standing.mesh_key is not None or standing.certificate is None:
            return math.inf
        return standing.certificate.expires

    def _contact(self) -> Contact:
        addresses, relay = self._reachable()
        packed = tuple(pack_address(address) for address in addresses[:_MAX_CONTACT_ADDRESSES])
        return Contact(self._standing.key.public, packed, relay)

    def _find(self, name: str) -> _Kept:
        wanted = name.strip().lower()
        invite = parse_invite(name)
        if isinstance(invite, Invite):
            wanted = invite_id(invite.terms.contacts[0].node, invite.terms.nonce).hex()
        found = [entry for entry in self._kept.values() if wanted and entry.id.startswith(wanted)]
        if len(found) == 1:
            return found[0]
        what = f"{name[:40]!r} fits more than one invite" if found else f"This node has no invite {name[:40]!r}"
        raise MeshError(
            code="invite_ambiguous" if found else "invite_unknown",
            message=f"{what}.",
            hint="See `mesh-llm invite list`. An invite is revoked where it was made.",
            status=409 if found else 404,
        )

    def _forget_old(self) -> None:
        """Expired invites stay for long: whom they admitted is still there, and can be cut off by revoking them."""
        expired = [entry for entry in self._kept.values() if entry.expires <= self._clock()]
        expired.sort(key=lambda entry: entry.expires)
        for entry in expired[: max(0, len(expired) - MAX_EXPIRED)]:
            del self._kept[entry.id]

    def _read(self) -> list[_Kept]:
        data = self._standing.store.read(INVITES_FILE)
        if data is None:
            return []
        try:
            return msgspec.json.decode(data, type=list[_Kept])
        except msgspec.MsgspecError as error:
            _log.error("the list of invites is damaged; starting with an empty one", reason=str(error))
            return []

    def _try_write(self) -> None:
        self._standing.store.try_write(INVITES_FILE, self._encoded())

    def _write_or_undo(self, undo: Callable[[], object]) -> None:
        """Keep the list. Raises MeshError(invite_not_kept) after `undo` where the disk does not take it."""
        try:
            self._standing.store.write(INVITES_FILE, self._encoded())
        except OSError as error:
            undo()
            raise MeshError(
                code="invite_not_kept",
                message=f"The invite was not made, since it cannot be written down: {why(error)}.",
                hint="Make room on the disk of the node's home (see `mesh-llm doctor`), and try again.",
                status=507,
            ) from error

    def _encoded(self) -> bytes:
        return msgspec.json.encode(list(self._kept.values()))


def _record(entry: _Kept, *, with_token: bool) -> InviteRecord:
    return InviteRecord(
        id=entry.id[:16],
        scope=entry.scope,
        created=entry.created,
        expires=entry.expires,
        uses_left=entry.uses - len(entry.admitted) if entry.uses else None,
        revoked=entry.revoked,
        token=entry.token if with_token else "",
    )
