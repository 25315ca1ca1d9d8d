"""The RPC plugin: its source, and how it is built once."""

import errno
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import installation
from mesh_llm.engine.sources.embedded import library_build, plugin
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.engine.spec import PartState


class Workshop:
    """The steps of a build without network, compiler or llama.cpp."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.compiled = 0
        self.steps: list[str] = []
        self.directory = tmp_path / "engine" / plugin.key()
        self.gate: Callable[[], object] = lambda: None
        self._lock = threading.Lock()
        monkeypatch.setattr(plugin, "directories", self._directories)
        monkeypatch.setattr(plugin, "build_directories", self._build_directories)
        monkeypatch.setattr(library_build, "provide_archive", self._provide)
        monkeypatch.setattr(plugin, "provide_library", self._library)
        monkeypatch.setattr(plugin, "find_library", self._library)
        monkeypatch.setattr(plugin, "unpack", self._unpack)
        monkeypatch.setattr(plugin.compiler, "find_compiler", lambda: ("c++",))
        monkeypatch.setattr(plugin.compiler, "compile_plugin", self._compile)
        monkeypatch.setattr(plugin, "self_test", self._self_test)

    def _directories(self, _: Path) -> list[Path]:
        return [self.directory]

    def _build_directories(self, _: Path, __: str) -> list[Path]:
        return [self.directory]

    def _library(self, _: Path) -> Path:
        return self.directory

    def _unpack(self, _: Path, work: Path) -> Path:
        return work

    def _self_test(self, _: Path) -> str:
        return "8.0.0"

    def _provide(self, _: Path, progress: Callable[[str, str], None], given: Path | None = None) -> Path:
        progress("verify" if given else "download", "Providing it.")
        return given or self.directory / "source.tar.gz"

    def _compile(self, _: Path, output: Path, __: tuple[str, ...], log: Path) -> None:
        self.gate()
        with self._lock:
            self.compiled += 1
        output.write_bytes(b"library %d" % self.compiled)
        log.write_text("c++ and its words")

    def progress(self, step: str, _: str) -> None:
        self.steps.append(step)


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workshop:
    return Workshop(monkeypatch, tmp_path)


def test_builds_once_and_tells_each_step(workshop: Workshop, tmp_path: Path) -> None:
    assert plugin.find(tmp_path) is None
    built = plugin.install(tmp_path, workshop.progress)
    assert workshop.steps == ["download", "unpack", "compile", "self-test", "done"]
    assert built.rpc_version == "8.0.0"
    assert plugin.find(tmp_path) == built
    assert plugin.install(tmp_path, workshop.progress) == built
    assert workshop.compiled == 1
    # Nothing of the build is left.
    assert sorted(path.name for path in workshop.directory.iterdir()) == [
        plugin.LOG_NAME,
        installation.MANIFEST,
        built.path.name,
    ]


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
    assert sorted(path.name for path in workshop.directory.iterdir()) == [plugin.LOG_NAME, installation.MANIFEST]


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


def refuse(code: str) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise MeshError(code=code, message="It went wrong.", hint="Do this.")

    return fail


def test_a_failure_is_remembered_until_it_is_built(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(plugin.compiler, "compile_plugin", refuse("plugin_compile_failed"))
        with pytest.raises(MeshError):
            plugin.install(tmp_path, workshop.progress)
    part = plugin.status(tmp_path)
    assert (part.state, part.text, part.hint) == (PartState.FAILED, "It went wrong.", "Do this.")
    plugin.install(tmp_path, workshop.progress)
    part = plugin.status(tmp_path)
    assert part.state is PartState.READY
    assert part.text == "compiled with c++"
    assert Path(part.log).read_text() == "c++ and its words"


def test_what_may_pass_is_tried_again(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library_build, "provide_archive", refuse("plugin_download_failed"))
    with pytest.raises(MeshError):
        plugin.install(tmp_path, workshop.progress)
    assert plugin.examine(tmp_path).failure is not None
    assert plugin.status(tmp_path).state is PartState.MISSING


def test_without_a_compiler_nothing_is_tried(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plugin.compiler, "find_compiler", refuse("compiler_missing"))
    part = plugin.status(tmp_path)
    assert (part.state, part.text, part.hint) == (PartState.FAILED, "It went wrong.", "Do this.")


def test_a_disk_that_fills_is_said_and_not_a_traceback(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(plugin.compiler, "compile_plugin", full)
    with pytest.raises(MeshError) as caught:
        plugin.install(tmp_path, workshop.progress)
    assert caught.value.code == "disk_full"
    assert "Free some room" in caught.value.hint


def test_one_that_waited_takes_the_others_failure(
    workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, waiting = threading.Event(), threading.Event()

    def gate() -> None:
        started.set()
        assert waiting.wait(10)
        raise MeshError(code="plugin_compile_failed", message="It went wrong.")

    def progress(step: str, _: str) -> None:
        if step == "wait":
            waiting.set()

    workshop.gate = gate
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(plugin.install, tmp_path, progress)
        assert started.wait(10)
        second = pool.submit(plugin.install, tmp_path, progress)
        for one in (first, second):
            with pytest.raises(MeshError) as caught:
                one.result(10)
            assert caught.value.code == "plugin_compile_failed"
    assert workshop.compiled == 0


def test_what_a_killed_build_left_is_removed(workshop: Workshop, tmp_path: Path) -> None:
    left = workshop.directory / ".build-killed"
    left.mkdir(parents=True)
    (left / "half").touch()
    plugin.install(tmp_path, workshop.progress)
    assert not left.exists()


def test_the_directory_is_named_after_what_it_fits() -> None:
    assert VERSION in plugin.key()
