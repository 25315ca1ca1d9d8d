import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.embedded import plugin


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
