"""Who hosts a split model: a pure function of what the group's members announced.

Every node asks the same question of the same words, so all that see the same words name the same host; nobody votes.

Why it converges: words spread to everybody (gossip), each is replaced only by a newer one of the same node, and the
answer depends on nothing else. So once no node is lost or found any more, all views, and then all answers, are equal.
From then on only the elected one may take the seat, with a term above all it has heard of; one that leads a form of
its own and hears of a better claim gives its seat up. Claims are ordered totally (term, memory, id), so of two leaders
that meet after a cut exactly one stays. Its term is then the highest, so it keeps the seat as long as it can: taking
it away needs a loss, or a group that does not fit any more.

Which split group a node takes part in: the one that its user wants, else one that others want and it can help.
"""

from collections.abc import Callable, Collection, Container, Mapping, Sequence
from typing import TypeAlias

import msgspec

from mesh_llm.core.split.layout import SplitAsk, fits
from mesh_llm.core.types.announcement import Member, SplitState
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import MOST_SHARES, ModelFacts

Fits: TypeAlias = Callable[[Sequence[int]], bool]
"""Whether the model fits into these memories, the host's first, in bytes."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A member of the group that can be counted on: alive, of the same file, lending by its certificate.

    Attributes:
        node: who.
        word: what it announced of this group.
        rpc_version: of its engine; empty where it cannot pair.
        name: for people.
        gives: it gives its files to others; without that it cannot host workers that have not got the file.
    """

    node: NodeId
    word: SplitState
    rpc_version: str
    name: str = ""
    gives: bool = True


class Elected(msgspec.Struct, frozen=True, kw_only=True):
    """The group can serve.

    Attributes:
        host: who leads.
        group: the host first, then everybody it can pair with, most memory first; those without the file come last.
        sitting: it already led.
        term: the highest number that anybody knows of.
    """

    host: NodeId
    group: tuple[NodeId, ...]
    sitting: bool
    term: int


class Short(msgspec.Struct, frozen=True, kw_only=True):
    """The group cannot serve. `group` is the one with most memory that can pair; empty where there is no candidate."""

    group: tuple[NodeId, ...]
    term: int


def elect(candidates: Sequence[Candidate], fits: Fits) -> Elected | Short:
    """Name the host. In any order of `candidates` the answer is the same."""
    able = sorted(
        (candidate for candidate in candidates if candidate.rpc_version and candidate.word.memory_bytes > 0), key=_rank
    )
    term = max((candidate.word.term for candidate in candidates), default=0)
    memory = {candidate.node: candidate.word.memory_bytes for candidate in able}

    def serves(group: Sequence[NodeId]) -> bool:
        return fits([memory[node] for node in group])

    for sitting in _leaders(able):
        if serves(group := _group(sitting, able)):
            return Elected(host=sitting.node, group=group, sitting=True, term=term)
    hosts = [candidate for candidate in able if not candidate.word.bare]
    groups = [_group(candidate, able) for candidate in hosts]
    for candidate, group in zip(hosts, groups, strict=True):
        if serves(group):
            return Elected(host=candidate.node, group=group, sitting=False, term=term)
    largest = max(groups, key=lambda group: sum(memory[node] for node in group), default=())
    return Short(group=largest, term=term)


def sitting_host(candidates: Sequence[Candidate]) -> Candidate | None:
    """Who leads at present, by the best claim; None where nobody does."""
    return next(iter(_leaders(candidates)), None)


