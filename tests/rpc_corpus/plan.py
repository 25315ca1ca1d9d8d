"""Which recordings are made of which architecture."""

from dataclasses import dataclass
from typing import Any

from tests.rpc_corpus import architectures
from tests.rpc_corpus.driver import Case

from mesh_llm.core.types.model import GGML_TYPES

IMPOSSIBLE: dict[str, str] = {
    "clip": "no language model: the engine loads it beside one, on the host (--mmproj)",
    "gptj": "the engine names it and has no code for it",
}
"""Architectures that the engine names but that no model can be made of, with the reason."""

_NOT_WEIGHTS = frozenset({0, 1, 9, 15, 24, 25, 26, 27, 28})
"""F32 and F16, which every architecture has; q8_1 and q8_K, which only kernels make; whole numbers and F64."""

_CACHES = (
    "flash-f32", "flash-bf16", "flash-q4_0", "flash-q4_1", "flash-q5_0", "flash-q5_1", "flash-iq4_nl", "k-q8_0",
    "unified", "plain-unified", "swa-full", "large",
)  # fmt: skip
"""Kinds of memory and of batches; recorded of one architecture for each kind of attention."""

_WITH_ALL_CACHES = frozenset({"llama", "gemma3", "deepseek2", "gpt-oss", "falcon-h1"})
_POOLED = {
    "bert": ("mean", "cls", "rank"), "nomic-bert-moe": ("mean",), "modern-bert": ("mean", "rank"),
    "qwen3": ("last", "rank"), "gemma-embedding": ("mean",), "gemma-embedding2": ("mean",), "llama-embed": ("mean",),
    "llama": ("mean", "embeddings"), "jina-bert-v3": ("mean",),
}  # fmt: skip
_WITH_ADAPTERS = frozenset({"llama", "qwen3moe", "gemma3"})
_MIXED = frozenset({"llama", "gemma3", "qwen2vl", "qwen3vl"})
"""With tokens and an image's rows in one micro-batch."""

_ONE_SEQUENCE = frozenset({"t5", "t5encoder"})
_ONLY_FROM_FILES = frozenset({"gemma4-assistant", "clef"})
"""Architectures whose loader asks the file for a tensor, so that they cannot be made without one."""

_DRAFTS = {"eagle3": ("llama", "draft"), "dflash": ("llama", "draft"), "gemma4-assistant": ("gemma4", "mtp")}
"""Models that guess for another one and share its context: that one's architecture, and the kind of context."""

_NEXT_TOKEN_LAYERS = frozenset({
    "deepseek2", "deepseek32", "glm-dsa", "qwen35", "qwen35moe", "step35", "hy_v3", "qwen3next", "glm4moe",
})  # fmt: skip
"""Architectures with layers that guess the token after the next one (MTP)."""


@dataclass(frozen=True)
class Planned:
    """A case, the name of its recordings, and over how many workers the model is split."""

    name: str
    case: Case
    workers: int = 1


def cases(architecture: str) -> list[Planned]:
    """All cases of an architecture."""
    found: list[Planned] = []

    def add(name: str, workers: int = 1, **fields: Any) -> None:
        found.append(Planned(name, Case(architecture=architecture, plugin="", endpoints=(), **fields), workers))

    if architecture in _DRAFTS:
        target, context = _DRAFTS[architecture]
        if architecture not in _ONLY_FROM_FILES:
            add("most", contexts=(context,), target=target)
        add("least", least=True, weights=1, contexts=(context,), target=target)
        return found
    if architecture in _ONE_SEQUENCE:
        add("most", contexts=("one",))
        add("least", least=True, weights=1, contexts=("one",))
        add("most-split", workers=2, contexts=("one",), output_on_host=True)
        return found
    if architecture not in _ONLY_FROM_FILES:
        add("most", contexts=("plain", "flash", "flash-q8_0"))
        add("most-split", workers=2, contexts=("flash",), output_on_host=True)
        add("rows", contexts=("rows",))
    if architecture in architectures.DENSE_AND_EXPERTS:
        add("dense", experts=False, contexts=("plain",))
    add("least", least=True, weights=1, contexts=("plain", "flash-q4_0"))
    add("fused", least=True, fused=True, weights=1, contexts=("short", "short-flash"))
    add("quantised", least=True, weights=12, contexts=("short", "short-flash"))
    if architecture in _WITH_ALL_CACHES:
        for context in _CACHES:
            add(context, least=True, weights=8, contexts=(context,))
    for context in _POOLED.get(architecture, ()):
        add(context, contexts=(context,))
    if architecture in _MIXED:
        add("mixed", contexts=("mixed",))
    if architecture in _WITH_ADAPTERS:
        add("lora", least=True, weights=1, contexts=("lora", "control"))
    if architecture in _NEXT_TOKEN_LAYERS:
        layers = {"block_count": architectures.LAYERS + 1, "nextn_predict_layers": 1}
        add("mtp", contexts=("mtp",), target=architecture, more=layers)
    if architecture == "qwen3moe":
        for kind in sorted(GGML_TYPES.keys() - _NOT_WEIGHTS):
            add(f"weights-{kind}", least=True, weights=kind, contexts=("short",))
    return found
