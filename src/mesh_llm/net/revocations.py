"""What a node knows to be revoked: verified, bounded, kept over restarts. Satisfies wire.certificate.Revoked."""

from collections import Counter

import msgspec
import structlog

from mesh_llm.core.ids import MeshId
from mesh_llm.net.store import MeshStore
from mesh_llm.wire.certificate import Link
from mesh_llm.wire.refusal import Reason, Refusal, Subject
from mesh_llm.wire.revocation import Kind, Revocation, check_revocation, decode_revocation, encode_revocation
from mesh_llm.wire.signing import Verify

MAX_REVOCATIONS = 4096
MAX_PER_REVOKER = 256
_FILE = "revocations"

_log = structlog.get_logger(__name__)


class RevocationList:
    """All revocations of one mesh that this node has heard of and found to be true."""

    def __init__(self, mesh: MeshId, store: MeshStore, verify: Verify) -> None:
        self._mesh = mesh
        self._store = store
        self._verify = verify
        self._known: dict[bytes, Revocation] = {}
        self._invites: set[bytes] = set()
        self._nodes: set[bytes] = set()
        self._per_revoker: Counter[bytes] = Counter()
        for data in self._read():
            self._take(data)

    def __len__(self) -> int:
        return len(self._known)

    def encoded(self) -> tuple[bytes, ...]:
        """All of them, as they travel."""
        return tuple(self._known)

    def covers(self, links: tuple[Link, ...]) -> bool:
        """Whether any of these links' nodes or invites was revoked."""
        return any(link.invite in self._invites or link.node in self._nodes for link in links)

    def names(self, node: bytes) -> bool:
        """Whether this very node was revoked: no invite lets it in again."""
        return node in self._nodes

    def add(self, data: bytes) -> Revocation | Refusal | None:
        """Verify one and keep it. None: it was known before."""
        if data in self._known:
            return None
        taken = self._take(data)
        if isinstance(taken, Revocation):
            self._store.try_write(_FILE, msgspec.msgpack.encode(list(self._known)))
        return taken

    def _take(self, data: bytes) -> Revocation | Refusal | None:
        revocation = decode_revocation(data)
        if isinstance(revocation, Refusal):
            return revocation
        # Encoded again, so that two spellings of one revocation are not two.
        data = encode_revocation(revocation)
        targets = self._invites if revocation.kind is Kind.INVITE else self._nodes
        if data in self._known or revocation.target in targets:
            return None
        if refusal := check_revocation(revocation, mesh=self._mesh, verify=self._verify):
            return refusal
        mesh_signed = revocation.revoker == revocation.mesh
        if len(self._known) >= MAX_REVOCATIONS or (
            not mesh_signed and self._per_revoker[revocation.revoker] >= MAX_PER_REVOKER
        ):
            _log.warning("revocation not kept: too many", revoker=revocation.revoker.hex()[:10])
            return Refusal(Reason.BUSY, Subject.REVOCATION, "too many revocations")
        self._known[data] = revocation
        self._per_revoker[revocation.revoker] += 1
        targets.add(revocation.target)
        return revocation

    def _read(self) -> list[bytes]:
        data = self._store.read(_FILE)
        if data is None:
            return []
        try:
            return msgspec.msgpack.decode(data, type=list[bytes])
        except msgspec.MsgspecError as error:
            _log.error("the list of revocations is damaged; starting with an empty one", reason=str(error))
            return []
