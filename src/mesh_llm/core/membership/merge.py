"""This node's own announcement, and how it merges what peers send: announcements, digests and verdicts.

A signed announcement is its node's own statement, but maybe an old one. So a node that is known by hearsay only counts
as doubtful until it answers, or two peers vouch for it: one peer's stale news cannot bring a dead node back into the
routes.
"""

import msgspec

from mesh_llm.core.membership.failure_detector import FailureDetector
from mesh_llm.core.membership.gossip import PushPull
from mesh_llm.core.membership.scheduler import GossipScheduler, Reconnector
from mesh_llm.core.membership.state import (
    MembershipState,
    MemberState,
    PeerState,
    Record,
    Timer,
    display_name,
    is_newer,
    supersedes,
)
from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement, only_load_differs, trimmed
from mesh_llm.core.types.effects import NoticeLevel
from mesh_llm.core.types.gossip import Digest, Verdict
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.core.types.model import Role

_REFUTE_FIRST = 0.5
_REFUTE_MOST = 5.0
_FOREIGN_MOST = 3


class LocalState:
    """Numbers the own announcement, paces it, and refutes accusations by raising the incarnation (SWIM).

    The own record lies in the view like everybody's, unsigned: the edge signs what it sends.
    """

    def __init__(self, state: MembershipState, incarnation: Incarnation) -> None:
        self._state = state
        self.incarnation = incarnation
        self.sequence = 0
        self._announced: Announcement | None = None
        self._announced_at = 0.0
        self._deferred: Announcement | None = None
        self._refuted_at = float("-inf")
        self._pause = 0.0
        self._accused = Incarnation(0)
        self._foreign = 0

    @property
    def began(self) -> bool:
        """Whether the node has announced anything yet."""
        return self._announced is not None

    def publish(self, announcement: Announcement, now: float) -> bool:
        """Announce a change; returns whether it was announced now. A change of load alone may be deferred."""
        candidate = trimmed(announcement)
        if self._announced is not None and not candidate.left:
            numbered = self._numbered(candidate, self.sequence)
            if numbered == self._announced:
                self._deferred = None
                self._state.cancel_timer(Timer.PUBLISH)
                return False
            due = self._announced_at + self._state.config.soft * self._state.size
            if now < due and only_load_differs(numbered, self._announced):
                self._deferred = candidate
                self._state.set_timer(Timer.PUBLISH, due)
                return False
        self._announce(candidate, now)
        return True

    def publish_deferred(self, now: float) -> bool:
        """Announce what was deferred; returns whether there was anything."""
        if self._deferred is None:
            return False
        self._announce(self._deferred, now)
        return True

    def refute(self, incarnation: Incarnation, now: float, *, foreign: bool = False) -> bool:
        """Rise above an incarnation that is accused, or that this node did not announce itself (`foreign`).

        Returns whether the own announcement changed. Refutations are spaced: peers that keep accusing cannot make this
        node flood the mesh.
        """
        if self._announced is None or incarnation < self.incarnation or self._announced.left:
            return False
        self._accused = max(self._accused, incarnation)
        due = self._refuted_at + self._pause
        if now < due:
            self._state.set_timer(Timer.REFUTE, due)
            return False
        if foreign:
            self._note_foreign()
        calm = now - self._refuted_at > 12 * _REFUTE_MOST
        self._pause = _REFUTE_FIRST if calm else min(_REFUTE_MOST, max(_REFUTE_FIRST, 2 * self._pause))
        self._refuted_at = now
        self.incarnation = Incarnation(self._accused + 1)
        self.sequence = 0
        self._announce(self._deferred or self._announced, now)
        return True

    def refute_deferred(self, now: float) -> bool:
        """Refute an accusation that came too soon after the last refutation."""
        return self._accused >= self.incarnation and self.refute(self._accused, now)

    def _note_foreign(self) -> None:
        self._foreign += 1
        if self._foreign == _FOREIGN_MOST:
            self._state.notice(
                NoticeLevel.ERROR,
                "duplicate_identity",
                "Another process announces itself with this node's key. Give one of the two its own MESH_LLM_HOME.",
                about=self._state.me,
            )

    def _numbered(self, announcement: Announcement, sequence: int) -> Announcement:
        return msgspec.structs.replace(
            announcement,
            mesh=self._state.mesh,
            node=self._state.me,
            incarnation=self.incarnation,
            sequence=sequence,
        )

    def _announce(self, announcement: Announcement, now: float) -> None:
        self.sequence += 1
        self._announced = self._numbered(announcement, self.sequence)
        self._announced_at = now
        self._deferred = None
        self._state.cancel_timer(Timer.PUBLISH)
        self._state.view.merge(Record(SignedAnnouncement(announcement=self._announced)))


