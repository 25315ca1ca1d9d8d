"""What a model needs that no node can hold, who gives memory to it, who does not, and what to type.

`survey` applies the rules of `eligibility` and the election; `Outlook.sentence` is what every place shows: notices, the
status, the console, the body of a 503, and `mesh-llm plan`.
"""

import math
import re
from collections.abc import Hashable, Mapping, Sequence
from types import MappingProxyType

import msgspec

from mesh_llm.core.split.election import Elected, TooSmall, elect
from mesh_llm.core.split.eligibility import Barred, GroupMember, Obstacle, to_count, to_join, why_absent
from mesh_llm.core.split.layout import SplitRequest, group_fits
from mesh_llm.core.types.announcement import Announcement, Member, SplitOffer, SplitState
from mesh_llm.core.types.errors import size
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts, ModelStatus

_MOST_NAMED = 6
_MOST_EXPLAINED = 3
_PLAIN = re.compile(r"[\w.-]+$")
"""A name that needs no quotes in a command."""
_ADDRESS_DIGITS = 16


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could take part.

    Attributes:
        node: its id.
        name: for people.
        since: its incarnation.
        memory_bytes: what it offers.
        member: its part in the group; None: it has none.
        barred: what keeps it from having one.
        wants: its user wants the model.
    """

    node: NodeId
    name: str
    since: int
    memory_bytes: int
    member: GroupMember | None = None
    barred: Barred | None = None
    wants: bool = False


def candidate_of(member: Member, facts: ModelFacts, *, silent: bool) -> Candidate:
    """A node as it announces itself. `silent`: nobody counts on it, because it does not answer."""
    announced = member.announcement
    state, offer = announced.split, announced.offer
    barred = to_count(state, facts.name, facts.fingerprint, silent=silent)
    mine = state is not None and state.model == facts.name
    if barred is not None and barred.code == Obstacle.PENDING:
        barred = why_absent(announced, facts)
    memory = offer.memory_bytes if offer is not None else announced.capacity.memory_bytes
    return Candidate(
        node=announced.node,
        name=member.label,
        since=announced.incarnation,
        memory_bytes=state.memory_bytes if state is not None and mine else memory,
        member=None
        if barred is not None or state is None
        else GroupMember(
            node=announced.node,
            state=state,
            rpc_version=announced.capacity.rpc_version,
            name=member.label,
            gives=announced.shares,
        ),
        barred=barred,
        wants=facts.name in announced.wanted or (state is not None and mine and state.seeds),
    )


def would_be(
    member: Member,
    known: Candidate,
    facts: ModelFacts,
    *,
    round_trips: Mapping[NodeId, float] = MappingProxyType({}),
    hoped: str | None = None,
) -> Candidate:
    """A node without a part in a group, as it would be if the model were wanted: it enters where nothing is in its way.

    Args:
        member: the node.
        known: what it is now.
        facts: the model.
        round_trips: to all others, in milliseconds, as far as they are known or assumed; without them it hosts nothing.
        hoped: the RPC version that it is hoped to have, where something of it is not known yet that may keep it out;
            None: what is known counts.
    """
    announced, offer = member.announcement, member.announcement.offer
    if hoped is not None:
        offer = msgspec.structs.replace(
            offer or SplitOffer(memory_bytes=announced.capacity.memory_bytes, fetches=True), obstacle=""
        )
        files = (one.fingerprint for one in announced.on_disk if one.name == facts.name)
        barred = to_join(offer, facts, next(files, None), _soon(announced, offer))
        if barred is not None:
            return msgspec.structs.replace(known, barred=barred)
    elif offer is None or known.barred is None or known.barred.code != Obstacle.PENDING:
        return known
    elif member.suspect:
        return msgspec.structs.replace(known, barred=Barred(Obstacle.SILENT))
    state = SplitState(
        model=facts.name,
        fingerprint=facts.fingerprint,
        memory_bytes=offer.memory_bytes if hoped is None else _soon(announced, offer),
        round_trips=dict(round_trips),
        bare=all(one.name != facts.name for one in announced.on_disk),
    )
    part = GroupMember(
        node=announced.node,
        state=state,
        rpc_version=announced.capacity.rpc_version or hoped or "",
        name=member.label,
        gives=announced.shares,
    )
    return msgspec.structs.replace(known, member=part, barred=None, memory_bytes=state.memory_bytes)


def _soon(announced: Announcement, offer: SplitOffer) -> int:
    """What a node could give once the engines that it stops have ended."""
    stopping = sum(one.size_bytes for one in announced.serving if one.status is ModelStatus.STOPPING)
    return min(announced.capacity.memory_bytes, offer.memory_bytes + stopping)


class Participant(msgspec.Struct, frozen=True, kw_only=True):
    """A node in an outlook.

    Attributes:
        node: its id.
        name: for people.
        address: how a command names it.
        memory_bytes: what it offers.
        obstacle: what keeps it out: a code of `Obstacle`; empty: it takes part.
        detail: more about the obstacle.
        limit: the least limit that would let it in, where one keeps it out.
        where: the nodes whose limit it is, as in "node1 and node2".
        wants: its user wants the model.
    """

    node: NodeId
    name: str
    address: str
    memory_bytes: int
    obstacle: str = ""
    detail: str = ""
    limit: float = 0.0
    where: str = ""
    wants: bool = False


class Outlook(msgspec.Struct, frozen=True, kw_only=True):
    """Why a model does not run, though several nodes could run it together.

    Attributes:
        model: its name.
        participants: those that take part, the host first; then those that do not.
        alone_bytes: what it needs on one node.
        need_bytes: what it needs on those that take part.
        wider_bytes: what it needs on one node more.
        have_bytes: what those that take part offer together.
        undivided: there is enough, and whole layers do not divide so.
        granter: who may let others share models; None: nobody that is known.
    """

    model: ModelName
    participants: tuple[Participant, ...]
    alone_bytes: int
    need_bytes: int
    wider_bytes: int
    have_bytes: int
    undivided: bool = False
    granter: NodeId | None = None

    @property
    def taking_part(self) -> list[Participant]:
        """Those that give memory."""
        return [one for one in self.participants if not one.obstacle]

    @property
    def kept_out(self) -> list[Participant]:
        """Those that do not, except where that can change any moment without anybody's doing."""
        return [one for one in self.participants if one.obstacle and one.obstacle != Obstacle.PENDING]

    @property
    def reason(self) -> Hashable:
        """Changes when another node must do something else, or the sum is another."""
        obstacles = tuple((one.node, one.obstacle, one.where or one.detail) for one in self.kept_out)
        return (self.need_bytes, self.have_bytes, self.undivided, self.granter, obstacles)

    @property
    def unreached(self) -> bool:
        """Whether a node is kept out only because no way to it is known."""
        return any(one.obstacle == Obstacle.UNREACHED for one in self.participants)

    def sentence(self, reader: NodeId | None = None) -> str:
        """All of it, for people. `reader`: the node where it is read; None: it is for all nodes."""
        mine = next((one for one in self.kept_out if one.node == reader), None)
        if mine is not None and not mine.wants:
            return self._from_outside(mine)
        return " ".join([f"waiting for more memory: {self.sum()}", *self.explained(reader)])

    def why(self, one: Participant, reader: NodeId | None = None) -> str:
        """Why a node does not take part, and what to type; empty where it does."""
        if not one.obstacle:
            return ""
        reason, remedy = clause(Barred(one.obstacle, one.detail)), self._remedy(one, reader)
        return f"{reason}: {remedy}" if remedy else reason

    def sum(self) -> str:
        """What the model needs, and how much of it each node gives: one sentence."""
        taking = self.taking_part
        unit, name = (10**9, "GB") if self.need_bytes >= 10**9 else (10**6, "MB")

        def shown(value: int) -> str:
            return f"{value / unit:.1f}"

        need = f"it needs {shown(self.need_bytes)} {name}"
        if len(taking) > 1:
            # The need grows with each node, which surprises whoever saw the first number.
            more = "the second's" if len(taking) == 2 else "the others'"
            beside = f"{float(shown(self.need_bytes)) - float(shown(self.alone_bytes)):.1f}"
            need += f" on {len(taking)} nodes ({shown(self.alone_bytes)} on one, and {beside} for {more} own buffers)"
        elif self.wider_bytes:
            need += f" ({shown(self.wider_bytes)} on two nodes, each with buffers of its own)"
        parts = [f"{one.name} {shown(one.memory_bytes)}" for one in taking[:_MOST_NAMED]]
        if len(taking) > _MOST_NAMED:
            rest = sum(one.memory_bytes for one in taking[_MOST_NAMED:])
            parts.append(f"{len(taking) - _MOST_NAMED} more {shown(rest)}")
        have = ", ".join(parts) + f" = {shown(self.have_bytes)}"
        if len(taking) == 1:
            have = f"{taking[0].name} offers {shown(self.have_bytes)}"
        rest = "" if self.kept_out else "; no node that has its file can host it"
        text = f"{need}; {have} {name}" if parts else need + rest
        return f"{text}, and its layers do not divide so." if self.undivided else f"{text}."

    def explained(self, reader: NodeId | None) -> list[str]:
        """Who does not take part, and why; or what else helps. Sentences."""
        out = self.kept_out
        told = [self.about(one, reader) for one in out[:_MOST_EXPLAINED]]
        if len(out) > _MOST_EXPLAINED:
            told.append(f"{len(out) - _MOST_EXPLAINED} more do not take part: see mesh-llm status.")
        if not out:
            told.append("Add a machine, or take a smaller model.")
        return told

    def about(self, one: Participant, reader: NodeId | None) -> str:
        """Who does not take part, and why: a sentence."""
        who = "this node" if one.node == reader else one.name
        offers = f"offers {size(one.memory_bytes)} but " if one.memory_bytes else ""
        text = f"{who} {offers}{self.why(one, reader)}."
        return text[:1].upper() + text[1:] if who == "this node" else text

    def _from_outside(self, mine: Participant) -> str:
        """For a node that could help, and does not."""
        wanting = next((one for one in self.participants if one.wants), None)
        who = wanting.name if wanting is not None else "the mesh"
        missing = (self.wider_bytes if self.taking_part else self.alone_bytes) - self.have_bytes
        offers = f"offers {size(mine.memory_bytes)} but " if mine.memory_bytes else ""
        return f"{who} needs about {size(missing)} more; this node {offers}{self.why(mine, mine.node)}."

    def _remedy(self, one: Participant, reader: NodeId | None) -> str:
        """What to type; empty where nothing can be done."""
        there = "" if one.node == reader else f"on {one.name}: "
        if one.obstacle == Obstacle.SCOPE:
            return self._grant(one, reader)
        if one.obstacle == Obstacle.DISTRUSTED:
            return "see mesh-llm trust list"
        if one.obstacle == Obstacle.NOT_GIVEN:
            return f"start {one.detail} without --no-seed"
        if one.obstacle == Obstacle.FAR:
            # Round trips vary. A limit just above one of them would not let the node in for long.
            return f"start {one.where} with --max-rtt {10 * math.ceil(one.limit * 1.5 / 10):.0f}"
        remedy = _REMEDIES.get(one.obstacle, "").format(model=self.model, detail=one.detail)
        return there + remedy if remedy else ""

    def _grant(self, one: Participant, reader: NodeId | None) -> str:
        command = f"mesh-llm invite grant {one.address} --scope split"
        granter = next((other.name for other in self.participants if other.node == self.granter), None)
        if granter is None:
            return f"on the node that invited it: {command}"
        return command if self.granter == reader else f"on {granter}: {command}"


