"""Which split group a node takes part in: the one that its user wants, else one that others want and it can help."""

from collections.abc import Collection, Container, Mapping, Sequence

import msgspec

from mesh_llm.core.ids import ModelName, NodeId
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.split_plan import SplitAsk, fits
from mesh_llm.core.split_word import SplitWord


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
    found: dict[ModelName, list[SplitWord]] = {}
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
