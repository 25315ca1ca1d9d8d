"""The invites that this node issued: kept over restarts, listed, counted, revoked."""

import math
import os
from collections.abc import Callable

import msgspec
import structlog

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.credentials import INVITES_FILE, Credentials
from mesh_llm.net.admission.records import InviteRecord
from mesh_llm.net.admission.revocations import revoke_invite
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.runtime.supervision import error_text
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import came_by_listing, rests_on
from mesh_llm.wire.mesh.invites import (
    NONCE_BYTES,
    Contact,
    Invite,
    InviteTerms,
    Revocation,
    format_invite,
    invite_id,
    issue_invite,
    pack_address,
    parse_invite,
)

DEFAULT_LIFETIME = 30 * 86400
PUBLISHED_LIFETIME = 86400
"""Of the token in a public listing: short, since anybody may have read it."""
MAX_LIFETIME = 366 * 86400
MAX_INVITES = 1000
MAX_EXPIRED = 1000
_MAX_CONTACT_ADDRESSES = 4

_log = structlog.get_logger(__name__)


class _StoredInvite(msgspec.Struct, kw_only=True):
    """A stored invite. `standing`: printed at every start; `published`: in a public listing.

    `admitted`: the nodes that used an invite with limited uses.
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
    """The invites of one node in one mesh. `clock` gives UNIX seconds."""

    def __init__(
        self,
        credentials: Credentials,
        reachable: Callable[[], Reachable],
        clock: Callable[[], float],
        widest: Scope = Scope.SPLIT,
    ) -> None:
        """`widest`: the scope of invites for which nobody names one, unless this node may only give less."""
        self._credentials = credentials
        self._reachable = reachable
        self._clock = clock
        self._widest = widest
        self._stored: dict[str, _StoredInvite] = {entry.id: entry for entry in self._read()}

    def create(self, scope: Scope | None, lifetime: float, uses: int | None = None) -> InviteRecord:
        """Issue an invite; `scope` None: the same as that of the token printed at start.

        It ends with this node's own admission at the latest: see the record's `expires`.
        Raises MeshError: lifetime or uses out of range, or a wider scope than this node's own.
        """
        return _record(self._create(scope or self._default_scope(), lifetime, uses or 0), with_token=True)

    def create_for(self, node: NodeId, scope: Scope, lifetime: float) -> Invite:
        """Issue an invite that admits only `node`. Raises MeshError as `create`."""
        entry = self._create(scope, lifetime, 1)
        entry.admitted.append(node)
        self._write_or_undo(lambda: self._stored.pop(entry.id))
        invite = parse_invite(entry.token)
        assert isinstance(invite, Invite)  # noqa: S101 - it was printed above
        return invite

    def issued(self, invite: bytes) -> bool:
        """Whether this node issued the invite of this id, and has not revoked it."""
        entry = self._stored.get(invite.hex())
        return entry is not None and not entry.revoked

    def is_published(self, invite: bytes) -> bool:
        """Whether this node issued the invite of this id for a public listing."""
        entry = self._stored.get(invite.hex())
        return entry is not None and entry.published

    @property
    def all_marked(self) -> bool:
        """Whether other nodes see who came by this node's listings: by the mark of all its published invites.

        Those of versions up to 0.2 have no mark. They count until they are revoked: who came by them may still be
        there.
        """
        shown = (entry for entry in self._stored.values() if entry.published and not entry.revoked)
        return all(map(_is_marked, shown))

    def records(self) -> list[InviteRecord]:
        """All invites, newest first, without their tokens."""
        entries = sorted(self._stored.values(), key=lambda entry: entry.created, reverse=True)
        return [_record(entry, with_token=False) for entry in entries]

    def standing(self) -> InviteRecord | None:
        """The invite that every start prints, for machines of the same user.

        It is the same until half its life is over, or this node's scope or addresses change. None if this node may not
        invite: a client, or a node that is not admitted yet.
        """
        own = self._credentials.scope
        if own is None or own < Scope.SERVE or self._limit() <= self._clock():
            return None
        scope = self._default_scope()
        standing = [entry for entry in self._stored.values() if entry.standing and entry.scope == scope.word]
        if good := self._reusable(standing, DEFAULT_LIFETIME):
            return _record(good, with_token=True)
        try:
            made = self._create(scope, DEFAULT_LIFETIME, 0, keep=False)
        except MeshError as error:
            _log.warning("no invite can be made", reason=str(error))
            return None
        made.standing = True
        self._try_write()
        return _record(made, with_token=True)

    def token(self) -> str:
        """The token of `standing`; empty if this node may not invite."""
        record = self.standing()
        return record.token if record is not None else ""

    def _default_scope(self) -> Scope:
        """The widest scope that this node may give, up to what the user set for invites without a named scope."""
        return min(self._widest, self._credentials.scope or self._widest)

    def in_listing(self, scope: Scope) -> str:
        """The token for a public listing that is still good; empty if a new one is due: see `publish`."""
        entries = self._stored.values()
        shown = [entry for entry in entries if entry.published and entry.scope == scope.word and _is_marked(entry)]
        good = self._reusable(shown, PUBLISHED_LIFETIME)
        return good.token if good is not None else ""

    def publish(self, scope: Scope, nonce: bytes) -> str:
        """Make the token for a public listing. `nonce`: a `listing_nonce` of this node. Raises MeshError."""
        made = self._create(scope, PUBLISHED_LIFETIME, 0, nonce, keep=False)
        made.published = True
        self._try_write()
        return made.token

    def _reusable(self, entries: list[_StoredInvite], lifetime: float) -> _StoredInvite | None:
        """An invite with this node's current address and more than half its life left."""
        now, contact = self._clock(), self._contact()
        lifetime = min(lifetime, self._limit() - now)
        for entry in entries:
            if not entry.revoked and entry.expires - now > max(0.0, lifetime / 2):
                invite = parse_invite(entry.token)
                if isinstance(invite, Invite) and invite.terms.contacts[0] == contact and self._current(invite):
                    return entry
        return None

    def _current(self, invite: Invite) -> bool:
        """Whether an invite rests on what this node's admission rests on now: it may have joined anew."""
        own = self._credentials.certificate
        return not invite.chain or (own is not None and rests_on(invite.chain) == rests_on(own.links))

    def redeem(self, invite: Invite, node: NodeId) -> Refusal | None:
        """Count a use of an invite with limited uses, once per node. None: the node may be admitted."""
        if not invite.terms.uses:
            return None
        entry = self._stored.get(invite.id.hex())
        if invite.issuer != self._credentials.key.node_id or entry is None:
            return Refusal(Reason.NOT_ISSUER, Subject.INVITE)
        if node in entry.admitted:
            return None
        if len(entry.admitted) >= invite.terms.uses:
            return Refusal(Reason.USES_EXHAUSTED, Subject.INVITE, f"{invite.terms.uses} of {invite.terms.uses} used")
        entry.admitted.append(node)
        try:
            self._write_or_undo(lambda: entry.admitted.remove(node))
        except MeshError:
            # A use that is not written down would be free again after a restart.
            return Refusal(Reason.BUSY, Subject.INVITE, "its use cannot be written down")
        return None

    def revoke(self, name: str) -> tuple[InviteRecord, Revocation]:
        """Revoke an invite by its id, a prefix of it, or its token. Raises MeshError: invite_unknown, _ambiguous."""
        entry = self._find(name)
        identifier, nonce = bytes.fromhex(entry.id), bytes.fromhex(entry.nonce)
        revocation = revoke_invite(self._credentials, identifier, nonce, self._clock())
        entry.revoked = True
        # It holds from now on, even if the disk refuses.
        self._try_write()
        return _record(entry, with_token=False), revocation

    def _create(
        self, scope: Scope, lifetime: float, uses: int, nonce: bytes = b"", *, keep: bool = True
    ) -> _StoredInvite:
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
        if sum(entry.expires > now for entry in self._stored.values()) >= MAX_INVITES:
            raise MeshError(
                code="too_many_invites",
                message=f"This node has {MAX_INVITES} invites that still hold.",
                hint="Revoke some: `mesh-llm invite list`, `mesh-llm invite revoke ID`.",
                status=409,
            )
        invite = self._issue(scope, int(min(now + lifetime, self._limit())), uses, nonce or self._private_nonce())
        entry = _StoredInvite(
            id=invite.id.hex(),
            nonce=invite.terms.nonce.hex(),
            scope=scope.word,
            created=now,
            expires=invite.terms.expires,
            uses=uses,
            token=format_invite(invite),
        )
        self._stored[entry.id] = entry
        if keep:
            self._write_or_undo(lambda: self._stored.pop(entry.id))
        return entry

    def _private_nonce(self) -> bytes:
        """A nonce whose invite no node takes for one of a listing."""
        while came_by_listing((invite_id(self._credentials.key.public, nonce := os.urandom(NONCE_BYTES)),)):
            pass
        return nonce

    def _issue(self, scope: Scope, expires: int, uses: int, nonce: bytes) -> Invite:
        credentials = self._credentials
        own = credentials.scope
        if own is not None and scope > own:
            raise refusal_error(Refusal(Reason.WRONG_SCOPE, Subject.INVITE, f"this node has scope {own.word}"))
        if credentials.mesh_key is not None:
            terms = InviteTerms(credentials.mesh_key.public, (self._contact(),), nonce, scope, expires, uses)
            issued = issue_invite(terms, None, credentials.mesh_key.sign)
        elif credentials.certificate is not None:
            terms = InviteTerms(credentials.certificate.mesh, (self._contact(),), nonce, scope, expires, uses)
            issued = issue_invite(terms, credentials.certificate, credentials.key.sign)
        else:
            issued = Refusal(Reason.NOTHING_SHOWN, Subject.NODE)
        if isinstance(issued, Refusal):
            raise refusal_error(issued)
        return issued

    def _limit(self) -> float:
        """The latest end of an invite, UNIX seconds: that of this node's own admission."""
        credentials = self._credentials
        if credentials.mesh_key is not None or credentials.certificate is None:
            return math.inf
        return credentials.certificate.expires

    def _contact(self) -> Contact:
        addresses, relay = self._reachable()
        packed = tuple(pack_address(address) for address in addresses[:_MAX_CONTACT_ADDRESSES])
        return Contact(self._credentials.key.public, packed, relay)

    def _find(self, name: str) -> _StoredInvite:
        wanted = name.strip().lower()
        invite = parse_invite(name)
        if isinstance(invite, Invite):
            wanted = invite_id(invite.terms.contacts[0].node, invite.terms.nonce).hex()
        found = [entry for entry in self._stored.values() if wanted and entry.id.startswith(wanted)]
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
        """Drop the oldest expired invites. The others stay: revoking one still ends the admissions by it."""
        expired = [entry for entry in self._stored.values() if entry.expires <= self._clock()]
        expired.sort(key=lambda entry: entry.expires)
        for entry in expired[: max(0, len(expired) - MAX_EXPIRED)]:
            del self._stored[entry.id]

    def _read(self) -> list[_StoredInvite]:
        data = self._credentials.store.read(INVITES_FILE)
        if data is None:
            return []
        try:
            return msgspec.json.decode(data, type=list[_StoredInvite])
        except UNREADABLE as error:
            _log.error("the list of invites is damaged; starting with an empty one", reason=str(error))
            return []

    def _try_write(self) -> None:
        self._credentials.store.try_write(INVITES_FILE, self._encoded())

    def _write_or_undo(self, undo: Callable[[], object]) -> None:
        """Write the list. If the disk refuses, call `undo` and raise MeshError(invite_not_kept)."""
        try:
            self._credentials.store.write(INVITES_FILE, self._encoded())
        except OSError as error:
            undo()
            raise MeshError(
                code="invite_not_kept",
                message=f"The invite was not made, since it cannot be written down: {error_text(error)}.",
                hint="Make room on the disk of the node's home (see `mesh-llm doctor`), and try again.",
                status=507,
            ) from error

    def _encoded(self) -> bytes:
        return msgspec.json.encode(list(self._stored.values()))


def _is_marked(entry: _StoredInvite) -> bool:
    return came_by_listing((bytes.fromhex(entry.id),))


def _record(entry: _StoredInvite, *, with_token: bool) -> InviteRecord:
    return InviteRecord(
        id=entry.id[:16],
        scope=entry.scope,
        created=entry.created,
        expires=entry.expires,
        uses_left=entry.uses - len(entry.admitted) if entry.uses else None,
        revoked=entry.revoked,
        token=entry.token if with_token else "",
        shown="listing" if entry.published else "start" if entry.standing else "",
    )
