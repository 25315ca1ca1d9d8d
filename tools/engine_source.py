"""Prints where the pinned engine's source archive is kept in the virtual environment; downloads it where it is missing.

Tests compare the kernels that the firewall's rules were read from with it, and the RPC plugin is built from it.
"""

import sys
import tempfile
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded.plugin import SDIST_NAME, check_digest, download

KEPT = Path(sys.prefix) / "share" / "mesh-llm" / "source" / SDIST_NAME


def archive() -> Path:
    """The archive, checked. Raises MeshError."""
    if not KEPT.exists():
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=KEPT.parent) as name:
            found = download(Path(name))
            check_digest(found)
            found.replace(KEPT)
    check_digest(KEPT)
    return KEPT


if __name__ == "__main__":
    try:
        print(archive())
    except MeshError as error:
        sys.exit(f"{error.message} {error.hint}")
