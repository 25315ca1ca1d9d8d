"""A mesh on paper: nodes with keys, standings and registrars, without any network."""

from collections.abc import Callable
from functools import lru_cache

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission import credentials
from mesh_llm.net.admission.credentials import Credentials, MeshStores, SigningKey, open_credentials
from mesh_llm.net.admission.handshake import CertificateIssuer, Program
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.revocations import RevocationList
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import AdmitRequest, Admitted, Approved, Refused
from mesh_llm.wire.mesh.certificates import Certificate
from mesh_llm.wire.mesh.invites import Invite, parse_invite

verify = lru_cache(maxsize=65536)(credentials.verify)
"""Each signature is looked at once: properties look at the same ones very often."""

START = 1_700_000_000.0


class Member:
    """One node. `now` is its clock."""

    def __init__(self, *tokens: str, key: SigningKey | None = None, stores: MeshStores | None = None) -> None:
        self.now = START
        self.key = key or SigningKey.generate()
        invites = [read(token) for token in tokens]
        self.standing: Credentials = open_credentials(
            stores or MeshStores(None), self.key, invites, self.now, client=False
        )
        self.revocations = RevocationList(self.standing.mesh, self.standing.store, verify)
        self.standing.ceiling = self.revocations.ceiling
        self.addresses: tuple[str, ...] = ("10.0.0.1:4433",)
        self.book = InviteBook(self.standing, self._reachable, self._clock)
        self.registrar = CertificateIssuer(
            self.standing,
            self.book,
            self.revocations,
            verify,
            self._clock,
            Program("1.0", b"session1"),
        )
        self.registrar.known = self._known
        self.known: Callable[[NodeId], Certificate | None] = lambda _: None
        """What this node has heard of others' certificates."""
        self.tokens = tokens

    def _reachable(self) -> Reachable:
        return Reachable(self.addresses, "")

    def _known(self, node: NodeId) -> Certificate | None:
        return self.known(node)

    def _clock(self) -> float:
        return self.now

    def request(self) -> AdmitRequest:
        return self.registrar.request(tuple(encode(read(token)) for token in self.tokens))

    def join(self, other: "Member") -> Certificate | Refused:
        """Ask another node for admission, and take what it gives."""
        request = self.request()
        decision = other.registrar.decide(request, self.key.node_id)
        if isinstance(decision, Refused):
            return decision
        assert not isinstance(decision, Approved)
        admitted, certificate = decision
        assert isinstance(admitted, Admitted)
        accepted = self.registrar.accept_peer(admitted, other.key.node_id, request)
        assert isinstance(accepted, Certificate), accepted
        return certificate


def read(token: str) -> Invite:
    invite = parse_invite(token)
    assert isinstance(invite, Invite)
    return invite
