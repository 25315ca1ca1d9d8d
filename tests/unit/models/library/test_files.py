import hashlib
import json
from pathlib import Path

import pytest
from tests.support.gguf_writer import llama_metadata, llama_tensors, write

from mesh_llm.core.types.ids import ModelName
from mesh_llm.models.hub.cache import CachedRepository, cached_source, hub_cache_directory
from mesh_llm.models.library.files import Store, known_stores, read_hub_cache, read_ollama, read_tree
from mesh_llm.models.library.library import LocalModel, scan

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(path: Path, context: int = 4096) -> Path:
    return write(path, llama_metadata(context=context), llama_tensors())


def projector(path: Path, width: int = 256, layers: int = 1) -> Path:
    metadata = {"general.architecture": "clip", "clip.vision.projection_dim": width}
    return write(path, metadata, llama_tensors(layers=layers))


def only(models: dict[ModelName, LocalModel]) -> LocalModel:
    assert len(models) == 1
    return next(iter(models.values()))


def test_the_hub_cache(tmp_path: Path) -> None:
    place = CachedRepository(tmp_path, "owner/Repo-GGUF")
    model(place.content("e1"))
    link = place.publish(COMMIT, "sub/Model-Q4.gguf", "e1")
    place.publish("f" * 40, "sub/Model-Q4.gguf", "e1")
    place.remember("main", COMMIT)
    place.remember(COMMIT, COMMIT)
    assert [path.name for path in (place.folder / "refs").iterdir()] == ["main"]
    assert link.is_symlink()
    assert not link.readlink().is_absolute()

    library = scan([], builtin=False, stores=[Store("Hugging Face", tmp_path, read_hub_cache)])
    found = only(dict(library.models))
    assert (found.name, found.store, found.path) == ("Model-Q4", "Hugging Face", link)
    assert found.facts.source == f"hf:owner/Repo-GGUF:sub/Model-Q4.gguf@{COMMIT}"
    assert not library.unusable


def test_a_file_that_was_just_fetched_is_not_taken_for_one_being_written(tmp_path: Path) -> None:
    place = CachedRepository(tmp_path, "owner/Repo-GGUF")
    model(place.content("e1"))
    place.publish(COMMIT, "Model-Q4.gguf", "e1")
    stores = [Store("Hugging Face", tmp_path, read_hub_cache)]
    assert scan([], builtin=False, stores=stores, quiet_seconds=3600).models


def test_sources_of_cached_files(tmp_path: Path) -> None:
    inside = tmp_path / "models--o--r" / "snapshots" / COMMIT
    assert cached_source(inside / "a" / "m.gguf", tmp_path) == f"hf:o/r:a/m.gguf@{COMMIT}"
    for path in (
        tmp_path / "m.gguf",
        Path("/elsewhere/m.gguf"),
        tmp_path / "datasets--o--r" / "snapshots" / COMMIT / "m",
    ):
        assert cached_source(path, tmp_path) == ""


def blob(root: Path, path: Path) -> str:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    path.rename(root / "blobs" / f"sha256-{digest}")
    return f"sha256:{digest}"


def manifest(root: Path, name: str, **layers: str) -> None:
    path = root / "manifests" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [
        {"mediaType": f"application/vnd.ollama.image.{kind}", "digest": digest, "size": 1}
        for kind, digest in layers.items()
    ]
    path.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": listed}))


