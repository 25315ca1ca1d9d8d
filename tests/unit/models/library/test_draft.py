from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from tests.support.gguf_writer import Value, llama_metadata, llama_tensors, write

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName
from mesh_llm.models.library.draft import difference, find_draft, read_vocabulary, require_draft
from mesh_llm.models.library.library import Library, LocalModel, scan

Tokenizer = Mapping[str, Value]
TOKENS = [f"token {i}" for i in range(400)]


def model(
    path: Path, tokens: Sequence[str] = TOKENS, *, width: int = 64, layers: int = 1, tokenizer: Tokenizer | None = None
) -> Path:
    metadata = llama_metadata(tokens=tokens, width=width, layers=layers)
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in (tokenizer or {}).items()}
    return write(path, metadata, llama_tensors(width=width, layers=layers))


def compare(tmp_path: Path, tokens: Sequence[str] = TOKENS, tokenizer: Tokenizer | None = None) -> str | None:
    one = model(tmp_path / "one.gguf")
    other = model(tmp_path / "other.gguf", tokens, tokenizer=tokenizer)
    there = difference(read_vocabulary(one), read_vocabulary(other))
    back = difference(read_vocabulary(other), read_vocabulary(one))
    assert (there is None) == (back is None)
    return there


def test_the_same_vocabulary(tmp_path: Path) -> None:
    assert compare(tmp_path) is None


def test_padding_to_another_length_is_the_same(tmp_path: Path) -> None:
    assert compare(tmp_path, [*TOKENS, *(f"[PAD{i}]" for i in range(128))]) is None
    assert compare(tmp_path, TOKENS[:-20]) is None


def test_the_first_few_tokens_may_differ(tmp_path: Path) -> None:
    assert compare(tmp_path, ["other", *TOKENS[1:]]) is None


@pytest.mark.parametrize(
    ("tokens", "extra", "says"),
    [
        ([*TOKENS[:300], "another", *TOKENS[301:]], {}, "token 300 differs"),
        ([*TOKENS, *(f"[PAD{i}]" for i in range(129))], {}, "they have 400 and 529 tokens"),
        (TOKENS, {"model": "llama"}, "tokenizers differ: gpt2 and llama"),
        (TOKENS, {"merges": ["b a"]}, "merge characters"),
        (TOKENS, {"add_bos_token": True}, "begin with different tokens: none and token 0"),
        (TOKENS, {"pre": "llama-bpe"}, "begin with different tokens: none and token 0"),
        (TOKENS, {"add_eos_token": True}, "end with different tokens: none and token 1"),
    ],
)
def test_what_differs_is_said(tmp_path: Path, tokens: list[str], extra: Tokenizer, says: str) -> None:
    assert says in (compare(tmp_path, tokens, extra) or "")


def test_a_beginning_that_is_not_added_may_differ(tmp_path: Path) -> None:
    assert compare(tmp_path, TOKENS, {"bos_token_id": 7}) is None
    added: Tokenizer = {"add_bos_token": True}
    one = read_vocabulary(model(tmp_path / "a.gguf", tokenizer=added))
    assert difference(one, read_vocabulary(model(tmp_path / "b.gguf", tokenizer=added))) is None
    third = model(tmp_path / "c.gguf", tokenizer={**added, "bos_token_id": 3})
    differs = difference(one, read_vocabulary(third))
    assert differs == "their texts begin with different tokens: token 0 and token 3"


def library(folder: Path) -> tuple[Library, LocalModel]:
    found = scan([folder], builtin=False)
    return found, next(item for name, item in found.models.items() if name == "big")


def test_a_pair_comes_first_then_drafts_then_small_models(tmp_path: Path) -> None:
    model(tmp_path / "big.gguf", width=1024, layers=2)
    model(tmp_path / "small.gguf", width=96)
    model(tmp_path / "middle.gguf", width=512)
    model(tmp_path / "stranger.gguf", [*TOKENS[:300], "x", *TOKENS[301:]])
    found, big = library(tmp_path)
    choice = find_draft(big, found)
    assert choice.draft is not None
    assert choice.draft.name == "small"
    assert choice.reason == "small drafts for big: it has the same vocabulary"

    model(tmp_path / "some-draft.gguf", width=128)
    found, big = library(tmp_path)
    choice = find_draft(big, found)
    assert choice.draft is not None
    assert choice.draft.name == "some-draft"
    choice = find_draft(big, found, {"big": "middle"})
    assert choice.draft is not None
    assert choice.draft.name == "middle"
    assert "made for this model" in choice.reason
    choice = find_draft(big, found, {"big": "stranger"})
    assert choice.draft is not None
    assert choice.draft.name == "some-draft"


