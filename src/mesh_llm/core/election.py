"""Who hosts a split model: a pure function of what the group's members announced.

Every node asks the same question of the same words, so all that see the same words name the same host; nobody votes.

Why it converges: words spread to everybody (gossip), each is replaced only by a newer one of the same node, and the
answer depends on nothing else. So once no node is lost or found any more, all views, and then all answers, are equal.
From then on only the elected one may take the seat, with a term above all it has heard of; one that leads a form of
its own and hears of a better claim gives its seat up. Claims are ordered totally (term, memory, id), so of two leaders
that meet after a cut exactly one stays. Its term is then the highest, so it keeps the seat as long as it can: taking
it away needs a loss, or a group that does not fit any more.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import msgspec

from mesh_llm.core.ids import NodeId
from mesh_llm.core.split_layout import MOST_SHARES
from mesh_llm.core.split_word import SplitWord

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
    word: SplitWord
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
