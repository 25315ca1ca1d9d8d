import errno
import os
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.log import explain_disk_errors
from mesh_llm.daemon.main import run
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.admission import credentials as store


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
async def test_a_start_without_room_ends_with_what_to_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path, data: bytes, mode: int = 0o600) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store, "write_atomic", write)
    with pytest.raises(MeshError) as told:
        await run(Settings(home=tmp_path / "home"))
    assert told.value.code == "home_unwritable"
    assert str(tmp_path / "home") in told.value.message
    assert "MESH_LLM_HOME" in told.value.hint


def test_other_errors_pass() -> None:
    with pytest.raises(PermissionError), explain_disk_errors(Path("/home")):
        raise PermissionError(errno.EACCES, "no")
