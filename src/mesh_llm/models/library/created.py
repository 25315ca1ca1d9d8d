"""Models that clients of the API make on this machine: of files that they upload, or as further names of models here.

They lie in a directory of their own among the user's models. Uploaded files wait in another one, under the SHA-256 of
their content, until a model is made of them. No path comes from a client: names are checked letter by letter.
"""

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.disk import SPARE_BYTES, Usage, disk_error, removal_error, require_space
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import GgufError, read_header
from mesh_llm.models.hub.cache import created_directory
from mesh_llm.models.library.library import LocalModel

_STEM = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
_PART = re.compile(r"-\d{5}-of-\d{5}$")
"""A part of a model in several files, which one alone is not."""
_DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})")
_MOST_UPLOADS = 4
_KEPT_SECONDS = 86_400.0
_CHECKED_BYTES = 256 << 20
"""Bytes after which the free space is looked at again, where the size of an upload is not known."""


def file_stem(name: str) -> str:
    """The name of a model's file: `hub/model:tag` is `model-tag`. Raises MeshError `invalid_model_name` (400)."""
    bare, _, tag = name.rpartition("/")[2].partition(":")
    stem = bare if tag in ("", "latest") else f"{bare}-{tag}"
    if not _STEM.fullmatch(stem) or ".." in stem or stem.lower().endswith(".gguf") or _PART.search(stem):
        raise MeshError(
            "invalid_model_name",
            f"{name[:200]!r} cannot be the name of a model.",
            "Use letters, digits, `.`, `_` and `-`, beginning with a letter or a digit.",
            400,
            param="model",
        )
    return stem


def link_model(model: LocalModel, name: str) -> str:
    """Give a model that is here a further name; returns it. Blocks: it copies only where the disk cannot link.

    Raises:
        MeshError: `invalid_model_name`, `not_copyable`, `disk_full`, `disk_failed`.
    """
    stem = file_stem(name)
    if len(model.paths) > 1:
        raise MeshError(
            "not_copyable", f"{model.name} has several files: it cannot get another name.",
            "Give it an alias in the configuration file.", 400,
        )  # fmt: skip
    _place(model.path, stem)
    return stem


def make_model(blob: Path, name: str) -> str:
    """Make a model of an uploaded file; returns its name. Blocks.

    Raises:
        MeshError: `invalid_model_name`; `model_invalid` (400) for no GGUF file that can be served.
    """
    stem = file_stem(name)
    try:
        read_facts([read_header(blob)], stem)
    except GgufError as error:
        raise MeshError(
            "model_invalid", f"The file cannot be used: {error.reason}.", "Upload a GGUF file.", 400
        ) from error
    except OSError as error:
        raise disk_error(error) from error
    _place(blob, stem)
    with contextlib.suppress(OSError):
        blob.unlink()
    return stem


def remove_created(model: LocalModel) -> bool:
    """Remove a model that a client made; False if it is none. Raises MeshError `disk_failed`."""
    directory = created_directory()
    if any(path.parent != directory for path in model.paths):
        return False
    try:
        for path in model.paths:
            path.unlink(missing_ok=True)
    except OSError as error:
        raise removal_error(error, model.name) from error
    return True


def _place(source: Path, stem: str) -> None:
    """Put a file among the created models, as a link to the same content if the disk can."""
    directory = created_directory()
    part = directory / f".{stem}.{secrets.token_hex(4)}"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        source = source.resolve()
        try:
            os.link(source, part)
        except OSError:
            require_space(directory, source.stat().st_size)
            shutil.copyfile(source, part)
        part.replace(directory / f"{stem}.gguf")
    except OSError as error:
        raise disk_error(error) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


class BlobStore:
    """Uploaded files in one directory, named by their digest. Those that nobody used within a day are removed."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._open = 0

    def find(self, digest: str) -> Path | None:
        """The file with this digest (`sha256:` and 64 hex digits), if it is here. Raises MeshError (400)."""
        path = self._path(digest)
        return path if path.is_file() else None

    def begin(self, digest: str, size: int | None) -> "Upload":
        """Begin to store a file. `size`: its bytes, where they are known. Blocks shortly.

        Raises:
            MeshError: `invalid_digest` (400), `too_many_uploads` (429), `disk_full`, `disk_failed` (507).
        """
        path = self._path(digest)
        if self._open >= _MOST_UPLOADS:
            raise MeshError("too_many_uploads", f"{_MOST_UPLOADS} files are being uploaded.", "Try again.", 429, 5.0)
        try:
            self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._remove_old()
            require_space(self._directory, size or 0)
            upload = Upload(path, self._closed)
        except OSError as error:
            raise disk_error(error) from error
        self._open += 1
        return upload

    def _closed(self) -> None:
        self._open -= 1

    def _path(self, digest: str) -> Path:
        match = _DIGEST.fullmatch(digest)
        if match is None:
            raise MeshError("invalid_digest", "invalid digest format", "A digest is sha256: and 64 hex digits.", 400)
        return self._directory / f"sha256-{match[1]}"

    def _remove_old(self) -> None:
        oldest = time.time() - _KEPT_SECONDS
        for path in self._directory.glob("sha256-*"):
            with contextlib.suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


class Upload:
    """A file that is being uploaded. `finish` or `abort` must be called; methods block."""

    def __init__(self, path: Path, closed: Callable[[], None]) -> None:
        """`closed`: called once when it has ended."""
        self._path = path
        self._closed = closed
        self._part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        self._file = self._part.open("xb")
        self._digest = hashlib.sha256()
        self._unchecked = 0

    def write(self, data: bytes) -> None:
        """Add bytes. Raises MeshError `disk_full`, `disk_failed`."""
        try:
            self._unchecked += len(data)
            if self._unchecked > _CHECKED_BYTES:
                self._unchecked = 0
                if Usage(self._path.parent).free < SPARE_BYTES:
                    require_space(self._path.parent, SPARE_BYTES)
            self._file.write(data)
            self._digest.update(data)
        except OSError as error:
            raise disk_error(error) from error

    def finish(self) -> None:
        """Keep the file, if its content has the digest. Raises MeshError `digest_mismatch` (400), `disk_failed`."""
        try:
            found = f"sha256-{self._digest.hexdigest()}"
            if found != self._path.name:
                message = f'digest mismatch, expected "{self._path.name}", got "{found}"'
                raise MeshError("digest_mismatch", message, "", 400)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.replace(self._path)
        except OSError as error:
            raise disk_error(error) from error
        finally:
            self.abort()

    def abort(self) -> None:
        """Drop what came, unless it was kept. Idempotent."""
        closed, self._closed = self._closed, _nothing
        closed()
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._part.unlink(missing_ok=True)


def _nothing() -> None:
    """What an upload calls after its end."""
