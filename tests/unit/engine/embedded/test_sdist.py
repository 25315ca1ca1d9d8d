import io
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded import plugin as sdist
from mesh_llm.engine.sources.embedded.plugin import SDIST_NAME, SDIST_SHA256, VERSION

ROOT = "xllamacpp-1/thirdparty/llama.cpp/ggml"


def archive(path: Path, names: list[str]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 1
            tar.addfile(member, io.BytesIO(b"x"))
    return path


def test_the_digest_in_the_code_is_the_lock_files() -> None:
    lock = (Path(__file__).parents[4] / "requirements" / "runtime.lock").read_text()
    block = lock.split(f"xllamacpp=={VERSION}")[1].split("# via")[0]
    assert SDIST_SHA256 in block


def test_any_other_bytes_are_refused(tmp_path: Path) -> None:
    wrong = archive(tmp_path / SDIST_NAME, ["a"])
    with pytest.raises(MeshError) as caught:
        sdist.check_digest(wrong)
    assert caught.value.code == "plugin_source_wrong"
    with pytest.raises(MeshError):
        sdist.check_digest(tmp_path / "missing.tar.gz")


def test_only_what_is_needed_is_unpacked(tmp_path: Path) -> None:
    wanted = [f"{ROOT}/include/ggml.h", f"{ROOT}/src/ggml-impl.h", f"{ROOT}/src/ggml-rpc/ggml-rpc.cpp"]
    source = archive(tmp_path / "a.tar.gz", [*wanted, f"{ROOT}/src/ggml.c", "xllamacpp-1/setup.py"])
    ggml = sdist.unpack(source, tmp_path / "out")
    assert ggml == tmp_path / "out" / ROOT
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(wanted)


def test_an_archive_without_the_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        sdist.unpack(archive(tmp_path / "a.tar.gz", ["x/setup.py"]), tmp_path / "out")
    assert caught.value.code == "plugin_source_wrong"


def test_no_client_is_an_error_that_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdist, "package_clients", list)
    with pytest.raises(MeshError) as caught:
        sdist.download(tmp_path)
    assert caught.value.code == "package_client_missing"
    assert "pip" in caught.value.hint


def test_every_client_is_tried_and_each_failure_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [(sys.executable, "-c", f"import sys; sys.exit('no route to {name}')") for name in ("one", "two")]
    monkeypatch.setattr(sdist, "package_clients", lambda: [*clients, ("/does/not/exist",)])
    with pytest.raises(MeshError) as caught:
        sdist.download(tmp_path)
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

    monkeypatch.setattr(sdist.subprocess, "run", run)
    monkeypatch.setattr(sdist, "package_clients", lambda: [("pip",)])
    assert sdist.download(tmp_path) == tmp_path / SDIST_NAME
    assert "--require-hashes" in seen
    assert SDIST_SHA256 in Path(seen[seen.index("--requirement") + 1]).read_text()