_CLAUSES: dict[str, tuple[str, str]] = {
    Obstacle.SCOPE: ("may not lend it", ", because its invite has scope {}"),
    Obstacle.PLUGIN: ("has no RPC plugin", " ({})"),
    Obstacle.BUILDING: ("is still building its RPC plugin", " ({})"),
    Obstacle.UNCONFINED: ("cannot confine its RPC server", " ({})"),
    Obstacle.YIELDING: ("gives its machine to its owner at present", " ({})"),
    Obstacle.BRINGS: ("fetches a model of its own first", ""),
    Obstacle.DECLINED: ("dropped this model, or could not run it", ""),
    Obstacle.NO_FETCH: ("lacks the file and takes none from others", ""),
    Obstacle.OTHER_FILE: ("has another file of this name", ""),
    Obstacle.MEMORY: ("has no memory left", ""),
    Obstacle.ELSEWHERE: ("takes part in another split model", ", {}"),
    Obstacle.PENDING: ("has not entered the group", ""),
    Obstacle.SILENT: ("does not answer", ""),
    Obstacle.VERSION: ("speaks another RPC version", " ({})"),
    Obstacle.NOT_GIVEN: ("lacks the file, and gets it from nobody", " ({} gives none)"),
    Obstacle.UNREACHED: ("cannot be reached directly at present", ""),
    Obstacle.DISTRUSTED: ("is not trusted with this model", ""),
    Obstacle.FAR: ("is too far away", " ({})"),
    Obstacle.FULL: ("is not needed: the group has as many nodes as there may be", ""),
}
"""For each obstacle a clause whose subject is the node, and how a detail continues it."""