class StateMerger:
    """Merges what peers send into view and peers. Each method returns whether that is urgent news for others."""

    def __init__(
        self,
        state: MembershipState,
        local: LocalState,
        gossip: PushPull,
        detector: FailureDetector,
        reconnector: Reconnector,
        scheduler: GossipScheduler,
    ) -> None:
        self._state = state
        self._local = local
        self._gossip = gossip
        self._detector = detector
        self._reconnector = reconnector
        self._scheduler = scheduler
        self._introductions = state.config.introductions

    def reset_introductions(self) -> None:
        """This node is alone: the members that it meets next do not know it."""
        self._introductions = self._state.config.introductions

    def merge_entry(self, signed: SignedAnnouncement, sender: NodeId, now: float) -> bool:
        """Merge an announcement."""
        announcement = signed.announcement
        state = self._state
        node = announcement.node
        if announcement.mesh != state.mesh or node in state.revoked or announcement.role is Role.CLIENT:
            return False
        known = state.view.get(node)
        if node == state.me:
            return (
                known is not None
                and is_newer(announcement, known.announcement)
                and self._refute(announcement.incarnation, now, foreign=True)
            )
        if known is None and (announcement.left or not self._make_room()):
            return False
        if (known is not None and not supersedes(signed, known.signed)) or not state.view.merge(Record(signed)):
            return False
        self._gossip.got(node)
        record = state.view.get(node) or Record(signed)
        if record.state is MemberState.DEAD:
            return False
        load = known is not None and not known.gone and only_load_differs(announcement, known.announcement)
        self._gossip.broadcast(node, load=load)
        state.mark_changed(node)
        if record.state is MemberState.LEFT:
            self._left(record, now)
            return True
        peer = state.peers.get(node)
        if peer is None:
            self._joined(record, now, proven=sender == node)
            return True
        if known is None or announcement.incarnation > known.announcement.incarnation:
            self._new_incarnation(node, peer, now)
            return True
        return not load

    def merge_digest(self, digest: Digest, sender: NodeId, now: float) -> bool:
        """Compare what a peer knows of a node with what is known here."""
        state = self._state
        node = digest.node
        if node == state.me:
            return self._merge_own_digest(digest, now)
        record = state.view.get(node)
        if record is None:
            if digest.state != "d" and node not in state.revoked:
                self._gossip.want(node)
            return False
        newest = record.signed.announcement
        if digest.incarnation > newest.incarnation or (
            digest.incarnation == newest.incarnation and digest.sequence > newest.sequence
        ):
            self._gossip.want(node)
        peer = state.peers.get(node)
        if peer is None or digest.incarnation != newest.incarnation or sender == node:
            return False
        if digest.state == "a":
            if not peer.proven and peer.vouched_by(sender):
                peer.proven = True
                state.mark_proven(node)
        elif digest.state != "u" and peer.suspicion is None:
            self._detector.check_soon(node, now)
        return False

    def merge_verdict(self, verdict: Verdict, sender: NodeId, now: float) -> bool:
        """Take in an accusation; refute it if it is about this node."""
        if verdict.node != self._state.me:
            return self._detector.hear(verdict, sender, now)
        return verdict.incarnation == self._local.incarnation and self._refute(verdict.incarnation, now, foreign=False)

    def _merge_own_digest(self, digest: Digest, now: float) -> bool:
        local = self._local
        if digest.incarnation == local.incarnation and digest.state in {"s", "d"}:
            return self._refute(digest.incarnation, now, foreign=False)
        if (digest.incarnation, digest.sequence) > (local.incarnation, local.sequence):
            # A digest has no signature, so it is not believed. Ask for the signed entry.
            self._gossip.want(self._state.me)
        return False

    def _refute(self, incarnation: Incarnation, now: float, *, foreign: bool) -> bool:
        if not self._local.refute(incarnation, now, foreign=foreign):
            return False
        self._gossip.broadcast(self._state.me)
        return True

    def _joined(self, record: Record, now: float, *, proven: bool) -> None:
        state = self._state
        node = record.announcement.node
        peer = state.peers[node] = PeerState(proven=proven)
        state.cancel_timer(Timer.EXPIRE, node)
        self._reconnector.discard(node)
        self._scheduler.joined(node, now)
        if proven:
            peer.heard = now
        else:
            state.unproven[node] = None
            self._detector.check_soon(node, now)
        if not proven and self._introductions > 0:
            self._introductions -= 1
            state.send(node, self._gossip.request(node, introduce=True))
        state.notice(NoticeLevel.INFO, "peer_joined", f"{display_name(record)} is in the mesh.", about=node)

    def _new_incarnation(self, node: NodeId, peer: PeerState, now: float) -> None:
        """A member refuted or restarted. Only the node itself can sign that, so trust in it stays."""
        if peer.suspicion is not None:
            peer.refuted(self._state.config, now)
            self._detector.note_refutation(now)
            self._state.cancel_timer(Timer.SUSPICION, node)
        if peer.doubtful:
            self._detector.check_soon(node, now)

    def _left(self, record: Record, now: float) -> None:
        state = self._state
        node = record.announcement.node
        self._reconnector.discard(node)
        if node in state.peers:
            self._detector.forget(node, now)
            state.notice(NoticeLevel.INFO, "peer_left", f"{display_name(record)} left the mesh.", about=node)
        state.disconnect(node, "left")

    def _make_room(self) -> bool:
        view = self._state.view
        if view.full:
            tombstone = next((node for node in view if (record := view.get(node)) is not None and record.gone), None)
            if tombstone is None:
                return False
            view.forget(tombstone)
            self._state.cancel_timer(Timer.EXPIRE, tombstone)
        return True
