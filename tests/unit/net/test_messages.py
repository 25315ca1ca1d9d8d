"""How much of a member's gossip a node takes at once."""

from typing import Any

import pytest
from tests.unit.net.members import Member
from tests.unit.net.test_revocations import admitted, of

from mesh_llm.core.types.gossip import Exchange, MeshMessage
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net import gossip_transport as messages
from mesh_llm.net.gossip_transport import Messenger
from mesh_llm.net.peers import Peer
from mesh_llm.wire.mesh.invites import Revocation


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


class Events:
    def __init__(self) -> None:
        self.revocations: list[Revocation] = []

    def received(self, peer: NodeId, message: MeshMessage) -> None: ...

    def revoked(self, revocation: Revocation) -> None:
        self.revocations.append(revocation)


async def costs_of(monkeypatch: pytest.MonkeyPatch, member: Member, said: list[MeshMessage], events: Events) -> Any:
    """What each message counts as."""
    costs: list[float] = []

    class Pace:
        def take(self, _now: float, cost: float = 1.0) -> float:
            costs.append(cost)
            return 0.0

    monkeypatch.setattr(messages, "_Pace", Pace)
    unused: Any = None
    codec: Any = Codec(said)
    heard: Any = events
    stream: Any = Frames(len(said))
    messenger = Messenger(unused, unused, member.revocations, codec, heard, unused)
    assert member.standing.certificate is not None
    await messenger.receive_gossip(stream, Peer(member.key.node_id, member.standing.certificate, "1", b""), b"")
    return costs


async def test_a_new_revocation_counts_as_many_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    founder = Member()
    middle = admitted(founder)
    data = [of(middle, admitted(middle)) for _ in range(4)]
    events = Events()
    said: list[MeshMessage] = [Exchange(), Exchange(revocations=tuple(data)), Exchange(revocations=tuple(data))]
    assert await costs_of(monkeypatch, founder, said, events) == [1.0, 41.0, 1.0]
    assert len(events.revocations) == 4
