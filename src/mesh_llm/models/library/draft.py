"""Finds a draft model for speculative decoding: a small model with the same vocabulary, by the headers of both.

The rules are llama.cpp's (`common_speculative_are_compatible` in common/speculative.cpp), which refuses
other pairs. Merges must be equal as well, so that both models split text into the same tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import ModelKind
from mesh_llm.core.types.model_settings import DRAFT_KINDS
from mesh_llm.models.gguf.header import GgufArray, GgufError, GgufHeader, ValueType, read_header
from mesh_llm.models.library.files import FileStamp
from mesh_llm.models.library.library import Library, LocalModel

_MOST_DIFFERENCE = 128
_FIRST_COMPARED = 5
_BEGINS_WITH_BOS = frozenset({"llama", "bert"})
_BPE_WITH_BOS = frozenset({"falcon3", "lfm2", "llama-bpe", "llama-v3", "llama3", "midm-2.0", "pixtral"})


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """A model's tokenizer, from its header. `tokens` and `merges` are digests and positions, not texts.

    Attributes:
        path: the file.
        kind: `tokenizer.ggml.model`.
        tokens: texts of all tokens.
        merges: of a byte-pair tokenizer; None for others.
        begins: id of the token that begins every text, if one does.
        ends: id of the token that ends every text, if one does.
    """

    path: Path
    kind: str
    tokens: GgufArray
    merges: GgufArray | None
    begins: int | None
    ends: int | None


def read_vocabulary(path: Path) -> Vocabulary:
    """The tokenizer in a model's (first) file; cached while the file is unchanged. Raises GgufError, OSError."""
    return _read(path, FileStamp.of(path))


@lru_cache(maxsize=256)
def _read(path: Path, _: FileStamp) -> Vocabulary:
    header = read_header(path)
    tokens = header.array("tokenizer.ggml.tokens")
    if tokens is None or tokens.element is not ValueType.STRING:
        raise GgufError("it has no vocabulary")
    return Vocabulary(
        path=path,
        kind=header.text("tokenizer.ggml.model"),
        tokens=tokens,
        merges=header.array("tokenizer.ggml.merges"),
        begins=_added(header, "bos", header.text("tokenizer.ggml.model") in _BEGINS_WITH_BOS or _bpe_with_bos(header)),
        ends=_added(header, "eos", default=False),
    )


def difference(one: Vocabulary, other: Vocabulary) -> str | None:
    """How two vocabularies differ, as a clause; None if they are the same. Raises OSError."""
    if one.kind != other.kind:
        return f"their tokenizers differ: {one.kind or 'none'} and {other.kind or 'none'}"
    if one.begins != other.begins:
        return f"their texts begin with different tokens: {_id(one.begins)} and {_id(other.begins)}"
    if one.ends != other.ends:
        return f"their texts end with different tokens: {_id(one.ends)} and {_id(other.ends)}"
    if abs(one.tokens.count - other.tokens.count) > _MOST_DIFFERENCE:
        return f"they have {one.tokens.count} and {other.tokens.count} tokens"
    if (one.merges and one.merges.digest) != (other.merges and other.merges.digest):
        return "they merge characters into tokens differently"
    if one.tokens.digest == other.tokens.digest:
        return None
    # Vocabularies are padded to different lengths. The tokens that both have must be equal.
    first = _first_different(one, other)
    return None if first is None else f"token {first} differs"


def _first_different(one: Vocabulary, other: Vocabulary) -> int | None:
    texts, others = _raw(one), _raw(other)
    at = there = 0
    for token in range(min(one.tokens.count, other.tokens.count)):
        text, at = _next(texts, at)
        same, there = _next(others, there)
        if text != same and token >= _FIRST_COMPARED:
            return token
    return None


def _raw(vocabulary: Vocabulary) -> bytes:
    with vocabulary.path.open("rb") as file:
        file.seek(vocabulary.tokens.offset)
        return file.read(vocabulary.tokens.length)


def _next(raw: bytes, at: int) -> tuple[bytes, int]:
    begin = at + 8
    end = begin + int.from_bytes(raw[at:begin], "little")
    return raw[begin:end], end


def _bpe_with_bos(header: GgufHeader) -> bool:
    return header.text("tokenizer.ggml.model") == "gpt2" and header.text("tokenizer.ggml.pre") in _BPE_WITH_BOS


def _added(header: GgufHeader, which: str, default: bool) -> int | None:
    added = header.metadata.get(f"tokenizer.ggml.add_{which}_token", default)
    return header.integer(f"tokenizer.ggml.{which}_token_id") if added is True else None


def _id(token: int | None) -> str:
    return "none" if token is None else f"token {token}"


BUILTIN_PAIRS = {"tiny": "tiny-draft"}
"""Model to draft, by name."""

_LEAST_RATIO = 8
_MOST_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """The draft, or None; and the reason for either."""

    draft: LocalModel | None
    reason: str


