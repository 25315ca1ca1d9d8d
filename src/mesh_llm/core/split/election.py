"""Who hosts a split model: which members of the group can be counted on, and a stateless election among them.

`elect` is a pure function of the members' announced states. There is no vote: nodes that see the same states name the
same host.

Invariants:
- One host: of two hosts that hear of each other, exactly one stays. Claims are ordered totally, by term (the higher one
  wins), then memory, then id; the host with the lesser claim gives up.
- The higher term wins: a new host takes a term above all that it has heard of.
- Stateless: states spread by gossip, a node's newer state replaces its older one, and the result depends on nothing
  else. Once no node is lost or found any more, all views and therefore all results are equal. The host then keeps its
  place until a member is lost or the group no longer fits the model.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from mesh_llm.core.routing.circuit_breaker import CircuitBreaker, LaunchId, SuspectGrace
from mesh_llm.core.split.eligibility import Barred, GroupMember, to_count, to_lend, to_pair
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.ids import Incarnation, ModelName, NodeId

Fits: TypeAlias = Callable[[Sequence[int]], bool]
"""Whether the model fits into these memories in bytes, the host's first."""

_BUCKET_SECONDS = 10.0
_ANNOUNCE_CHANGE = 0.25
_MIN_CHANGE_MS = 1.0
_FIRST_BLOCK = 2.0
_LONGEST_BLOCK = 60.0


class Elected(msgspec.Struct, frozen=True, kw_only=True):
    """The group can serve the model.

    Attributes:
        host: the elected node.
        group: the host, then all that can pair with it, most memory first; those without the file last.
        incumbent: the host already leads.
        term: the highest term that any member knows of.
        left_out: the members that are not in the group, and what keeps them out.
    """

    host: NodeId
    group: tuple[NodeId, ...]
    incumbent: bool
    term: int
    left_out: dict[NodeId, Barred] = {}


class TooSmall(msgspec.Struct, frozen=True, kw_only=True):
    """The group cannot serve. `group`: the one with most memory that can pair; empty where no member can host.

    `left_out`: as of `Elected`.
    """

    group: tuple[NodeId, ...]
    term: int
    left_out: dict[NodeId, Barred] = {}


def elect(members: Sequence[GroupMember], fits: Fits) -> Elected | TooSmall:
    """Name the host. The order of `members` does not matter.

    The leading member with the best claim stays if its group fits the model; else the member with most memory does it.
    """
    unable = {one.node: barred for one in members if (barred := to_lend(one)) is not None}
    able = sorted((one for one in members if one.node not in unable), key=_rank)
    term = max((one.state.term for one in members), default=0)
    memory = {one.node: one.state.memory_bytes for one in able}

    def serves(group: Sequence[NodeId]) -> bool:
        return fits([memory[node] for node in group])

    for leader in _leaders(able):
        group, left_out = _group(leader, able)
        if serves(group):
            return Elected(host=leader.node, group=group, incumbent=True, term=term, left_out=unable | left_out)
    groups = [_group(host, able) for host in able if not host.state.bare]
    for group, left_out in groups:
        if serves(group):
            return Elected(host=group[0], group=group, incumbent=False, term=term, left_out=unable | left_out)
    nobody: _Formed = ((), {})
    largest, left_out = max(groups, key=lambda formed: sum(memory[node] for node in formed[0]), default=nobody)
    return TooSmall(group=largest, term=term, left_out=unable | left_out)


def current_host(members: Sequence[GroupMember]) -> GroupMember | None:
    """The member that leads at present by the best claim, if any."""
    return next(iter(_leaders(members)), None)


def mismatched(members: Sequence[GroupMember], host: NodeId) -> tuple[GroupMember, ...]:
    """Members that cannot pair with a host because their engines speak another RPC version, or none."""
    version = next((one.rpc_version for one in members if one.node == host), "")
    return tuple(sorted((one for one in members if one.rpc_version != version), key=lambda one: one.node))


def _leaders(members: Sequence[GroupMember]) -> list[GroupMember]:
    """Those that lead, the best claim first."""
    leaders = [one for one in members if one.state.leads and not one.state.bare]
    return sorted(leaders, key=lambda one: (-one.state.term, *_rank(one)))


def _rank(member: GroupMember) -> tuple[bool, int, NodeId]:
    return (member.state.bare, -member.state.memory_bytes, member.node)


_Formed: TypeAlias = tuple[tuple[NodeId, ...], dict[NodeId, Barred]]


def _group(host: GroupMember, ranked: Sequence[GroupMember]) -> _Formed:
    """The host, and all members that can pair with it and with each other as far as is known; and the others."""
    chosen = [host]
    left_out: dict[NodeId, Barred] = {}
    for member in ranked:
        if member.node == host.node:
            continue
        barred = to_pair(host, member, chosen)
        if barred is None:
            chosen.append(member)
        else:
            left_out[member.node] = barred
    return tuple(member.node for member in chosen), left_out


