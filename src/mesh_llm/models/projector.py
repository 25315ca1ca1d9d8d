"""Which vision projector goes with a model: publishers put them side by side and say it in the file's name."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path

from mesh_llm.core.model import ModelFacts

_WORDS = re.compile(r"[-_.\s]+")
_QUANT = re.compile(r"(i?q\d.*|[km]|[sml]|xs|xxs|nl|\d|b?f\d+|fp\d+|mxfp4|ud)", re.IGNORECASE)
_ARCHITECTURES = {
    "cogvlm": ("cogvlm",),
    "cohere2v": ("cohere2",),
    "gemma3": ("gemma3",),
    "gemma3na": ("gemma3n",),
    "gemma3nv": ("gemma3n",),
    "gemma4a": ("gemma4",),
    "gemma4ua": ("gemma4",),
    "gemma4uv": ("gemma4",),
    "gemma4v": ("gemma4",),
    "glm4v": ("glm4",),
    "lfm2": ("lfm2",),
    "lfm2a": ("lfm2",),
    "llama4": ("llama4",),
    "qwen2.5vl_merger": ("qwen2vl",),
    "qwen2vl_merger": ("qwen2vl",),
    "qwen3vl_merger": ("qwen3vl", "qwen35"),
}
"""Kind of projector to the beginnings of the architectures that it is made for (llama.cpp, tools/mtmd/clip-impl.h and
convert_hf_to_gguf.py). Kinds that go with many architectures, such as `mlp`, are not here."""
_GENERIC = frozenset({"mmproj", "model", "gguf", "vision", "projector", "encoder"})


def choose_projector(
    model: ModelFacts, candidates: Mapping[Path, ModelFacts], beside: Collection[str] = ()
) -> Path | None:
    """The projector among `candidates` (files beside the model's) that fits it; None if none does.

    It must be made for the model's architecture and width where it says so, and its name must not speak of another
    model. One whose name speaks of no model fits only where all models `beside` it are the same one, in several
    quantisations. Of several that fit, the most specific by name, then the one in half precision.

    Args:
        model: a chat model.
        candidates: what the projectors' headers say.
        beside: names of all chat models in the model's directory.
    """
    alone = len({_about(name) for name in beside}) <= 1
    fitting = [
        (path, facts)
        for path, facts in candidates.items()
        if facts.embedding_length in {0, model.embedding_length}
        and model.architecture.startswith(_ARCHITECTURES.get(facts.architecture, ("",)))
        and _named(path) <= _words(model.name)
        and (alone or _named(path))
    ]
    ranked = sorted(
        fitting, key=lambda item: (-len(_named(item[0])), not _is_half(item[0]), item[1].size_bytes, item[0])
    )
    return ranked[0][0] if ranked else None


def _words(name: str) -> frozenset[str]:
    return frozenset(word.casefold() for word in _WORDS.split(name) if word)


def _named(path: Path) -> frozenset[str]:
    """The words of a projector's name that are about the model that it belongs to."""
    return _about(path.stem)


def _about(name: str) -> frozenset[str]:
    return frozenset(word for word in _words(name) if word not in _GENERIC and not _QUANT.fullmatch(word))


def _is_half(path: Path) -> bool:
    return bool(_words(path.stem) & {"f16", "fp16"})
