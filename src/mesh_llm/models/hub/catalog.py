"""The catalogue: models that can be fetched by a short name, and which of them fits a machine. Data: catalog.toml."""

import re
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources

import msgspec

from mesh_llm.core.placement.fit import DoesNotFit, plan_solo
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions, ModelFacts
from mesh_llm.models.gguf.facts import split_part_name
from mesh_llm.models.hub.source_ref import SourceRef

_USEFUL_CONTEXT = 8_192
_SEPARATORS = re.compile(r"[\s\-_/]+")
_SHOWN = 12


class CatalogRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line and the console show of an entry. The fields are those of CatalogEntry."""

    name: str
    title: str
    size_bytes: int
    parameters: float
    active_parameters: float
    context: int
    quant: str
    licence: str
    capabilities: tuple[str, ...]
    draft: str
    source: str


class CatalogEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model.

    Attributes:
        name: the short name.
        title: the publisher's name.
        repository: `owner/name` on the hub.
        file: in the repository; empty if the model has several parts, which are found by `quant`.
        quant: quantisation.
        size_mb: decimal megabytes of all parts.
        parameters: billions.
        active_parameters: billions that are used per token, of a mixture of experts; 0 for dense models.
        context: trained context, tokens.
        layers: blocks.
        width: of the residual stream.
        vocabulary: tokens.
        cache_bytes: f16 KV cache of one token, all layers.
        window: length of the sliding window, in tokens; 0 if there is none.
        window_cache_bytes: the part of `cache_bytes` in layers with a sliding window.
        licence: identifier, as on the hub.
        capabilities: of chat, code, reasoning, tools, vision.
        draft: name of the entry of its draft model; empty if it has none.
        rank: quality; higher is better.
        checked: which of `file` and `size` were verified in public sources.
    """

    name: str
    title: str
    repository: str
    quant: str
    size_mb: int
    parameters: float
    context: int
    layers: int
    width: int
    vocabulary: int
    cache_bytes: int
    licence: str
    capabilities: tuple[str, ...]
    rank: int
    file: str = ""
    active_parameters: float = 0.0
    window: int = 0
    window_cache_bytes: int = 0
    draft: str = ""
    checked: tuple[str, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Approximate bytes of all parts."""
        return self.size_mb * 10**6

    @property
    def ref(self) -> SourceRef:
        """Its source."""
        return SourceRef(repository=self.repository, file=self.file, quant="" if self.file else self.quant)

    @property
    def stem(self) -> str:
        """The name of the fetched model; empty if only the fetch will show it."""
        return split_part_name(self.file.rsplit("/", 1)[-1].removesuffix(".gguf"))[0]

    def row(self) -> CatalogRow:
        """The row for the command line and the console."""
        return CatalogRow(
            name=self.name,
            title=self.title,
            size_bytes=self.size_bytes,
            parameters=self.parameters,
            active_parameters=self.active_parameters,
            context=self.context,
            quant=self.quant,
            licence=self.licence,
            capabilities=self.capabilities,
            draft=self.draft,
            source=str(self.ref),
        )

    def facts(self) -> ModelFacts:
        """Approximate facts for placement, before the file is fetched."""
        return ModelFacts(
            name=ModelName(self.stem or self.name),
            size_bytes=self.size_bytes,
            layers=self.layers,
            context_train=self.context,
            embedding_length=self.width,
            vocabulary=self.vocabulary,
            kv_bytes_per_token=self.cache_bytes,
            kv_window_bytes_per_token=self.window_cache_bytes,
            window=self.window,
            source=str(self.ref),
        )

    def fits(self, memory_bytes: int) -> bool:
        """Whether it runs in this much memory."""
        return not isinstance(plan_solo(self.facts(), memory_bytes, LaunchOptions()), DoesNotFit)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: tuple[CatalogEntry, ...]


@cache
def catalog() -> tuple[CatalogEntry, ...]:
    """All entries, smallest first."""
    text = (resources.files("mesh_llm.models") / "catalog.toml").read_text(encoding="utf-8")
    return tuple(sorted(msgspec.convert(tomllib.loads(text), _File).model, key=lambda entry: entry.size_mb))


def find_entry(asked: str, entries: Sequence[CatalogEntry] | None = None) -> CatalogEntry:
    """The entry that a user means: by its name, title or file, or by words that begin parts of one name only (`32b`).

    Raises:
        MeshError: `model_not_found` or `model_ambiguous`, with the choices.
    """
    entries = catalog() if entries is None else entries
    wanted = asked.strip().casefold()
    for entry in entries:
        if wanted in {entry.name, entry.title.casefold(), entry.file.casefold(), entry.stem.casefold()} - {""}:
            return entry
    words = [word for word in _SEPARATORS.split(wanted) if word]
    found = [entry for entry in entries if words and _has(entry, words)]
    if len(found) == 1:
        return found[0]
    if not found:
        shown = ", ".join(entry.name for entry in entries)
        raise MeshError(
            code="model_not_found",
            message=f"The catalogue has no model {asked!r}.",
            hint=f"It has {shown}. For any other model: hf:OWNER/REPO.",
            status=404,
        )
    shown = ", ".join(f"{entry.name} ({entry.size_mb / 1000:.1f} GB)" for entry in found[:_SHOWN])
    raise MeshError(
        code="model_ambiguous",
        message=f"{asked!r} could be any of {len(found)} models: {shown}.",
        hint="Use one of these names.",
        status=400,
    )


def recommend(memory_bytes: int, entries: Sequence[CatalogEntry] | None = None) -> CatalogEntry | None:
    """The best model that runs in this much memory with a useful context; None if none does."""
    entries = catalog() if entries is None else entries
    fitting = [entry for entry in entries if _context(entry, memory_bytes) >= min(_USEFUL_CONTEXT, entry.context)]
    return max(fitting, key=lambda entry: entry.rank, default=None)


def draft_pairs(entries: Sequence[CatalogEntry] | None = None) -> dict[str, str]:
    """Served names of models to those of their drafts, for `library.draft.find_draft`."""
    entries = catalog() if entries is None else entries
    by_name = {entry.name: entry for entry in entries}
    return {entry.stem: by_name[entry.draft].stem for entry in entries if entry.draft and entry.stem}


def entry_of(repository: str, file: str) -> CatalogEntry | None:
    """The entry of a file in a repository; None if there is none."""
    for entry in catalog():
        if entry.repository == repository and (entry.file == file or (not entry.file and entry.quant in file.upper())):
            return entry
    return None


def _has(entry: CatalogEntry, words: Sequence[str]) -> bool:
    parts = _SEPARATORS.split(entry.name)
    return all(any(part.startswith(word) for part in parts) for word in words)


def _context(entry: CatalogEntry, memory_bytes: int) -> int:
    plan = plan_solo(entry.facts(), memory_bytes, LaunchOptions())
    return 0 if isinstance(plan, DoesNotFit) else plan.context