_SENTENCES = {Obstacle.PLUGIN, Obstacle.UNCONFINED}
"""Obstacles whose detail is a sentence of its own elsewhere."""

_REMEDIES: dict[str, str] = {
    Obstacle.PLUGIN: "mesh-llm doctor",
    Obstacle.UNCONFINED: "start it with --lend-unconfined, if you trust all members of the mesh",
    Obstacle.DECLINED: "mesh-llm load {model}",
    Obstacle.NO_FETCH: "start it without --no-fetch",
    Obstacle.OTHER_FILE: "mesh-llm models rm {model}",
    Obstacle.MEMORY: "mesh-llm drop what it serves, or start it with a larger --use",
    Obstacle.ELSEWHERE: "mesh-llm drop {detail}",
    Obstacle.VERSION: "install the same engine version there",
}
"""What to do on that node."""


def clause(barred: Barred) -> str:
    """An obstacle as a clause whose subject is the node."""
    known = _CLAUSES.get(barred.code)
    if known is None:
        return f"takes no part ({barred.detail or barred.code})"
    plain, more = known
    detail = barred.detail.rstrip(".")
    if barred.code in _SENTENCES and detail[1:2].islower():
        detail = detail[:1].lower() + detail[1:]
    return plain + (more.format(detail) if detail else "")


