"""Mesh nodes for benchmarks: no relay, nothing kept, no gossip."""

from mesh_llm.core.types.announcement import Announcement
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.event_adapter import OnEvent
from mesh_llm.net.mesh import MeshNet, MeshNetConfig
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.announcement import encode_announcement
from mesh_llm.wire.mesh.gossip import decode_message, encode_message


class Codec:
    """`wire.mesh.gossip` as the transport needs it."""

    def encode(self, message: MeshMessage) -> bytes:
        """See GossipCodec."""
        return encode_message(message)

    def decode(self, payload: bytes) -> MeshMessage | None:
        """See GossipCodec."""
        message = decode_message(payload)
        return None if isinstance(message, Malformed) else message

    def encode_announcement(self, announcement: Announcement) -> bytes:
        """See GossipCodec."""
        return encode_announcement(announcement)


def _nothing(_: AnyEvent) -> None:
    return


def make_node(*tokens: str, client: bool = False, tls: bool = True, on_event: OnEvent = _nothing) -> MeshNet:
    """A node that founds a mesh, or joins the one of its tokens. `tls`: not with `--transport quic`."""
    config = MeshNetConfig(home=None, tokens=tokens, client=client, tls=tls, endpoint=EndpointSettings(relay=False))
    return MeshNet(config, SigningKey.generate(), Codec(), on_event)