def find_draft(model: LocalModel, library: Library, pairs: Mapping[str, str] = BUILTIN_PAIRS) -> DraftChoice:
    """Choose a draft for `model` from the library.

    First the one that is paired with it by name; then draft models, and then other chat models, of at most an eighth of
    its size, the smallest first. The vocabulary must be the same. Reads headers. Blocks.
    """
    if model.facts.kind is not ModelKind.CHAT:
        return DraftChoice(None, f"{model.name} does not generate text")
    try:
        vocabulary = read_vocabulary(model.path)
    except (GgufError, OSError) as error:
        return DraftChoice(None, f"{model.name} cannot be read: {_reason(error)}")
    paired = library.find(pairs.get(model.name, ""))
    refused = ""
    for draft in _candidates(model, library, paired):
        unfit = mismatch(vocabulary, draft)
        if unfit is None:
            how = "it is made for this model" if draft is paired else "it has the same vocabulary"
            return DraftChoice(draft, f"{draft.name} drafts for {model.name}: {how}")
        refused = refused or f"{draft.name} cannot draft for {model.name}: {unfit}"
    return DraftChoice(None, refused or f"there is no small model with the vocabulary of {model.name}")


def require_draft(model: LocalModel, draft: LocalModel) -> None:
    """Check the draft that the user chose. Raises MeshError `draft_mismatch`."""
    try:
        unfit = mismatch(read_vocabulary(model.path), draft) or _made_for_another(model, draft)
    except (GgufError, OSError) as error:
        unfit = f"{model.name} cannot be read: {_reason(error)}"
    if unfit is not None:
        raise MeshError(
            code="draft_mismatch",
            message=f"{draft.name} cannot draft for {model.name}: {unfit}.",
            hint="Use a smaller model of the same family; or leave --draft out, and one that fits is chosen.",
            status=400,
        )


_READS_LAYERS = frozenset({"eagle3", "dflash"})
_GIVES_LAYERS = frozenset({
    "bailingmoe3", "deepseek4", "gemma4", "gpt-oss", "hunyuan-dense", "hunyuan_vl", "k2-horizon", "lfm2", "lfm2moe",
    "llama", "mimo2", "minimax-01", "minimax-m2", "muse-glimmer", "nanbeige", "nemotron_h", "nemotron_h_moe", "qwen3",
    "qwen35", "qwen35moe", "qwen3moe", "qwen3next", "qwen4exp",
})  # fmt: skip
"""Architectures whose layers' inputs the pinned engine gives a draft: `t_layer_inp` in llama.cpp, src/models. Seen with
another one: it starts, and ends at the first request."""


def _made_for_another(model: LocalModel, draft: LocalModel) -> str | None:
    """Why a draft cannot read this model's hidden states, as a clause; None if it can, or reads none.

    llama.cpp does not check it: its process would end. Source: src/models/eagle3.cpp, common/speculative.cpp.
    """
    kind = draft.facts.architecture
    if kind not in DRAFT_KINDS:
        return None
    if kind in _READS_LAYERS and model.facts.architecture not in _GIVES_LAYERS:
        return f"the engine gives no hidden states of {model.facts.architecture} models"
    header, width = read_header(draft.path), model.facts.embedding_length
    reads = header.integer(f"{kind}.target_hidden_size")
    if reads is not None and reads != width:
        return f"it reads hidden states of {reads} numbers, and those of {model.name} have {width}"
    layers = header.array(f"{kind}.target_layers")
    last = max((layer for layer in (layers.values or () if layers else ()) if isinstance(layer, int)), default=0)
    if last > model.facts.layers:
        return f"it reads layer {last}, and {model.name} has {model.facts.layers}"
    return None


def mismatch(vocabulary: Vocabulary, draft: LocalModel) -> str | None:
    """Why `draft` cannot draft for the model with this vocabulary, as a clause; None if it can."""
    try:
        return difference(vocabulary, read_vocabulary(draft.path))
    except (GgufError, OSError) as error:
        return f"it cannot be read: {_reason(error)}"


def _candidates(model: LocalModel, library: Library, paired: LocalModel | None) -> Iterable[LocalModel]:
    if paired is not None:
        yield paired
    smaller = (other for other in library.models.values() if other.facts.kind is ModelKind.CHAT)
    for group in (library.drafts.values(), smaller):
        for other in sorted(group, key=lambda candidate: candidate.facts.size_bytes):
            small = other.facts.size_bytes * _LEAST_RATIO <= model.facts.size_bytes
            if other.facts.architecture in DRAFT_KINDS:
                # It reads the hidden states of one model, and the headers do not say of which.
                continue
            if other is not paired and small and other.facts.size_bytes <= _MOST_BYTES:
                yield other


def _reason(error: GgufError | OSError) -> str:
    return error.reason if isinstance(error, GgufError) else (error.strerror or str(error))