def _leaders(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that lead, the best claim first."""
    leaders = [candidate for candidate in candidates if candidate.word.leads and not candidate.word.bare]
    return sorted(leaders, key=lambda candidate: (-candidate.word.term, *_rank(candidate)))


def _rank(candidate: Candidate) -> tuple[bool, int, NodeId]:
    return (candidate.word.bare, -candidate.word.memory_bytes, candidate.node)


def _group(host: Candidate, ranked: Sequence[Candidate]) -> tuple[NodeId, ...]:
    """The host and all that can pair with it and with each other, as far as is known."""
    chosen = [host]
    for candidate in ranked:
        if len(chosen) == MOST_SHARES:
            break
        if candidate.node == host.node or candidate.rpc_version != host.rpc_version:
            continue
        if candidate.word.bare and not host.gives:
            continue
        limit = min(host.word.max_rtt_ms, candidate.word.max_rtt_ms)
        distance = host.word.round_trips.get(candidate.node)
        if distance is None or distance > limit:
            continue
        if all(_near(candidate, other) for other in chosen[1:]):
            chosen.append(candidate)
    return tuple(candidate.node for candidate in chosen)


def _near(one: Candidate, other: Candidate) -> bool:
    """Whether two workers may stand next to each other; true where neither knows the distance."""
    limit = min(one.word.max_rtt_ms, other.word.max_rtt_ms)
    told = (one.word.round_trips.get(other.node), other.word.round_trips.get(one.node))
    return all(distance is None or distance <= limit for distance in told)


def mismatches(candidates: Sequence[Candidate], host: NodeId) -> tuple[Candidate, ...]:
    """Members that cannot pair with a host, because their engines speak another RPC version, or none."""
    version = next((one.rpc_version for one in candidates if one.node == host), "")
    return tuple(sorted((one for one in candidates if one.rpc_version != version), key=lambda one: one.node))


class SplitGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group as others announce it.

    Attributes:
        model: which.
        running: somebody leads it.
        asked: it is to be split in any case.
        computing: all that its leaders count on.
        memories: bytes that those have for it whose file is there, the most first.
    """

    model: ModelName
    running: bool
    asked: bool
    computing: frozenset[NodeId] = frozenset()
    memories: tuple[int, ...] = ()


def groups(
    members: Sequence[Member], known: Mapping[ModelName, ModelFacts], excluded: Collection[ModelName]
) -> dict[ModelName, SplitGroup]:
    """The groups that somebody wants or leads, of the very files in `known`."""
    found: dict[ModelName, list[SplitState]] = {}
    for member in members:
        word = member.announcement.split
        if member.suspect or word is None or word.model in excluded:
            continue
        facts = known.get(word.model)
        if facts is not None and facts.fingerprint == word.fingerprint:
            found.setdefault(word.model, []).append(word)
    return {
        model: SplitGroup(
            model=model,
            running=any(word.leads for word in words),
            asked=any(word.asked for word in words),
            computing=frozenset(share.node for word in words if word.leads for share in word.shares),
            memories=tuple(sorted((word.memory_bytes for word in words if not word.bare), reverse=True)),
        )
        for model, words in found.items()
        if any(word.seeds or word.leads for word in words)
    }


def elsewhere(members: Sequence[Member], on_disk: Container[ModelName]) -> dict[ModelName, ModelFacts]:
    """Models of groups whose file is not here, as the first of those that have the file describes it."""
    found: dict[ModelName, ModelFacts] = {}
    for member in sorted(members, key=lambda member: member.announcement.node):
        word = member.announcement.split
        if word is None or word.bare or word.model in on_disk or not word.fingerprint:
            continue
        for facts in member.announcement.on_disk:
            if (facts.name, facts.fingerprint) == (word.model, word.fingerprint):
                found.setdefault(word.model, facts)
    return found


def needs_bare(group: SplitGroup, facts: ModelFacts, me: NodeId, *, alone: bool, busy: bool) -> bool:
    """Whether a node without the file should help: where it is counted on, nobody leads yet, or all are asked to.

    Who is about to hold the model `alone` fetches it whole instead: that is faster than any group. Who is `busy` with
    another model is meant by "all" only where those that have the file are too few.
    """
    if me in group.computing:
        return True
    if group.asked:
        return not busy or not group.memories or not fits(SplitAsk(facts=facts), group.memories)
    return not (group.running or alone)


def choose_group(known: Collection[SplitGroup]) -> SplitGroup | None:
    """The one to help: first those that wait for more, then by name."""
    return min(known, key=lambda group: (group.running and not group.asked, group.model), default=None)
