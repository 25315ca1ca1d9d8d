"""The library that saves slots: whether it is there, when a node builds it by itself, and what is noted of failures."""

import errno
from dataclasses import replace
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.confinement.policy import RpcPolicy
from mesh_llm.engine.installation import Part, digest, look, record_part
from mesh_llm.engine.sources.embedded import backends, library_build, plugin, server_main, slot_library
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import NGRAM, EngineSpec, PartState


def nothing(*_: object) -> None:
    """No archive; no progress."""


def here(*_: object) -> Path:
    return Path()


def built_plugin(_: Path) -> plugin.Plugin:
    return plugin.Plugin(path=Path("rpc.so"), rpc_version="8.0.0")


def yes() -> bool:
    return True


def no() -> bool:
    return False


@pytest.fixture
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where it is built; nothing is bundled, and no archive is here."""
    place = tmp_path / "engine" / plugin.key()
    monkeypatch.setattr(slot_library, "supported", yes)

    def places(*_: object) -> list[Path]:
        return [place]

    monkeypatch.setattr(plugin, "directories", places)
    monkeypatch.setattr(slot_library, "build_directories", places)
    monkeypatch.setattr(slot_library, "find_archive", nothing)
    return place


def built(place: Path, version: str = slot_library.revision()) -> Path:
    place.mkdir(parents=True, exist_ok=True)
    library = place / slot_library.library_name()
    library.write_bytes(b"library")
    part = Part(name=slot_library.SLOTS, file=library.name, sha256=digest(library), how="made", version=version)
    record_part(place, VERSION, part)
    return library


def test_one_of_an_earlier_source_is_built_again(directory: Path, tmp_path: Path) -> None:
    assert slot_library.find(tmp_path) is None
    built(directory, "earlier")
    assert slot_library.find(tmp_path) is None
    assert "earlier source" in slot_library.status(tmp_path).text
    assert slot_library.find(tmp_path) is None
    assert built(directory) == slot_library.find(tmp_path)


def test_a_node_builds_it_only_where_that_needs_no_download(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slot_library.find(tmp_path) is None
    assert slot_library.status(tmp_path).state is PartState.FAILED
    monkeypatch.setattr(slot_library, "find_archive", here)
    assert slot_library.status(tmp_path).state is PartState.MISSING
    library = built(directory)
    assert slot_library.status(tmp_path).state is PartState.READY
    assert slot_library.install(tmp_path, nothing) == library


def test_changed_bytes_are_not_loaded(directory: Path, tmp_path: Path) -> None:
    built(directory).write_bytes(b"changed")
    assert slot_library.find(tmp_path) is None
    assert "are not those that were tested" in slot_library.status(tmp_path).text


def test_a_failure_is_remembered(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> Path:
        raise MeshError(code="plugin_compile_failed", message="c++ could not compile it.")

    monkeypatch.setattr(library_build, "build", fails)
    monkeypatch.setattr(slot_library, "find_archive", here)
    with pytest.raises(MeshError):
        slot_library.install(tmp_path, nothing)
    assert look(slot_library.SLOTS, VERSION, [directory]).failure is not None
    assert slot_library.status(tmp_path).state is PartState.FAILED


def test_a_disk_that_fills_is_said_and_not_a_traceback(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(library_build, "build", full)
    with pytest.raises(MeshError) as caught:
        slot_library.install(tmp_path, nothing)
    assert caught.value.code == "disk_full"
    assert "too little room" in slot_library.status(tmp_path).text


def test_a_library_that_does_not_load_fails_its_self_test(tmp_path: Path) -> None:
    library = tmp_path / "broken.so"
    library.write_bytes(b"no library")
    with pytest.raises(MeshError) as caught:
        slot_library.self_test(library)
    assert caught.value.code == "plugin_self_test_failed"


@pytest.mark.parametrize(
    "case", ["plain", "plugin", "prebuilt", "draft", "split", "auto", "split auto", "prebuilt auto"]
)
async def test_only_the_build_that_it_was_compiled_for_gets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    prebuilt, file = tmp_path / "prebuilt", tmp_path / "plugin.so"
    prebuilt.mkdir()
    file.touch()
    loads = {
        "prebuilt": ("--load", str(prebuilt)),
        "prebuilt auto": ("--load", str(prebuilt)),
        "plugin": ("--load", str(file)),
    }

    def load(_: Path) -> tuple[str, ...]:
        return loads.get(case.split(maxsplit=1)[0], ())

    monkeypatch.setattr(backends, "load_arguments", load)
    monkeypatch.setattr(slot_library, "find", here)
    source = EmbeddedSource(tmp_path / "wheel.so", RpcPolicy(cache=tmp_path))
    spec = EngineSpec(model=tmp_path / "m.gguf", alias="m", context=512, slots=1, slot_socket=tmp_path / "1.slots")
    if case == "draft":
        spec = replace(spec, draft=tmp_path / "d.gguf")
    if "auto" in case:
        spec = replace(spec, speculation=NGRAM, while_it_pays=True)
    if "split" in case:
        monkeypatch.setattr(plugin, "find", built_plugin)
        spec = replace(spec, rpc=("127.0.0.1:5000",))
    command = await source.server(spec)
    # An engine with a draft is only switched; its slots are not saved.
    assert (command.slot_socket is not None) == ("prebuilt" not in case)
    assert command.saves_slots == (case != "draft")
    assert command.speculates == (case in {"draft", "auto", "split auto"})
    assert (server_main.SLOTS in command.argv) == (command.slot_socket is not None)


def test_other_systems_have_no_use_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slot_library, "supported", no)
    assert slot_library.find(tmp_path) is None
    assert slot_library.install(tmp_path, nothing) is None
