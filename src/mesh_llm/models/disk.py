"""Room on the disk for models, and errors that say what to do when the disk fails. Used wherever models are stored."""

import errno
import os
import shutil
from pathlib import Path

from mesh_llm.core.types.errors import MeshError

SPARE_BYTES = 512 << 20
"""What a fetch leaves free."""


class Usage:
    """Free and total bytes of the disk that holds `folder`, which need not exist yet. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        here = next(place for place in (folder, *folder.parents) if place.exists())
        usage = shutil.disk_usage(here)
        self.free, self.total = usage.free, usage.total


def allocated_bytes(path: Path) -> int:
    """Bytes that a file takes on the disk: less than its length where it has holes. 0 if it is not there."""
    try:
        return path.stat().st_blocks * 512
    except OSError:
        return 0


def require_space(folder: Path, needed: int) -> None:
    """Refuse a fetch before its first byte if the disk cannot hold it. Raises MeshError `disk_full`, OSError."""
    if needed <= 0:
        return
    free = Usage(folder).free
    if needed + SPARE_BYTES > free:
        raise MeshError(
            code="disk_full",
            message=f"{needed / 1e9:.1f} GB more are needed in {folder}, but {free / 1e9:.1f} GB are free.",
            hint="Free space there, or set HF_HOME (or MESH_LLM_MODELS) to a directory on another disk.",
            status=507,
        )


def disk_error(error: OSError) -> MeshError:
    """The disk failed while a model was stored."""
    full = error.errno == errno.ENOSPC
    where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
    return MeshError(
        code="disk_full" if full else "disk_failed",
        message=f"The model cannot be stored: {where}{error.strerror or error}.",
        hint=("Free space" if full else "Check the disk and the permissions of its directory")
        + ", then try again: what has arrived is kept. HF_HOME names another directory.",
        status=507,
    )


def removal_error(error: OSError, what: str) -> MeshError:
    """A file of `what` could not be removed."""
    return MeshError(
        code="disk_failed",
        message=f"{error.filename or what} cannot be removed: {error.strerror or error}.",
        hint="Check the permissions of its directory, then run the same command again.",
    )
