"""Binds the core to the mesh: effects go to the net room, its invites to the management."""

from mesh_llm import __version__
from mesh_llm.core.types.announcement import Announcement
from mesh_llm.core.types.effects import Disconnect, Notice, NoticeLevel, Rejoin, SendMessage, SetRoutes
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.daemon.notices import NoticeBook, OnStage, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.event_adapter import OnEvent
from mesh_llm.net.mesh import MeshNet, MeshNetConfig
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.runtime.home import Home
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.announcement import encode_announcement
from mesh_llm.wire.mesh.frames import CloseCode
from mesh_llm.wire.mesh.gossip import decode_message, encode_message


class Codec:
    """Satisfies net.messages.GossipCodec by wire.gossip."""

    def encode(self, message: MeshMessage) -> bytes:
        """A message whose entries have payload and signature."""
        return encode_message(message)

    def decode(self, payload: bytes) -> MeshMessage | None:
        """The opposite; None where the bytes are no message."""
        message = decode_message(payload)
        return None if isinstance(message, Malformed) else message

    def encode_announcement(self, announcement: Announcement) -> bytes:
        """The payload that a node signs."""
        return encode_announcement(announcement)


class MeshEffects:
    """Carries out the effects that are about other nodes."""

    def __init__(self, net: MeshNet, *, passive: bool) -> None:
        """`passive`: this node has no routes that others would ask for."""
        self._net = net
        self._passive = passive

    def set_routes(self, effect: SetRoutes) -> None:
        """Tell passive nodes the new routes."""
        if not self._passive:
            self._net.routes_server.update(effect.snapshot)

    def send(self, effect: SendMessage) -> None:
        """Hand a message to a peer."""
        self._net.send(effect.peer, effect.message, effect.addresses, effect.relay)

    def disconnect(self, effect: Disconnect) -> None:
        """Close the connection to a peer."""
        self._net.connections.disconnect(effect.peer, CloseCode.DISCONNECTED, effect.reason)

    def rejoin(self, effect: Rejoin) -> None:
        """Try tokens and last-known peers once."""
        self._net.joiner.rejoin(effect.peers)


def make_net(settings: Settings, key: SigningKey, kept: Home | None, on_event: OnEvent) -> MeshNet:
    """The mesh of these settings; `kept` holds its key and certificates, None keeps nothing."""
    config = MeshNetConfig(
        home=kept,
        tokens=settings.join,
        client=settings.client,
        found=settings.discovery.auto,
        endpoint=EndpointSettings(relay=settings.relay, port=settings.quic_port),
        version=__version__,
        approvals=settings.lan and not settings.client,
    )
    return MeshNet(config, key, Codec(), on_event)


async def join(net: MeshNet, notices: NoticeBook, on_progress: OnStage) -> bool:
    """Get into the mesh at the start, and say how it went. Where nobody answers, the core goes on trying.

    False: nobody let this node in yet.

    Raises:
        MeshError: no token can ever let this node in.
    """
    if not net.joins:
        on_progress(Stage(name="mesh", text="a mesh of its own, open to whoever has an invite", done=True))
        return True
    on_progress(Stage(name="mesh", text="joining", done=False))
    report = await net.joiner.join()
    if report.admitted is None and report.hopeless:
        report.raise_for_user()
    for problem in report.problems:
        notices.add(Notice(level=NoticeLevel.WARNING, code=problem.code, text=str(problem)))
    if report.admitted is None:
        on_progress(Stage(name="mesh", text="nobody answers yet; trying on", done=False))
        return False
    on_progress(Stage(name="mesh", text=f"joined by {report.admitted[:12]}", done=True))
    notices.add(Notice(level=NoticeLevel.INFO, code="mesh_joined", text="Joined the mesh.", about=report.admitted))
    return True
