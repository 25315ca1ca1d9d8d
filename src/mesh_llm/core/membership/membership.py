"""Who is in the mesh: a state machine that gossips, probes, suspects, forgets and reconnects. One per active node.

A variant of SWIM. Every `MembershipConfig.step` it starts one exchange with the next member of a shuffled round. The
answer is that member's proof of life. Without one it is probed harder, then suspected in public
(`failure_detector.py`). Each node passes news on a few times (`gossip.py`). So a node's cost does not grow with the
mesh, and every member is watched several times a second by somebody.
"""

from collections.abc import Callable, Sequence

import msgspec

from mesh_llm.core.config import MembershipConfig
from mesh_llm.core.membership.failure_detector import FailureDetector, Prober
from mesh_llm.core.membership.gossip import PushPull
from mesh_llm.core.membership.merge import LocalState, StateMerger
from mesh_llm.core.membership.scheduler import GossipScheduler, Reconnector
from mesh_llm.core.membership.state import Connection, MembershipState, Timer, View
from mesh_llm.core.membership.timers import TokenBucket
from mesh_llm.core.types.announcement import Announcement, Member
from mesh_llm.core.types.effects import AnyEffect
from mesh_llm.core.types.events import (
    AdmissionEnded,
    AnyEvent,
    MessageReceived,
    PathChanged,
    PeerConnected,
    PeerLost,
    Readmitted,
    RejoinFailed,
    RevocationLearned,
    ScopeLimited,
    SendFailed,
    TargetFailed,
)
from mesh_llm.core.types.gossip import Ack, Exchange, MeshMessage, Ping, PingRequest
from mesh_llm.core.types.ids import Incarnation, MeshId, NodeId
from mesh_llm.core.types.ports import RandomSource

_MISSES_TO_REDIAL = 2
"""Failed probes in a row, of a member that others reach, after which its connection is closed: once may be a hiccup."""
_FAREWELLS = 32
_MOST_REVOKED = 4096
_LONG_SLEEP = 10.0
_STRANGERS_RATE = 5.0
_STRANGERS_BURST = 20.0