def test_ollama(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    one, two = blob(tmp_path, model(tmp_path / "1")), blob(tmp_path, model(tmp_path / "2", context=8192))
    eyes = blob(tmp_path, projector(tmp_path / "3"))
    manifest(tmp_path, "registry.ollama.ai/library/llama3.2/latest", model=one, template=two)
    manifest(tmp_path, "registry.ollama.ai/someone/other/7b", model=two, projector=eyes)
    manifest(tmp_path, "registry.ollama.ai/library/same/1b", model=one)
    manifest(tmp_path, "registry.ollama.ai/library/gone/1b", model=f"sha256:{'0' * 64}")
    manifest(tmp_path, "registry.ollama.ai/library/evil/1b", model="sha256:../../../etc/passwd")
    (tmp_path / "manifests/registry.ollama.ai/library/broken").mkdir()
    (tmp_path / "manifests/registry.ollama.ai/library/broken/latest").write_text("{")

    before = sorted(tmp_path.rglob("*"))
    library = scan([], builtin=False, stores=[Store("Ollama", tmp_path, read_ollama)])
    assert sorted(tmp_path.rglob("*")) == before
    assert set(library.models) == {"llama3.2", "someone/other:7b"}
    seeing = library.models[ModelName("someone/other:7b")]
    assert seeing.projector == tmp_path / "blobs" / eyes.replace(":", "-")
    assert seeing.facts.companion_bytes > 0
    assert library.models[ModelName("llama3.2")].projector is None
    assert not library.unusable


def test_lm_studio_and_the_users_own_come_first(tmp_path: Path) -> None:
    model(tmp_path / "studio" / "publisher" / "repo" / "m.gguf")
    mine = model(tmp_path / "mine" / "m.gguf")
    library = scan([tmp_path / "mine"], builtin=False, stores=[Store("LM Studio", tmp_path / "studio", read_tree)])
    assert only(dict(library.models)).path == mine
    library = scan([], builtin=False, stores=[Store("LM Studio", tmp_path / "studio", read_tree)])
    assert only(dict(library.models)).store == "LM Studio"


def test_where_stores_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "OLLAMA_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ollama" / "models").mkdir(parents=True)
    roots = {store.name: store.root for store in known_stores()}
    assert roots["Hugging Face"] == tmp_path / ".cache/huggingface/hub"
    assert roots["Ollama"] == tmp_path / ".ollama/models"
    assert [store.root for store in known_stores() if store.name == "LM Studio"] == [
        tmp_path / ".lmstudio/models",
        tmp_path / ".cache/lm-studio/models",
    ]
    (tmp_path / ".lmstudio-home-pointer").write_text("/data/studio\n")
    assert Path("/data/studio/models") in [store.root for store in known_stores()]
    monkeypatch.setenv("OLLAMA_MODELS", "/data/ollama")
    monkeypatch.setenv("HF_HOME", "~/hf")
    assert hub_cache_directory() == tmp_path / "hf/hub"
    monkeypatch.setenv("HF_HUB_CACHE", "/data/hub")
    roots = {store.name: store.root for store in known_stores()}
    assert (roots["Hugging Face"], roots["Ollama"]) == (Path("/data/hub"), Path("/data/ollama"))


def paired(folder: Path, name: str) -> str | None:
    found = scan([folder], builtin=False).models[ModelName(name)].projector
    return None if found is None else found.name


def test_projectors_beside_a_model_pair(tmp_path: Path) -> None:
    model(tmp_path / "one" / "Gemma-3-4B-it-Q4_K_M.gguf")
    assert paired(tmp_path, "Gemma-3-4B-it-Q4_K_M") is None
    projector(tmp_path / "one" / "mmproj-model-f32.gguf", layers=2)
    projector(tmp_path / "one" / "mmproj-model-f16.gguf")
    projector(tmp_path / "two" / "mmproj-model-f16.gguf", layers=3)
    model(tmp_path / "two" / "Other-7B-Q4_K_M.gguf", context=512)
    assert paired(tmp_path, "Gemma-3-4B-it-Q4_K_M") == "mmproj-model-f16.gguf"
    library = scan([tmp_path], builtin=False)
    for name, sizes in (("Gemma-3-4B-it-Q4_K_M", 1), ("Other-7B-Q4_K_M", 3)):
        entry = library.models[ModelName(name)]
        assert entry.projector is not None
        assert entry.projector.parent == entry.path.parent
        assert entry.facts.companion_bytes == 2 * (256 * 4 * 2 + sizes * 1024 * 256) + 1024
    assert not library.unusable


def test_projectors_of_other_models_do_not(tmp_path: Path) -> None:
    model(tmp_path / "Gemma-3-4B-it-Q4_K_M.gguf")
    projector(tmp_path / "mmproj-Qwen2-VL-2B-f16.gguf")
    projector(tmp_path / "mmproj-gemma-3-4b-wide-f16.gguf", width=512)
    projector(tmp_path / "mmproj-model-f16.gguf", width=512)
    assert paired(tmp_path, "Gemma-3-4B-it-Q4_K_M") is None
    projector(tmp_path / "gemma-3-4b-it-mmproj-bf16.gguf")
    assert paired(tmp_path, "Gemma-3-4B-it-Q4_K_M") == "gemma-3-4b-it-mmproj-bf16.gguf"
