import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.catalog import catalog, draft_pairs, entry_of, find_entry, recommend
from mesh_llm.models.hub.source_ref import parse_source

LISTED = """
    qwen2.5-3b qwen2.5-7b qwen2.5-14b qwen2.5-32b qwen2.5-72b qwen2.5-coder-7b qwen2.5-coder-32b qwen3-8b qwen3-14b
    qwen3-32b qwen3-30b-a3b llama-3.3-70b gemma-3-27b glm-4.7-flash gpt-oss-20b gpt-oss-120b deepseek-v3 hermes-3-405b
"""
GB = 10**9


def test_what_is_listed() -> None:
    names = [entry.name for entry in catalog()]
    assert len(names) == len(set(names))
    assert set(LISTED.split()) <= set(names)
    sizes = [entry.size_mb for entry in catalog()]
    assert sizes == sorted(sizes)
    assert min(entry.parameters for entry in catalog()) <= 0.5
    assert max(entry.parameters for entry in catalog()) >= 405
    assert any(entry.active_parameters for entry in catalog())


def test_every_entry_is_consistent() -> None:
    names = {entry.name for entry in catalog()}
    for entry in catalog():
        assert parse_source(str(entry.ref)) == entry.ref
        # Four to five bits and a half a parameter, and the same figure from the shape.
        assert 3.9 <= entry.size_bytes * 8 / (entry.parameters * 10**9) <= 6.6, entry.name
        assert entry.draft in names | {""}
        assert not entry.draft or find_entry(entry.draft).size_mb * 5 <= entry.size_mb
        assert set(entry.capabilities) <= {"chat", "code", "reasoning", "tools", "vision"}
        assert set(entry.checked) <= {"file", "size"}
        assert entry.cache_bytes % (2 * entry.layers) == 0
        assert entry.window_cache_bytes <= entry.cache_bytes
        assert entry.licence
        assert entry.quant.lower() in entry.file.lower() or not entry.file
        assert not entry.fits(entry.size_bytes)
        assert entry.fits(entry.size_bytes * 2 + 4 * GB)


def test_drafts() -> None:
    pairs = draft_pairs()
    assert pairs["Qwen2.5-Coder-32B-Instruct-Q4_K_M"] == "Qwen2.5-0.5B-Instruct-Q4_K_M"
    assert pairs["Qwen_Qwen3-32B-Q4_K_M"] == "Qwen3-0.6B-Q4_K_M"
    assert pairs["Llama-3.3-70B-Instruct-Q4_K_M"] == "Llama-3.2-1B-Instruct-Q4_K_M"
    assert pairs["gemma-3-27b-it-Q4_K_M"] == "gemma-3-1b-it-Q4_K_M"
    assert "GLM-4.7-Flash-Q4_K_M" not in pairs


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("qwen2.5-3b", "qwen2.5-3b"),
        ("QWEN2.5-3B", "qwen2.5-3b"),
        ("Qwen2.5-3B-Instruct-Q4_K_M.gguf", "qwen2.5-3b"),
        ("Qwen2.5-3B-Instruct-Q4_K_M", "qwen2.5-3b"),
        ("Qwen2.5 3B Instruct", "qwen2.5-3b"),
        ("72b", "qwen2.5-72b"),
        ("coder 32b", "qwen2.5-coder-32b"),
        ("120b", "gpt-oss-120b"),
        ("Hermes", "hermes-3-405b"),
        ("GLM", "glm-4.7-flash"),
        ("qwen3 32b", "qwen3-32b"),
    ],
)
def test_names_are_understood(asked: str, name: str) -> None:
    assert find_entry(asked).name == name


def test_ambiguous_and_unknown_names_show_the_choices() -> None:
    with pytest.raises(MeshError, match=r"qwen3-32b \(19.8 GB\)") as caught:
        find_entry("32b")
    assert caught.value.code == "model_ambiguous"
    assert "qwen2.5-coder-32b" in caught.value.message
    for asked in ("nothing", "", " ", "-"):
        with pytest.raises(MeshError, match="has no model") as caught:
            find_entry(asked)
        assert "qwen2.5-3b" in caught.value.hint


def test_words_begin_parts_of_names() -> None:
    with pytest.raises(MeshError) as caught:
        find_entry("3b")
    assert "a3b" not in caught.value.message
    with pytest.raises(MeshError, match="has no model"):
        find_entry("2b")


def test_the_best_that_fits() -> None:
    assert recommend(10**8) is None
    chosen = [recommend(memory * GB) for memory in (2, 8, 16, 24, 48, 96, 1000)]
    assert all(entry is not None for entry in chosen)
    ranks = [entry.rank for entry in chosen if entry is not None]
    assert ranks == sorted(ranks)
    for entry, memory in zip(chosen, (2, 8, 16, 24, 48, 96, 1000), strict=True):
        assert entry is not None
        assert entry.fits(memory * GB)


def test_from_a_file_to_its_entry() -> None:
    for entry in catalog():
        file = entry.file or f"x/{entry.quant}-00001-of-00002.gguf"
        assert entry_of(entry.repository, file) == entry
    assert entry_of("owner/other", "x.gguf") is None
