"""Revocations: the list of those that this node knows, and the signing of new ones."""

from collections import Counter
from typing import TypeAlias

import msgspec
import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.gossip import MOST_REVOCATIONS
from mesh_llm.core.types.ids import MeshId
from mesh_llm.net.admission.credentials import Credentials, MeshStore
from mesh_llm.wire.codec import Verify, encode
from mesh_llm.wire.mesh.admission import Reason, Refusal, Subject, refusal_error
from mesh_llm.wire.mesh.certificates import Certificate, Link, rests_on
from mesh_llm.wire.mesh.invites import (
    NONCE_BYTES,
    Revocation,
    RevocationKind,
    check_revocation,
    decode_revocation,
    revoke,
)

MAX_PER_REVOKER = 256
_FILE = "revocations"

_Path: TypeAlias = tuple[bytes, ...]

_log = structlog.get_logger(__name__)


class RevocationList:
    """The verified revocations of one mesh: bounded, kept over restarts. A Revoked of wire.mesh.certificates.

    A revocation by the mesh's key holds for every node. One by a member ends the admissions that rest on both that
    member and its target. When the list is full, the newest revocation of the members with the most is dropped: the
    branch of the membership tree with the most revocations is found from the top, so that a member with many invented
    members below it takes no space from others.
    """

    def __init__(self, mesh: MeshId, store: MeshStore, verify: Verify) -> None:
        self._mesh = mesh
        self._mesh_key = bytes.fromhex(mesh)
        self._store = store
        self._verify = verify
        self._known: dict[bytes, Revocation] = {}
        self._revokers: dict[bytes, set[bytes]] = {}
        self._per_revoker: Counter[bytes] = Counter()
        self._branches: dict[_Path, Counter[bytes]] = {}
        """For each path from the top: the number of revocations below each next node; b"": at the path itself."""
        self._at: dict[_Path, dict[bytes, None]] = {}
        self._replaced: list[bytes] = []
        for data in self._read():
            self._take(data)

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

    def names(self, node: bytes) -> bool:
        """Whether the mesh's key revoked this node: no invite admits it again."""
        return self._mesh_key in self._revokers.get(node, ())

    def add(self, data: bytes) -> Revocation | Refusal | None:
        """Verify a revocation and add it; the next flush of the store writes it. None: it was known before."""
        if data in self._known:
            return None
        taken = self._take(data)
        if isinstance(taken, Revocation):
            # In a flood, the whole list would otherwise be written and synced for each revocation.
            self._store.write_later(_FILE, lambda: msgspec.msgpack.encode(list(self._known)))
        return taken

    def _take(self, data: bytes) -> Revocation | Refusal | None:
        revocation = decode_revocation(data)
        if isinstance(revocation, Refusal):
            return revocation
        # Encoded again, so that two encodings of one revocation count as one.
        data = encode(revocation)
        revokers = self._revokers.get(revocation.target, set[bytes]())
        if data in self._known or revocation.revoker in revokers or self._mesh_key in revokers:
            return None
        if refusal := check_revocation(revocation, mesh=self._mesh, verify=self._verify):
            return refusal
        crowded = revocation.revoker != self._mesh_key and self._per_revoker[revocation.revoker] >= MAX_PER_REVOKER
        if not crowded:
            self._keep(data, revocation)
            if len(self._known) > MOST_REVOCATIONS:
                self._drop_one()
        if data not in self._known:
            _log.debug("revocation not kept: too many", revoker=revocation.revoker.hex()[:10])
            return Refusal(Reason.BUSY, Subject.REVOCATION, "too many revocations")
        return revocation

    def _keep(self, data: bytes, revocation: Revocation) -> None:
        self._known[data] = revocation
        self._per_revoker[revocation.revoker] += 1
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
        data = next(reversed(self._at.get(path) or self._known))
        revocation = self._known.pop(data)
        self._replaced.append(data)
        self._per_revoker[revocation.revoker] -= 1
        if not self._per_revoker[revocation.revoker]:
            del self._per_revoker[revocation.revoker]
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
        except msgspec.MsgspecError as error:
            _log.error("the list of revocations is damaged; starting with an empty one", reason=str(error))
            return []


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
    links = certificate.links
    if credentials.mesh_key is None and credentials.key.public not in rests_on(links) - {links[-1].node}:
        raise MeshError(
            code="not_yours",
            message=f"The node {certificate.node[:10]} was not invited or admitted by this one, nor through it.",
            hint="Revoke it on the node that invited it, or on the one that founded the mesh.",
            status=403,
        )
    return _write(credentials, RevocationKind.NODE, links[-1].node, links, bytes(NONCE_BYTES), now)


def _write(
    credentials: Credentials, kind: RevocationKind, target: bytes, chain: tuple[Link, ...], nonce: bytes, now: float
) -> Revocation:
    mesh = bytes.fromhex(credentials.mesh)
    if credentials.mesh_key is not None:
        key, chain = credentials.mesh_key, ()
    else:
        key = credentials.key
    return revoke(mesh, kind, target, revoker=key.public, issued=int(now), sign=key.sign, chain=chain, nonce=nonce)
