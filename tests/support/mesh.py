"""One membership under test, with time by hand and the other nodes played by the test."""

from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.membership.membership import Membership
from mesh_llm.core.membership.state import MemberState
from mesh_llm.core.types.announcement import Announcement, Serving, SignedAnnouncement
from mesh_llm.core.types.effects import AnyEffect, Notice, SendMessage
from mesh_llm.core.types.events import AnyEvent, MessageReceived, TargetFailed, Tick
from mesh_llm.core.types.gossip import Ack, Digest, Exchange, MeshMessage, Ping, PingRequest, Verdict
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus

MESH = MeshId("e" * 64)
ME = NodeId("0" * 64)
A, B, C, D = (NodeId(letter * 64) for letter in "abcd")
LIFE = Incarnation(1000)


def word(node: NodeId, incarnation: int = LIFE, sequence: int = 1, **fields: Any) -> Announcement:
    values: dict[str, Any] = {
        "mesh": MESH,
        "node": node,
        "incarnation": Incarnation(incarnation),
        "sequence": sequence,
        "name": node[:4],
        "addresses": (f"10.0.0.1:{int(node[:2], 16)}",),
    }
    return Announcement(**(values | fields))


def signed(node: NodeId, incarnation: int = LIFE, sequence: int = 1, **fields: Any) -> SignedAnnouncement:
    announcement = word(node, incarnation, sequence, **fields)
    payload = msgspec.msgpack.encode(announcement)
    return SignedAnnouncement(announcement=announcement, payload=payload, signature=b"s" * 64)


def serving(in_flight: int = 0, status: ModelStatus = ModelStatus.WARM) -> Serving:
    return Serving(model=ModelName("m"), status=status, in_flight=in_flight)


def digest(node: NodeId, incarnation: int = LIFE, sequence: int = 1, state: str = "a") -> Digest:
    return Digest(node, Incarnation(incarnation), sequence, state)


def verdict(node: NodeId, state: str = "s", by: NodeId = B, incarnation: int = LIFE) -> Verdict:
    return Verdict(node=node, incarnation=Incarnation(incarnation), state=state, by=by)


class Bench:
    """Runs a membership; remembers all effects. `silent` nodes get no answers from the others it plays."""

    def __init__(self, pace: MembershipConfig | None = None, *, publish: bool = True, seed: int = 1) -> None:
        self.now = 100.0
        self.membership = Membership(ME, MESH, LIFE, pace or MembershipConfig(), Random(seed))
        self.effects: list[AnyEffect] = []
        self.alive: set[NodeId] = set()
        if publish:
            self.publish()

    def publish(self, **fields: Any) -> list[AnyEffect]:
        return self._keep(self.membership.publish(word(ME, **fields), self.now))

    def do(self, event: AnyEvent) -> list[AnyEffect]:
        return self._keep(self.membership.handle(event, self.now))

    def hear(self, peer: NodeId, message: MeshMessage) -> list[AnyEffect]:
        return self.do(MessageReceived(peer=peer, message=message))

    def meet(self, *nodes: NodeId) -> None:
        """Let members introduce themselves, and live from now on."""
        for node in nodes:
            self.hear(node, Exchange(entries=(signed(node),)))
            self.alive.add(node)

    def die(self, *nodes: NodeId) -> None:
        """Let nodes answer no more."""
        self.alive.difference_update(nodes)

    def wait(self, seconds: float, *, answer: bool = True) -> list[AnyEffect]:
        """Let time pass, tick by tick; living nodes answer at once."""
        end = self.now + seconds
        start = len(self.effects)
        while (deadline := self.membership.deadline()) is not None and deadline <= end:
            self.now = max(self.now, deadline)
            effects = self.do(Tick())
            if answer:
                self._answer(effects)
        self.now = end
        return self.effects[start:]

    def _answer(self, effects: list[AnyEffect]) -> None:
        for effect in effects:
            if not isinstance(effect, SendMessage) or effect.peer not in self.alive:
                continue
            match effect.message:
                case Ping(nonce=nonce):
                    self.hear(effect.peer, Ack(nonce=nonce))
                case PingRequest(nonce=nonce, target=target) if target in self.alive:
                    self.hear(effect.peer, Ack(nonce=nonce, about=target))
                case Exchange(reply=True):
                    self.hear(effect.peer, Exchange(fingerprint=self.membership.view.fingerprint))
                case _:
                    pass

    def _keep(self, effects: list[AnyEffect]) -> list[AnyEffect]:
        self.effects += effects
        return effects


def sent(effects: Sequence[AnyEffect], peer: NodeId | None = None) -> list[MeshMessage]:
    messages = [effect for effect in effects if isinstance(effect, SendMessage)]
    return [effect.message for effect in messages if peer is None or effect.peer == peer]


def exchanges(effects: Sequence[AnyEffect], peer: NodeId | None = None) -> list[Exchange]:
    return [message for message in sent(effects, peer) if isinstance(message, Exchange)]


def notices(effects: Sequence[AnyEffect]) -> list[str]:
    return [effect.code for effect in effects if isinstance(effect, Notice)]


def failed(node: NodeId) -> TargetFailed:
    """A request that ran into a node that does not answer."""
    return TargetFailed(node=node, model=ModelName("m"), reason="refused")


def state(bench: Bench, node: NodeId) -> MemberState | None:
    """The state of another node, as the node under test sees it."""
    record = bench.membership.view.get(node)
    return record.state if record is not None else None
