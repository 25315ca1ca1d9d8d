"""Reads a model's files anew and compares them with what their publisher said of them."""

import hashlib
import re
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec

from mesh_llm.models.gguf_header import read_header
from mesh_llm.models.gguf_types import GgufError
from mesh_llm.models.library import LocalModel
from mesh_llm.models.transfer import FetchCancelledError, Progress

_SHA256 = re.compile(r"[0-9a-f]{64}")
_OLLAMA = re.compile(r"sha256-([0-9a-f]{64})")
_READ_BYTES = 4 << 20


class FileVerdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of one file.

    Attributes:
        path: the file.
        sha256: of its content now.
        expected: what it should be; empty where nobody said.
        problem: why it cannot be used, as a clause; empty if nothing is wrong with it.
    """

    path: str
    sha256: str = ""
    expected: str = ""
    problem: str = ""


def verify(
    model: LocalModel, on_progress: Callable[[Progress], None], cancel: threading.Event | None = None
) -> list[FileVerdict]:
    """Check all files of a model, its projector included. Blocks, for about a second a gigabyte.

    Raises:
        FetchCancelledError: `cancel` was set.
    """
    paths = [*model.paths, *([model.projector] if model.projector is not None else [])]
    total = sum(path.stat().st_size for path in paths if path.exists())
    done = 0
    verdicts: list[FileVerdict] = []
    for path in paths:
        digest = hashlib.sha256()
        try:
            read_header(path)
            with path.open("rb") as file:
                while piece := file.read(_READ_BYTES):
                    if cancel is not None and cancel.is_set():
                        raise FetchCancelledError
                    digest.update(piece)
                    done += len(piece)
                    on_progress(Progress(phase="checking", done_bytes=done, total_bytes=total))
        except GgufError as error:
            verdicts.append(FileVerdict(path=str(path), problem=error.reason))
            continue
        except OSError as error:
            verdicts.append(FileVerdict(path=str(path), problem=f"it cannot be read: {error.strerror or error}"))
            continue
        found, expected = digest.hexdigest(), expected_sha256(path)
        problem = "its content is not what was published" if expected not in {"", found} else ""
        verdicts.append(FileVerdict(path=str(path), sha256=found, expected=expected, problem=problem))
    return verdicts


def expected_sha256(path: Path) -> str:
    """The SHA-256 that a store of contents by digest names a file by (Hugging Face, Ollama); empty elsewhere."""
    name = path.resolve().name
    if _SHA256.fullmatch(name):
        return name
    ollama = _OLLAMA.fullmatch(name)
    return ollama[1] if ollama else ""
