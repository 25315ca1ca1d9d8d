"""Resolves the name in a request to a model: exact, in any case, a file's name, or a unique prefix.

Clients also write names as other services do: `tiny:latest`, `openai/tiny`, `hf.co/owner/tiny-GGUF:Q4_K_M`, `tiny[1m]`.
What no model has for a name is read without these marks.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

import msgspec

from mesh_llm.core.routing.aliases import NO_ALIASES, Aliases
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
    """No model has that name; `choices` are the known ones. `asked` None: no name was given and there is no default.

    `alias`: the name that was asked for, if it is an alias of `asked`.
    """

    asked: str | None
    choices: tuple[ModelName, ...]
    alias: str = ""


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


def resolve(
    asked: str | None, snapshot: RoutingSnapshot, aliases: Aliases = NO_ALIASES
) -> ModelRoute | Ambiguous | NotFound:
    """Find the model that a request names. No name means the node's default model.

    A prefix of several models means the only one of them that is served. Marks of other services are left out of a name
    that is not found with them. An alias comes before other readings of a name, except a model of exactly that name; a
    pattern comes last.
    """
    models = snapshot.models
    if not asked:
        route = models.get(snapshot.default) if snapshot.default is not None else None
        return route or NotFound(None, _served_first(models.values()))
    route = models.get(ModelName(asked))
    if route is not None:
        return route
    meant = _meant(asked, aliases.named) if aliases else None
    if meant is not None:
        return _aliased(asked, meant, snapshot)
    candidates = {name: route.aliases for name, route in models.items()}
    found = match(asked, candidates)
    if isinstance(found, NotFound):
        found = _match_unmarked(asked, candidates)
    if isinstance(found, NotFound):
        meant = _meant(asked, aliases.matched) if aliases else None
        return NotFound(asked, _served_first(models.values())) if meant is None else _aliased(asked, meant, snapshot)
    if isinstance(found, Ambiguous):
        served = [name for name in found.choices if models[name].status is not ModelStatus.COLD]
        return models[served[0]] if len(served) == 1 else found
    return models[found]


_NOTE = re.compile(r"\[[^\[\]]*\]$")
_GGUF = re.compile(r"[-_.]gguf$", re.IGNORECASE)
_LATEST = "latest"


def _aliased(alias: str, meant: str, snapshot: RoutingSnapshot) -> ModelRoute | Ambiguous | NotFound:
    """The model that an alias means. The name that it stands for is no alias itself."""
    found = resolve(meant, snapshot)
    return NotFound(meant, found.choices, alias) if isinstance(found, NotFound) else found


def _meant(asked: str, find: Callable[[str], str | None]) -> str | None:
    """What an alias stands for, also where a name carries the marks of another service."""
    tagged, bare = _unmarked(asked)
    return next((meant for name in (asked, *tagged, *bare) if (meant := find(name)) is not None), None)


def _match_unmarked(asked: str, candidates: Candidates) -> ModelName | Ambiguous | NotFound:
    """Like `match`, for a name with the marks of another service.

    A tag belongs to the name: `qwen2.5:3b` is not `qwen2.5-7b`, but may be a model that is called `qwen2.5` only.
    """
    tagged, bare = _unmarked(asked)
    for rules, readings in (((_exact, _folded), tagged), ((_prefix,), tagged), ((_exact, _folded), bare)):
        for reading in readings:
            for rule in rules:
                found = rule(reading, candidates)
                if found:
                    return found[0] if len(found) == 1 else Ambiguous(asked, found)
    return NotFound(asked, ())


def _unmarked(asked: str) -> tuple[list[str], list[str]]:
    """The readings of a name without the marks of another service: with its tag, and without."""
    name, tag = _NOTE.sub("", asked), ""
    before, colon, after = name.rpartition(":")
    if colon and "/" not in after:
        name, tag = before, after
    parts = name.split("/")
    bare = [_GGUF.sub("", "/".join(parts[-count:])) for count in (len(parts), 2, 1) if count <= len(parts)]
    bare = [reading for reading in dict.fromkeys(bare) if reading.strip("/")]
    tagged = bare if tag.casefold() in ("", _LATEST) else [f"{reading}-{tag}" for reading in bare]
    return tagged, bare


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
