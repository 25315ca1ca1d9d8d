"""Which model a node should take: pure functions of what the mesh wants, serves and has on disk."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import TypeAlias

import msgspec

from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelFacts


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A model that a node might serve.

    Attributes:
        facts: what it is.
        hosts: how many live nodes serve or load it.
        on_disk: whether this node has it.
        wanted: position in the mesh's wanted list; None where it is only served.
        shared: another node gives its files.
    """

    facts: ModelFacts
    hosts: int
    on_disk: bool
    wanted: int | None = None
    shared: bool = False

    @property
    def at_hand(self) -> bool:
        """Whether it can be had: it is here, or there is somewhere to fetch it from."""
        return self.on_disk or self.shared or bool(self.facts.source)


class Assigned(msgspec.Struct, frozen=True, kw_only=True):
    """Serve this one; `why` completes "because"."""

    facts: ModelFacts
    why: str
    unserved: bool


class Unassigned(msgspec.Struct, frozen=True, kw_only=True):
    """Nothing to serve; `why` is a clause for people."""

    why: str


Assignment: TypeAlias = Assigned | Unassigned

_LAST = 1 << 30


def wanted_order(lists: Iterable[Sequence[ModelName]]) -> tuple[ModelName, ...]:
    """Merge the nodes' wanted lists into one: by best position, then by name. The same on every node."""
    best: dict[ModelName, int] = {}
    for names in lists:
        for position, name in enumerate(names):
            best[name] = min(position, best.get(name, position))
    return tuple(sorted(best, key=lambda name: (best[name], name)))


def known_models(models: Iterable[ModelFacts]) -> dict[ModelName, ModelFacts]:
    """Models by name; of several that say of one what it is, one that says where it came from."""
    return {facts.name: facts for facts in sorted(models, key=lambda facts: bool(facts.source))}


def assign(candidates: Iterable[Candidate], fits: Callable[[ModelFacts], bool], *, can_fetch: bool) -> Assignment:
    """Choose what a node without a model of its own should serve.

    In this order: a wanted model that nobody serves and that is on disk here; one that nobody serves; the least served
    on disk here; the least served. Never one that does not fit; one that is not on disk only
    if it can be fetched, and its source or a node that gives it is known.
    """
    known = list(candidates)
    if not known:
        return Unassigned(why="the mesh wants no model yet")
    at_hand = [candidate for candidate in known if candidate.on_disk or (can_fetch and candidate.at_hand)]
    if not at_hand:
        return Unassigned(why=f"none of the mesh's models is on disk here ({_names(known)})")
    possible = [candidate for candidate in at_hand if fits(candidate.facts)]
    if not possible:
        return Unassigned(why=f"none of the mesh's models fits this machine's memory ({_names(at_hand)})")
    best = min(possible, key=_preference)
    if best.hosts == 0:
        where = "and it is on disk here" if best.on_disk else "and it fits here"
        return Assigned(facts=best.facts, why=f"nobody serves it, {where}", unserved=True)
    where = "of those on disk here" if best.on_disk else "of those that fit here"
    hosts = f"{best.hosts} node{'' if best.hosts == 1 else 's'}"
    return Assigned(facts=best.facts, why=f"it is the least served ({hosts}) {where}", unserved=False)


def _preference(candidate: Candidate) -> tuple[bool, bool, int, int, str]:
    unserved = candidate.hosts == 0
    wanted = _LAST if candidate.wanted is None else candidate.wanted
    return (not unserved, not candidate.on_disk, candidate.hosts, wanted, candidate.facts.name)


def _names(candidates: Sequence[Candidate]) -> str:
    names = sorted(candidate.facts.name for candidate in candidates)
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def rendezvous(model: ModelName, nodes: Iterable[NodeId]) -> tuple[NodeId, ...]:
    """Order nodes for a model, by a hash of both: every node computes the same, and models spread evenly."""
    return tuple(sorted(nodes, key=lambda node: (_weight(model, node), node)))


def _weight(model: ModelName, node: NodeId) -> bytes:
    return blake2b(f"{model}\0{node}".encode(), digest_size=8).digest()


def overloaded(demand: Mapping[str, float], hosts: Mapping[ModelName, int], per_host: float) -> dict[ModelName, float]:
    """Models that are served, but asked for more often than their hosts are meant to bear; requests per minute each."""
    return {
        model: rate
        for model, count in hosts.items()
        if count > 0 and (rate := demand.get(model, 0.0) / count) > per_host
    }
