"""A node whose home cannot be used ends with a sentence, and not with the place in the program where it was seen."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from mesh_llm.runtime.home import explain


@contextmanager
def told_of_disk(home: Path) -> Generator[None]:
    """Say of an OSError about the home what is wrong with it; other errors pass.

    Raises:
        MeshError: `home_unwritable`, `home_unusable`.
    """
    try:
        yield
    except OSError as error:
        explained = explain(error, home)
        if explained is None:
            raise
        raise explained from error