def survey(request: SplitRequest, candidates: Sequence[Candidate]) -> Outlook | None:
    """What keeps these nodes from running the model together; None: nothing, an election names a host."""
    members = [one.member for one in candidates if one.member is not None]
    plain = msgspec.structs.replace(request, draft=None)
    outcome = elect(members, lambda memories: group_fits(plain, memories))
    return None if isinstance(outcome, Elected) else outlook(request, candidates, outcome)


def outlook(request: SplitRequest, candidates: Sequence[Candidate], outcome: Elected | TooSmall) -> Outlook:
    """What the outcome of an election means for all candidates."""
    barred = {one.node: one.barred for one in candidates if one.barred is not None} | outcome.left_out
    taking = {node: place for place, node in enumerate(outcome.group)}
    ranked = sorted(
        (one for one in candidates if one.node in taking or one.node in barred),
        key=lambda one: (taking.get(one.node, len(taking)), -one.memory_bytes, one.node),
    )
    participants: list[Participant] = []
    for one in ranked:
        found = Barred("") if one.node in taking else barred[one.node]
        participants.append(
            Participant(
                node=one.node,
                name=one.name,
                address=one.name if _PLAIN.match(one.name) else one.node[:_ADDRESS_DIGITS],
                memory_bytes=one.memory_bytes,
                obstacle=found.code,
                detail=found.detail,
                limit=found.limit,
                where=found.where,
                wants=one.wants,
            )
        )
    memory = request.memory(request.least_context, request.options.slots or 1)
    layers, alone_bytes, count = request.facts.layers, memory.solo.total, len(taking)
    need = memory.total(layers, count) if count > 1 else alone_bytes
    have = sum(one.memory_bytes for one in participants if not one.obstacle)
    able = [one for one in candidates if barred.get(one.node, Barred("")).code != Obstacle.SCOPE]
    granters = sorted((not one.wants, one.since, one.node) for one in able)
    return Outlook(
        model=request.facts.name,
        participants=tuple(participants),
        alone_bytes=alone_bytes,
        need_bytes=need,
        wider_bytes=memory.total(layers, max(2, count + 1)),
        have_bytes=have,
        undivided=count > 1 and need <= have,
        granter=granters[0][2] if granters else None,
    )
