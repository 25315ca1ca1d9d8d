"""This node's connection to its mesh: how it is made from the settings, and how it joins."""

from collections.abc import Iterator

from mesh_llm import __version__
from mesh_llm.core.types.announcement import Announcement, Ownership
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.daemon.published_state import NoticeLog, ProgressListener, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.net.event_adapter import OnEvent
from mesh_llm.net.mesh import MeshNet, MeshNetConfig
from mesh_llm.net.quic.endpoint import EndpointSettings
from mesh_llm.runtime.home import Home
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.announcement import encode_announcement
from mesh_llm.wire.mesh.gossip import decode_message, encode_message


class Codec:
    """Encodes and decodes gossip for the transport, by `wire.mesh.gossip`."""

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


def make_net(
    settings: Settings, key: SigningKey, kept: Home | None, on_event: OnEvent, ownership: Ownership | None = None
) -> MeshNet:
    """The connection to the mesh.

    `kept`: the home with its key and certificates; None: nothing is kept. `ownership`: whose node this is.
    """
    config = MeshNetConfig(
        home=kept,
        tokens=settings.join,
        client=settings.client,
        found=settings.discovery.auto,
        endpoint=EndpointSettings(relay=settings.relay, port=settings.quic_port),
        version=__version__,
        approvals=settings.lan and not settings.client,
        invite_scope=Scope.parse(settings.invite_scope),
        tls=settings.tls,
        ownership=ownership,
    )
    return MeshNet(config, key, Codec(), on_event)


async def join(net: MeshNet, notices: NoticeLog, on_progress: ProgressListener) -> bool:
    """Join the mesh at the start, and report the result. If nobody answers, the core keeps trying.

    Returns False if no node has admitted this one yet.

    Raises:
        MeshError: no token can ever admit this node.
    """
    if not net.joins:
        on_progress(Stage(name="mesh", text="a new mesh; others join it with an invite", done=True))
        return True
    on_progress(Stage(name="mesh", text="joining", done=False))
    report = await net.joiner.join()
    if report.admitted is None and report.hopeless:
        report.raise_for_user()
    for problem in report.problems:
        notices.add(Notice(level=NoticeLevel.WARNING, code=problem.code, text=str(problem)))
    if report.admitted is None:
        on_progress(Stage(name="mesh", text="nobody answers yet; still trying", done=False))
        return False
    on_progress(Stage(name="mesh", text=f"joined through node {report.admitted[:12]}", done=True))
    notices.add(Notice(level=NoticeLevel.INFO, code="mesh_joined", text="Joined the mesh.", about=report.admitted))
    return True


def port_notices(net: MeshNet) -> Iterator[Notice]:
    """What the user is told of ports that other programs have: those of the last run, and those of `--quic-port`."""
    if net.lost_port:
        text = (
            f"UDP port {net.lost_port}, which this node had before, is used by another program: this node has port "
            f"{net.endpoint.ports[0]} now. Invites made before lead to the old one. A new one: mesh-llm status"
        )
        yield Notice(level=NoticeLevel.WARNING, code="quic_port_moved", text=text)
    if net.tls_listener.taken:
        text = (
            f"TCP port {net.tls_listener.taken} of --quic-port is used by another program: other nodes may reach this "
            "one over QUIC only, which is slower. End that program, or choose another port: --quic-port PORT"
        )
        yield Notice(level=NoticeLevel.WARNING, code="tcp_port_taken", text=text)
