"""What one node tells all others about itself."""

import msgspec

from mesh_llm.core.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.model import Capacity, ModelFacts, ModelKind, ModelStatus, Role
from mesh_llm.core.publicity import Publicity
from mesh_llm.core.split_word import SplitWord


class Serving(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model on one node.

    Attributes:
        model: served name.
        status: warm ones are routed to.
        term: launch number on that node.
        context: tokens per slot.
        slots: requests at once.
        in_flight: requests being answered, from everybody.
        tokens_per_second: measured generation speed of one request; 0.0 unknown.
        size_bytes: weights.
        reason: why it failed, bounded to 500 characters; else empty.
        embeddings: whether it answers /v1/embeddings.
        aliases: further exact names, such as the file stem.
        kind: what it is for.
    """

    model: ModelName
    status: ModelStatus
    term: int = 0
    context: int = 0
    slots: int = 1
    in_flight: int = 0
    tokens_per_second: float = 0.0
    size_bytes: int = 0
    reason: str = ""
    embeddings: bool = True
    aliases: tuple[str, ...] = ()
    kind: ModelKind = ModelKind.CHAT


class Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node's word about itself, ordered by (incarnation, sequence); signed by the node at the edge.

    Attributes:
        mesh: the mesh it belongs to.
        node: who speaks.
        incarnation: life number.
        sequence: rises with every change within one life.
        name: human name (host name by default), at most 64 characters.
        role: serve, standby or client.
        version: mesh-llm version.
        serving: models here.
        on_disk: models that it could load.
        wanted: models that its user seeded the mesh with (`--model`), in order.
        demand: requests per minute it saw asked, per model, decayed.
        capacity: memory and engine.
        addresses: `ip:port` where QUIC reaches it.
        relay: relay URL, or empty.
        certificate: encoded admission certificate, opaque to the core; verified at the edge.
        left: True in the last word of a node that leaves in good order.
        split: the split group that it takes part in, if any.
        shares: it gives the files of `on_disk` to others of the mesh.
        publicity: its wish that the mesh be listed for others to find; None: none.
        clients: passive nodes that follow it.
    """

    mesh: MeshId
    node: NodeId
    incarnation: Incarnation
    sequence: int
    name: str = ""
    role: Role = Role.SERVE
    version: str = ""
    serving: tuple[Serving, ...] = ()
    on_disk: tuple[ModelFacts, ...] = ()
    wanted: tuple[ModelName, ...] = ()
    demand: dict[str, float] = {}
    capacity: Capacity = Capacity()
    addresses: tuple[str, ...] = ()
    relay: str = ""
    certificate: bytes = b""
    left: bool = False
    split: SplitWord | None = None
    shares: bool = False
    publicity: Publicity | None = None
    clients: int = 0


class SignedAnnouncement(msgspec.Struct, frozen=True, kw_only=True):
    """An announcement with the exact bytes that its node signed. The edge verifies before the core sees it.

    The node's own entry has empty `payload` and `signature`: the edge fills them when it sends.
    """

    announcement: Announcement
    payload: bytes = b""
    signature: bytes = b""


def without_load(word: Announcement) -> Announcement:
    """The announcement without what changes all the time and need not be known at once.

    Everything else counts: a field that is added to an announcement is not load unless it is named here.
    """
    serving = tuple(msgspec.structs.replace(one, in_flight=0, tokens_per_second=0.0) for one in word.serving)
    return msgspec.structs.replace(word, serving=serving, demand={}, clients=0)
