"""Who is at the other end of an admitted connection."""

from dataclasses import dataclass

from mesh_llm.core.ids import NodeId
from mesh_llm.wire.certificate import Certificate, Scope


@dataclass(frozen=True, slots=True)
class Peer:
    """An admitted node.

    Attributes:
        node: its key, proven by the connection's TLS handshake.
        certificate: by which it was admitted; verified.
        version: of its program.
        session: of its process's life.
    """

    node: NodeId
    certificate: Certificate
    version: str
    session: bytes

    @property
    def scope(self) -> Scope:
        """What it may do."""
        return self.certificate.scope
