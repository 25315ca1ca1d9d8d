"""Which accelerator the engine's children load, and what is said of the others."""

import sys
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.installation import Part, digest, record_failure, record_part, remove_part
from mesh_llm.engine.sources.embedded import backends, loading, plugin
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.engine.sources.embedded.ggml import library_path
from mesh_llm.engine.spec import PartState


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where parts of the home are, without those of this Python environment."""
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    found = plugin.directories(tmp_path)[0]
    found.mkdir(parents=True)
    return found


def add(directory: Path, kind: str, **fields: str) -> Path:
    path = directory / loading.library_name(kind)
    path.write_bytes(kind.encode())
    part = Part(name=kind, file=path.name, sha256=digest(path), **fields)  # pyright: ignore[reportArgumentType]
    record_part(directory, VERSION, part)
    return path


def test_nothing_is_loaded_where_nothing_was_built(tmp_path: Path, directory: Path) -> None:
    assert backends.load_arguments(tmp_path) == ()
    assert backends.parts(tmp_path) == ()


def test_the_last_one_is_loaded_and_the_other_says_why_it_is_not(tmp_path: Path, directory: Path) -> None:
    add(directory, loading.CUDA)
    vulkan = add(directory, loading.VULKAN, tested="16 operators")
    assert backends.load_arguments(tmp_path) == (loading.LOAD, str(vulkan))
    first, second = backends.parts(tmp_path)
    assert (first.name, first.state, first.text) == ("vulkan", PartState.READY, "16 operators")
    assert (second.name, second.text) == ("cuda", "not loaded: another one was installed later")


def test_one_that_failed_its_test_is_not_loaded_and_the_older_one_is(tmp_path: Path, directory: Path) -> None:
    cuda = add(directory, loading.CUDA)
    add(directory, loading.VULKAN, set_aside="wrong results in MUL_MAT q4_0.")
    assert backends.load_arguments(tmp_path) == (loading.LOAD, str(cuda))
    aside, _ = backends.parts(tmp_path)
    assert aside.state is PartState.FAILED
    assert "wrong results in MUL_MAT q4_0." in aside.text
    assert "mesh-llm engine install --gpu vulkan --force" in aside.hint


def test_other_bytes_are_not_loaded(tmp_path: Path, directory: Path) -> None:
    path = add(directory, loading.VULKAN)
    path.write_bytes(b"something else")
    assert backends.load_arguments(tmp_path) == ()
    (part,) = backends.parts(tmp_path)
    assert part.state is PartState.FAILED
    assert "not those that were tested" in part.text


def test_one_of_another_engine_is_not_loaded(tmp_path: Path, directory: Path) -> None:
    path = directory / loading.library_name(loading.VULKAN)
    path.write_bytes(b"old")
    record_part(directory, "2025.1.1", Part(name=loading.VULKAN, file=path.name, sha256=digest(path)))
    assert backends.load_arguments(tmp_path) == ()
    (part,) = backends.parts(tmp_path)
    assert f"it fits the engine 2025.1.1, and this is {VERSION}" in part.text


def test_a_build_that_failed_is_told(tmp_path: Path, directory: Path) -> None:
    record_failure(directory, VERSION, loading.ROCM, MeshError(code="x", message="No compiler.", hint="Install one."))
    (part,) = backends.parts(tmp_path)
    assert (part.name, part.state, part.text, part.hint) == ("rocm", PartState.FAILED, "No compiler.", "Install one.")


def test_what_is_removed_is_gone(tmp_path: Path, directory: Path) -> None:
    path = add(directory, loading.VULKAN)
    assert remove_part(directory, loading.VULKAN)
    assert not path.exists()
    assert backends.parts(tmp_path) == ()
    assert not remove_part(directory, loading.VULKAN)


def test_a_prebuilt_engine_comes_before_the_installed_one(
    tmp_path: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = directory / "wheel-vulkan-1"
    (wheel / "xllamacpp").mkdir(parents=True)
    (wheel / "xllamacpp" / "__init__.py").touch()
    (wheel / "xllamacpp" / "xllamacpp.abi3.so").touch()
    (wheel / "xllamacpp" / "libggml-vulkan.so").touch()
    (wheel / "nvidia" / "x" / "lib").mkdir(parents=True)
    (wheel / "nvidia" / "x" / "lib" / "libx.so.1").write_text("no library: it is left to the engine's own to say so")
    part = Part(name=loading.VULKAN, file=wheel.name, sha256=digest(wheel))
    record_part(directory, VERSION, part)
    arguments = backends.load_arguments(tmp_path)
    assert arguments == (loading.LOAD, str(wheel))
    # What follows happens in a child.
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    others, plugins = loading.parse_load(["spec", *arguments])
    assert (others, plugins) == (["spec"], [wheel / "xllamacpp" / "libggml-vulkan.so"])
    assert sys.path[0] == str(wheel)
    assert library_path() == wheel / "xllamacpp" / "xllamacpp.abi3.so"


def test_a_failed_prebuilt_engine_is_told_beside_the_build(tmp_path: Path, directory: Path) -> None:
    error = MeshError(code="wheel_wrong", message="It does not start here.", hint="")
    record_failure(directory, VERSION, backends.prebuilt_name(loading.CUDA), error)
    (part,) = backends.parts(tmp_path)
    assert (part.name, part.state) == ("cuda", PartState.FAILED)
    assert part.text == "the prebuilt engine was not taken: It does not start here."
    add(directory, loading.CUDA, how="compiled")
    (part,) = backends.parts(tmp_path)
    assert part.state is PartState.READY
    assert part.text == "compiled; the prebuilt engine was not taken: It does not start here."
