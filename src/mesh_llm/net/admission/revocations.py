"""Revocations: the list of those that this node knows, and the signing of new ones."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import msgspec
import structlog

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.core.types.gossip import MOST_REVOCATIONS
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.net.admission.credentials import Credentials, MeshStore
from mesh_llm.net.limits import CEILING_BURST, CEILINGS_PER_SECOND, TokenBucket
from mesh_llm.wire.codec import Verify, encode
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, Link, rests_on
from mesh_llm.wire.mesh.invites import (
    NONCE_BYTES,
    Revocation,
    RevocationKind,
    ceiling_nonce,
    check_revocation,
    decode_revocation,
    revoke,
)

MAX_PER_REVOKER = 256
_OWN_RATE_DEPTH = 2
"""Members of this depth and above have a rate of ceilings each: the founder, and whom it admitted."""
_FILE = "revocations"

_Path: TypeAlias = tuple[bytes, ...]

_log = structlog.get_logger(__name__)


class RevocationList:
    """The verified revocations of one mesh: bounded, kept over restarts. A Revoked of wire.mesh.certificates.

    A revocation by the mesh's key holds for every node. One by a member ends the admissions that rest on both that
    member and its target. A ceiling narrows such admissions; the latest one of a revoker for a node holds.

    When the list is full, the newest revocation of the members with the most is dropped: the branch of the membership
    tree with the most revocations is found from the top, so that a member with many invented members below it takes no
    space from others.
    """

    def __init__(
        self, mesh: MeshId, store: MeshStore, verify: Verify, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`clock`: seconds, for the rate of new ceilings."""
        self._clock = clock
        self._mesh = mesh
        self._mesh_key = bytes.fromhex(mesh)
        self._store = store
        self._verify = verify
        self._known: dict[bytes, Revocation] = {}
        self._revokers: dict[bytes, set[bytes]] = {}
        self._ceilings: dict[bytes, dict[bytes, bytes]] = {}
        """For each node the ceilings by revoker, as they are encoded."""
        self._new_ceilings: OrderedDict[_Path, TokenBucket] = OrderedDict()
        self._per_revoker: Counter[bytes] = Counter()
        self._branches: dict[_Path, Counter[bytes]] = {}
        """For each path from the top: the number of revocations below each next node; b"": at the path itself."""
        self._at: dict[_Path, dict[bytes, None]] = {}
        self._replaced: list[bytes] = []
        for data in self._read():
            self._take(data, limited=False)

    def __len__(self) -> int:
        return len(self._known)

    def known(self) -> tuple[tuple[bytes, Revocation], ...]:
        """All revocations, each with its encoding."""
        return tuple(self._known.items())

    def replaced(self) -> tuple[bytes, ...]:
        """The revocations that were dropped for others since the last call."""
        replaced, self._replaced = self._replaced, []
        return tuple(replaced)

    def covers(self, links: tuple[Link, ...]) -> bool:
        """Whether a node or invite on which these links rest was revoked by the mesh's key or another such node."""
        if not self._revokers:
            return False
        names = rests_on(links)
        return any(
            self._mesh_key in revokers or not revokers.isdisjoint(names)
            for name in names
            if (revokers := self._revokers.get(name))
        )

    def ceiling(self, links: tuple[Link, ...]) -> Scope:
        """The widest scope that ceilings leave to a certificate of these links.

        A ceiling counts if its revoker is the mesh's key, or a node on which the links rest as well.
        """
        scope = Scope.SPLIT
        if self._ceilings:
            names = rests_on(links)
            for name in names & self._ceilings.keys():
                for revoker, data in self._ceilings[name].items():
                    ceiling = self._known[data].ceiling
                    if ceiling is not None and (revoker == self._mesh_key or revoker in names):
                        scope = min(scope, ceiling)
        return scope

    def ceilings_of(self, node: bytes) -> tuple[Revocation, ...]:
        """The latest ceilings of this node, one by each revoker."""
        return tuple(self._known[data] for data in self._ceilings.get(node, {}).values())

    def is_ceiling(self, data: bytes) -> bool:
        """Whether these bytes are a known ceiling."""
        revocation = self._known.get(data)
        return revocation is not None and revocation.kind is RevocationKind.CEILING

    def names(self, node: bytes) -> bool:
        """Whether the mesh's key revoked this node: no invite admits it again."""
        return self._mesh_key in self._revokers.get(node, ())

    def add(self, data: bytes) -> Revocation | Refusal | None:
        """Verify a revocation and add it; the next flush of the store writes it. None: it was known before."""
        if data in self._known:
            return None
        taken = self._take(data, limited=True)
        if isinstance(taken, Revocation):
            # In a flood, the whole list would otherwise be written and synced for each revocation.
            self._store.write_later(_FILE, lambda: msgspec.msgpack.encode(list(self._known)))
        return taken

    def _take(self, data: bytes, *, limited: bool) -> Revocation | Refusal | None:
        """`limited`: refuse a ceiling of a revoker that makes too many."""
        revocation = decode_revocation(data)
        if isinstance(revocation, Refusal):
            return revocation
        # Encoded again, so that two encodings of one revocation count as one.
        data = encode(revocation)
        if data in self._known or self._superfluous(revocation):
            return None
        if refusal := check_revocation(revocation, mesh=self._mesh, verify=self._verify):
            return refusal
        if revocation.kind is RevocationKind.CEILING:
            if limited and revocation.revoker != self._mesh_key and not self._may_change(_path(revocation)):
                return Refusal(Reason.BUSY, Subject.REVOCATION, "too many ceilings")
            earlier = self._ceilings.get(revocation.target, {}).get(revocation.revoker)
            if earlier is not None:
                self._drop(earlier)
        crowded = revocation.revoker != self._mesh_key and self._per_revoker[revocation.revoker] >= MAX_PER_REVOKER
        if not crowded:
            self._keep(data, revocation)
            if len(self._known) > MOST_REVOCATIONS:
                self._drop_one()
        if data not in self._known:
            _log.debug("revocation not kept: too many", revoker=revocation.revoker.hex()[:10])
            return Refusal(Reason.BUSY, Subject.REVOCATION, "too many revocations")
        return revocation

    def _superfluous(self, revocation: Revocation) -> bool:
        """Whether what is known says as much already."""
        if revocation.kind is not RevocationKind.CEILING:
            revokers = self._revokers.get(revocation.target, set[bytes]())
            return revocation.revoker in revokers or self._mesh_key in revokers
        earlier = self._ceilings.get(revocation.target, {}).get(revocation.revoker)
        return earlier is not None and _rank(self._known[earlier]) >= _rank(revocation)

    def _may_change(self, path: _Path) -> bool:
        """Take one of the ceilings that a member may make in a time: each one goes to every node.

        All that are further down than the member below the founder share what one member has: a member can invent any
        number of members below itself.
        """
        now = self._clock()
        source = path if len(path) <= _OWN_RATE_DEPTH else (*path[:_OWN_RATE_DEPTH], b"")
        bucket = self._new_ceilings.pop(source, None) or TokenBucket(CEILINGS_PER_SECOND, CEILING_BURST, now)
        self._new_ceilings[source] = bucket
        if len(self._new_ceilings) > MOST_REVOCATIONS:
            self._new_ceilings.popitem(last=False)
        return bucket.take(now)

    def _keep(self, data: bytes, revocation: Revocation) -> None:
        self._known[data] = revocation
        self._per_revoker[revocation.revoker] += 1
        if revocation.kind is RevocationKind.CEILING:
            self._ceilings.setdefault(revocation.target, {})[revocation.revoker] = data
        else:
            self._revokers.setdefault(revocation.target, set()).add(revocation.revoker)
        self._count(data, revocation, 1)

    def _drop_one(self) -> None:
        """Drop the newest revocation of the heaviest branch; those by the mesh's key are spared."""
        path: _Path = ()
        while path in self._branches:
            _, child = max((size, node) for node, size in self._branches[path].items())
            if not child:
                break
            path += (child,)
        # If all are by the mesh's key, the newest one is dropped.
        self._drop(next(reversed(self._at.get(path) or self._known)))

    def _drop(self, data: bytes) -> None:
        revocation = self._known.pop(data)
        self._replaced.append(data)
        self._per_revoker[revocation.revoker] -= 1
        if not self._per_revoker[revocation.revoker]:
            del self._per_revoker[revocation.revoker]
        if revocation.kind is RevocationKind.CEILING:
            ceilings = self._ceilings[revocation.target]
            del ceilings[revocation.revoker]
            if not ceilings:
                del self._ceilings[revocation.target]
        else:
            revokers = self._revokers[revocation.target]
            revokers.discard(revocation.revoker)
            if not revokers:
                del self._revokers[revocation.target]
        self._count(data, revocation, -1)

    def _count(self, data: bytes, revocation: Revocation, change: int) -> None:
        if revocation.revoker == self._mesh_key:
            return
        path = _path(revocation)
        for depth, node in enumerate((*path, b"")):
            sizes = self._branches.setdefault(path[:depth], Counter())
            sizes[node] += change
            if not sizes[node]:
                del sizes[node]
            if not sizes:
                del self._branches[path[:depth]]
        at = self._at.setdefault(path, {})
        if change > 0:
            at[data] = None
        else:
            del at[data]
        if not at:
            del self._at[path]

    def _read(self) -> list[bytes]:
        data = self._store.read(_FILE)
        if data is None:
            return []
        try:
            return msgspec.msgpack.decode(data, type=list[bytes])
        except UNREADABLE as error:
            _log.error("the list of revocations is damaged; starting with an empty one", reason=str(error))
            return []


