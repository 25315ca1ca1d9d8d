"""How far other nodes are, as told to others: the least of the last moments, in coarse steps.

One slow answer says little about a path: a busy machine answers late, and a first contact through a relay reads slow.

Who can be counted on in a split group, as this node sees it: its file, its distance, and what failed with it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from mesh_llm.core.split.election import Candidate
from mesh_llm.core.types.announcement import Member, SplitState
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId

_BUCKET = 10.0
_CHANGE = 0.25
_LEAST_MS = 1.0


@dataclass
class _Distance:
    path: str
    since: float
    least: float
    before: float | None
    told: float

    @property
    def milliseconds(self) -> float:
        return self.least if self.before is None else min(self.least, self.before)


class Distances:
    """Round trips of the last 10 to 20 seconds, by node; forgotten where the path becomes another one."""

    def __init__(self) -> None:
        self._distances: dict[NodeId, _Distance] = {}

    def sample(self, node: NodeId, milliseconds: float, path: str, now: float) -> None:
        """Take a measured round trip; 0.0 is none."""
        if milliseconds <= 0.0:
            return
        known = self._distances.get(node)
        if known is None or (known.path != path and "none" not in {known.path, path}):
            self._distances[node] = _Distance(path, now, milliseconds, None, _coarse(milliseconds))
            return
        known.path = path if path != "none" else known.path
        if now - known.since >= _BUCKET:
            known.before, known.least, known.since = known.least, milliseconds, now
        else:
            known.least = min(known.least, milliseconds)
        value = known.milliseconds
        if abs(value - known.told) > max(_LEAST_MS, _CHANGE * known.told):
            known.told = _coarse(value)

    def get(self, node: NodeId) -> float | None:
        """What to tell of a node; None where it was never measured."""
        known = self._distances.get(node)
        return None if known is None else known.told

    def keep(self, nodes: frozenset[NodeId]) -> None:
        """Forget all others."""
        self._distances = {node: known for node, known in self._distances.items() if node in nodes}


def _coarse(milliseconds: float) -> float:
    return float(max(_LEAST_MS, round(milliseconds))) if milliseconds < 20.0 else 5.0 * round(milliseconds / 5.0)


_BLOCK_FIRST = 2.0
_BLOCK_MOST = 60.0
_FORGET_AFTER = 120.0


@dataclass
class _Block:
    incarnation: Incarnation
    until: float
    seconds: float


class SplitMembers:
    """Remembers doubts, failures and distances of the group's other members, and who wanted it."""

    def __init__(self, grace: float) -> None:
        """`grace`: for how long a doubted node is still counted on by a group that works with it."""
        self._grace = grace
        self._doubted: dict[NodeId, float] = {}
        self._blocks: dict[NodeId, _Block] = {}
        self._distances = Distances()
        self._seeds: set[NodeId] = set()
        self._lost_seeds: frozenset[NodeId] = frozenset()
        self._model: ModelName | None = None
        self._lives: dict[NodeId, Incarnation] = {}

    def observe(self, model: ModelName | None, members: Sequence[Member], now: float) -> None:
        """Look at the other nodes, as members of the group of `model`."""
        if model != self._model:
            self._model = model
            self._seeds.clear()
            self._lost_seeds = frozenset()
        doubted: dict[NodeId, float] = {}
        for member in members:
            node = member.announcement.node
            self._lives[node] = member.announcement.incarnation
            self._distances.sample(node, member.rtt_ms, member.path, now)
            if member.suspect:
                doubted[node] = self._doubted.get(node, now)
            word = member.announcement.split
            if word is not None and word.model == model and word.seeds:
                self._seeds.add(node)
            else:
                # Alive, and wanting it no more: its user dropped it. One that is lost still counts as wanting it.
                self._seeds.discard(node)
        self._doubted = doubted
        self._adopt(members)
        present = frozenset(member.announcement.node for member in members)
        self._lives = {node: life for node, life in self._lives.items() if node in present}
        self._distances.keep(present)
        for node in [node for node, block in self._blocks.items() if self._over(node, block, now)]:
            del self._blocks[node]

    @property
    def wanted(self) -> bool:
        """Whether somebody wants this group, or did to its end."""
        return bool(self._seeds) or self.adopted

    @property
    def adopted(self) -> bool:
        """Whether all that wanted it are lost, so that this node wants it in their place until one is back."""
        return bool(self._lost_seeds)

    def _adopt(self, members: Sequence[Member]) -> None:
        present = {member.announcement.node for member in members}
        if self._lost_seeds & self._seeds & present:
            self._lost_seeds = frozenset()
        elif self._seeds and not self._seeds & present:
            self._lost_seeds |= self._seeds

    def failed(self, node: NodeId, now: float) -> None:
        """The tunnel to a node failed: do without it for a while, longer each time, or until its next life."""
        before = self._blocks.get(node)
        if before is not None and now < before.until:
            return
        seconds = _BLOCK_FIRST if before is None else min(_BLOCK_MOST, 2 * before.seconds)
        self._blocks[node] = _Block(self._lives.get(node, Incarnation(0)), now + seconds, seconds)

    def blocked(self, node: NodeId, now: float) -> bool:
        """Whether a node is done without at present."""
        block = self._blocks.get(node)
        return block is not None and now < block.until

    def deadline(self, now: float) -> float | None:
        """When somebody stops to count, or may be tried again."""
        times = [since + self._grace for since in self._doubted.values()]
        times += [block.until for block in self._blocks.values()]
        return min((time for time in times if time > now), default=None)

    def round_trips(
        self, members: Sequence[Member], limit: float, working: Collection[NodeId], now: float
    ) -> dict[NodeId, float]:
        """What this node tells of its distances in the group; one whose tunnel failed is not told, so nobody pairs us.

        Those that work together already are not parted before they are twice as far as they may be.
        """
        told: dict[NodeId, float] = {}
        for member in members:
            node = member.announcement.node
            word = member.announcement.split
            distance = self._distances.get(node)
            if word is None or word.model != self._model or distance is None or self.blocked(node, now):
                continue
            told[node] = min(distance, limit) if node in working and distance <= 2 * limit else distance
        return told

    def candidates(
        self, fingerprint: str, members: Sequence[Member], working: Collection[NodeId], now: float
    ) -> Iterator[Candidate]:
        """The other members that count. A doubted one does for a moment, where the group works with it."""
        for member in members:
            word = self._word(member, fingerprint)
            if word is None:
                continue
            node = member.announcement.node
            if member.suspect:
                since = self._doubted.get(node, now)
                if node not in working or now >= since + self._grace:
                    continue
            announced = member.announcement
            version = announced.capacity.rpc_version
            yield Candidate(node=node, word=word, rpc_version=version, name=announced.name, gives=announced.shares)

    def _word(self, member: Member, fingerprint: str) -> SplitState | None:
        word = member.announcement.split
        if word is None or word.model != self._model or word.fingerprint != fingerprint:
            return None
        return word

    def _over(self, node: NodeId, block: _Block, now: float) -> bool:
        life = self._lives.get(node)
        if life is not None and block.incarnation not in {Incarnation(0), life}:
            return True
        return now - block.until > _FORGET_AFTER
