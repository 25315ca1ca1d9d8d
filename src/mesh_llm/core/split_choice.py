"""Which split group a node takes part in: the one that its user wants, else one that others want and it can help."""

from collections.abc import Collection, Mapping, Sequence

import msgspec

from mesh_llm.core.ids import ModelName
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts
from mesh_llm.core.split_word import SplitWord


class SplitGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A group as others announce it. `running`: somebody leads it; `asked`: it is to be split in any case."""

    model: ModelName
    running: bool
    asked: bool


def groups(
    members: Sequence[Member], on_disk: Mapping[ModelName, ModelFacts], excluded: Collection[ModelName]
) -> dict[ModelName, SplitGroup]:
    """The groups that somebody wants or leads, and that this node could help by its own copy of the same file."""
    found: dict[ModelName, list[SplitWord]] = {}
    for member in members:
        word = member.announcement.split
        if member.suspect or word is None or word.model in excluded:
            continue
        facts = on_disk.get(word.model)
        if facts is not None and facts.fingerprint == word.fingerprint:
            found.setdefault(word.model, []).append(word)
    return {
        model: SplitGroup(
            model=model, running=any(word.leads for word in words), asked=any(word.asked for word in words)
        )
        for model, words in found.items()
        if any(word.seeds or word.leads for word in words)
    }


def choose_group(known: Collection[SplitGroup]) -> SplitGroup | None:
    """The one to help: first those that wait for more, then by name."""
    return min(known, key=lambda group: (group.running and not group.asked, group.model), default=None)