def _rank(ceiling: Revocation) -> tuple[int, int]:
    """Which of two ceilings by one revoker for one node holds: the later one, then the lower one."""
    return ceiling.issued, -(ceiling.ceiling or 0)


def _path(revocation: Revocation) -> _Path:
    """The position of a revoker below the mesh's key, by the chain that proves its membership."""
    nodes = tuple(link.node for link in revocation.chain)
    return nodes[: nodes.index(revocation.revoker) + 1] if revocation.revoker in nodes else nodes


def revoke_invite(credentials: Credentials, identifier: bytes, nonce: bytes, now: float) -> Revocation:
    """Sign the revocation of an invite that this node issued. Raises MeshError if this node was never admitted."""
    certificate = credentials.certificate
    if certificate is None:
        raise refusal_error(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
    return _write(credentials, RevocationKind.INVITE, identifier, certificate.links, nonce, now)


def revoke_node(credentials: Credentials, certificate: Certificate, now: float) -> Revocation:
    """Sign the revocation of an admission. Raises MeshError(not_yours) if it does not rest on this node."""
    _check_rests_on_me(credentials, certificate, "Revoke it")
    links = certificate.links
    return _write(credentials, RevocationKind.NODE, links[-1].node, links, bytes(NONCE_BYTES), now)


def revoke_key(credentials: Credentials, node: NodeId, now: float) -> Revocation:
    """Sign, as the founder, that this key is never admitted again. The node need not be known here."""
    return _write(credentials, RevocationKind.NODE, bytes.fromhex(node), (), bytes(NONCE_BYTES), now)


def set_ceiling(credentials: Credentials, certificate: Certificate, scope: Scope, now: float) -> Revocation:
    """Sign the widest scope of a member (`serve`, or `split` for no limit).

    Raises MeshError(not_yours) if its admission does not rest on this node.
    """
    _check_rests_on_me(credentials, certificate, "Lower it")
    links = certificate.links
    return _write(credentials, RevocationKind.CEILING, links[-1].node, links, ceiling_nonce(scope), now)


def _check_rests_on_me(credentials: Credentials, certificate: Certificate, what: str) -> None:
    links = certificate.links
    if credentials.mesh_key is None and credentials.key.public not in rests_on(links) - {links[-1].node}:
        raise MeshError(
            code="not_yours",
            message=f"The node {certificate.node[:10]} was not invited or admitted by this one, nor through it.",
            hint=f"{what} on the node that invited it, or on the one that founded the mesh.",
            status=403,
        )


def _write(
    credentials: Credentials, kind: RevocationKind, target: bytes, chain: tuple[Link, ...], nonce: bytes, now: float
) -> Revocation:
    mesh = bytes.fromhex(credentials.mesh)
    if credentials.mesh_key is not None:
        key, chain = credentials.mesh_key, ()
    else:
        key = credentials.key
    return revoke(mesh, kind, target, revoker=key.public, issued=int(now), sign=key.sign, chain=chain, nonce=nonce)