class MemberTracker:
    """What this node has seen of the other members: suspicions, failed tunnels, round trips, and who wants the model.

    It decides which members this node counts on; the election then depends on these members' states alone.
    """

    def __init__(self, grace: float) -> None:
        """`grace`: seconds for which a group still counts on a suspect member that works in it."""
        self._suspects = SuspectGrace(grace)
        self._failures: CircuitBreaker[NodeId] = CircuitBreaker(_FIRST_BLOCK, _LONGEST_BLOCK)
        self._round_trips = RoundTrips()
        self._model: ModelName | None = None
        self._wanting: set[NodeId] = set()
        self._lost: frozenset[NodeId] = frozenset()
        self._incarnations: dict[NodeId, Incarnation] = {}

    def observe(self, model: ModelName | None, members: Sequence[Member], now: float) -> None:
        """See the other nodes, as members of the group of `model`."""
        if model != self._model:
            self._model = model
            self._wanting.clear()
            self._lost = frozenset()
        for member in members:
            node, state = member.announcement.node, member.announcement.split
            self._round_trips.sample(node, member.rtt_ms, member.path, now)
            if state is not None and state.model == model and state.seeds:
                self._wanting.add(node)
            else:
                # It is alive and its user dropped the model. A lost node still counts as wanting it.
                self._wanting.discard(node)
        self._incarnations = {member.announcement.node: member.announcement.incarnation for member in members}
        present = self._incarnations.keys()
        if self._lost & self._wanting & present:
            self._lost = frozenset()
        elif self._wanting and not self._wanting & present:
            self._lost |= self._wanting
        self._round_trips.keep(frozenset(present))
        self._suspects.observe(members, now)
        self._suspects.due(now)
        self._failures.due(now)

    @property
    def adopted(self) -> bool:
        """Whether all nodes that want the model are lost, so that this node wants it for them until one is back."""
        return bool(self._lost)

    @property
    def wanted(self) -> bool:
        """Whether some node wants the model, or wanted it until it was lost."""
        return bool(self._wanting) or self.adopted

    def failed(self, node: NodeId, now: float) -> None:
        """The tunnel to a member failed: do without it for a while, longer each time, or until it restarts."""
        self._failures.trip(node, self._life(node), now)

    def deadline(self) -> float | None:
        """When a member stops to count, or may be tried again."""
        times = (self._suspects.deadline(), self._failures.deadline())
        return min((time for time in times if time is not None), default=None)

    def round_trips(
        self,
        members: Sequence[Member],
        limit: float,
        working: Collection[NodeId],
        now: float,
        distrusted: Collection[NodeId] = (),
    ) -> dict[NodeId, float]:
        """The round trips that this node announces in the group.

        A member whose tunnel failed, or that this node distrusts, is left out: so this node takes it for no worker, and
        all nodes that elect know that. Members that work together already are parted only at twice the limit.
        """
        found: dict[NodeId, float] = {}
        for member in members:
            node, state = member.announcement.node, member.announcement.split
            measured = self._round_trips.get(node)
            if state is None or state.model != self._model or measured is None or node in distrusted:
                continue
            if not self._failures.blocks(node, self._life(node), now):
                found[node] = min(measured, limit) if node in working and measured <= 2 * limit else measured
        return found

    def members(
        self, fingerprint: str, members: Sequence[Member], working: Collection[NodeId], now: float
    ) -> Iterator[GroupMember]:
        """The other members that count. A suspect one counts for a moment if it works in the group."""
        for member in members:
            announced, state = member.announcement, member.announcement.split
            if self._model is None or state is None:
                continue
            silent = self.silent(member, working, now)
            if to_count(state, self._model, fingerprint, silent=silent) is None:
                yield GroupMember(
                    node=announced.node,
                    state=state,
                    rpc_version=announced.capacity.rpc_version,
                    name=member.label,
                    gives=announced.shares,
                    on_processor=announced.capacity.on_processor,
                    speed=announced.capacity.speed,
                )

    def silent(self, member: Member, working: Collection[NodeId], now: float) -> bool:
        """Whether nobody counts on a member, because it does not answer."""
        node = member.announcement.node
        return member.suspect and (node not in working or self._suspects.expired(node, now))

    def _life(self, node: NodeId) -> LaunchId:
        return LaunchId(self._incarnations.get(node, Incarnation(0)), 0)


@dataclass
class _RoundTrip:
    path: str
    since: float
    lowest: float
    before: float | None
    announced: float


class RoundTrips:
    """Round trips to other nodes as announced: the lowest of the last 10 to 20 seconds, in coarse steps.

    One slow answer says little about a path: a busy machine answers late, and the first packets through a relay are
    slow. A change of path starts anew.
    """

    def __init__(self) -> None:
        self._known: dict[NodeId, _RoundTrip] = {}

    def sample(self, node: NodeId, milliseconds: float, path: str, now: float) -> None:
        """Take a measurement; 0.0 is none."""
        if milliseconds <= 0.0:
            return
        known = self._known.get(node)
        if known is None or (known.path != path and "none" not in {known.path, path}):
            self._known[node] = _RoundTrip(path, now, milliseconds, None, _coarse(milliseconds))
            return
        known.path = path if path != "none" else known.path
        if now - known.since >= _BUCKET_SECONDS:
            known.before, known.lowest, known.since = known.lowest, milliseconds, now
        else:
            known.lowest = min(known.lowest, milliseconds)
        value = known.lowest if known.before is None else min(known.lowest, known.before)
        if abs(value - known.announced) > max(_MIN_CHANGE_MS, _ANNOUNCE_CHANGE * known.announced):
            known.announced = _coarse(value)

    def get(self, node: NodeId) -> float | None:
        """The milliseconds to announce; None where nothing was measured."""
        known = self._known.get(node)
        return None if known is None else known.announced

    def keep(self, nodes: frozenset[NodeId]) -> None:
        """Forget all other nodes."""
        self._known = {node: known for node, known in self._known.items() if node in nodes}


def _coarse(milliseconds: float) -> float:
    return float(max(_MIN_CHANGE_MS, round(milliseconds))) if milliseconds < 20.0 else 5.0 * round(milliseconds / 5.0)
