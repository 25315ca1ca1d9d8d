from pathlib import Path

import pytest
from tests.support.gguf_writer import llama_metadata, llama_tensors, write

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.cache import CachedRepository
from mesh_llm.models.hub.source_ref import parse_source
from mesh_llm.models.library.files import Store, read_hub_cache
from mesh_llm.models.library.library import Library, LocalModel, scan
from mesh_llm.models.library.resolve import Remote, fetched_earlier, interpret

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def look(folder: Path) -> Library:
    return scan([folder / "mine"], builtin=False, stores=[Store("Hugging Face", folder / "hub", read_hub_cache)])


def model(path: Path, context: int = 4096) -> Path:
    return write(path, llama_metadata(context=context), llama_tensors())


def fetched(folder: Path, repository: str, file: str) -> None:
    place = CachedRepository(folder / "hub", repository)
    model(place.content(f"etag-{file}"))
    place.publish(COMMIT, file, f"etag-{file}")


def local(spec: str, library: Library) -> str:
    found = interpret(spec, library)
    assert isinstance(found, LocalModel)
    return found.name


def remote(spec: str, library: Library) -> str:
    found = interpret(spec, library)
    assert isinstance(found, Remote)
    return str(found.ref)


def test_what_is_here_comes_first(tmp_path: Path) -> None:
    path = model(tmp_path / "mine" / "Qwen3-Mine.gguf")
    library = look(tmp_path)
    assert local("qwen3", library) == "Qwen3-Mine"
    assert local(str(path), library) == "Qwen3-Mine"
    assert remote("qwen3-8b", library) == "hf:unsloth/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf"
    found = interpret("gpt-oss-120b", library)
    assert isinstance(found, Remote)
    assert found.entry is not None
    assert str(found.ref) == "hf:ggml-org/gpt-oss-120b-GGUF:MXFP4"


def test_what_the_catalogue_or_a_source_means_may_be_here_already(tmp_path: Path) -> None:
    fetched(tmp_path, "unsloth/Qwen3-8B-GGUF", "Qwen3-8B-Q4_K_M.gguf")
    library = look(tmp_path)
    source = "hf:unsloth/Qwen3-8B-GGUF:Qwen3-8B-Q4_K_M.gguf"
    assert local("Qwen3 8B", library) == "Qwen3-8B-Q4_K_M"
    assert local(source, library) == "Qwen3-8B-Q4_K_M"
    assert local(f"{source}@{COMMIT}", library) == "Qwen3-8B-Q4_K_M"
    assert remote(f"{source}@{'f' * 40}", library).endswith("f" * 40)
    assert remote("hf:unsloth/Qwen3-8B-GGUF:Q8_0", library) == "hf:unsloth/Qwen3-8B-GGUF:Q8_0"
    assert remote("https://huggingface.co/o/r/blob/main/m.gguf", library) == "hf:o/r:m.gguf"


@pytest.mark.parametrize(
    ("spec", "code", "says"),
    [
        ("nothing-like-it", "model_not_found", "hf:OWNER/REPO"),
        ("32b", "model_ambiguous", "qwen3-32b"),
        ("", "model_not_found", "is empty"),
        ("./no.gguf", "model_not_found", "no file"),
        ("hf:nothing", "source_invalid", "hf:OWNER/REPO"),
    ],
)
def test_what_is_nowhere_is_told(tmp_path: Path, spec: str, code: str, says: str) -> None:
    with pytest.raises(MeshError) as caught:
        interpret(spec, look(tmp_path))
    assert caught.value.code == code
    assert says in str(caught.value)


def test_without_the_hub_an_earlier_copy_is_what_the_source_means(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    for quant in ("Q8_0", "Q4_K_M"):
        fetched(tmp_path, "o/Model-GGUF", f"Model-{quant}.gguf")
    fetched(tmp_path, "o/Other-GGUF", "Other-Q4_K_M.gguf")
    library = look(tmp_path)

    def earlier(spec: str) -> str | None:
        found = fetched_earlier(parse_source(spec), library)
        return None if found is None else found.name

    assert earlier("hf:o/Model-GGUF") == "Model-Q4_K_M"
    assert earlier("hf:o/Model-GGUF:Q8_0") == "Model-Q8_0"
    assert earlier("hf:o/Model-GGUF:Q5_0") is None
    assert earlier("hf:o/None-GGUF") is None
    assert earlier(f"hf:o/Model-GGUF@{COMMIT}") == "Model-Q4_K_M"
    assert earlier(f"hf:o/Model-GGUF@{COMMIT[::-1]}") is None
    # A branch that the cache saw at another commit is not what is here.
    CachedRepository(tmp_path / "hub", "o/Model-GGUF").remember("main", COMMIT[::-1])
    assert earlier("hf:o/Model-GGUF") is None
    CachedRepository(tmp_path / "hub", "o/Model-GGUF").remember("main", COMMIT)
    assert earlier("hf:o/Model-GGUF") == "Model-Q4_K_M"
