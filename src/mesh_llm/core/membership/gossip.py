"""Writes exchanges: push-pull gossip of news, spans of the view to compare, and what the receiver lacks.

News is pushed whole a few times, then as a digest only; nodes that lack it ask for it. Independently of that, each
exchange can compare one span of the ring of ids, so that views become equal whatever was lost (anti-entropy). Every
message is bounded, so the cost of a node does not grow with the mesh.
"""

from collections.abc import Callable, Hashable
from itertools import islice
from typing import Generic, TypeVar

from mesh_llm.core.membership.state import MembershipState, MemberState, Record
from mesh_llm.core.types.announcement import SignedAnnouncement
from mesh_llm.core.types.gossip import MAX_DIGESTS, MOST_REVOCATIONS, Digest, Exchange, Verdict
from mesh_llm.core.types.ids import NodeId

_MOST_NEWS = 2048
_MOST_REVOCATION_BYTES = 4096
_REVOCATIONS_AT_ONCE = 2
_MOST_WANTED = 256
_ASKED_AT_ONCE = 16
_HOT_DIGESTS = 16
_UNPROVEN = 64
_COMPARE_EVERY = 16
_UNKNOWN_BYTES = 1024

Key = TypeVar("Key", bound=Hashable)


class PushPull:
    """Owns the news that this node passes on, and the announcements that it asks for."""

    def __init__(self, state: MembershipState) -> None:
        self._state = state
        self._entries: BroadcastQueue[NodeId] = BroadcastQueue(_MOST_NEWS)
        self._verdicts: BroadcastQueue[Verdict] = BroadcastQueue(_MOST_NEWS)
        self._final = _Revocations()
        self._revocations = _Revocations()
        self._wanted: dict[NodeId, None] = {}
        self._cursor = state.me
        self._requests = 0
        self._different = True

    def broadcast(self, node: NodeId, *, load: bool = False) -> None:
        """Pass a node's announcement on. A change of `load` alone is pushed whole once, then as a digest."""
        self._entries.add(node, max(0, self._state.config.eager - 1) if load else 0)
        self._wanted.pop(node, None)

    def broadcast_verdict(self, verdict: Verdict) -> None:
        """Pass a suspicion or death on."""
        self._verdicts.add(verdict)

    def broadcast_revocation(self, revocation: bytes, *, final: bool, replaces: tuple[bytes, ...] = ()) -> bool:
        """Pass a revocation on; returns whether it was unknown and is kept.

        Args:
            revocation: as it travels.
            final: it is signed with the mesh's own key. These go first, so that members' made-up ones never delay them.
            replaces: those that made room for it where revocations are verified and kept; no longer passed on.
        """
        for one in replaces:
            self._final.forget(one)
            self._revocations.forget(one)
        if len(revocation) > _MOST_REVOCATION_BYTES:
            return False
        return (self._final if final else self._revocations).add(revocation)

    def want(self, node: NodeId) -> None:
        """Ask for a node's announcement with the next exchange."""
        if len(self._wanted) < _MOST_WANTED:
            self._wanted[node] = None

    def got(self, node: NodeId) -> None:
        """Stop asking for a node's announcement."""
        self._wanted.pop(node, None)

    def compare(self, fingerprint: int) -> None:
        """Note whether a peer's view equals this node's."""
        if fingerprint:
            self._different = fingerprint != self._state.view.fingerprint

    def request(self, receiver: NodeId, *, introduce: bool = False) -> Exchange:
        """Write an exchange that asks for one in return. `introduce`: the receiver may not know this node."""
        state = self._state
        builder = ExchangeBuilder(state)
        self._add_news(builder, receiver)
        if introduce:
            builder.add_entry(state.me)
        span = None
        self._requests += 1
        if self._different or introduce or self._requests % _COMPARE_EVERY == 0:
            nodes, until = state.view.next_span(self._cursor, state.config.window)
            span = (self._cursor, until)
            self._cursor = until
            for node in nodes:
                builder.add_digest(node)
        for node in islice(state.unproven, _UNPROVEN):
            builder.add_digest(node)
        if introduce and receiver not in state.view:
            self.want(receiver)
        asked = list(islice(self._wanted, _ASKED_AT_ONCE))
        for node in asked:
            del self._wanted[node]
        return builder.build(
            wanted=tuple(asked), revocations=self._next_revocations(span is not None), span=span, reply=True
        )

    def answer(self, receiver: NodeId, request: Exchange) -> Exchange:
        """Write what the receiver lacks, and news. Asks for its announcement if that is unknown here."""
        state = self._state
        view = state.view
        builder = ExchangeBuilder(state)
        if any(verdict.node == state.me for verdict in request.verdicts):
            builder.add_entry(state.me)
        for node in request.wanted[: state.config.entries]:
            builder.add_entry(node)
        known_there: set[NodeId] = set()
        for digest in request.digests:
            known_there.add(digest.node)
            record = view.get(digest.node)
            if record is not None:
                self._correct(builder, record, digest)
        if request.span is not None:
            self._add_lacking(builder, request.span, known_there)
        self._add_news(builder, receiver)
        wanted = () if receiver in view else (receiver,)
        return builder.build(wanted=wanted, revocations=self._next_revocations(self._different))

    def entries(self, nodes: tuple[NodeId, ...]) -> Exchange | None:
        """Write the announcements that were asked for; None if none of them is known."""
        builder = ExchangeBuilder(self._state)
        for node in nodes:
            builder.add_entry(node)
        return builder.build() if builder.entries else None

    def accusation(self, node: NodeId, record: Record) -> Exchange:
        """Write to a node that is suspect or dead what it is accused of, so that it can refute."""
        builder = ExchangeBuilder(self._state)
        builder.add_accusation(node, record, self._state.me)
        return builder.build(reply=True)

    def _add_news(self, builder: "ExchangeBuilder", receiver: NodeId) -> None:
        state = self._state
        limit = state.config.retransmissions(state.size)
        eager = state.config.eager
        most = eager + state.config.numbered
        self._entries.take(state.config.entries, most, until=eager, accept=builder.add_entry)
        for node in self._entries.take(_HOT_DIGESTS, most, since=eager):
            builder.add_digest(node)
        for verdict in self._verdicts.take(state.config.verdicts, limit):
            record = state.view.get(verdict.node)
            if record is not None and _stands(verdict, record):
                builder.verdicts.append(verdict)
        record = state.view.get(receiver)
        if record is not None and record.accused:
            builder.add_accusation(receiver, record, state.me)

    def _correct(self, builder: "ExchangeBuilder", record: Record, digest: Digest) -> None:
        """Add what the sender of a digest should know: a newer announcement, a death, or proof of life."""
        newest = record.signed.announcement
        if (newest.incarnation, newest.sequence) > (digest.incarnation, digest.sequence):
            builder.add_entry(digest.node)
        elif newest.incarnation != digest.incarnation:
            return
        elif digest.state == "u":
            peer = self._state.peers.get(digest.node)
            if peer is None or peer.proven:
                builder.add_digest(digest.node)
        elif digest.state != "d" and record.state is MemberState.DEAD:
            builder.add_digest(digest.node)

    def _add_lacking(self, builder: "ExchangeBuilder", span: tuple[NodeId, NodeId], known_there: set[NodeId]) -> None:
        nodes = self._state.view.within(*span)
        if len(nodes) > 4 * self._state.config.entries:
            # A newcomer compares the whole ring. Each node that answers begins elsewhere, so it learns different parts.
            start = int(self._state.rng.random() * len(nodes))
            nodes = nodes[start:] + nodes[:start]
        for node in nodes:
            if node not in known_there and not builder.add_entry(node):
                break

    def _next_revocations(self, differs: bool) -> tuple[bytes, ...]:
        limit = self._state.config.retransmissions(self._state.size)
        chosen: list[bytes] = []
        for kind in (self._final, self._revocations):
            room = _REVOCATIONS_AT_ONCE - len(chosen)
            # Without news, send one of all known ones, for nodes that were away.
            chosen += kind.news(room, limit) or (kind.next() if differs and room else [])
        return tuple(chosen)


