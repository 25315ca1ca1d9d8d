"""The models that this daemon can launch: the library on disk, and files that the user named by path."""

import asyncio
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import msgspec

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import LaunchOptions, ModelFacts
from mesh_llm.models.catalog import draft_pairs
from mesh_llm.models.draft import BUILTIN_PAIRS, find_draft, require_draft
from mesh_llm.models.facts_cache import FactsCache
from mesh_llm.models.library import Library, LocalModel
from mesh_llm.models.resolve import looks_like_path, resolve
from mesh_llm.models.want import Remote, interpret

DEFAULT_MODEL = "tiny"


class Shelf:
    """Finds a model's file by its served name."""

    def __init__(self, library: Library, cache: FactsCache, *, projectors: bool = True) -> None:
        """`projectors` False: models go without the vision projectors that lie beside them."""
        self._projectors = projectors
        self._unfit: set[Path] = set()
        self._library = self._fitted(library)
        self._cache = cache
        self._named: dict[ModelName, LocalModel] = {}
        self.drafts: dict[str, str] = {}

    @property
    def library(self) -> Library:
        """What is on disk, with the projectors that are to be used."""
        return self._library

    @library.setter
    def library(self, library: Library) -> None:
        self._library = self._fitted(library)

    def without_projector(self, name: ModelName) -> None:
        """The engine did not start with the projector of this model: it goes without from now on."""
        model = self.find(name)
        if model is None or model.projector is None:
            return
        self._unfit.add(model.projector)
        self._library = self._fitted(self._library)
        if name in self._named:
            self._named[name] = _bare(self._named[name])

    def _fitted(self, library: Library) -> Library:
        """The library with projectors taken from the models that are to go without."""

        def fits(model: LocalModel) -> bool:
            return model.projector is None or (self._projectors and model.projector not in self._unfit)

        models = {name: model if fits(model) else _bare(model) for name, model in library.models.items()}
        return replace(library, models=models)

    def resolve(self, spec: str) -> LocalModel:
        """What a user means by a name or a path; a file outside of the library is remembered.

        Raises:
            MeshError: see models.resolve.
        """
        if not looks_like_path(spec) and (named := self._named.get(ModelName(spec))) is not None:
            return named
        model = resolve(spec, self.library, self._cache)
        known = self.library.find(model.name)
        if known is None or known.path != model.path:
            self._named[model.name] = model
        return model

    def interpret(self, spec: str) -> LocalModel | Remote:
        """What a user means, on this machine, in the catalogue, or on the hub; nothing is remembered.

        Raises:
            MeshError: see models.want.
        """
        if not looks_like_path(spec) and (named := self._named.get(ModelName(spec))) is not None:
            return named
        return interpret(spec, self.library, self._cache, os.environ.get("HF_ENDPOINT", ""))

    def find(self, name: ModelName) -> LocalModel | None:
        """The model of this served name."""
        return self._named.get(name) or self.library.find(name)

    def facts(self) -> tuple[ModelFacts, ...]:
        """All models for the core, drafts included: it counts their memory."""
        models = {**self.library.drafts, **self.library.models, **self._named}
        return tuple(models[name].facts for name in sorted(models))

    def wanted(self, specs: tuple[str, ...]) -> tuple[ModelName, ...]:
        """Served names of `--model` options. The first must be here; the others may be had by others of the mesh only.

        Raises:
            MeshError: see models.resolve.
        """
        names: list[ModelName] = []
        for position, spec in enumerate(specs):
            try:
                names.append(self.resolve(spec).name)
            except MeshError as error:
                if position == 0 or error.code != "model_not_found" or looks_like_path(spec):
                    raise
                names.append(ModelName(spec))
        return tuple(dict.fromkeys(names))

    def with_draft(self, options: LaunchOptions, model: LocalModel | None) -> LaunchOptions:
        """The options with the draft's path instead of what the user called it; checked to draft for `model`. Blocks.

        Raises:
            MeshError: see models.resolve and models.draft.
        """
        if options.draft is None or not options.use_draft:
            return options
        draft = self.resolve(options.draft)
        if model is not None:
            require_draft(model, draft)
        return msgspec.structs.replace(options, draft=str(draft.path))

    def draft_of(self, options: LaunchOptions) -> LocalModel | None:
        """The draft that `with_draft` put into options."""
        if options.draft is None or not options.use_draft:
            return None
        return self.resolve(options.draft)

    async def find_drafts(self, models: Iterable[LocalModel] | None = None) -> None:
        """Find who can guess ahead for these models, or for all; kept in `drafts`, by name.

        Headers are read on a thread; `drafts` changes on the loop only, so that two searches at once lose nothing.
        """
        chosen = [*self.library.models.values(), *self._named.values()] if models is None else list(models)
        found = await asyncio.to_thread(drafts_among, chosen, self.library)
        names = {model.name for model in chosen}
        kept = {} if models is None else {name: own for name, own in self.drafts.items() if name not in names}
        self.drafts = kept | found


def _bare(model: LocalModel) -> LocalModel:
    return replace(model, projector=None, facts=msgspec.structs.replace(model.facts, companion_bytes=0))


def drafts_among(models: Iterable[LocalModel], library: Library) -> dict[str, str]:
    """Model to draft, by name, for those that have one. Reads headers; blocks."""
    pairs = BUILTIN_PAIRS | draft_pairs()
    found = ((model.name, find_draft(model, library, pairs).draft) for model in models)
    return {str(name): str(draft.name) for name, draft in found if draft is not None}
