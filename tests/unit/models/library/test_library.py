import os
import shutil
import time
from pathlib import Path

import pytest
from tests.support.gguf_writer import Value, llama_metadata, llama_tensors, write

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model import ModelKind
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.hub.cache import models_directory
from mesh_llm.models.library import library
from mesh_llm.models.library import library as builtin_models
from mesh_llm.models.library.library import FactsCache, Library, model_directories, scan
from mesh_llm.models.library.resolve import resolve


def model(path: Path, **changes: object) -> Path:
    return write(path, llama_metadata(**changes), llama_tensors())  # pyright: ignore[reportArgumentType]


def parts(folder: Path, stem: str, count: int = 3) -> list[Path]:
    tensors = llama_tensors()
    paths: list[Path] = []
    for number in range(count):
        split: dict[str, Value] = {"split.no": number, "split.count": count, "split.tensors.count": len(tensors)}
        metadata = (llama_metadata() if number == 0 else {}) | split
        share = tensors[number * 4 :] if number == count - 1 else tensors[number * 4 : number * 4 + 4]
        paths.append(write(folder / f"{stem}-{number + 1:05d}-of-{count:05d}.gguf", metadata, share))
    return paths


def look(*directories: Path, cache: FactsCache | None = None) -> Library:
    return scan(directories, cache, builtin=False)


def test_models_by_name_and_the_rest_with_its_reason(tmp_path: Path) -> None:
    model(tmp_path / "Alpha-Q4_K_M.gguf")
    model(tmp_path / "deep" / "er" / "Beta.GGUF", name="x")
    write(tmp_path / "mmproj-Alpha.gguf", {"general.architecture": "clip"}, llama_tensors())
    model(tmp_path / "alpha-draft.gguf", layers=1)
    model(tmp_path / "embed.gguf", architecture="bert")
    (tmp_path / "page.gguf").write_text("<html>not found</html>")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "Alpha-Q4_K_M.gguf").read_bytes()[:-100])
    model(tmp_path / "coming.gguf", name="y")
    (tmp_path / "coming.gguf.aria2").touch()
    (tmp_path / "notes.txt").touch()
    model(tmp_path / ".hidden" / "no.gguf", name="z")

    library = look(tmp_path, tmp_path / "none")
    assert set(library.models) == {"Alpha-Q4_K_M", "Beta", "embed"}
    assert set(library.drafts) == {"alpha-draft"}
    assert set(library.projectors) == {"mmproj-Alpha"}
    assert {item.name: (item.reason, item.incomplete) for item in library.unusable} == {
        "page": ("it is not a GGUF file: it does not start with the letters GGUF", False),
        "cut": ("tensor blk.3.ffn_up.weight ends after the end of the file", True),
        "coming": ("it is still being fetched", True),
    }
    assert {facts.kind for facts in library.facts()} == {ModelKind.CHAT, ModelKind.EMBEDDING}
    assert library.find("alpha-draft") is not None
    assert library.find("none") is None


def test_parts_are_one_model_and_none_while_one_is_missing(tmp_path: Path) -> None:
    files = parts(tmp_path, "big")
    found = look(tmp_path).models
    assert [path.name for path in found[next(iter(found))].paths] == [path.name for path in files]
    assert list(found) == ["big"]
    files[1].unlink()
    library = look(tmp_path)
    assert not library.models
    assert library.unusable[0].reason == "only 2 of its 3 parts are there"
    assert library.unusable[0].incomplete


def test_one_model_in_two_places_is_one_and_two_models_of_one_name_are_told(tmp_path: Path) -> None:
    first = model(tmp_path / "a" / "same.gguf")
    (tmp_path / "b").mkdir()
    shutil.copy(first, tmp_path / "b" / "same.gguf")
    (tmp_path / "b" / "link.gguf").symlink_to(first)
    other = model(tmp_path / "c" / "same.gguf", context=8192)
    library = look(tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "a")
    assert list(library.models) == ["same"]
    assert [item.path for item in library.unusable] == [other]
    assert f"already called same: {first}" in library.unusable[0].reason


def test_looking_again_reads_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def counting(path: Path):
        reads.append(path.name)
        return read_header(path)

    monkeypatch.setattr(library, "read_header", counting)
    model(tmp_path / "one.gguf")
    parts(tmp_path, "two")
    (tmp_path / "bad.gguf").write_text("x")
    cache = FactsCache(tmp_path / "cache" / "facts.json")
    first = look(tmp_path, cache=cache)
    assert len(reads) == 5
    assert look(tmp_path, cache=cache) == first
    assert len(reads) == 5
    model(tmp_path / "one.gguf", context=8192)
    again = look(tmp_path, cache=cache)
    assert reads[5:] == ["one.gguf"]
    assert again.models[next(iter(again.models))].facts.context_train == 8192

    cache.save()
    assert look(tmp_path, cache=FactsCache(tmp_path / "cache" / "facts.json")) == again
    assert len(reads) == 6
    (tmp_path / "cache" / "facts.json").write_text("{")
    assert look(tmp_path, cache=FactsCache(tmp_path / "cache" / "facts.json")) == again
    assert len(reads) == 11


