"""Finds a small model that can guess ahead for a large one, and says why another cannot."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mesh_llm.core.errors import MeshError
from mesh_llm.core.model import ModelKind
from mesh_llm.models.gguf_types import GgufError
from mesh_llm.models.library import Library, LocalModel
from mesh_llm.models.vocabulary import Vocabulary, difference, read_vocabulary

BUILTIN_PAIRS = {"tiny": "tiny-draft"}
"""Model to draft, by name."""

_LEAST_RATIO = 8
_MOST_BYTES = 3 << 30


@dataclass(frozen=True, slots=True)
class DraftChoice:
    """What was found: `draft` None where nothing was; `reason` says why this one, or why none."""

    draft: LocalModel | None
    reason: str


def find_draft(model: LocalModel, library: Library, pairs: Mapping[str, str] = BUILTIN_PAIRS) -> DraftChoice:
    """Choose a draft for `model` from the library.

    First the one that it is paired with by name; then any draft, and then any other chat model of at most an eighth
    of its size, whose vocabulary is proven to be the same, the smallest first. Reads headers; blocks.
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
            how = "it is made for it" if draft is paired else "it has the same vocabulary"
            return DraftChoice(draft, f"{draft.name} drafts for {model.name}: {how}")
        refused = refused or f"{draft.name} cannot draft for {model.name}: {unfit}"
    return DraftChoice(None, refused or f"there is no small model with the vocabulary of {model.name}")


def require_draft(model: LocalModel, draft: LocalModel) -> None:
    """Check a draft that the user chose. Raises MeshError `draft_mismatch`."""
    try:
        unfit = mismatch(read_vocabulary(model.path), draft)
    except (GgufError, OSError) as error:
        unfit = f"{model.name} cannot be read: {_reason(error)}"
    if unfit is not None:
        raise MeshError(
            code="draft_mismatch",
            message=f"{draft.name} cannot draft for {model.name}: {unfit}.",
            hint="A draft is a smaller model of the same family. Leave --draft out: then one that fits is looked for.",
            status=400,
        )


def mismatch(vocabulary: Vocabulary, draft: LocalModel) -> str | None:
    """Why `draft` cannot guess for the model with this vocabulary, as a clause; None if it can."""
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
            if other is not paired and small and other.facts.size_bytes <= _MOST_BYTES:
                yield other


def _reason(error: GgufError | OSError) -> str:
    return error.reason if isinstance(error, GgufError) else (error.strerror or str(error))
