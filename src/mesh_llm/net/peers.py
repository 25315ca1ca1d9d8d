"""Who is at the other end of an admitted connection.

Where nodes were last said to be. Bounded; the newest word counts, and an empty one changes nothing.
"""

from collections import OrderedDict
from dataclasses import dataclass

from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.ids import NodeId
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.certificates import Certificate


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


_MAX_NODES = 16384


class AddressBook:
    """Addresses by node; the least recently mentioned one is forgotten first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[NodeId, KnownPeer] = OrderedDict()

    def learn(self, node: NodeId, addresses: tuple[str, ...], relay: str = "") -> None:
        """Take note, if there is anything to note."""
        if not addresses and not relay:
            return
        self._entries[node] = KnownPeer(node=node, addresses=addresses, relay=relay)
        self._entries.move_to_end(node)
        if len(self._entries) > _MAX_NODES:
            self._entries.popitem(last=False)

    def find(self, node: NodeId) -> KnownPeer:
        """What is known; without addresses where nothing is."""
        return self._entries.get(node) or KnownPeer(node=node)

    def recent(self, count: int) -> tuple[KnownPeer, ...]:
        """The most recently mentioned ones."""
        return tuple(self._entries[node] for node in list(self._entries)[-count:])
