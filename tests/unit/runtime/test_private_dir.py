"""A directory for sockets: nobody else enters, nothing is left behind, what is in use stays."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.local_socket import PrivateDirectory

_HOLDS = """
import signal
from mesh_llm.runtime.local_socket import PrivateDirectory
print(PrivateDirectory().path, flush=True)
signal.pause()
"""


@pytest.fixture(autouse=True)
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="base-") as name:
        monkeypatch.setenv("XDG_RUNTIME_DIR", name)
        yield Path(name)


def test_only_this_user_enters_and_it_goes_with_what_is_in_it(base: Path) -> None:
    directory = PrivateDirectory()
    assert directory.path.parent == base
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700
    (directory.path / "secret").write_text("x")
    directory.close()
    directory.close()
    assert not list(base.iterdir())


def test_a_place_where_others_can_write_is_not_taken(base: Path) -> None:
    base.chmod(0o777)
    directory = PrivateDirectory()
    assert directory.path.parent != base
    directory.close()


def test_what_a_killed_process_left_is_removed_and_what_is_used_is_not(base: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", _HOLDS], stdout=subprocess.PIPE, env=dict(os.environ)) as other:
        assert other.stdout is not None
        used = Path(other.stdout.readline().decode().strip())
        first = PrivateDirectory()
        assert used.is_dir()
        other.send_signal(signal.SIGKILL)
    second = PrivateDirectory()
    assert not used.exists()
    assert first.path.is_dir()
    first.close()
    second.close()


def test_what_is_not_its_own_stays_whatever_its_name(base: Path) -> None:
    # A home, a checkout, another program's directory; and what `mesh-llm run` and the command line's socket live in.
    for name in ("mesh-llm-home", "mesh-llm.12345678", "mesh-llm-abcdefgh"):
        (base / name / "mesh").mkdir(parents=True, mode=0o700)
        (base / name / "mesh" / "mesh-key").write_text("x")
    (base / "mesh-llm-12345678").mkdir(mode=0o700)
    PrivateDirectory().close()
    assert len(list(base.glob("*/mesh/mesh-key"))) == 3
    assert (base / "mesh-llm-12345678").is_dir()


def test_what_was_killed_before_it_was_marked_is_removed(base: Path) -> None:
    (base / "mesh-llm.12345678").mkdir(mode=0o700)
    PrivateDirectory().close()
    assert not list(base.iterdir())


def test_a_place_whose_path_is_too_long_for_a_socket_is_not_taken(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = base / ("d" * 90)
    deep.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    directory = PrivateDirectory()
    assert directory.path.parent != deep
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory.path / "tunnel-0123456789abcdef.sock"))
    directory.close()


def test_no_place_at_all_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc/nowhere")
    with pytest.raises(MeshError) as caught:
        PrivateDirectory()
    assert caught.value.code == "no_private_directory"
    assert "TMPDIR" in caught.value.hint


def test_without_descriptors_it_fails_at_once_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It made one directory after the other, for ever, and with it stopped the loop that would have freed some."""
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def refuse(*_: object, **__: object) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(MeshError, match="Too many open files"):
            PrivateDirectory()
    assert list(tmp_path.iterdir()) == []
    PrivateDirectory().close()
