"""Who else has a model's files and gives them away."""

from collections.abc import Iterable, Sequence

from mesh_llm.core.ids import ModelName
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts

_SHOWN = 2


def holders(members: Iterable[Member], name: ModelName, fingerprint: str) -> list[Member]:
    """Nodes that offer the very same file; those with the shortest way first. Doubted ones come last."""
    if not fingerprint:
        return []
    found = [
        member
        for member in members
        if member.announcement.shares
        and any((facts.name, facts.fingerprint) == (name, fingerprint) for facts in member.announcement.on_disk)
    ]
    return sorted(found, key=lambda member: (member.suspect, member.rtt_ms, member.announcement.node))


def shared_models(members: Iterable[Member]) -> set[ModelName]:
    """Names of models that somebody gives away."""
    return {
        facts.name
        for member in members
        if member.announcement.shares
        for facts in member.announcement.on_disk
        if facts.fingerprint
    }


def whence(found: Sequence[Member], facts: ModelFacts) -> str:
    """Where a model will be fetched, for people: the nodes that have it, else its source."""
    names = [member.announcement.name or member.announcement.node[:10] for member in found]
    if not names:
        return facts.source
    if len(names) > _SHOWN:
        return f"{', '.join(names[:_SHOWN])} and {len(names) - _SHOWN} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))
