"""Random trees of admissions: what each node may hold, and what a revocation ends."""

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.wire.mesh.test_certificates import FOUNDER, INVITE, MESH, NOW, founder
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Reason, Refusal, Scope
from mesh_llm.wire.mesh.certificates import (
    MAX_DEPTH,
    Certificate,
    Link,
    NothingRevoked,
    check_certificate,
    decode_certificate,
    issue_certificate,
)

STEPS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(Scope), st.integers(1, 200)), max_size=25)
"""Who admits (modulo those there), to what, and for how long."""


class RevokedNode:
    def __init__(self, node: bytes) -> None:
        self._node = node

    def covers(self, links: tuple[Link, ...]) -> bool:
        return any(link.node == self._node for link in links)

    def ceiling(self, links: tuple[Link, ...]) -> Scope:
        return Scope.SPLIT


def grow(steps: list[tuple[int, Scope, int]]) -> list[tuple[ToyKey, Certificate, int | None]]:
    """Every node with its certificate and the number of its admitting node; refused steps admit nobody."""
    nodes: list[tuple[ToyKey, Certificate, int | None]] = [(FOUNDER, founder(), None)]
    for number, (by, scope, lifetime) in enumerate(steps):
        parent = by % len(nodes)
        key, certificate, _ = nodes[parent]
        node = ToyKey(f"tree {number}")
        given_certificate = issue_certificate(certificate, node.public, scope, NOW + lifetime, INVITE, key.sign)
        may = certificate.scope >= Scope.SERVE and scope <= certificate.scope and len(certificate.links) < MAX_DEPTH
        assert isinstance(given_certificate, Certificate if may else Refusal)
        if isinstance(given_certificate, Certificate):
            nodes.append((node, given_certificate, parent))
    return nodes


def reason(node: ToyKey, certificate: Certificate, revoked: NothingRevoked | RevokedNode) -> Reason | None:
    refusal = check_certificate(
        certificate, mesh=MESH.mesh_id, node=node.node_id, now=NOW, verify=verify, revoked=revoked
    )
    return refusal.reason if refusal else None


@given(STEPS)
def test_every_admission_is_valid_and_no_wider_than_its_parent(steps: list[tuple[int, Scope, int]]):
    nodes = grow(steps)
    for node, certificate, parent in nodes:
        assert decode_certificate(encode(certificate)) == certificate
        assert reason(node, certificate, NothingRevoked()) is None
        if parent is not None:
            above = nodes[parent][1]
            assert certificate.scope <= above.scope
            assert certificate.expires <= above.expires


@given(STEPS, st.integers(0, 30))
def test_revoking_a_node_ends_exactly_the_admissions_below_it(steps: list[tuple[int, Scope, int]], which: int):
    nodes = grow(steps)
    target = which % len(nodes)
    revoked = RevokedNode(nodes[target][0].public)

    def below(number: int | None) -> bool:
        return number is not None and (number == target or below(nodes[number][2]))

    for number, (node, certificate, _) in enumerate(nodes):
        assert reason(node, certificate, revoked) is (Reason.REVOKED if below(number) else None)