class Membership:
    """One node's part in the mesh's membership. It begins with the first `publish` and ends with `leave`."""

    def __init__(
        self, me: NodeId, mesh: MeshId, incarnation: Incarnation, config: MembershipConfig, rng: RandomSource
    ) -> None:
        """`incarnation`: higher than in any earlier life of this node, where possible (UNIX seconds at start are)."""
        state = MembershipState(me, mesh, config, rng)
        self._state = state
        self._local = LocalState(state, incarnation)
        self._prober = Prober(state)
        self._gossip = PushPull(state)
        self._reconnector = Reconnector(state)
        self._detector = FailureDetector(state, self._prober, self._gossip, self._reconnector)
        self._scheduler = GossipScheduler(state)
        self._merger = StateMerger(state, self._local, self._gossip, self._detector, self._reconnector, self._scheduler)
        self._strangers = TokenBucket(_STRANGERS_RATE, _STRANGERS_BURST)
        self._latest: Announcement | None = None
        self._was_alone = True
        self._synced = False
        self._left = False
        self._on_timer: dict[Timer, Callable[[NodeId, float], None]] = {
            Timer.GOSSIP: self._start_exchange,
            Timer.PROBE: self._probe_timed_out,
            Timer.CHECK: lambda _, now: self._detector.run_checks(now),
            Timer.RETRY: self._retry,
            Timer.SUSPICION: self._suspicion_expired,
            Timer.EXPIRE: self._expire,
            Timer.RECONNECT: self._reconnect,
            Timer.REJOIN: self._rejoin,
            Timer.PUBLISH: self._publish_deferred,
            Timer.REFUTE: self._refute_deferred,
            Timer.RELAY: lambda _, __: self._prober.forget_relayed(),
        }

    @property
    def view(self) -> View:
        """What is known of every node. Read only."""
        return self._state.view

    @property
    def revision(self) -> int:
        """Rises whenever `members` may have changed."""
        return self._state.revision

    @property
    def incarnation(self) -> Incarnation:
        """The present incarnation of this node."""
        return self._local.incarnation

    @property
    def synced(self) -> bool:
        """Whether another member has sent what it knows of the mesh, since this node was last alone."""
        return self._synced

    def members(self) -> Sequence[Member]:
        """All other nodes that are neither dead nor gone, in order of their ids."""
        return self._state.members()

    def knows(self, node: NodeId) -> bool:
        """Whether another node counts as a member here."""
        return node in self._state.peers

    def trusts(self, node: NodeId) -> bool:
        """Whether another node is a member without any doubt, so that requests are routed to it."""
        peer = self._state.peers.get(node)
        return peer is not None and not peer.doubtful

    def deadline(self) -> float | None:
        """When `handle` wants a Tick; None before the first `publish` and after `leave`."""
        return None if self._left else self._state.timers.next()

    def publish(self, announcement: Announcement, now: float) -> list[AnyEffect]:
        """Announce this node's newest state; incarnation and sequence are set here. The first call begins it all."""
        if self._left:
            return []
        first = not self._local.began
        self._latest = announcement
        if self._local.publish(announcement, now):
            self._gossip.broadcast(self._state.me)
            self._scheduler.urgent(now)
        if first:
            self._scheduler.begin(now)
            self._reconnector.alone(now)
            for node in self._state.connections:
                self._state.send(node, self._gossip.request(node, introduce=True))
        return self._finish(now)

    def leave(self, now: float) -> list[AnyEffect]:
        """Announce that this node leaves. It does nothing any more afterwards."""
        if self._left or self._latest is None:
            return []
        state = self._state
        self._local.publish(msgspec.structs.replace(self._latest, left=True), now)
        connected = [node for node in state.connections if node in state.peers][:_FAREWELLS]
        others = state.random_members(_FAREWELLS - len(connected), *connected) if len(connected) < _FAREWELLS else []
        farewell = self._gossip.entries((state.me,))
        if farewell is not None:
            for node in (*connected, *others):
                state.send(node, farewell)
        self._left = True
        return state.take_effects()

    def handle(self, event: AnyEvent, now: float) -> list[AnyEffect]:
        """Take an event about peers, or the passing of time. Other events are ignored."""
        if self._left:
            return []
        self._run_timers(now)
        match event:
            case MessageReceived(peer=sender, message=message):
                self._received(sender, message, now)
            case PeerConnected(node=node, rtt_ms=rtt_ms, relayed=relayed):
                self._connected(node, Connection(rtt_ms, relayed), now)
            case PathChanged(node=node, rtt_ms=rtt_ms, relayed=relayed):
                self._path_changed(node, Connection(rtt_ms, relayed))
            case PeerLost(node=node, clean=clean):
                self._disconnected(node, now, clean=clean)
            case SendFailed(peer=node):
                self._unreachable(node, now)
            case TargetFailed(node=node):
                self._doubt(node, now)
            case RejoinFailed():
                if self._state.alone and self._local.began:
                    self._reconnector.rejoin_failed(now)
            case RevocationLearned() | AdmissionEnded() | Readmitted() | ScopeLimited():
                self._admission(event, now)
            case _:
                pass
        return self._finish(now)

    # Timers.

    def _run_timers(self, now: float) -> None:
        timers = self._state.timers
        due = timers.next()
        if due is not None and now - due > self._state.config.late:
            self._overslept(now - due, now)
        while (key := timers.pop(now)) is not None:
            self._on_timer[key[0]](key[1], now)

    def _overslept(self, late: float, now: float) -> None:
        """This node was stopped or starved: others are not to blame for answers that were not read."""
        state = self._state
        state.timers.shift(late)
        self._prober.overslept()
        if late > _LONG_SLEEP:
            for node, peer in state.peers.items():
                peer.unprove()
                state.unproven[node] = None
                self._detector.check_soon(node, now)
                state.mark_changed(node)

    def _start_exchange(self, _: NodeId, now: float) -> None:
        node = self._scheduler.next(now)
        if node is not None:
            self._state.send(node, self._gossip.request(node))
            self._prober.expect_answer(node, self._state.peers[node], now)

    def _probe_timed_out(self, node: NodeId, now: float) -> None:
        peer = self._state.peers.get(node)
        if peer is not None and self._prober.timed_out(node, peer, now):
            self._state.mark_changed(node)
            self._hurry_if(self._detector.probe_failed(node, peer, now), now)

    def _retry(self, node: NodeId, now: float) -> None:
        peer = self._state.peers.get(node)
        if peer is not None:
            self._detector.check_now(node, peer, now)

    def _suspicion_expired(self, node: NodeId, now: float) -> None:
        peer = self._state.peers.get(node)
        if peer is not None:
            self._hurry_if(self._detector.suspicion_expired(node, peer, now), now)

    def _expire(self, node: NodeId, _: float) -> None:
        record = self._state.view.get(node)
        if record is not None and record.gone:
            self._state.view.forget(node)

    def _reconnect(self, _: NodeId, now: float) -> None:
        dead = self._reconnector.next_dead(now)
        if dead is not None and dead.node not in self._state.peers:
            self._state.send(dead.node, self._gossip.request(dead.node, introduce=True), at=dead)

    def _rejoin(self, _: NodeId, now: float) -> None:
        if self._state.alone:
            self._reconnector.rejoin(now)

    def _publish_deferred(self, _: NodeId, now: float) -> None:
        if self._local.publish_deferred(now):
            self._gossip.broadcast(self._state.me)

    def _refute_deferred(self, _: NodeId, now: float) -> None:
        if self._local.refute_deferred(now):
            self._gossip.broadcast(self._state.me)
            self._scheduler.urgent(now)

    # Messages.

    def _received(self, sender: NodeId, message: MeshMessage, now: float) -> None:
        if not self._local.began or sender in self._state.revoked:
            return
        self._heard_from(sender, now)
        match message:
            case Ping(nonce=nonce):
                self._state.send(sender, Ack(nonce=nonce))
                self._answer_ping(sender, now)
            case Ack(about=None):
                self._prober.relay_ack(sender, message)
            case Ack(nonce=nonce, about=about):
                self._indirect_ack(about, nonce, now)
            case PingRequest():
                self._prober.relay_ping(sender, message, now)
            case Exchange():
                self._exchange(sender, message, now)

    def _heard_from(self, node: NodeId, now: float) -> None:
        peer = self._state.peers.get(node)
        if peer is None:
            return
        self._prober.answered(node, peer, now)
        if peer.mark_alive():
            self._state.mark_proven(node)

    def _answer_ping(self, sender: NodeId, now: float) -> None:
        """Send a peer what it is accused of; ask an unknown one for its announcement."""
        record = self._state.view.get(sender)
        if record is None:
            if self._strangers.take(now):
                self._state.send(sender, self._gossip.request(sender, introduce=True))
        elif record.accused:
            self._state.send(sender, self._gossip.accusation(sender, record))

    def _exchange(self, sender: NodeId, message: Exchange, now: float) -> None:
        state, merger = self._state, self._merger
        news = False
        before = len(state.view)
        for signed in message.entries:
            news |= merger.merge_entry(signed, sender, now)
        for verdict in message.verdicts:
            news |= merger.merge_verdict(verdict, sender, now)
        for digest in message.digests:
            news |= merger.merge_digest(digest, sender, now)
        if message.reply:
            state.send(sender, self._gossip.answer(sender, message))
        elif message.wanted:
            answer = self._gossip.entries(message.wanted)
            if answer is not None:
                state.send(sender, answer)
        self._synced |= not message.reply and not state.alone
        self._gossip.compare(message.fingerprint)
        if not message.reply and 2 * (len(state.view) - before) > state.config.entries:
            self._scheduler.catch_up(now)
        self._hurry_if(news, now)

    def _hurry_if(self, news: bool, now: float) -> None:
        if news:
            self._scheduler.urgent(now)

    def _indirect_ack(self, node: NodeId | None, nonce: int, now: float) -> None:
        peer = self._state.peers.get(node) if node is not None else None
        if node is not None and peer is not None and self._prober.indirect_ack(node, peer, nonce):
            state = self._state
            state.mark_proven(node)
            state.set_timer(Timer.RETRY, now + peer.mark_unreachable(state.config), node)
            if peer.missed >= _MISSES_TO_REDIAL:
                # Its connection may hold on to a path that is cut: the next message dials all its addresses again.
                state.disconnect(node, "not reached on this connection")

    # Connections.

    def _connected(self, node: NodeId, connection: Connection, now: float) -> None:
        state = self._state
        if node in state.connections or len(state.connections) < state.config.paths:
            state.connections[node] = connection
        if node in state.revoked:
            state.disconnect(node, "revoked")
            return
        state.mark_changed(node)
        self._heard_from(node, now)
        if self._local.began and node not in state.peers:
            state.send(node, self._gossip.request(node, introduce=True))
            self._reconnector.connected(now)

    def _path_changed(self, node: NodeId, connection: Connection) -> None:
        if node in self._state.connections:
            self._state.connections[node] = connection
            self._state.mark_changed(node)

    def _disconnected(self, node: NodeId, now: float, *, clean: bool) -> None:
        if self._state.connections.pop(node, None) is not None:
            self._state.mark_changed(node)
        if not clean:
            self._doubt(node, now)

    def _doubt(self, node: NodeId, now: float) -> None:
        peer = self._state.peers.get(node)
        if peer is not None:
            peer.doubted = True
            self._state.mark_changed(node)
            self._prober.probe(node, peer, now, urgent=True)

    def _unreachable(self, node: NodeId, now: float) -> None:
        peer = self._state.peers.get(node)
        if peer is not None:
            peer.reachable = False
            self._state.mark_changed(node)
            self._prober.probe(node, peer, now, urgent=True)

    # Admission.

    def _admission(self, event: RevocationLearned | AdmissionEnded | Readmitted | ScopeLimited, now: float) -> None:
        match event:
            case RevocationLearned():
                self._revoke(event, now)
            case AdmissionEnded(nodes=nodes):
                for node in nodes:
                    self._expel(node, now, "its admission has expired")
            case Readmitted(node=node):
                self._state.revoked.pop(node, None)
            case ScopeLimited(node=node, scope=scope):
                self._limit(node, scope)

    def _limit(self, node: NodeId, scope: str) -> None:
        limited = self._state.limited
        limited.pop(node, None)
        if scope:
            if len(limited) >= _MOST_REVOKED:
                del limited[next(iter(limited))]
            limited[node] = scope
        self._state.mark_changed(node)

    def _revoke(self, event: RevocationLearned, now: float) -> None:
        state = self._state
        if not self._gossip.broadcast_revocation(event.revocation, final=event.final, replaces=event.replaces):
            return
        for node in event.nodes[:_MOST_REVOKED]:
            if len(state.revoked) >= _MOST_REVOKED:
                del state.revoked[next(iter(state.revoked))]
            state.revoked[node] = None
            self._expel(node, now, "revoked")
        if self._local.began:
            self._scheduler.urgent(now)

    def _expel(self, node: NodeId, now: float, reason: str) -> None:
        """Forget a node that is no member any more, without a tombstone: it may be admitted again."""
        state = self._state
        if node in state.peers:
            self._detector.forget(node, now)
        state.view.forget(node)
        state.cancel_timer(Timer.EXPIRE, node)
        self._reconnector.discard(node)
        state.disconnect(node, reason)

    def _finish(self, now: float) -> list[AnyEffect]:
        alone = self._state.alone
        if alone != self._was_alone:
            self._was_alone = alone
            if alone:
                self._synced = False
                self._reconnector.alone(now)
                self._merger.reset_introductions()
            else:
                self._reconnector.joined()
        return self._state.take_effects()
