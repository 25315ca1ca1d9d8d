"""Writing revocations: with the mesh's own key where this node holds it, else as the one who gave."""

from mesh_llm.core.errors import MeshError
from mesh_llm.net.standing import Standing
from mesh_llm.wire.certificate import Certificate, Link, rests_on
from mesh_llm.wire.invite import NONCE_BYTES
from mesh_llm.wire.refusal import Reason, Refusal, Subject, describe
from mesh_llm.wire.revocation import Kind, Revocation, revoke


def revoke_invite(standing: Standing, identifier: bytes, nonce: bytes, now: float) -> Revocation:
    """Take back an invite that this node issued. Raises MeshError where the node was never admitted."""
    certificate = standing.certificate
    if certificate is None:
        raise describe(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
    return _write(standing, Kind.INVITE, identifier, certificate.links, nonce, now)


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
    return _write(standing, Kind.NODE, links[-1].node, links, bytes(NONCE_BYTES), now)


def _write(
    standing: Standing, kind: Kind, target: bytes, chain: tuple[Link, ...], nonce: bytes, now: float
) -> Revocation:
    mesh = bytes.fromhex(standing.mesh)
    if standing.mesh_key is not None:
        key, chain = standing.mesh_key, ()
    else:
        key = standing.key
    return revoke(mesh, kind, target, revoker=key.public, issued=int(now), sign=key.sign, chain=chain, nonce=nonce)
