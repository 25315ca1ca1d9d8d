"""What a node knows to be revoked: verified, bounded, kept over restarts. Satisfies wire.certificate.Revoked."""

from collections import Counter
from typing import TypeAlias

import msgspec
import structlog

from mesh_llm.core.types.gossip import MOST_REVOCATIONS
from mesh_llm.core.types.ids import MeshId
from mesh_llm.net.admission.credentials import MeshStore
from mesh_llm.wire.codec import Verify, encode
from mesh_llm.wire.mesh.admission import Reason, Refusal, Subject
from mesh_llm.wire.mesh.certificates import Link, rests_on
from mesh_llm.wire.mesh.invites import Revocation, check_revocation, decode_revocation

MAX_PER_REVOKER = 256
_FILE = "revocations"

_Path: TypeAlias = tuple[bytes, ...]

_log = structlog.get_logger(__name__)


class RevocationList:
    """All revocations of one mesh that this node has heard of and found to be true.

    A revocation by the mesh's key holds for everybody. One by a member ends the admissions that rest on that member as
    well as on what it names. When the list is full, the newest one of those who revoke most makes room: the branch of
    the tree of members with most revocations is looked for from the top, so that one member with many made-up ones
    below it takes no room from others.
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
        """Of each path from the top: how many revocations there are below each next node; b"": at the path itself."""
        self._at: dict[_Path, dict[bytes, None]] = {}
        self._replaced: list[bytes] = []
        for data in self._read():
            self._take(data)

    def __len__(self) -> int:
        return len(self._known)

    def known(self) -> tuple[tuple[bytes, Revocation], ...]:
        """All of them, each with its bytes as it travels."""
        return tuple(self._known.items())

    def replaced(self) -> tuple[bytes, ...]:
        """Those that made room for others since this was asked last."""
        replaced, self._replaced = self._replaced, []
        return tuple(replaced)

    def covers(self, links: tuple[Link, ...]) -> bool:
        """Whether anything that these links rest on was revoked, by the mesh's key or by one on whom they rest too."""
        if not self._revokers:
            return False
        names = rests_on(links)
        return any(
            self._mesh_key in revokers or not revokers.isdisjoint(names)
            for name in names
            if (revokers := self._revokers.get(name))
        )

    def names(self, node: bytes) -> bool:
        """Whether the mesh's key revoked this very node: no invite lets it in again."""
        return self._mesh_key in self._revokers.get(node, ())

    def add(self, data: bytes) -> Revocation | Refusal | None:
        """Verify one and keep it; it is written when the store writes what was put off. None: it was known before."""
        if data in self._known:
            return None
        taken = self._take(data)
        if isinstance(taken, Revocation):
            # A flood of them would otherwise have the whole list written and synced for each.
            self._store.put_off(_FILE, lambda: msgspec.msgpack.encode(list(self._known)))
        return taken

    def _take(self, data: bytes) -> Revocation | Refusal | None:
        revocation = decode_revocation(data)
        if isinstance(revocation, Refusal):
            return revocation
        # Encoded again, so that two spellings of one revocation are not two.
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
                self._make_room()
        if data not in self._known:
            _log.debug("revocation not kept: too many", revoker=revocation.revoker.hex()[:10])
            return Refusal(Reason.BUSY, Subject.REVOCATION, "too many revocations")
        return revocation

    def _keep(self, data: bytes, revocation: Revocation) -> None:
        self._known[data] = revocation
        self._per_revoker[revocation.revoker] += 1
        self._revokers.setdefault(revocation.target, set()).add(revocation.revoker)
        self._count(data, revocation, 1)

    def _make_room(self) -> None:
        """Drop the newest revocation of the heaviest branch; the mesh's own are not among them."""
        path: _Path = ()
        while path in self._branches:
            _, child = max((size, node) for node, size in self._branches[path].items())
            if not child:
                break
            path += (child,)
        # Where all are the mesh's own, the newest of these has no room.
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
    """Where a revoker stands below the mesh's key, by the chain with which it shows that it is a member."""
    nodes = tuple(link.node for link in revocation.chain)
    return nodes[: nodes.index(revocation.revoker) + 1] if revocation.revoker in nodes else nodes
