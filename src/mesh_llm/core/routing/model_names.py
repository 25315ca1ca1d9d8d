"""Resolves the name in a request to a model: exact, in any case, a file's name, or a unique prefix."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import msgspec

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus

Candidates: TypeAlias = Mapping[ModelName, tuple[str, ...]]
"""Served names, each with its further exact names (aliases, such as the file stem)."""


class Ambiguous(msgspec.Struct, frozen=True):
    """The name is a prefix of several models; `choices` are their full names."""

    asked: str
    choices: tuple[ModelName, ...]


class NotFound(msgspec.Struct, frozen=True):
    """No model has that name; `choices` are the known ones. `asked` None: no name was given and there is no default."""

    asked: str | None
    choices: tuple[ModelName, ...]


def match(asked: str, candidates: Candidates) -> ModelName | Ambiguous | NotFound:
    """Find the candidate that `asked` names.

    Tried in this order: a served name; an alias; either in any case, also as a file name (`dir/Name.gguf`); a prefix of
    exactly one of them in any case.
    """
    for rule in (_exact, _folded, _prefix):
        found = rule(asked, candidates)
        if len(found) == 1:
            return found[0]
        if found:
            return Ambiguous(asked, found)
    return NotFound(asked, tuple(sorted(candidates)))


def resolve(asked: str | None, snapshot: RoutingSnapshot) -> ModelRoute | Ambiguous | NotFound:
    """Find the model that a request names. No name means the node's default model.

    A prefix of several models means the only one of them that is served.
    """
    models = snapshot.models
    if not asked:
        route = models.get(snapshot.default) if snapshot.default is not None else None
        return route or NotFound(None, _served_first(models.values()))
    route = models.get(ModelName(asked))
    if route is not None:
        return route
    found = match(asked, {name: route.aliases for name, route in models.items()})
    if isinstance(found, NotFound):
        return NotFound(asked, _served_first(models.values()))
    if isinstance(found, Ambiguous):
        served = [name for name in found.choices if models[name].status is not ModelStatus.COLD]
        return models[served[0]] if len(served) == 1 else found
    return models[found]


def _served_first(routes: Iterable[ModelRoute]) -> tuple[ModelName, ...]:
    return tuple(
        route.name for route in sorted(routes, key=lambda route: (route.status is ModelStatus.COLD, route.name))
    )


def _exact(asked: str, candidates: Candidates) -> tuple[ModelName, ...]:
    if asked in candidates:
        return (ModelName(asked),)
    return tuple(sorted(name for name, aliases in candidates.items() if asked in aliases))


def _folded(asked: str, candidates: Candidates) -> tuple[ModelName, ...]:
    wanted = {asked.casefold(), _stem(asked)}
    return tuple(
        sorted(
            name
            for name, aliases in candidates.items()
            if any(known.casefold() in wanted for known in (name, *aliases))
        )
    )


def _prefix(asked: str, candidates: Candidates) -> tuple[ModelName, ...]:
    start = _stem(asked)
    return tuple(
        sorted(
            name
            for name, aliases in candidates.items()
            if any(known.casefold().startswith(start) for known in (name, *aliases))
        )
    )


def _stem(asked: str) -> str:
    """In lower case: the stem of a GGUF file's name, else the whole name."""
    folded = asked.casefold()
    if not folded.endswith(".gguf"):
        return folded
    return folded.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".gguf")
