"""What a repository on the hub holds, and which of its files a user means."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath

import msgspec

from mesh_llm.core.errors import MeshError
from mesh_llm.models.facts import split_part_name
from mesh_llm.models.source_ref import SourceRef, is_safe_path

# The usual compromise first; what publishers release natively (MXFP4) is as good.
_PREFERRED = ("Q4_K_M", "MXFP4", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q8_0", "Q6_K", "F16", "BF16")
_NOT_MODELS = re.compile(r"(^|[-_./])(mmproj|imatrix)", re.IGNORECASE)
_SHOWN = 12


class RepositoryFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file. `sha256`: 64 hex digits where the hub tells it (large files), or empty."""

    path: str
    size: int
    sha256: str = ""


class RemoteModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a repository: its file, or all of its parts in order.

    Attributes:
        name: as it will be called: file stem without part numbers.
        files: in order.
        repository: `owner/name`.
        revision: the commit that the files belong to.
        projectors: the repository's vision projectors, which go with any of its models.
    """

    name: str
    files: tuple[RepositoryFile, ...]
    repository: str
    revision: str
    projectors: tuple[RepositoryFile, ...] = ()

    @property
    def size_bytes(self) -> int:
        """All parts together, without projectors."""
        return sum(file.size for file in self.files)

    @property
    def source(self) -> str:
        """Where it comes from, as in ModelFacts.source."""
        return str(SourceRef(repository=self.repository, file=self.files[0].path, revision=self.revision))


def models_in(files: Iterable[RepositoryFile], repository: str, revision: str) -> list[RemoteModel]:
    """All whole models among a repository's files, by name; unsafe paths and other files are left out."""
    files = [file for file in files if file.path.lower().endswith(".gguf") and is_safe_path(file.path)]
    projectors = tuple(file for file in files if "mmproj" in PurePosixPath(file.path).name.lower())
    groups: dict[tuple[PurePosixPath, str, int], dict[int, RepositoryFile]] = {}
    for file in files:
        path = PurePosixPath(file.path)
        if not _NOT_MODELS.search(path.name):
            stem, number, count = split_part_name(path.stem)
            groups.setdefault((path.parent, stem, count), {})[number] = file
    return [
        RemoteModel(
            name=stem,
            files=tuple(parts[number] for number in sorted(parts)),
            repository=repository,
            revision=revision,
            projectors=projectors,
        )
        for (_, stem, count), parts in sorted(groups.items(), key=lambda item: (item[0][1], str(item[0][0])))
        if sorted(parts) == list(range(1, count + 1))
    ]


def choose(models: Sequence[RemoteModel], ref: SourceRef) -> RemoteModel:
    """The model that `ref` means: the file's, the one of that quantisation, or the usual one.

    Raises:
        MeshError: `source_not_found` or `source_ambiguous`, with the choices.
    """
    if not models:
        raise MeshError(
            code="source_not_found",
            message=f"{ref.repository} holds no GGUF model.",
            hint="Look for a repository whose name ends in -GGUF: `mesh-llm models search NAME`.",
            status=404,
        )
    if ref.file:
        found = [model for model in models if any(file.path == ref.file for file in model.files)]
    elif ref.quant:
        found = _closest([model for model in models if _has_quant(model.name, ref.quant)], ref.quant)
    else:
        found = _usual(models)
    if len(found) == 1:
        return found[0]
    if not found:
        message = f"{ref.repository} has no model {ref.file or ref.quant}."
        raise MeshError(code="source_not_found", message=message, hint=_choices(models), status=404)
    message = f"{ref} could be any of {len(found)} models."
    raise MeshError(code="source_ambiguous", message=message, hint=_choices(found), status=400)


def _has_quant(name: str, quant: str) -> bool:
    return re.search(rf"(^|[-_.]){re.escape(quant)}($|[-.])", name, re.IGNORECASE) is not None


def _closest(models: list[RemoteModel], quant: str) -> list[RemoteModel]:
    """Of several with a quantisation, those that have no further mark to it (as in `UD-Q4_K_M`)."""
    if len(models) <= 1:
        return models
    plain = [model for model in models if not re.search(rf"(^|[-_.])UD-{re.escape(quant)}", model.name, re.IGNORECASE)]
    return plain or models


def _usual(models: Sequence[RemoteModel]) -> list[RemoteModel]:
    if len(models) == 1:
        return list(models)
    for quant in _PREFERRED:
        found = _closest([model for model in models if _has_quant(model.name, quant)], quant)
        if found:
            return found
    return list(models)


def _choices(models: Sequence[RemoteModel]) -> str:
    shown = ", ".join(model.files[0].path for model in models[:_SHOWN])
    more = f" and {len(models) - _SHOWN} more" if len(models) > _SHOWN else ""
    return f"Give the file: {shown}{more}."