def test_files_changed_just_now_can_be_left_out(tmp_path: Path) -> None:
    model(tmp_path / "new.gguf")
    library = scan([tmp_path], builtin=False, quiet_seconds=3600)
    assert not library.models
    assert library.unusable[0].reason == "it is still being written"
    # It changes while the directory is looked through.
    os.utime(tmp_path / "new.gguf", (time.time() + 60, time.time() + 60))
    assert not scan([tmp_path], builtin=False, quiet_seconds=3600).models
    # A clock that was wrong once: it is served all the same.
    os.utime(tmp_path / "new.gguf", (time.time() + 7200, time.time() + 7200))
    assert scan([tmp_path], builtin=False, quiet_seconds=3600).models
    os.utime(tmp_path / "new.gguf", (1, 1))
    assert scan([tmp_path], builtin=False, quiet_seconds=3600).models


def test_unreadable_files_are_told(tmp_path: Path) -> None:
    (tmp_path / "gone.gguf").symlink_to(tmp_path / "nowhere")
    assert look(tmp_path).unusable[0].reason == "it cannot be read: No such file or directory"


def test_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path))
    assert models_directory() == tmp_path
    assert model_directories([tmp_path, tmp_path / "x"]) == (tmp_path, tmp_path / "x")
    monkeypatch.delenv("MESH_LLM_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_directory() == tmp_path / ".models"


def installed(monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def files(package: str) -> Path:
        assert package == "mesh_llm.models"
        return place

    monkeypatch.setattr(builtin_models.resources, "files", files)


def test_builtin_models_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, mine = tmp_path / "package" / "builtin", tmp_path / "mine"
    model(inside / "tiny.gguf")
    model(inside / "tiny-draft.gguf", layers=1)
    model(mine / "tiny.gguf", context=8192)
    installed(monkeypatch, tmp_path / "package")
    library = scan([mine])
    tiny = library.models[next(iter(library.models))]
    assert (tiny.name, tiny.builtin, tiny.path) == ("tiny", True, inside / "tiny.gguf")
    assert list(library.drafts) == ["tiny-draft"]
    assert "already called tiny" in library.unusable[0].reason


def refusal(spec: str, library: Library) -> MeshError:
    with pytest.raises(MeshError) as caught:
        resolve(spec, library)
    assert caught.value.hint
    return caught.value


def test_resolving_names(tmp_path: Path) -> None:
    model(tmp_path / "Qwen2.5-3B-Instruct-Q4_K_M.gguf")
    model(tmp_path / "Qwen2.5-7B-Instruct-Q4_K_M.gguf", context=8192)
    model(tmp_path / "my-draft.gguf", layers=1, context=1024)
    (tmp_path / "broken.gguf").write_text("x")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\3\0\0\0")
    library = look(tmp_path)
    assert resolve("qwen2.5-3b", library).path.name == "Qwen2.5-3B-Instruct-Q4_K_M.gguf"
    assert resolve("Qwen2.5-7B-Instruct-Q4_K_M.gguf", library).facts.context_train == 8192
    assert resolve("my-draft", library).facts.kind is ModelKind.DRAFT
    both = refusal("qwen", library)
    assert both.code == "model_ambiguous"
    assert "Qwen2.5-3B-Instruct-Q4_K_M, Qwen2.5-7B-Instruct-Q4_K_M" in both.message
    none = refusal("llama", library)
    assert (none.code, none.status) == ("model_not_found", 404)
    assert "Qwen2.5-3B" in none.hint
    assert "does not start with the letters GGUF" in refusal("broken", library).message
    assert refusal("cut", library).code == "model_incomplete"
    assert "no models yet" in refusal("llama", Library()).hint


def test_resolving_the_builtin_when_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, tmp_path)
    error = refusal("tiny", scan([]))
    assert error.code == "builtin_missing"


def test_resolving_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    path = model(tmp_path / "one.gguf")
    assert resolve(str(path), library).name == "one"
    monkeypatch.chdir(tmp_path)
    assert resolve("one.gguf", library).path == path
    assert resolve("./one.gguf", library).path == path
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/one.gguf", library).path == path

    directory = refusal(str(tmp_path), library)
    assert directory.code == "model_invalid"
    assert "Use one of its files: one.gguf" in directory.hint
    missing = refusal(str(tmp_path / "two.gguf"), library)
    assert missing.code == "model_not_found"
    assert "one.gguf" in missing.hint
    (tmp_path / "text").write_text("x" * 100)
    assert "does not start with the letters GGUF" in refusal(str(tmp_path / "text"), library).message

    files = parts(tmp_path / "parts", "big")
    assert resolve(str(files[2]), library).paths == tuple(files)
    files[0].unlink()
    partial = refusal(str(files[1]), library)
    assert partial.code == "model_incomplete"
    assert "one of 3 parts. Missing parts: 1" in partial.message


def not_utf8(folder: Path, stem: bytes = b"m\xe8le") -> Path:
    return Path(os.fsdecode(os.path.join(os.fsencode(folder), stem + b".gguf")))  # noqa: PTH118


def test_a_name_that_is_not_utf8_is_reported_and_nothing_else_notices(tmp_path: Path) -> None:
    good = model(tmp_path / "good.gguf")
    shutil.copy(good, not_utf8(tmp_path))
    cache = FactsCache(tmp_path / "cache.json")
    library = look(tmp_path, cache=cache)
    assert list(library.models) == ["good"]
    (broken,) = library.unusable
    assert (broken.name, broken.reason) == ("m\\xe8le", "its path is not valid UTF-8; rename it")
    assert str(broken.path).endswith("m\\xe8le.gguf")
    cache.save()
    with pytest.raises(MeshError, match=r"m\\xe8le\.gguf cannot be used: its path is not valid UTF-8"):
        resolve(str(not_utf8(tmp_path)), library)
    with pytest.raises(MeshError, match=r"It holds good\.gguf, m\\xe8le\.gguf|is a directory") as raised:
        resolve(str(tmp_path), library)
    raised.value.hint.encode()
    for missing in (str(not_utf8(tmp_path, b"\xff")), os.fsdecode(b"\xff")):
        with pytest.raises(MeshError) as raised:
            resolve(missing, library)
        f"{raised.value.message}{raised.value.hint}".encode()


def test_a_directory_whose_name_is_not_utf8(tmp_path: Path) -> None:
    folder = not_utf8(tmp_path)
    folder.mkdir()
    model(folder / "inside.gguf")
    library = look(tmp_path)
    assert not library.models
    assert library.unusable[0].reason == "its path is not valid UTF-8; rename it"


def test_parts_in_capitals_are_reported_since_the_engine_would_not_find_them(tmp_path: Path) -> None:
    for path in parts(tmp_path, "big"):
        path.rename(path.with_suffix(".GGUF"))
    library = look(tmp_path)
    assert not library.models
    (broken,) = library.unusable
    assert "in lower case; rename them" in broken.reason
    with pytest.raises(MeshError, match="in lower case"):
        resolve(str(tmp_path / "big-00001-of-00003.GGUF"), library)


def test_linked_directories_are_looked_into_once_and_loops_end(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    model(tmp_path / "elsewhere" / "far.gguf")
    (tmp_path / "models" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "models" / "again").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "models")
    library = look(tmp_path / "models")
    assert list(library.models) == ["far"]
    assert not library.unusable


def projector(path: Path, kind: str = "mlp", width: int = 256) -> Path:
    metadata: dict[str, Value] = {
        "general.architecture": "clip",
        "clip.projector_type": kind,
        "clip.vision.projection_dim": width,
    }
    return write(path, metadata, llama_tensors())


def chosen(folder: Path) -> dict[str, str]:
    found = look(folder).models.items()
    return {str(name): one.projector.name if one.projector is not None else "" for name, one in found}


def test_a_projector_goes_with_the_model_that_it_is_made_for(tmp_path: Path) -> None:
    width = look(model(tmp_path / "probe" / "x.gguf").parent).facts()[0].embedding_length
    generic = tmp_path / "generic"
    model(generic / "Thing-Q4_K_M.gguf")
    model(generic / "Thing-Q8_0.gguf", name="other")
    projector(generic / "mmproj-model-f16.gguf", width=width)
    assert set(chosen(generic).values()) == {"mmproj-model-f16.gguf"}
    # Beside several models, one that names none may belong to any of them.
    model(generic / "Else-Q4_K_M.gguf", name="else")
    assert set(chosen(generic).values()) == {""}
    projector(generic / "mmproj-Thing-f16.gguf", width=width)
    assert chosen(generic) == {
        "Thing-Q4_K_M": "mmproj-Thing-f16.gguf",
        "Thing-Q8_0": "mmproj-Thing-f16.gguf",
        "Else-Q4_K_M": "",
    }
    # One that is made for another architecture fits no llama, whatever its name and width.
    foreign = tmp_path / "foreign"
    model(foreign / "Thing-Q4_K_M.gguf")
    projector(foreign / "mmproj-Thing-f16.gguf", "qwen2vl_merger", width)
    assert chosen(foreign) == {"Thing-Q4_K_M": ""}
    narrow = tmp_path / "narrow"
    model(narrow / "Thing-Q4_K_M.gguf")
    projector(narrow / "mmproj-Thing-f16.gguf", width=width + 1)
    assert chosen(narrow) == {"Thing-Q4_K_M": ""}