def test_a_draft_that_was_made_for_one_model_is_not_chosen_by_its_vocabulary(tmp_path: Path) -> None:
    model(tmp_path / "big.gguf", width=1024, layers=2)
    model(tmp_path / "small.gguf", width=96)
    found, big = library(tmp_path)
    made = replace(found.models[ModelName("small")], facts=msgspec.structs.replace(
        found.models[ModelName("small")].facts, architecture="eagle3"))  # fmt: skip
    assert find_draft(big, replace(found, models={big.name: big}, drafts={made.name: made})).draft is None
    assert find_draft(big, replace(found, drafts={made.name: made}), {"big": "small"}).draft is not None


def test_none_is_found_with_a_reason(tmp_path: Path) -> None:
    model(tmp_path / "big.gguf", width=1024, layers=2)
    found, big = library(tmp_path)
    assert find_draft(big, found).reason == "there is no small model with the vocabulary of big"
    model(tmp_path / "stranger.gguf", [*TOKENS[:300], "x", *TOKENS[301:]])
    found, big = library(tmp_path)
    choice = find_draft(big, found)
    assert choice.draft is None
    assert choice.reason == "stranger cannot draft for big: token 300 differs"


def test_a_chosen_draft_is_checked(tmp_path: Path) -> None:
    model(tmp_path / "big.gguf", width=1024, layers=2)
    model(tmp_path / "small.gguf")
    model(tmp_path / "stranger.gguf", ["x", *TOKENS])
    found, big = library(tmp_path)
    drafts = {str(name): item for name, item in found.models.items()}
    require_draft(big, drafts["small"])
    with pytest.raises(MeshError, match="stranger cannot draft for big: token 5 differs") as caught:
        require_draft(big, drafts["stranger"])
    assert caught.value.code == "draft_mismatch"
    (tmp_path / "small.gguf").unlink()
    with pytest.raises(MeshError, match="cannot be read: No such file"):
        require_draft(big, drafts["small"])


@pytest.mark.parametrize(
    ("width", "layers", "says"),
    [(96, [0, 1, 2], ""), (64, [0, 1, 2], "hidden states of 64 numbers"), (96, [0, 1, 3], "it reads layer 3")],
)
def test_a_draft_that_reads_hidden_states_is_of_one_model(
    tmp_path: Path, width: int, layers: list[int], says: str
) -> None:
    model(tmp_path / "big.gguf", width=96, layers=2)
    made = llama_metadata(architecture="eagle3", tokens=TOKENS, width=64, layers=1)
    made |= {"eagle3.target_hidden_size": width, "eagle3.target_layers": layers}
    write(tmp_path / "made.gguf", made, llama_tensors(width=64, layers=1))
    found, big = library(tmp_path)
    draft = found.drafts[ModelName("made")]
    if not says:
        require_draft(big, draft)
        return
    with pytest.raises(MeshError, match=says):
        require_draft(big, draft)


def test_not_every_architecture_gives_a_draft_its_hidden_states(tmp_path: Path) -> None:
    model(tmp_path / "big.gguf", width=96, layers=2)
    made = llama_metadata(architecture="eagle3", tokens=TOKENS, width=64, layers=1)
    write(tmp_path / "made.gguf", made, llama_tensors(width=64, layers=1))
    found, big = library(tmp_path)
    draft = found.drafts[ModelName("made")]
    require_draft(big, draft)
    other = replace(big, facts=msgspec.structs.replace(big.facts, architecture="glm4moe"))
    with pytest.raises(MeshError, match="no hidden states of glm4moe models"):
        require_draft(other, draft)
