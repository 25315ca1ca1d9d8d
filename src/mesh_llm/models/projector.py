"""Which vision projector goes with a model: publishers put them side by side and say it in the file's name."""

import re
from collections.abc import Mapping
from pathlib import Path

from mesh_llm.core.model import ModelFacts

_WORDS = re.compile(r"[-_.\s]+")
_QUANT = re.compile(r"(i?q\d.*|[km]|[sml]|xs|xxs|nl|\d|b?f\d+|fp\d+|mxfp4|ud)", re.IGNORECASE)
_GENERIC = frozenset({"mmproj", "model", "gguf", "vision", "projector", "encoder"})


def choose_projector(model: ModelFacts, candidates: Mapping[Path, ModelFacts]) -> Path | None:
    """The projector among `candidates` (files beside the model's) that fits it; None if none does.

    It must give vectors of the model's width where it tells, and its name must not speak of another model. Of several
    that fit, the most specific by name, then the one in half precision.
    """
    fitting = [
        (path, facts)
        for path, facts in candidates.items()
        if facts.embedding_length in {0, model.embedding_length} and _named(path) <= _words(model.name)
    ]
    ranked = sorted(
        fitting, key=lambda item: (-len(_named(item[0])), not _is_half(item[0]), item[1].size_bytes, item[0])
    )
    return ranked[0][0] if ranked else None


def _words(name: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in _WORDS.split(name) if word)


def _named(path: Path) -> frozenset[str]:
    """The words of a projector's name that are about the model that it belongs to."""
    return frozenset(word for word in _words(path.stem) if word not in _GENERIC and not _QUANT.fullmatch(word))


def _is_half(path: Path) -> bool:
    return bool(_words(path.stem) & {"f16", "fp16"})
