"""One manifest for what is built on a machine, and what is set aside."""

import hashlib
from pathlib import Path

import msgspec
import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import installation
from mesh_llm.engine.installation import (
    MANIFEST,
    Manifest,
    Part,
    digest,
    look,
    record_failure,
    record_part,
    remove_part,
    system,
)

ENGINE = "2026.1"


def add(directory: Path, name: str = "rpc", data: bytes = b"library") -> Part:
    directory.mkdir(exist_ok=True)
    path = directory / f"{name}.so"
    path.write_bytes(data)
    part = Part(name=name, file=path.name, sha256=digest(path), version="8.0.0", how="compiled with c++")
    record_part(directory, ENGINE, part)
    return part


def manifest(directory: Path) -> Manifest:
    return msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)


def test_parts_are_kept_side_by_side(tmp_path: Path) -> None:
    rpc, other = add(tmp_path), add(tmp_path, "other")
    assert manifest(tmp_path).parts == (rpc, other)
    newer = add(tmp_path, data=b"newer")
    assert manifest(tmp_path).parts == (other, newer)
    found = look("rpc", ENGINE, [tmp_path])
    assert (found.part, found.path, found.set_aside) == (newer, tmp_path / "rpc.so", ())
    assert look("none", ENGINE, [tmp_path]).part is None


@pytest.mark.parametrize("change", ["damaged", "gone", "engine", "system"])
def test_what_does_not_match_is_set_aside_with_the_reason(tmp_path: Path, change: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    add(first)
    add(second)
    expected = {
        "damaged": "not those that were tested",
        "gone": "cannot be read",
        "engine": "fits the engine 2025.1",
        "system": "built for plan9-vax",
    }[change]
    match change:
        case "damaged":
            (first / "rpc.so").write_bytes(b"librarx")
        case "gone":
            (first / "rpc.so").unlink()
        case "engine":
            changed = msgspec.structs.replace(manifest(first), engine="2025.1")
            (first / MANIFEST).write_bytes(msgspec.json.encode(changed))
        case _:
            changed = msgspec.structs.replace(manifest(first), system="plan9-vax")
            (first / MANIFEST).write_bytes(msgspec.json.encode(changed))
    alone = look("rpc", ENGINE, [first])
    assert alone.part is None
    assert len(alone.set_aside) == 1
    assert expected in alone.set_aside[0]
    both = look("rpc", ENGINE, [first, second])
    assert both.path == second / "rpc.so"
    assert both.set_aside == alone.set_aside


def test_a_failure_is_kept_until_the_part_is_made(tmp_path: Path) -> None:
    error = MeshError(code="compiler_missing", message="There is none.", hint="Install one.")
    record_failure(tmp_path, ENGINE, "rpc", error)
    record_failure(tmp_path, ENGINE, "rpc", error)
    failure = look("rpc", ENGINE, [tmp_path]).failure
    assert failure is not None
    assert (failure.code, failure.message, failure.hint) == (error.code, error.message, error.hint)
    assert len(manifest(tmp_path).failures) == 1
    add(tmp_path, "other")
    assert look("rpc", ENGINE, [tmp_path]).failure == failure
    add(tmp_path)
    assert look("rpc", ENGINE, [tmp_path]).failure is None


def test_a_manifest_of_another_engine_begins_anew(tmp_path: Path) -> None:
    add(tmp_path)
    record_failure(tmp_path, "2027.1", "rpc", MeshError(code="x", message="y"))
    assert manifest(tmp_path).parts == ()
    assert manifest(tmp_path).engine == "2027.1"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"engine": 1}', '{"engine": "a", "system": "b", "format": 99}'])
def test_a_manifest_that_is_none_is_passed_over(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    assert look("rpc", ENGINE, [tmp_path]).part is None
    part = add(tmp_path)
    assert manifest(tmp_path).parts == (part,)
    assert manifest(tmp_path).system == system()


def test_a_failure_that_cannot_be_written_is_no_second_failure(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.touch()
    record_failure(place, ENGINE, "rpc", MeshError(code="disk_full", message="It is full."))


def test_a_directory_is_one_part(tmp_path: Path) -> None:
    wheel = tmp_path / "wheel-vulkan-1"
    (wheel / "engine").mkdir(parents=True)
    for name in ("engine/a.so", "b.py"):
        (wheel / name).write_text(name)
    record_part(tmp_path, ENGINE, Part(name="vulkan", file=wheel.name, sha256=digest(wheel)))
    assert look("vulkan", ENGINE, [tmp_path]).path == wheel
    # What Python compiles does not count.
    (wheel / "__pycache__").mkdir()
    (wheel / "__pycache__" / "b.pyc").write_text("compiled")
    assert look("vulkan", ENGINE, [tmp_path]).part is not None
    (wheel / "engine" / "a.so").write_text("engine/a.sp")
    assert "not those that were tested" in look("vulkan", ENGINE, [tmp_path]).set_aside[0]
    assert remove_part(tmp_path, "vulkan")
    assert not wheel.exists()


def test_a_file_of_a_directory_that_moved_counts(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "a").write_text("1")
    before = digest(tmp_path / "x")
    (tmp_path / "x" / "a").rename(tmp_path / "x" / "b")
    assert digest(tmp_path / "x") != before


def test_what_has_settled_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "_SETTLED_NS", 0)
    path = tmp_path / "library"
    path.write_text("first")
    before = digest(path)
    reads: list[Path] = []

    def count(path: Path) -> str:
        reads.append(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    monkeypatch.setattr(installation, "_read_digest", count)
    assert digest(path) == before
    assert reads == []
    path.write_text("other, and longer")
    assert digest(path) != before
    assert reads == [path]
