"""Prints where the pinned engine's source archive is kept in the virtual environment; downloads it where it is missing.

Tests compare the kernels that the firewall's rules were read from with it, and the RPC plugin is built from it.
"""

import sys
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded.archive import SDIST_NAME, provide_archive

KEPT = Path(sys.prefix) / "share" / "mesh-llm" / "source" / SDIST_NAME


def archive() -> Path:
    """The archive, checked. Raises MeshError."""
    return provide_archive(KEPT.parents[1], lambda _step, _text: None)


if __name__ == "__main__":
    try:
        print(archive())
    except MeshError as error:
        sys.exit(f"{error.message} {error.hint}")
