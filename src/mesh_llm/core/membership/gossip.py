"""News worth passing on, each a limited number of times, the least told first.

One exchange while it is being written: filled up to its bounds, each node once.

Writes exchanges: what news goes out, which stretch of the view is compared, and what the other side lacks.

News is pushed whole a few times, then by number only; whoever lacks it asks. Independently of that each exchange can
compare one stretch of the ring of ids, so that views become equal whatever was lost. Every message is bounded, so the
cost of a node does not grow with the mesh.
"""

from collections.abc import Callable, Hashable
from itertools import islice
from typing import Generic, TypeVar

from mesh_llm.core.membership.state import Fact, MemberState, Roster
from mesh_llm.core.types.announcement import SignedAnnouncement
from mesh_llm.core.types.gossip import MAX_DIGESTS, MOST_REVOCATIONS, Digest, Exchange, Verdict
from mesh_llm.core.types.ids import NodeId

Key = TypeVar("Key", bound=Hashable)


class Rumours(Generic[Key]):
    """A bounded queue of keys by how often they were told. All operations cost O(1) per key."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._levels: list[dict[Key, None]] = []
        self._told: dict[Key, int] = {}

    def __len__(self) -> int:
        return len(self._told)

    def __contains__(self, key: object) -> bool:
        return key in self._told

    def add(self, key: Key, told: int = 0) -> None:
        """Tell `key` from now on, as if told so many times before. The most told makes room where there is no more."""
        self.discard(key)
        if len(self._told) >= self._most:
            stalest = next(level for level in reversed(self._levels) if level)
            self.discard(next(iter(stalest)))
        self._put(key, told)

    def discard(self, key: Key) -> None:
        """Tell `key` no more."""
        told = self._told.pop(key, None)
        if told is not None:
            del self._levels[told][key]

    def take(
        self,
        count: int,
        limit: int,
        since: int = 0,
        until: int | None = None,
        accept: Callable[[Key], bool] | None = None,
    ) -> list[Key]:
        """Take up to `count` keys to tell now, told at least `since` and less than `until` times before.

        Each counts as told once more; told `limit` times, it is dropped. `accept` gets each key in turn; its first no
        ends the taking.
        """
        if not self._told:
            return []
        taken: list[Key] = []
        moved: list[tuple[Key, int]] = []
        last = len(self._levels) if until is None else min(until, len(self._levels))
        for level in range(since, last):
            told = self._levels[level]
            chosen = list(islice(told, count - len(taken))) if told else []
            for position, key in enumerate(chosen):
                if accept is not None and not accept(key):
                    del chosen[position:]
                    count = 0
                    break
            for key in chosen:
                del told[key]
                moved.append((key, level + 1))
            taken += chosen
            if len(taken) >= count:
                break
        for key, level in moved:
            if level < limit:
                self._put(key, level)
            else:
                del self._told[key]
        return taken

    def _put(self, key: Key, level: int) -> None:
        while len(self._levels) <= level:
            self._levels.append({})
        self._levels[level][key] = None
        self._told[key] = level


_UNKNOWN_BYTES = 1024


class Draft:
    """Collects what goes into one Exchange."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._get = roster.view.get
        self._bytes = roster.pace.entry_bytes
        self._most = roster.pace.entries
        self._there: set[NodeId] = set()
        self._numbered: set[NodeId] = set()
        self.entries: list[SignedAnnouncement] = []
        self.digests: list[Digest] = []
        self.verdicts: list[Verdict] = []

    def entry(self, node: NodeId, *, dead: bool = False) -> bool:
        """Put in an announcement, with its digest. False: no room. `dead`: also that of a node that died."""
        if node in self._there:
            return True
        fact = self._get(node)
        if fact is None or (fact.state is MemberState.DEAD and not dead):
            return True
        size = len(fact.signed.payload) or _UNKNOWN_BYTES
        if size > self._bytes or len(self.entries) >= self._most:
            return False
        self._there.add(node)
        self._bytes -= size
        self.entries.append(fact.signed)
        self._number(node, fact)
        return True

    def digest(self, node: NodeId) -> None:
        """Put in a digest."""
        fact = self._get(node)
        if fact is not None:
            self._number(node, fact)

    def _number(self, node: NodeId, fact: Fact) -> None:
        if node in self._numbered or len(self.digests) >= MAX_DIGESTS:
            return
        self._numbered.add(node)
        state = fact.state
        if state is MemberState.SUSPECT:
            letter = "s"
        elif state is MemberState.DEAD:
            letter = "d"
        else:
            contact = self._roster.contacts.get(node)
            letter = "a" if (contact.proven if contact is not None else node == self._roster.me) else "u"
        word = fact.signed.announcement
        self.digests.append(Digest(node, word.incarnation, word.sequence, letter))

    def verdict(self, node: NodeId, fact: Fact, by: NodeId) -> None:
        """Put in what is held against a node."""
        letter = "d" if fact.state is MemberState.DEAD else "s"
        self.verdicts.append(Verdict(node=node, incarnation=fact.announcement.incarnation, state=letter, by=by))

    def charge(self, node: NodeId, fact: Fact, by: NodeId) -> None:
        """Put in what is held against the node that this goes to, for it to refute.

        With the word that it died by: where its clock went back meanwhile, its present life has a lower number than the
        dead one, and it rises above that one only if it sees its own signature.
        """
        self.verdict(node, fact, by)
        self.entry(node, dead=True)

    def finish(
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
            fingerprint=self._roster.view.fingerprint,
            span=span,
        )


