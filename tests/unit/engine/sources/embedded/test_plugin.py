"""The RPC plugin: its source, and how it is built once."""

import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.plugin import SDIST_NAME, SDIST_SHA256, VERSION


class Workshop:
    """The steps of a build without network, compiler or llama.cpp."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.compiled = 0
        self.steps: list[str] = []
        self.directory = tmp_path / "engine" / plugin.key()
        self.gate: Callable[[], object] = lambda: None
        self._lock = threading.Lock()
        monkeypatch.setattr(plugin, "directories", self._directories)
        monkeypatch.setattr(plugin, "download", self._download)
        monkeypatch.setattr(plugin, "check_digest", self._check_digest)
        monkeypatch.setattr(plugin, "unpack", self._unpack)
        monkeypatch.setattr(plugin.compiler, "find_compiler", lambda: ("c++",))
        monkeypatch.setattr(plugin.compiler, "compile_plugin", self._compile)
        monkeypatch.setattr(plugin, "self_test", self._self_test)

    def _directories(self, _: Path) -> list[Path]:
        return [self.directory]

    def _check_digest(self, _: Path) -> None:
        """Any archive will do."""

    def _unpack(self, _: Path, work: Path) -> Path:
        return work

    def _self_test(self, _: Path) -> str:
        return "8.0.0"

    def _download(self, work: Path) -> Path:
        return work / "source.tar.gz"

    def _compile(self, _: Path, output: Path, __: tuple[str, ...]) -> None:
        self.gate()
        with self._lock:
            self.compiled += 1
        output.write_bytes(b"library %d" % self.compiled)

    def progress(self, step: str, _: str) -> None:
        self.steps.append(step)


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workshop:
    return Workshop(monkeypatch, tmp_path)


def test_builds_once_and_tells_each_step(workshop: Workshop, tmp_path: Path) -> None:
    assert plugin.find(tmp_path) is None
    built = plugin.install(tmp_path, workshop.progress)
    assert workshop.steps == ["download", "verify", "unpack", "compile", "self-test", "done"]
    assert built.rpc_version == "8.0.0"
    assert plugin.find(tmp_path) == built
    assert plugin.install(tmp_path, workshop.progress) == built
    assert workshop.compiled == 1
    # Nothing of the build is left.
    assert sorted(path.name for path in workshop.directory.iterdir()) == [built.path.name, "manifest.json"]


def test_force_builds_again(workshop: Workshop, tmp_path: Path) -> None:
    plugin.install(tmp_path, workshop.progress)
    plugin.install(tmp_path, workshop.progress, force=True)
    assert workshop.compiled == 2
    assert plugin.find(tmp_path) is not None


def test_an_archive_brought_by_hand_is_not_downloaded(workshop: Workshop, tmp_path: Path) -> None:
    plugin.install(tmp_path, workshop.progress, archive=tmp_path / "x.tar.gz")
    assert "download" not in workshop.steps
    assert "verify" in workshop.steps


def test_other_bytes_than_those_tested_are_not_loaded(workshop: Workshop, tmp_path: Path) -> None:
    built = plugin.install(tmp_path, workshop.progress)
    built.path.write_bytes(b"truncated")
    assert plugin.find(tmp_path) is None
    assert plugin.install(tmp_path, workshop.progress).path == built.path
    assert workshop.compiled == 2


def test_two_at_once_build_one(workshop: Workshop, tmp_path: Path) -> None:
    started = threading.Event()
    release = threading.Event()

    def gate() -> None:
        started.set()
        assert release.wait(10)

    workshop.gate = gate
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(plugin.install, tmp_path, workshop.progress)
        assert started.wait(10)
        second = pool.submit(plugin.install, tmp_path, workshop.progress)
        release.set()
        assert first.result(10) == second.result(10)
    assert workshop.compiled == 1


def test_a_failed_step_leaves_nothing(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Path) -> str:
        raise MeshError(code="plugin_self_test_failed", message="no")

    monkeypatch.setattr(plugin, "self_test", fail)
    with pytest.raises(MeshError):
        plugin.install(tmp_path, workshop.progress)
    assert plugin.find(tmp_path) is None
    assert list(workshop.directory.iterdir()) == []


def test_no_place_to_write_says_what_to_do(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine").write_text("in the way")
    with pytest.raises(MeshError) as caught:
        plugin.install(tmp_path, workshop.progress)
    assert caught.value.code == "plugin_not_writable"
    assert "MESH_LLM_HOME" in caught.value.hint


def test_a_library_that_does_not_load_fails_its_self_test(tmp_path: Path) -> None:
    library = tmp_path / "libggml-rpc.so"
    library.write_bytes(b"not a library")
    with pytest.raises(MeshError) as caught:
        plugin.self_test(library)
    assert caught.value.code == "plugin_self_test_failed"
    assert "does not load" in caught.value.message


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


def test_any_other_bytes_are_refused(tmp_path: Path) -> None:
    wrong = archive(tmp_path / SDIST_NAME, ["a"])
    with pytest.raises(MeshError) as caught:
        plugin.check_digest(wrong)
    assert caught.value.code == "plugin_source_wrong"
    with pytest.raises(MeshError):
        plugin.check_digest(tmp_path / "missing.tar.gz")


def test_only_what_is_needed_is_unpacked(tmp_path: Path) -> None:
    wanted = [f"{ROOT}/include/ggml.h", f"{ROOT}/src/ggml-impl.h", f"{ROOT}/src/ggml-rpc/ggml-rpc.cpp"]
    source = archive(tmp_path / "a.tar.gz", [*wanted, f"{ROOT}/src/ggml.c", "xllamacpp-1/setup.py"])
    ggml = plugin.unpack(source, tmp_path / "out")
    assert ggml == tmp_path / "out" / ROOT
    files = [str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(files) == sorted(wanted)


def test_an_archive_without_the_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        plugin.unpack(archive(tmp_path / "a.tar.gz", ["x/setup.py"]), tmp_path / "out")
    assert caught.value.code == "plugin_source_wrong"


def test_no_client_is_an_error_that_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "package_clients", list)
    with pytest.raises(MeshError) as caught:
        plugin.download(tmp_path)
    assert caught.value.code == "package_client_missing"
    assert "pip" in caught.value.hint


def test_every_client_is_tried_and_each_failure_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = [(sys.executable, "-c", f"import sys; sys.exit('no route to {name}')") for name in ("one", "two")]
    monkeypatch.setattr(plugin, "package_clients", lambda: [*clients, ("/does/not/exist",)])
    with pytest.raises(MeshError) as caught:
        plugin.download(tmp_path)
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

    monkeypatch.setattr(plugin.subprocess, "run", run)
    monkeypatch.setattr(plugin, "package_clients", lambda: [("pip",)])
    assert plugin.download(tmp_path) == tmp_path / SDIST_NAME
    assert "--require-hashes" in seen
    assert SDIST_SHA256 in Path(seen[seen.index("--requirement") + 1]).read_text()
