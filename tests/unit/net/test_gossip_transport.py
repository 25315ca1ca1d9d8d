"""How much of a member's gossip a node takes at once, and which certificate of a node counts."""

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from tests.unit.net.admission.test_revocations import admitted, of
from tests.unit.net.members import Member

from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.types.gossip import Exchange, MeshMessage
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.net import gossip_transport as messages
from mesh_llm.net.admission.credentials import verify
from mesh_llm.net.gossip_transport import AnnouncementGuard, GossipTransport
from mesh_llm.net.quic.connection import Peer, PeerConnection
from mesh_llm.net.quic.endpoint import Endpoint, EndpointSettings
from mesh_llm.wire.mesh.admission import Reason
from mesh_llm.wire.mesh.certificates import Certificate


class Frames:
    """A stream of numbered frames."""

    def __init__(self, count: int) -> None:
        self._left = list(range(count))

    async def read_frame(self, _limit: int) -> bytes | None:
        return bytes([self._left.pop(0)]) if self._left else None


class Codec:
    """Frame n is message n."""

    def __init__(self, said: list[MeshMessage]) -> None:
        self._said = said

    def decode(self, payload: bytes) -> MeshMessage | None:
        return self._said[payload[0]]


class Connections:
    """No connections at all."""

    def __init__(self, member: Member) -> None:
        self.on_lost: list[object] = []
        self.endpoint = Endpoint(member.key.secret, EndpointSettings())

    def __iter__(self) -> Iterator[PeerConnection]:
        return iter(())


class Guard:
    def drop_ended(self) -> list[NodeId]:
        return []


class Events:
    def __init__(self) -> None:
        self.revocations: list[bytes] = []

    def received(self, peer: NodeId, message: MeshMessage) -> None: ...

    def revoked(self, encoded: bytes, *_: object, **__: object) -> None:
        self.revocations.append(encoded)


async def costs_of(monkeypatch: pytest.MonkeyPatch, member: Member, said: list[MeshMessage], events: Events) -> Any:
    """What each message counts as."""
    costs: list[float] = []

    class Bucket:
        def __init__(self, *_: float) -> None: ...

        def charge(self, _now: float, cost: float) -> float:
            costs.append(cost)
            return 0.0

    monkeypatch.setattr(messages, "TokenBucket", Bucket)
    connections: Any = Connections(member)
    guard: Any = Guard()
    codec: Any = Codec(said)
    heard: Any = events
    stream: Any = Frames(len(said))
    transport = GossipTransport(connections, guard, member.revocations, codec, heard)
    assert member.standing.certificate is not None
    await transport.receive_gossip(stream, Peer(member.key.node_id, member.standing.certificate, "1", b""), b"")
    return costs


async def test_a_new_revocation_counts_as_many_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    founder = Member()
    middle = admitted(founder)
    data = [of(middle, admitted(middle)) for _ in range(4)]
    events = Events()
    said: list[MeshMessage] = [Exchange(), Exchange(revocations=tuple(data)), Exchange(revocations=tuple(data))]
    assert await costs_of(monkeypatch, founder, said, events) == [1.0, 41.0, 1.0]
    assert len(events.revocations) == 4


DAY = 86400


def guard(member: Member) -> AnnouncementGuard:
    return AnnouncementGuard(member.standing, member.registrar, verify, msgspec.msgpack.encode)


def announced(member: Member, sequence: int) -> SignedAnnouncement:
    """What a member announces, with the certificate that it has now."""
    announcement = Announcement(
        mesh=member.standing.mesh, node=member.key.node_id, incarnation=Incarnation(1), sequence=sequence
    )
    return guard(member).seal(SignedAnnouncement(announcement=announcement))


def test_an_old_word_said_again_does_not_bring_an_old_certificate_back() -> None:
    founder = Member()
    member = admitted(founder)
    old, before = announced(member, 1), member.standing.certificate
    for one in (founder, member):
        one.now += 60 * DAY
    assert isinstance(member.join(founder), Certificate)
    renewed = member.standing.certificate
    assert renewed is not None
    assert before is not None
    assert renewed.expires > before.expires
    heard = guard(founder)
    assert heard.check(announced(member, 2)) is None
    # Somebody kept it: it is a true announced still, and says nothing new.
    assert heard.check(old) is None
    assert heard.certificate(member.key.node_id) == renewed
    founder.now = before.expires + 1.0
    assert heard.drop_ended() == []
    refusal = heard.check(old)
    assert refusal is not None
    assert refusal.reason is Reason.EXPIRED
    founder.now = renewed.expires + 1.0
    assert heard.drop_ended() == [member.key.node_id]
