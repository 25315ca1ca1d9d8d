"""Where models lie on this machine: the user's directory, and the Hugging Face cache, which other tools use too.

Layout of the cache: huggingface_hub's documentation, "Understand caching". `models--OWNER--NAME/` holds `blobs/`
(contents, named by the hub's entity tag), `snapshots/COMMIT/` (links to contents) and `refs/` (the last known commit of
a branch or tag). `.locks/` beside it holds the locks of processes that fetch a file.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from mesh_llm.runtime.home import expand
from mesh_llm.runtime.transfer.partial_file import PARTIAL_SUFFIX

_COMMIT = re.compile(r"[0-9a-f]{40}")


def models_directory() -> Path:
    """The user's directory of models: `MESH_LLM_MODELS`, default `~/.models`."""
    return expand(os.environ.get("MESH_LLM_MODELS") or "~/.models")


def created_directory() -> Path:
    """Where the models lie that clients of the API made. Files appear there by being renamed."""
    return models_directory() / "created"


def hub_cache_directory() -> Path:
    """The cache: `HF_HUB_CACHE`, or `hub` in `HF_HOME`, or `~/.cache/huggingface/hub`."""
    explicit = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if explicit:
        return expand(os.path.expandvars(explicit))
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return expand(os.path.expandvars(home)) / "hub"


@dataclass(frozen=True, slots=True)
class CachedRepository:
    """One model repository in the cache at `root`."""

    root: Path
    repository: str

    @property
    def folder(self) -> Path:
        """Its directory."""
        return self.root / f"models--{self.repository.replace('/', '--')}"

    def content(self, etag: str) -> Path:
        """The place of a content."""
        return self.folder / "blobs" / etag

    def partial(self, etag: str) -> Path:
        """The place of a content while it is incomplete. Tools that clean the cache know the suffix."""
        return self.folder / "blobs" / f"{etag}{PARTIAL_SUFFIX}"

    def lock(self, etag: str) -> Path:
        """The lock to hold while a content is fetched. huggingface_hub takes the same."""
        return self.root / ".locks" / self.folder.name / f"{etag}.lock"

    def link(self, commit: str, path: str) -> Path:
        """The name of a file of a commit."""
        return self.folder / "snapshots" / commit / PurePosixPath(path)

    def publish(self, commit: str, path: str, etag: str) -> Path:
        """Give a content its name: by a relative link, or by moving it where links cannot be made. Returns the name."""
        link, content = self.link(commit, path), self.content(etag)
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.exists():
            return link
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.relpath(content, link.parent))
        except FileExistsError:
            return link
        except OSError:
            content.replace(link)
        return link

    def remember(self, revision: str, commit: str) -> None:
        """Note the commit of a branch or tag."""
        if _COMMIT.fullmatch(revision):
            return
        place = self.folder / "refs" / revision
        place.parent.mkdir(parents=True, exist_ok=True)
        if not place.exists() or place.read_bytes() != commit.encode():
            place.write_text(commit)

    def remembered(self, revision: str) -> str:
        """The commit that was last noted for a branch or tag, or the revision itself if it is one; empty if unknown."""
        if _COMMIT.fullmatch(revision):
            return revision
        try:
            commit = (self.folder / "refs" / revision).read_text(encoding="utf-8", errors="replace").strip()
        except OSError:
            return ""
        return commit if _COMMIT.fullmatch(commit) else ""


def cached_source(path: Path, root: Path) -> str:
    """The source of a file in the cache at `root`, as in ModelFacts.source; empty if it is in no snapshot."""
    try:
        folder, kind, commit, *rest = path.relative_to(root).parts
    except ValueError:
        return ""
    words = folder.removeprefix("models--").split("--")
    if not folder.startswith("models--") or kind != "snapshots" or len(words) != 2 or not rest:
        return ""
    return f"hf:{words[0]}/{words[1]}:{'/'.join(rest)}@{commit}"
