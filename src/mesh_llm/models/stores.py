"""Models that other programs keep on this machine: read, never written.

Sources: Hugging Face cache: see `hub_cache`. Ollama: its documentation (`OLLAMA_MODELS`) and the layout of its store:
`manifests/HOST/NAMESPACE/MODEL/TAG` are OCI image manifests whose layers lie in `blobs/sha256-DIGEST`. LM Studio: its
documentation, models lie in `models/PUBLISHER/REPOSITORY/` below its home.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mesh_llm.models.hub_cache import cached_source, hub_cache_directory
from mesh_llm.models.model_files import ModelFiles, find_files, group
from mesh_llm.runtime.home import expand, user_home

_MODEL_LAYER = "application/vnd.ollama.image.model"
_PROJECTOR_LAYER = "application/vnd.ollama.image.projector"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_MANIFEST_BYTES = 1 << 20
_MOST_MANIFESTS = 2_000


@dataclass(frozen=True, slots=True)
class Found:
    """A model's files, with what the place where they lie says of them.

    Attributes:
        files: the files.
        source: where they came from, as in ModelFacts.source; empty if nobody says.
        projector: the vision projector that belongs to it; None if the place says nothing.
        whole: files appear in this place by being renamed, so they are never seen while they are written.
    """

    files: ModelFiles
    source: str = ""
    projector: Path | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Store:
    """Another program's store of models below `root`, which need not exist. `models` reads what is there now."""

    name: str
    root: Path
    reader: Callable[[Path], Iterator[Found]]

    def models(self) -> Iterator[Found]:
        """Everything in the store that looks like a model."""
        return self.reader(self.root)


def known_stores() -> tuple[Store, ...]:
    """The stores that this machine may have, as the environment names them."""
    return (
        Store("Hugging Face", hub_cache_directory(), read_hub_cache),
        Store("Ollama", ollama_directory(), read_ollama),
        *(Store("LM Studio", root, read_tree) for root in lm_studio_directories()),
    )


def ollama_directory() -> Path:
    """`OLLAMA_MODELS`, or `~/.ollama/models`; where neither is there, the place of Ollama's own Linux service."""
    named = os.environ.get("OLLAMA_MODELS")
    own = expand(named) if named else user_home() / ".ollama" / "models"
    service = Path("/usr/share/ollama/.ollama/models")
    return service if not own.exists() and os.access(service, os.R_OK | os.X_OK) else own


def lm_studio_directories() -> tuple[Path, ...]:
    """LM Studio's homes, the present and the former."""
    home = user_home()
    try:
        chosen = Path((home / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        chosen = home / ".lmstudio"
    return chosen / "models", home / ".cache" / "lm-studio" / "models"


def read_tree(root: Path) -> Iterator[Found]:
    """A tree of GGUF files."""
    return (Found(files) for files in group(find_files(root)))


def read_hub_cache(root: Path) -> Iterator[Found]:
    """The Hugging Face cache: snapshots of repositories."""
    for repository in sorted(root.glob("models--*")):
        for files in group(find_files(repository / "snapshots")):
            yield Found(files, cached_source(files.paths[0], root), whole=True)


class _Layer(msgspec.Struct, frozen=True):
    media_type: str = msgspec.field(name="mediaType", default="")
    digest: str = ""


class _Manifest(msgspec.Struct, frozen=True):
    layers: tuple[_Layer, ...] = ()


def read_ollama(root: Path) -> Iterator[Found]:
    """Ollama's store. A model is called as Ollama calls it, `llama3.2:3b`, without `:latest`."""
    manifests = sorted((root / "manifests").glob("*/*/*/*"))[:_MOST_MANIFESTS]
    for place in manifests:
        manifest = _manifest(place)
        if manifest is None:
            continue
        name = _ollama_name(place)
        model, projector = _blob(root, manifest, _MODEL_LAYER), _blob(root, manifest, _PROJECTOR_LAYER)
        if projector is not None:
            yield Found(ModelFiles(f"mmproj-{name}", (projector,), 1))
        if model is not None:
            yield Found(ModelFiles(name, (model,), 1), projector=projector)


def _manifest(place: Path) -> _Manifest | None:
    try:
        with place.open("rb") as file:
            return msgspec.json.decode(file.read(_MANIFEST_BYTES), type=_Manifest)
    except (OSError, msgspec.MsgspecError):
        return None


def _blob(root: Path, manifest: _Manifest, kind: str) -> Path | None:
    for layer in manifest.layers:
        if layer.media_type == kind and _DIGEST.fullmatch(layer.digest):
            blob = root / "blobs" / layer.digest.replace(":", "-")
            return blob if blob.exists() else None
    return None


def _ollama_name(place: Path) -> str:
    host, namespace, name, tag = place.parts[-4:]
    full = name if tag == "latest" else f"{name}:{tag}"
    if namespace != "library":
        full = f"{namespace}/{full}"
    return full if host == "registry.ollama.ai" else f"{host}/{full}"
