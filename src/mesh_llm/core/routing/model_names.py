"""What a user means by a model's name: exact, any case, a file's name, or the beginning of exactly one."""

from collections.abc import Iterable, Mapping
from typing import TypeAlias

import msgspec

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus

Candidates: TypeAlias = Mapping[ModelName, tuple[str, ...]]
"""Served names, each with its further exact names (aliases, such as the file stem)."""


class Ambiguous(msgspec.Struct, frozen=True):
    """The name is the beginning of several: `choices` are their full names."""

    asked: str
    choices: tuple[ModelName, ...]


class NotFound(msgspec.Struct, frozen=True):
    """No model goes by that name (None: none was given, and there is no default); `choices` is what there is."""

    asked: str | None
    choices: tuple[ModelName, ...]


def match(asked: str, candidates: Candidates) -> ModelName | Ambiguous | NotFound:
    """Find the one candidate that `asked` means.

    In this order: a served name, an alias, either in any case, the same for a file name (`dir/Name.gguf`), and last
    the beginning of exactly one of them in any case.
    """
    for rule in (_exact, _folded, _beginning):
        found = rule(asked, candidates)
        if len(found) == 1:
            return found[0]
        if found:
            return Ambiguous(asked, found)
    return NotFound(asked, tuple(sorted(candidates)))


def resolve(asked: str | None, snapshot: RoutingSnapshot) -> ModelRoute | Ambiguous | NotFound:
    """Find the model that a request means; no name means the node's own.

    A beginning that several models share means the one of them that is served, where only one is.
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


def _beginning(asked: str, candidates: Candidates) -> tuple[ModelName, ...]:
    start = _stem(asked)
    return tuple(
        sorted(
            name
            for name, aliases in candidates.items()
            if any(known.casefold().startswith(start) for known in (name, *aliases))
        )
    )


def _stem(asked: str) -> str:
    """The file stem in lower case, if the name looks like a GGUF file's; else the name in lower case."""
    folded = asked.casefold()
    if not folded.endswith(".gguf"):
        return folded
    return folded.replace("\\", "/").rsplit("/", 1)[-1].removesuffix(".gguf")
