"""Sources of models, `hf:owner/repo[:file or quant][@revision]` or a Hugging Face URL; and a repository's models."""

import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import msgspec

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.gguf.facts import split_part_name

DEFAULT_REVISION = "main"
_HOSTS = frozenset({"hf.co", "huggingface.co", "www.huggingface.co"})
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,250}", re.ASCII)
_QUANT = re.compile(r"[A-Za-z][\w.-]{0,40}", re.ASCII)
_FORM = "Write hf:OWNER/REPO, hf:OWNER/REPO:Q4_K_M or hf:OWNER/REPO:FILE.gguf; add @REVISION if it matters."


class SourceRef(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a repository of the hub.

    Attributes:
        repository: `owner/name`.
        file: path of the (first) file in the repository; empty if it is not given.
        quant: quantisation, as in `Q4_K_M`; empty if it is not given, or `file` is.
        revision: branch, tag or commit.
    """

    repository: str
    file: str = ""
    quant: str = ""
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        what = f":{self.file or self.quant}" if self.file or self.quant else ""
        revision = f"@{self.revision}" if self.revision != DEFAULT_REVISION else ""
        return f"hf:{self.repository}{what}{revision}"


def is_source(spec: str) -> bool:
    """Whether `spec` is a source, rather than a path or a name."""
    return spec.startswith(("hf:", "http://", "https://"))


def parse_source(spec: str, endpoint: str = "") -> SourceRef:
    """Parse a source. `endpoint`: the URL of another hub (`HF_ENDPOINT`), which is accepted as well.

    Raises:
        MeshError: `source_invalid`.
    """
    if spec.startswith(("http://", "https://")):
        return _from_url(spec, endpoint)
    if not spec.startswith("hf:"):
        raise _invalid(spec, "it does not begin with hf:")
    rest, at, revision = spec.removeprefix("hf:").removeprefix("//").rpartition("@")
    if not at or revision.lower().endswith(".gguf"):
        # No revision ends like this: the @ belongs to the file's name.
        rest, at, revision = spec.removeprefix("hf:").removeprefix("//"), "", ""
    path, colon, what = rest.partition(":")
    owner, _, tail = path.partition("/")
    name, slash, inside = tail.partition("/")
    if slash and colon:
        raise _invalid(spec, "it names a file twice")
    if colon and not what:
        raise _invalid(spec, "nothing follows the colon")
    file = inside if slash else (what if what.lower().endswith(".gguf") else "")
    quant = what if colon and not file else ""
    if at and not revision:
        raise _invalid(spec, "nothing follows the @")
    return _checked(spec, f"{owner}/{name}", file, quant, revision or DEFAULT_REVISION)


def _from_url(spec: str, endpoint: str) -> SourceRef:
    try:
        parts, base = urlsplit(spec), urlsplit(endpoint)
        host = parts.hostname
    except ValueError:
        raise _invalid(spec, "it is not an address") from None
    inside = parts.path
    if base.netloc and parts.netloc == base.netloc:
        inside = inside.removeprefix(base.path)
    elif host not in _HOSTS:
        raise _invalid(spec, "models are fetched from the Hugging Face hub only")
    words = [unquote(word) for word in inside.strip("/").split("/")]
    if len(words) < 2:
        raise _invalid(spec, "it names no repository")
    repository, verb, rest = "/".join(words[:2]), words[2:3], words[3:]
    if not verb:
        return _checked(spec, repository, "", "", DEFAULT_REVISION)
    if verb[0] not in {"blob", "resolve", "tree", "raw"} or not rest:
        raise _invalid(spec, "it is not the address of a repository or of a file in one")
    # The revision of a pull request has slashes: refs/pr/N.
    depth = 3 if rest[:2] == ["refs", "pr"] else 1
    file = "/".join(rest[depth:])
    if verb[0] == "tree":
        file = ""
    elif not file:
        raise _invalid(spec, "it names no file")
    return _checked(spec, repository, file, "", "/".join(rest[:depth]))


def _checked(spec: str, repository: str, file: str, quant: str, revision: str) -> SourceRef:
    if not _REPOSITORY.fullmatch(repository) or ".." in repository:
        raise _invalid(spec, f"{repository!r} is not the name of a repository")
    if not _REVISION.fullmatch(revision) or ".." in revision:
        raise _invalid(spec, f"{revision!r} is not a revision")
    if quant and not _QUANT.fullmatch(quant):
        raise _invalid(spec, f"{quant!r} is neither a file nor a quantisation")
    if file and not is_safe_path(file):
        raise _invalid(spec, f"{file!r} is not a file in a repository")
    if file and not file.lower().endswith(".gguf"):
        raise _invalid(spec, f"{file!r} is not a GGUF file")
    return SourceRef(repository=repository, file=file, quant=quant, revision=revision)


def is_safe_path(path: str) -> bool:
    """Whether a path from a hub stays inside the directory into which it is put."""
    if len(path) > 500 or not path.isprintable() or "\\" in path or ":" in path:
        return False
    return all(word not in {"", ".", ".."} for word in path.split("/"))


def _invalid(spec: str, reason: str) -> MeshError:
    return MeshError(
        code="source_invalid",
        message=f"{spec} is not the source of a model: {reason}.",
        hint=_FORM,
        status=400,
        param="model",
    )


# The usual compromise first. MXFP4, in which some publishers release, is as good.
_PREFERRED = ("Q4_K_M", "MXFP4", "Q4_K_S", "Q4_0", "IQ4_XS", "Q5_K_M", "Q8_0", "Q6_K", "F16", "BF16")
_NOT_MODELS = re.compile(r"(^|[-_./])(mmproj|imatrix)", re.IGNORECASE)
_SHOWN = 12


class RepositoryFile(msgspec.Struct, frozen=True, kw_only=True):
    """One file. `sha256`: 64 hex digits, or empty: the hub has it for large files only."""

    path: str
    size: int
    sha256: str = ""


class RemoteModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a repository: its file, or all of its parts in order.

    Attributes:
        name: its name once fetched: the stem of its file, without part numbers.
        files: in order.
        repository: `owner/name`.
        revision: the commit that the files belong to.
        projectors: the repository's vision projectors; each fits all of its models.
    """

    name: str
    files: tuple[RepositoryFile, ...]
    repository: str
    revision: str
    projectors: tuple[RepositoryFile, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of all parts, without projectors."""
        return sum(file.size for file in self.files)

    @property
    def source(self) -> str:
        """Its source, as in ModelFacts.source."""
        return str(SourceRef(repository=self.repository, file=self.files[0].path, revision=self.revision))


def models_in(files: Iterable[RepositoryFile], repository: str, revision: str) -> list[RemoteModel]:
    """All complete models among a repository's files, by name. Unsafe paths and other files are ignored."""
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
    """The model that `ref` means: by file, by quantisation, or else the usual one.

    Raises:
        MeshError: `source_not_found` or `source_ambiguous`, with the choices.
    """
    if not models:
        raise MeshError(
            code="source_not_found",
            message=f"{ref.repository} holds no GGUF model.",
            hint="Find a repository whose name ends in -GGUF: mesh-llm models search NAME",
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
    """Of several models with a quantisation, those without a prefix to it (such as `UD-` in `UD-Q4_K_M`)."""
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
    return f"Name the file: {shown}{more}."