class BroadcastQueue(Generic[Key]):
    """A bounded queue of news; each key is sent a limited number of times, the least sent first.

    All operations cost O(1) per key.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._levels: list[dict[Key, None]] = []
        self._sent: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._sent)

    def __contains__(self, key: object) -> bool:
        return key in self._sent

    def add(self, key: Key, sent: int = 0) -> None:
        """Send `key` from now on, as if sent so many times before. When full, the most sent key makes room."""
        self.discard(key)
        if len(self._sent) >= self._most:
            stalest = next(level for level in reversed(self._levels) if level)
            self.discard(next(iter(stalest)))
        self._put(key, sent)

    def discard(self, key: Key) -> None:
        """Stop sending `key`."""
        sent = self._sent.pop(key, None)
        if sent is not None:
            del self._levels[sent][key]

    def take(
        self,
        count: int,
        limit: int,
        since: int = 0,
        until: int | None = None,
        accept: Callable[[Key], bool] | None = None,
    ) -> list[Key]:
        """Take up to `count` keys to send now, of those sent at least `since` and less than `until` times before.

        Each counts as sent once more; after `limit` times it is dropped. `accept` is called for each key in turn; the
        first False ends the taking.
        """
        if not self._sent:
            return []
        taken: list[Key] = []
        moved: list[tuple[Key, int]] = []
        last = len(self._levels) if until is None else min(until, len(self._levels))
        for level in range(since, last):
            keys = self._levels[level]
            chosen = list(islice(keys, count - len(taken))) if keys else []
            for position, key in enumerate(chosen):
                if accept is not None and not accept(key):
                    del chosen[position:]
                    count = 0
                    break
            for key in chosen:
                del keys[key]
                moved.append((key, level + 1))
            taken += chosen
            if len(taken) >= count:
                break
        for key, level in moved:
            if level < limit:
                self._put(key, level)
            else:
                del self._sent[key]
        return taken

    def _put(self, key: Key, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append({})
        self._levels[level][key] = None
        self._sent[key] = level


class ExchangeBuilder:
    """One exchange while it is being written: filled up to its bounds, each node once."""

    def __init__(self, state: MembershipState) -> None:
        self._state = state
        self._get = state.view.get
        self._bytes = state.config.entry_bytes
        self._most = state.config.entries
        self._entered: set[NodeId] = set()
        self._digested: set[NodeId] = set()
        self.entries: list[SignedAnnouncement] = []
        self.digests: list[Digest] = []
        self.verdicts: list[Verdict] = []

    def add_entry(self, node: NodeId, *, dead: bool = False) -> bool:
        """Add an announcement with its digest; False: no room. `dead`: even that of a dead node."""
        if node in self._entered:
            return True
        record = self._get(node)
        if record is None or (record.state is MemberState.DEAD and not dead):
            return True
        size = len(record.signed.payload) or _UNKNOWN_BYTES
        if size > self._bytes or len(self.entries) >= self._most:
            return False
        self._entered.add(node)
        self._bytes -= size
        self.entries.append(record.signed)
        self._add_digest_of(node, record)
        return True

    def add_digest(self, node: NodeId) -> None:
        """Add a digest, if the node is known."""
        record = self._get(node)
        if record is not None:
            self._add_digest_of(node, record)

    def add_accusation(self, node: NodeId, record: Record, by: NodeId) -> None:
        """Add the accusation of the node that this goes to, for it to refute.

        The announcement of the accused incarnation goes with it. If the node's clock went back since, its present
        incarnation is lower than the accused one, and it rises above that only if it sees its own signature.
        """
        letter = "d" if record.state is MemberState.DEAD else "s"
        self.verdicts.append(Verdict(node=node, incarnation=record.announcement.incarnation, state=letter, by=by))
        self.add_entry(node, dead=True)

    def build(
        self,
        *,
        wanted: tuple[NodeId, ...] = (),
        revocations: tuple[bytes, ...] = (),
        span: tuple[NodeId, NodeId] | None = None,
        reply: bool = False,
    ) -> Exchange:
        """Return the message."""
        return Exchange(
            digests=tuple(self.digests),
            entries=tuple(self.entries),
            wanted=wanted,
            verdicts=tuple(self.verdicts),
            revocations=revocations,
            reply=reply,
            fingerprint=self._state.view.fingerprint,
            span=span,
        )

    def _add_digest_of(self, node: NodeId, record: Record) -> None:
        if node in self._digested or len(self.digests) >= MAX_DIGESTS:
            return
        self._digested.add(node)
        if record.state is MemberState.SUSPECT:
            letter = "s"
        elif record.state is MemberState.DEAD:
            letter = "d"
        else:
            peer = self._state.peers.get(node)
            letter = "a" if (peer.proven if peer is not None else node == self._state.me) else "u"
        newest = record.signed.announcement
        self.digests.append(Digest(node, newest.incarnation, newest.sequence, letter))


class _Revocations:
    """Revocations of one kind: the news among them, and all that are known. The edge bounds their number."""

    def __init__(self) -> None:
        self._news: BroadcastQueue[bytes] = BroadcastQueue(MOST_REVOCATIONS)
        self._known: dict[bytes, None] = {}

    def add(self, revocation: bytes) -> bool:
        """Returns whether it was unknown."""
        if revocation in self._known:
            return False
        self._known[revocation] = None
        self._news.add(revocation)
        return True

    def forget(self, revocation: bytes) -> None:
        """Keep it no longer."""
        if revocation in self._known:
            del self._known[revocation]
            self._news.discard(revocation)

    def news(self, count: int, limit: int) -> list[bytes]:
        """Up to `count` that were sent less than `limit` times."""
        return self._news.take(count, limit) if count > 0 else []

    def next(self) -> list[bytes]:
        """The one that was not sent for longest."""
        if not self._known:
            return []
        revocation = next(iter(self._known))
        del self._known[revocation]
        self._known[revocation] = None
        return [revocation]


def _stands(verdict: Verdict, record: Record) -> bool:
    """Whether a verdict is still what is believed about the node."""
    if verdict.incarnation != record.condemned:
        return False
    state = record.state
    return state is MemberState.DEAD if verdict.state == "d" else state is MemberState.SUSPECT
