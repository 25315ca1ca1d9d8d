"""Which nodes may take part in a split model, and what keeps the others out: the one rule, in three steps.

1. `to_join`: a node enters a group. It decides that for itself; the others know the answer from what it announces.
2. `to_count`: a node counts on a member of its group.
3. `to_pair`: a host takes a member as a worker.

`group` and `election` decide by these functions. `outlook` explains by them, and so every text about a split model
agrees with what is done.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from mesh_llm.core.types.announcement import Announcement, SplitOffer, SplitState
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import MAX_SPLIT_NODES, ModelFacts, Speed


class Obstacle(StrEnum):
    """What keeps a node out. `core/split/outlook.py` has a sentence for each.

    A node announces the first ones of itself (`SplitOffer.obstacle`); the others are found by who looks at it.
    """

    SCOPE = "scope"
    """Its certificate is for less than split models; the detail is its scope."""
    PLUGIN = "plugin"
    """Its engine has no RPC; the detail says why."""
    BUILDING = "building"
    """The RPC plugin of its engine is being built."""
    UNCONFINED = "unconfined"
    """Its RPC server cannot be confined; the detail says why."""
    YIELDING = "yielding"
    """It gives the machine back to its owner; the detail says why."""
    BRINGS = "brings"
    """It fetches a model of its own, and keeps its memory for it."""
    DECLINED = "declined"
    """A user dropped the model there, or it failed there."""
    NO_FETCH = "no-fetch"
    """It lacks the file, and takes none from others."""
    OTHER_FILE = "other-file"
    """It has another file of this name."""
    MEMORY = "memory"
    """It has no memory left."""
    ELSEWHERE = "elsewhere"
    """It is in the group of another model; the detail is that model's name."""
    PENDING = "pending"
    """Nothing is in its way as far as is known, and it has not entered the group."""
    SILENT = "silent"
    """It does not answer."""
    VERSION = "version"
    """Its engine speaks another RPC version; the detail has both versions."""
    NOT_GIVEN = "not-given"
    """It lacks the file, and the host gives none; the detail is the host's name."""
    UNREACHED = "unreached"
    """No way to it was measured yet, or its tunnel failed a moment ago."""
    DISTRUSTED = "distrusted"
    """Its answers to the host's canaries were not those of the model. No node announces this of another."""
    FAR = "far"
    """Its round trip is too long. The detail gives the time and the other node."""
    FULL = "full"
    """The group has as many nodes as there may be."""


class Barred(msgspec.Struct, frozen=True):
    """An obstacle. `code`: an `Obstacle`, or one that a newer version announces.

    `limit`: what would have to be permitted, on the nodes `where`.
    """

    code: str
    detail: str = ""
    limit: float = 0.0
    where: str = ""


class GroupMember(msgspec.Struct, frozen=True, kw_only=True):
    """A member of a split group that can be counted on: alive, with the same file, and permitted to lend.

    Attributes:
        node: its id.
        state: what it announced of this group.
        rpc_version: of its engine; empty where it cannot pair.
        name: for people.
        gives: it gives its files to others. Without that it cannot host workers that lack the file.
        on_processor, speed: as in `Capacity`.
    """

    node: NodeId
    state: SplitState
    rpc_version: str
    name: str = ""
    gives: bool = True
    on_processor: bool = False
    speed: Speed = Speed()

    @property
    def label(self) -> str:
        """Its name, or the beginning of its id."""
        return self.name or self.node[:10]


def to_join(offer: SplitOffer, facts: ModelFacts, file: str | None, memory_bytes: int) -> Barred | None:
    """What keeps a node out of the group of a model.

    Args:
        offer: what the node offers to split models.
        facts: the model.
        file: fingerprint of the node's own file of that name; None: it has none.
        memory_bytes: what it could give to this model.
    """
    if offer.obstacle:
        return Barred(offer.obstacle, offer.detail)
    if facts.name in offer.declined:
        return Barred(Obstacle.DECLINED)
    if file is None and not offer.fetches:
        return Barred(Obstacle.BRINGS if offer.brings else Obstacle.NO_FETCH)
    if file is not None and file != facts.fingerprint:
        return Barred(Obstacle.OTHER_FILE)
    return Barred(Obstacle.MEMORY) if memory_bytes <= 0 else None


def to_count(state: SplitState | None, model: ModelName, fingerprint: str, *, silent: bool) -> Barred | None:
    """What keeps a node from counting on another one, of which it knows `state`. `silent`: it did not answer."""
    if state is None or (state.model, state.fingerprint) != (model, fingerprint):
        return Barred(Obstacle.PENDING)
    return Barred(Obstacle.SILENT) if silent else None


def why_absent(announced: Announcement, facts: ModelFacts) -> Barred:
    """What keeps a node out of a group whose part it does not announce, as far as it says so."""
    state, offer = announced.split, announced.offer
    files = (one.fingerprint for one in announced.on_disk if one.name == facts.name)
    found = to_join(offer, facts, next(files, None), offer.memory_bytes) if offer is not None else None
    if found is not None:
        return found
    if state is not None and state.model != facts.name:
        return Barred(Obstacle.ELSEWHERE, state.model)
    if state is not None and state.fingerprint != facts.fingerprint:
        return Barred(Obstacle.OTHER_FILE)
    if offer is None and not announced.capacity.rpc_version:
        return Barred(Obstacle.PLUGIN)
    return Barred(Obstacle.PENDING)


def to_lend(member: GroupMember) -> Barred | None:
    """What keeps a member from computing for anybody, or hosting."""
    if not member.rpc_version:
        return Barred(Obstacle.PLUGIN)
    return Barred(Obstacle.MEMORY) if member.state.memory_bytes <= 0 else None


def to_pair(host: GroupMember, member: GroupMember, chosen: Sequence[GroupMember]) -> Barred | None:
    """What keeps a host from taking a member as a worker beside those that it has `chosen`, itself first."""
    if member.rpc_version != host.rpc_version:
        return Barred(Obstacle.VERSION, f"{member.rpc_version}, and {host.label} {host.rpc_version}")
    if member.state.bare and not host.gives:
        return Barred(Obstacle.NOT_GIVEN, host.label)
    round_trip = host.state.round_trips.get(member.node)
    if round_trip is None:
        return Barred(Obstacle.UNREACHED)
    far = _too_far(host, member, round_trip)
    for other in chosen[1:]:
        if far is not None:
            break
        # Two workers may stand next to each other where neither knows the round trip.
        measured = (member.state.round_trips.get(other.node), other.state.round_trips.get(member.node))
        far = _too_far(other, member, max((one for one in measured if one is not None), default=0.0))
    if far is not None:
        return far
    return Barred(Obstacle.FULL) if len(chosen) >= MAX_SPLIT_NODES else None


def _too_far(other: GroupMember, member: GroupMember, round_trip: float) -> Barred | None:
    strict = [one.label for one in (other, member) if round_trip > one.state.max_rtt_ms]
    if not strict:
        return None
    return Barred(Obstacle.FAR, f"{round_trip:.0f} ms from {other.label}", round_trip, " and ".join(strict))
