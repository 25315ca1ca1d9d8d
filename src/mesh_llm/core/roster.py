"""What the parts of membership share: who is there, what is known of them, what is to be sent, what wakes up when."""

from enum import IntEnum, auto

from mesh_llm.core.chance import Chance
from mesh_llm.core.contact import Contact, Path
from mesh_llm.core.effects import AnyEffect, Disconnect, KnownPeer, Notice, NoticeLevel, SendMessage
from mesh_llm.core.gossip import MeshMessage
from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.pace import Pace
from mesh_llm.core.timers import Timers
from mesh_llm.core.view import MemberState, View

NOBODY = NodeId("")


class Alarm(IntEnum):
    """What a timer is for. Those about one node are set with its id, the others with NOBODY."""

    STEP = auto()
    PROBE = auto()
    TURN = auto()
    RETRY = auto()
    SUSPICION = auto()
    EXPIRE = auto()
    HEAL = auto()
    REJOIN = auto()
    PUBLISH = auto()
    REFUTE = auto()
    RELAY = auto()


class Roster:
    """Shared state; the parts that own a piece of it change it, the others read."""

    def __init__(self, me: NodeId, mesh: MeshId, pace: Pace, chance: Chance) -> None:
        self.me = me
        self.mesh = mesh
        self.pace = pace
        self.chance = chance
        self.view = View(pace.members)
        self.contacts: dict[NodeId, Contact] = {}
        self.unproven: dict[NodeId, None] = {}
        self.checks: dict[NodeId, None] = {}
        self.paths: dict[NodeId, Path] = {}
        self.timers: Timers[tuple[Alarm, NodeId]] = Timers()
        self.revoked: dict[NodeId, None] = {}
        self.revision = 0
        self._changed: dict[NodeId, None] = {}
        self._members: dict[NodeId, Member] = {}
        self._sorted: tuple[Member, ...] = ()
        self._effects: list[AnyEffect] = []

    @property
    def size(self) -> int:
        """Members that are not gone, this node among them."""
        return len(self.view.ring)

    @property
    def alone(self) -> bool:
        """Whether no other member is there."""
        return not self.contacts

    def prove(self, node: NodeId) -> None:
        """A member need not be looked into any more."""
        self.unproven.pop(node, None)
        self.checks.pop(node, None)
        self.calm(Alarm.RETRY, node)
        self.touch(node)

    def touch(self, node: NodeId) -> None:
        """Remember that what readers see of a node may have changed."""
        self._changed[node] = None
        self.revision += 1

    def some(self, count: int, *besides: NodeId) -> list[NodeId]:
        """Pick up to `count` other members at random."""
        ring = self.view.ring
        picked = self.chance.sample(ring, min(len(ring), count + len(besides) + 1))
        return [node for node in picked if node != self.me and node not in besides][:count]

    def nonce(self) -> int:
        """Return a number that a peer cannot guess from earlier ones."""
        return int(self.chance.random() * (1 << 52))

    def alarm(self, alarm: Alarm, at: float, node: NodeId = NOBODY) -> None:
        """Wake up for something at a time."""
        self.timers.set((alarm, node), at)

    def calm(self, alarm: Alarm, node: NodeId = NOBODY) -> None:
        """Do not wake up for it."""
        self.timers.cancel((alarm, node))

    def send(self, peer: NodeId, message: MeshMessage, at: KnownPeer | None = None) -> None:
        """Hand a message to a peer, at the addresses it announced, or where it was before it was forgotten."""
        fact = self.view.get(peer)
        if fact is None:
            where = at or KnownPeer(node=peer)
            send = SendMessage(peer=peer, message=message, addresses=where.addresses, relay=where.relay)
            self._effects.append(send)
            return
        word = fact.signed.announcement
        self._effects.append(SendMessage(peer=peer, message=message, addresses=word.addresses, relay=word.relay))

    def disconnect(self, peer: NodeId, reason: str) -> None:
        """Close the connection to a peer, if one stands."""
        if self.paths.pop(peer, None) is not None:
            self._effects.append(Disconnect(peer=peer, reason=reason))

    def notice(self, level: NoticeLevel, code: str, text: str, about: str = "") -> None:
        """Tell the user."""
        self._effects.append(Notice(level=level, code=code, text=text, about=about))

    def emit(self, effect: AnyEffect) -> None:
        """Ask for something else."""
        self._effects.append(effect)

    def drain(self) -> list[AnyEffect]:
        """Take what was asked for since the last time, in order."""
        effects, self._effects = self._effects, []
        return effects

    def members(self) -> tuple[Member, ...]:
        """All other members as decisions see them, in order of their ids."""
        if self._changed:
            for node in self._changed:
                member = self._member(node)
                if member is None:
                    self._members.pop(node, None)
                else:
                    self._members[node] = member
            self._changed.clear()
            self._sorted = tuple(self._members[node] for node in self.view.ring if node in self._members)
        return self._sorted

    def _member(self, node: NodeId) -> Member | None:
        contact = self.contacts.get(node)
        fact = self.view.get(node)
        if contact is None or fact is None:
            return None
        path = self.paths.get(node)
        return Member(
            announcement=fact.announcement,
            suspect=contact.doubtful or fact.state is not MemberState.ALIVE,
            rtt_ms=path.rtt_ms if path is not None and path.rtt_ms > 0.0 else contact.rtt * 1000.0,
            path="none" if path is None else "relay" if path.relayed else "direct",
        )
