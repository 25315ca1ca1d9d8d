"""The engine's source archive: downloaded by a package client, checked, and kept."""

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded import archive as archives
from mesh_llm.engine.sources.embedded.archive import SDIST_NAME, SDIST_SHA256, VERSION

ROOT = "xllamacpp-1/thirdparty/llama.cpp/ggml"


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    return path


def test_the_digest_in_the_code_is_the_lock_files() -> None:
    lock = (Path(__file__).parents[5] / "requirements" / "runtime.lock").read_text()
    block = lock.split(f"xllamacpp=={VERSION}")[1].split("# via")[0]
    assert SDIST_SHA256 in block


def test_the_wheel_is_built_with_the_same_release() -> None:
    text = (Path(__file__).parents[5] / "pyproject.toml").read_text()
    assert text.count(f'"xllamacpp=={VERSION}"') == text.count("xllamacpp==") == 2


def test_any_other_bytes_are_refused(tmp_path: Path) -> None:
    wrong = archive(tmp_path / SDIST_NAME, ["a"])
    with pytest.raises(MeshError) as caught:
        archives.check_digest(wrong)
    assert caught.value.code == "plugin_source_wrong"
    with pytest.raises(MeshError):
        archives.check_digest(tmp_path / "missing.tar.gz")


def test_only_what_is_needed_is_unpacked(tmp_path: Path) -> None:
    wanted = [f"{ROOT}/include/ggml.h", f"{ROOT}/src/ggml-impl.h", f"{ROOT}/src/ggml-rpc/ggml-rpc.cpp"]
    source = archive(tmp_path / "a.tar.gz", [*wanted, f"{ROOT}/src/ggml.c", "xllamacpp-1/setup.py"])
    ggml = archives.unpack(source, tmp_path / "out")
    assert ggml == tmp_path / "out" / ROOT
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(wanted)


def test_python_without_filters_extracts_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As in Python 3.11.2, which Debian 12 has.
    extractall = tarfile.TarFile.extractall

    def old(self: tarfile.TarFile, path: Path, members: list[tarfile.TarInfo]) -> None:
        extractall(self, path, members, filter="data")

    monkeypatch.delattr(tarfile, "data_filter", raising=False)
    monkeypatch.setattr(tarfile.TarFile, "extractall", old)
    source = archive(tmp_path / "a.tar.gz", [f"{ROOT}/src/ggml-rpc/ggml-rpc.cpp"])
    assert archives.unpack(source, tmp_path / "out") == tmp_path / "out" / ROOT


def test_an_archive_without_the_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        archives.unpack(archive(tmp_path / "a.tar.gz", ["x/setup.py"]), tmp_path / "out")
    assert caught.value.code == "plugin_source_wrong"


def test_no_client_is_an_error_that_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "package_clients", list)
    with pytest.raises(MeshError) as caught:
        archives.download(tmp_path)
    assert caught.value.code == "package_client_missing"
    assert "pip" in caught.value.hint


def test_every_client_is_tried_and_each_failure_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [(sys.executable, "-c", f"import sys; sys.exit('no route to {name}')") for name in ("one", "two")]
    monkeypatch.setattr(archives, "package_clients", lambda: [*clients, ("/does/not/exist",)])
    with pytest.raises(MeshError) as caught:
        archives.download(tmp_path)
    assert caught.value.code == "plugin_download_failed"
    assert "no route to one" in caught.value.message
    assert "no route to two" in caught.value.message
    assert "--archive" in caught.value.hint


def test_the_client_is_made_to_check_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def run(argv: tuple[str, ...], **_: object) -> subprocess.CompletedProcess[str]:
        seen.extend(argv)
        (tmp_path / SDIST_NAME).write_bytes(b"")
        return subprocess.CompletedProcess(argv, 0, "", "")

    monkeypatch.setattr(archives.subprocess, "run", run)
    monkeypatch.setattr(archives, "package_clients", lambda: [("pip",)])
    assert archives.download(tmp_path) == tmp_path / SDIST_NAME
    assert "--require-hashes" in seen
    assert SDIST_SHA256 in Path(seen[seen.index("--requirement") + 1]).read_text()


def any_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every file that is there for the pinned archive."""

    def check(path: Path) -> None:
        if not path.exists():
            raise MeshError(code="plugin_source_wrong", message="no")

    monkeypatch.setattr(archives, "check_digest", check)


def test_it_is_downloaded_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[str] = []

    def download(directory: Path) -> Path:
        (directory / SDIST_NAME).write_bytes(b"archive")
        return directory / SDIST_NAME

    any_digest(monkeypatch)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.setattr(archives, "download", download)
    first = archives.provide_archive(tmp_path, lambda step, _: steps.append(step))
    assert first.read_bytes() == b"archive"
    assert steps == ["download", "verify"]
    assert archives.provide_archive(tmp_path, lambda step, _: steps.append(step)) == first
    assert len(steps) == 2
    assert sorted(path.name for path in first.parent.iterdir()) == [SDIST_NAME]


def test_one_that_the_user_has_is_checked_and_nothing_is_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []

    def download(_: Path) -> Path:
        raise AssertionError

    monkeypatch.setattr(archives, "download", download)
    own = tmp_path / "brought.tar.gz"
    own.write_bytes(b"another release")
    with pytest.raises(MeshError) as caught:
        archives.provide_archive(tmp_path, lambda step, _: steps.append(step), own)
    assert caught.value.code == "plugin_source_wrong"
    any_digest(monkeypatch)
    assert archives.provide_archive(tmp_path, lambda step, _: steps.append(step), own) == own
    assert steps == ["verify", "verify"]
    assert [path.name for path in tmp_path.iterdir()] == [own.name]


def test_a_damaged_one_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / SDIST_NAME).write_bytes(b"half of it")
    assert archives.find_archive(tmp_path) is None


def test_a_full_disk_is_said_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)

    def nearly_full(_: Path) -> object:
        return usage._replace(free=1000)

    monkeypatch.setattr(archives.shutil, "disk_usage", nearly_full)

    def quiet(_step: str, _text: str) -> None:
        """Show nothing."""

    with pytest.raises(MeshError) as caught:
        archives.provide_archive(tmp_path, quiet)
    assert caught.value.code == "disk_full"
    assert "150.0 MB are needed, 1 kB are free" in caught.value.message


@pytest.mark.slow
def test_without_a_network_it_fails_soon_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Tests run where there is no route: the package client itself is asked.
    first = archives.package_clients()[:1]
    monkeypatch.setattr(archives, "package_clients", lambda: first)
    with pytest.raises(MeshError) as caught:
        archives.download(tmp_path)
    assert caught.value.code == "plugin_download_failed"
    assert "--archive" in caught.value.hint