_MOST_NEWS = 2048
_MOST_REVOCATION_BYTES = 4096
_REVOCATIONS_AT_ONCE = 2
_MOST_WANTED = 256
_ASKED_AT_ONCE = 16
_HOT_DIGESTS = 16
_UNPROVEN = 64
_COMPARE_EVERY = 16


class Writer:
    """Owns what is to be told, and what is to be asked for."""

    def __init__(self, roster: Roster) -> None:
        self._roster = roster
        self._entries: Rumours[NodeId] = Rumours(_MOST_NEWS)
        self._verdicts: Rumours[Verdict] = Rumours(_MOST_NEWS)
        self._final = _Revocations()
        self._revocations = _Revocations()
        self._wanted: dict[NodeId, None] = {}
        self._cursor = roster.me
        self._steps = 0
        self._different = True

    def tell(self, node: NodeId, *, load: bool = False) -> None:
        """A node's announcement is news; of mere `load` each node tells but one, and the numbers to some."""
        self._entries.add(node, max(0, self._roster.pace.eager - 1) if load else 0)
        self._wanted.pop(node, None)

    def accuse(self, verdict: Verdict) -> None:
        """A verdict is news."""
        self._verdicts.add(verdict)

    def revoke(self, revocation: bytes, *, final: bool, replaces: tuple[bytes, ...] = ()) -> bool:
        """A revocation is to be told; says whether it was not known, and is kept.

        Args:
            revocation: as it travels.
            final: it is signed with the mesh's own key. These go first, so members' made-up ones never delay them.
            replaces: those that made room for it where revocations are verified and kept: they are told no more.
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
        """No need to ask for it any more."""
        self._wanted.pop(node, None)

    def compare(self, fingerprint: int) -> None:
        """Note whether a peer's view equals this one."""
        if fingerprint:
            self._different = fingerprint != self._roster.view.fingerprint

    def request(self, peer: NodeId, *, introduce: bool = False) -> Exchange:
        """Write an exchange that asks for one in return. `introduce`: the peer may not know this node."""
        roster = self._roster
        draft = Draft(roster)
        self._news(draft, peer)
        if introduce:
            draft.entry(roster.me)
        span = None
        self._steps += 1
        if self._different or introduce or self._steps % _COMPARE_EVERY == 0:
            nodes, until = roster.view.stretch(self._cursor, roster.pace.window)
            span = (self._cursor, until)
            self._cursor = until
            for node in nodes:
                draft.digest(node)
        for node in islice(roster.unproven, _UNPROVEN):
            draft.digest(node)
        if introduce and peer not in roster.view:
            self.want(peer)
        asked = list(islice(self._wanted, _ASKED_AT_ONCE))
        for node in asked:
            del self._wanted[node]
        return draft.finish(
            wanted=tuple(asked), revocations=self._told_revocations(span is not None), span=span, reply=True
        )

    def answer(self, peer: NodeId, request: Exchange) -> Exchange:
        """Write what a peer lacks, and news. Asks for its announcement if that is not known."""
        roster = self._roster
        view = roster.view
        draft = Draft(roster)
        if any(verdict.node == roster.me for verdict in request.verdicts):
            draft.entry(roster.me)
        for node in request.wanted[: roster.pace.entries]:
            draft.entry(node)
        said: set[NodeId] = set()
        for digest in request.digests:
            said.add(digest.node)
            fact = view.get(digest.node)
            if fact is not None:
                self._correct(draft, fact, digest)
        if request.span is not None:
            self._lacking(draft, request.span, said)
        self._news(draft, peer)
        wanted = () if peer in view else (peer,)
        return draft.finish(wanted=wanted, revocations=self._told_revocations(self._different))

    def entries(self, nodes: tuple[NodeId, ...]) -> Exchange | None:
        """Write the announcements that were asked for; None if none of them is known."""
        draft = Draft(self._roster)
        for node in nodes:
            draft.entry(node)
        return draft.finish() if draft.entries else None

    def accusation(self, node: NodeId, fact: Fact) -> Exchange:
        """Write to a condemned node what is held against it, so that it can refute."""
        draft = Draft(self._roster)
        draft.charge(node, fact, self._roster.me)
        return draft.finish(reply=True)

    def _news(self, draft: Draft, peer: NodeId) -> None:
        roster = self._roster
        limit = roster.pace.retransmissions(roster.size)
        eager = roster.pace.eager
        told = eager + roster.pace.numbered
        self._entries.take(roster.pace.entries, told, until=eager, accept=draft.entry)
        for node in self._entries.take(_HOT_DIGESTS, told, since=eager):
            draft.digest(node)
        for verdict in self._verdicts.take(roster.pace.verdicts, limit):
            fact = roster.view.get(verdict.node)
            if fact is not None and _stands(verdict, fact):
                draft.verdicts.append(verdict)
        fact = roster.view.get(peer)
        if fact is not None and fact.condemned_now:
            draft.charge(peer, fact, roster.me)

    def _correct(self, draft: Draft, fact: Fact, digest: Digest) -> None:
        """Write what a peer that knows a node thus should know: a newer word, its death, or proof of its life."""
        word = fact.signed.announcement
        if (word.incarnation, word.sequence) > (digest.incarnation, digest.sequence):
            draft.entry(digest.node)
        elif word.incarnation != digest.incarnation:
            return
        elif digest.state == "u":
            contact = self._roster.contacts.get(digest.node)
            if contact is None or contact.proven:
                draft.digest(digest.node)
        elif digest.state != "d" and fact.state is MemberState.DEAD:
            draft.digest(digest.node)

    def _lacking(self, draft: Draft, span: tuple[NodeId, NodeId], said: set[NodeId]) -> None:
        nodes = self._roster.view.within(*span)
        if len(nodes) > 4 * self._roster.pace.entries:
            # A newcomer compares all at once: each who answers begins elsewhere, and so it learns different parts.
            start = int(self._roster.chance.random() * len(nodes))
            nodes = nodes[start:] + nodes[:start]
        for node in nodes:
            if node not in said and not draft.entry(node):
                break

    def _told_revocations(self, differs: bool) -> tuple[bytes, ...]:
        limit = self._roster.pace.retransmissions(self._roster.size)
        told: list[bytes] = []
        for kind in (self._final, self._revocations):
            room = _REVOCATIONS_AT_ONCE - len(told)
            # Where nothing is news, one of all that are known, for whoever was away.
            told += kind.fresh(room, limit) or (kind.next() if differs and room else [])
        return tuple(told)


