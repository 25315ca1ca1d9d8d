"""Models that clients make on this machine: names, links, uploads."""

import hashlib
import os
from pathlib import Path

import pytest
from tests.support.gguf_tool_caller import write_tool_caller

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.cache import created_directory
from mesh_llm.models.library.created import (
    BlobStore,
    file_stem,
    link_model,
    make_model,
    remove_created,
)
from mesh_llm.models.library.library import LocalModel, scan


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    monkeypatch.setenv("MESH_LLM_MODELS", str(directory))
    return directory


def found(directory: Path) -> dict[str, LocalModel]:
    library = scan([directory], builtin=False, quiet_seconds=60.0)
    return {str(name): model for name, model in library.models.items()}


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def upload(store: BlobStore, data: bytes, digest: str = "") -> None:
    one = store.begin(digest or digest_of(data), len(data))
    one.write(data)
    one.finish()


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("mine", "mine"),
        ("mine:latest", "mine"),
        ("mine:v2", "mine-v2"),
        ("hub.io/me/mine:7b", "mine-7b"),
        ("a.b_c-1", "a.b_c-1"),
    ],
)
def test_names_of_files(name: str, stem: str):
    assert file_stem(name) == stem


NO_NAMES = ["", ".", "..", "a/..", "../../etc/passwd:x/..", ".hidden", "a\\b", "a b", "a\0b", "x.gguf", "é", "a" * 200]


@pytest.mark.parametrize("name", [*NO_NAMES, "tiny-00001-of-00002", "a:b:c", "~me", "-o", "a..b"])
def test_names_that_cannot_be_files(name: str):
    with pytest.raises(MeshError, match="cannot be the name") as refused:
        file_stem(name)
    assert refused.value.status == 400


def test_a_model_of_an_upload_and_its_further_name(models: Path, tmp_path: Path):
    write_tool_caller(tmp_path / "x.gguf")
    data = (tmp_path / "x.gguf").read_bytes()
    store = BlobStore(tmp_path / "uploads")
    assert store.find(digest_of(data)) is None
    upload(store, data)
    blob = store.find(digest_of(data))
    assert blob is not None
    assert make_model(blob, "mine:v1") == "mine-v1"
    assert store.find(digest_of(data)) is None
    assert (created_directory() / "mine-v1.gguf").read_bytes() == data

    made = found(models)["mine-v1"]
    assert link_model(made, "other") == "other"
    both = found(models)
    assert both.keys() == {"mine-v1", "other"}
    assert both["other"].path.stat().st_ino == made.path.stat().st_ino
    assert remove_created(both["other"])
    assert found(models).keys() == {"mine-v1"}
    assert [path.name for path in created_directory().iterdir()] == ["mine-v1.gguf"]


def test_a_file_of_the_users_own_is_not_removed(models: Path):
    write_tool_caller(models / "own.gguf")
    os.utime(models / "own.gguf", (1.0, 1.0))
    assert not remove_created(found(models)["own"])
    assert (models / "own.gguf").exists()


def test_what_is_no_model_is_refused_and_leaves_nothing(models: Path, tmp_path: Path):
    store = BlobStore(tmp_path / "uploads")
    upload(store, b"no model at all")
    blob = store.find(digest_of(b"no model at all"))
    assert blob is not None
    with pytest.raises(MeshError, match="cannot be used"):
        make_model(blob, "mine")
    assert not created_directory().exists()


def test_an_upload_must_have_its_digest(tmp_path: Path):
    store = BlobStore(tmp_path)
    with pytest.raises(MeshError, match="digest mismatch"):
        upload(store, b"a", digest_of(b"b"))
    assert list(tmp_path.iterdir()) == []
    one = store.begin(digest_of(b"c"), None)
    one.write(b"c")
    one.abort()
    one.abort()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:" + "A" * 64, "md5:" + "a" * 64, "sha256:../" + "a" * 61, "sha256:" + "a" * 65]
)
def test_a_digest_is_no_path(tmp_path: Path, digest: str):
    with pytest.raises(MeshError, match="invalid digest format"):
        BlobStore(tmp_path).find(digest)
    with pytest.raises(MeshError, match="invalid digest format"):
        BlobStore(tmp_path).begin(digest, 1)
    assert list(tmp_path.iterdir()) == []


def test_uploads_are_bounded(tmp_path: Path):
    store = BlobStore(tmp_path)
    with pytest.raises(MeshError) as full:
        store.begin(digest_of(b""), 1 << 60)
    assert full.value.code == "disk_full"
    running = [store.begin(digest_of(bytes([number])), 1) for number in range(4)]
    with pytest.raises(MeshError) as many:
        store.begin(digest_of(b"x"), 1)
    assert many.value.status == 429
    for one in running:
        one.abort()
    upload(store, b"x")
    old = store.find(digest_of(b"x"))
    assert old is not None
    os.utime(old, (1.0, 1.0))
    upload(store, b"y")
    assert store.find(digest_of(b"x")) is None
