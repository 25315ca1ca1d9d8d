"""The models that can be had by name: what each is, whence it comes, and which fits a machine. Data: catalog.toml."""

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
        name: what users call it.
        title: as its publisher calls it.
        repository: `owner/name` on the hub.
        file: in the repository; empty where there are several parts, found by `quant`.
        quant: quantisation.
        size_mb: decimal megabytes of all parts.
        parameters: billions.
        active_parameters: billions that a token passes through, for mixtures of experts; 0 for dense models.
        context: trained context, tokens.
        layers: blocks.
        width: of the residual stream.
        vocabulary: tokens.
        cache_bytes: f16 KV cache of one token, all layers.
        window: tokens that windowed layers see; 0 without.
        window_cache_bytes: the part of `cache_bytes` in windowed layers.
        licence: identifier, as the hub has it.
        capabilities: of chat, code, reasoning, tools, vision.
        draft: name of the entry that drafts for it; empty for none.
        rank: higher is better, for choosing the best that fits.
        checked: which of `file` and `size` were found in public sources.
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
        """Bytes of all parts, as far as known."""
        return self.size_mb * 10**6

    @property
    def ref(self) -> SourceRef:
        """Where it is fetched from."""
        return SourceRef(repository=self.repository, file=self.file, quant="" if self.file else self.quant)

    @property
    def stem(self) -> str:
        """The name that the fetched model goes by; empty where that is known only then."""
        return split_part_name(self.file.rsplit("/", 1)[-1].removesuffix(".gguf"))[0]

    def row(self) -> CatalogRow:
        """What is shown of it, on the command line and by the console."""
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
        """What placement needs to know, before the file is there."""
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
        """Whether it runs in so much memory."""
        return not isinstance(plan_solo(self.facts(), memory_bytes, LaunchOptions()), DoesNotFit)


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    model: tuple[CatalogEntry, ...]


@cache
def catalog() -> tuple[CatalogEntry, ...]:
    """All entries, smallest first."""
    text = (resources.files("mesh_llm.models") / "catalog.toml").read_text(encoding="utf-8")
    return tuple(sorted(msgspec.convert(tomllib.loads(text), _File).model, key=lambda entry: entry.size_mb))


def find_entry(asked: str, entries: Sequence[CatalogEntry] | None = None) -> CatalogEntry:
    """The entry that a user means: its name, its file's name, or words that begin parts of exactly one name (`32b`).

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
            hint=f"It has {shown}. Any other: hf:OWNER/REPO.",
            status=404,
        )
    shown = ", ".join(f"{entry.name} ({entry.size_mb / 1000:.1f} GB)" for entry in found[:_SHOWN])
    raise MeshError(
        code="model_ambiguous",
        message=f"{asked!r} could be any of {len(found)} models: {shown}.",
        hint="Give one of these names.",
        status=400,
    )


def recommend(memory_bytes: int, entries: Sequence[CatalogEntry] | None = None) -> CatalogEntry | None:
    """The best model that runs in so much memory with a context of use; None if none does."""
    entries = catalog() if entries is None else entries
    fitting = [entry for entry in entries if _context(entry, memory_bytes) >= min(_USEFUL_CONTEXT, entry.context)]
    return max(fitting, key=lambda entry: entry.rank, default=None)


def draft_pairs(entries: Sequence[CatalogEntry] | None = None) -> dict[str, str]:
    """Served name of a model to that of its draft, for `draft.find_draft`."""
    entries = catalog() if entries is None else entries
    by_name = {entry.name: entry for entry in entries}
    return {entry.stem: by_name[entry.draft].stem for entry in entries if entry.draft and entry.stem}


def entry_of(repository: str, file: str) -> CatalogEntry | None:
    """The entry that a repository's file belongs to; None if it is in none."""
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
