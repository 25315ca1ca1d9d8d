"""Who else has a model's files and gives them away."""

from collections.abc import Iterable, Sequence

from mesh_llm.core.ids import ModelName
from mesh_llm.core.member import Member
from mesh_llm.core.model import ModelFacts


def holders(members: Sequence[Member], facts: ModelFacts) -> list[Member]:
    """Nodes that offer the very same file; those with the shortest way first. Doubted ones come last."""
    if not facts.fingerprint:
        return []
    found = [
        member
        for member in members
        if member.announcement.shares
        and any(
            (other.name, other.fingerprint) == (facts.name, facts.fingerprint) for other in member.announcement.on_disk
        )
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
    shown = " and ".join(filter(None, (", ".join(names[:2][:-1]), names[:2][-1])))
    return shown if len(names) <= 2 else f"{shown} and {len(names) - 2} more"
