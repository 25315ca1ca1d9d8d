"""A node whose home cannot be written ends with a sentence, and not with the place in the program where it was seen."""

import errno
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mesh_llm.core.errors import MeshError

_OF_THE_DISK = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


@contextmanager
def told_of_disk(home: Path) -> Generator[None]:
    """Say of a disk that is full or read-only what it is; other errors pass.

    Raises:
        MeshError: `home_unwritable`.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        raise MeshError(
            code="home_unwritable",
            message=f"{home} cannot be written: {error.strerror}.",
            hint="Make room on that disk, or keep the node's files on another one: MESH_LLM_HOME=DIR mesh-llm ...",
            status=507,
        ) from error
