"""A home that others may write to: they could put another key, or another plugin, in the place of the user's own."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh_llm.runtime.home import Home


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_who_takes_a_home_lets_nobody_else_write_into_it(tmp_path: Path) -> None:
    root = tmp_path / "home"
    root.mkdir(0o777)
    (root / "mesh").mkdir(0o777)
    (root / "cache").mkdir(0o775)
    home = Home(root)
    lock = home.lock()
    (home.logs).mkdir()
    for directory in (root, home.mesh, home.cache, home.logs):
        assert not stat.S_IMODE(directory.stat().st_mode) & 0o022
    # Who may read is the user's own decision.
    assert stat.S_IMODE(root.stat().st_mode) == 0o755
    lock.release()