class _Revocations:
    """Revocations of one kind: those that are news, and all that are known. Whoever adds them bounds their number."""

    def __init__(self) -> None:
        self._fresh: Rumours[bytes] = Rumours(MOST_REVOCATIONS)
        self._known: dict[bytes, None] = {}

    def add(self, revocation: bytes) -> bool:
        """Says whether it was not known."""
        if revocation in self._known:
            return False
        self._known[revocation] = None
        self._fresh.add(revocation)
        return True

    def forget(self, revocation: bytes) -> None:
        """It is not kept any more."""
        if revocation in self._known:
            del self._known[revocation]
            self._fresh.discard(revocation)

    def fresh(self, count: int, limit: int) -> list[bytes]:
        """Up to `count` that were told less than `limit` times."""
        return self._fresh.take(count, limit) if count > 0 else []

    def next(self) -> list[bytes]:
        """The one that was not told for longest."""
        if not self._known:
            return []
        revocation = next(iter(self._known))
        del self._known[revocation]
        self._known[revocation] = None
        return [revocation]


def _stands(verdict: Verdict, fact: Fact) -> bool:
    """Whether a verdict is still what is held of the node."""
    if verdict.incarnation != fact.condemned:
        return False
    state = fact.state
    return state is MemberState.DEAD if verdict.state == "d" else state is MemberState.SUSPECT
