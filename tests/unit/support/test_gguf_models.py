"""Generated models: what is in the file, and that it follows from the recipe alone."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from tests.support.gguf_models import PRESETS, cached_model, tensor_shapes, write_model
from tests.support.gguf_vocabulary import TURN_END, build_vocabulary
from tests.support.gguf_weights import Recipe, foretell, matrices

LITTLE = Recipe("little", layers=2, width=128, feed_forward=64, heads=4, kv_heads=2, seed=3)


@pytest.mark.parametrize(
    ("weights", "kind"), [("f16", gguf.GGMLQuantizationType.F16), ("q8_0", gguf.GGMLQuantizationType.Q8_0)]
)
def test_the_file_holds_what_the_recipe_says(tmp_path: Path, weights: str, kind: gguf.GGMLQuantizationType) -> None:
    recipe = replace(LITTLE, weights=weights)
    path = tmp_path / "model.gguf"
    write_model(path, recipe)
    assert list(tmp_path.iterdir()) == [path], "nothing else is left"

    reader = gguf.GGUFReader(path)
    metadata = {name: part.contents() for name, part in reader.fields.items()}
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 2
    assert metadata["llama.attention.head_count_kv"] == 2
    assert metadata["tokenizer.ggml.eos_token_id"] == build_vocabulary().id_of(TURN_END)
    expected = dict(matrices(recipe, build_vocabulary()))
    for tensor in reader.tensors:
        wanted = expected.pop(tensor.name)
        assert tensor.tensor_type == (kind if wanted.ndim == 2 else gguf.GGMLQuantizationType.F32)
        values = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(wanted.shape)
        # Q8_0 keeps 8 bits of the largest of 32 values.
        assert np.allclose(values, wanted, atol=0.005 * float(np.abs(wanted).max()), rtol=0.001)
    assert not expected, "tensors that are not in the file"


@pytest.mark.parametrize("preset", PRESETS)
def test_shapes_are_those_of_the_values(preset: str) -> None:
    vocabulary = build_vocabulary()
    few = replace(PRESETS[preset], layers=1)
    assert tensor_shapes(few, len(vocabulary)) == {name: m.shape for name, m in matrices(few, vocabulary)}


@pytest.mark.parametrize(
    ("preset", "least", "most"), [("small", 4e6, 6e6), ("small-draft", 0.4e6, 1e6), ("half-gigabyte", 500e6, 560e6)]
)
def test_presets_have_their_size(preset: str, least: float, most: float) -> None:
    shapes = tensor_shapes(PRESETS[preset], len(build_vocabulary()))
    assert least < sum(2 * int(np.prod(shape)) for shape in shapes.values()) < most


def test_the_same_recipe_makes_the_same_bytes(tmp_path: Path) -> None:
    for name, recipe in (("a", LITTLE), ("b", LITTLE), ("c", replace(LITTLE, seed=4))):
        write_model(tmp_path / name, recipe)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_cached_model_is_written_once(tmp_path: Path) -> None:
    path = cached_model(tmp_path, "small-draft")
    written = path.stat().st_mtime_ns
    assert cached_model(tmp_path, "small-draft") == path
    assert path.stat().st_mtime_ns == written


def test_models_that_the_plan_has_no_room_for_are_refused() -> None:
    for values in ({"width": 64}, {"kv_heads": 1}, {"layers": 25}):
        with pytest.raises(ValueError, match="for the plan"):
            replace(LITTLE, **values)


def test_the_vocabulary_spells_every_byte_and_writes_words() -> None:
    vocabulary = build_vocabulary()
    assert len(vocabulary.tokens) == len(set(vocabulary.tokens)) == len(vocabulary.types)
    assert len(vocabulary) % 64 == 0
    for merge in vocabulary.merges:
        left, right = merge.split(" ")
        assert {left, right, left + right} <= set(vocabulary.tokens)
    writes = [token for token, writable in zip(vocabulary.tokens, vocabulary.writable, strict=True) if writable]
    assert "Ġmesh" in writes
    assert TURN_END not in writes


def prompts(count: int) -> list[list[int]]:
    words = np.flatnonzero(build_vocabulary().writable)
    return np.random.default_rng(1).choice(words, size=(count, 20)).tolist()


@pytest.mark.parametrize("preset", ["small", "half-gigabyte"])
def test_texts_do_not_run_into_short_loops(preset: str) -> None:
    for prompt in prompts(5):
        text = foretell(PRESETS[preset], build_vocabulary(), prompt, 500)
        assert all(text[-20 - distance : -distance] != text[-20:] for distance in range(1, 130))


@pytest.mark.parametrize("preset", ["small", "half-gigabyte"])
def test_every_layer_decides(preset: str) -> None:
    vocabulary, recipe = build_vocabulary(), PRESETS[preset]
    shallower = replace(recipe, layers=recipe.layers - 1)
    for prompt in prompts(5):
        assert foretell(recipe, vocabulary, prompt, 60) != foretell(shallower, vocabulary, prompt, 60)


@pytest.mark.parametrize("preset", ["small", "half-gigabyte"])
def test_the_draft_is_right_more_often_than_not(preset: str) -> None:
    vocabulary = build_vocabulary()
    right = total = 0
    for prompt in prompts(3):
        text = prompt + foretell(PRESETS[preset], vocabulary, prompt, 150)
        for end in range(20, len(text)):
            right += foretell(PRESETS["small-draft"], vocabulary, text[end - 20 : end], 1) == [text[end]]
            total += 1
    assert 0.55 < right / total < 0.95


def test_too_short_a_prompt_cannot_be_foretold() -> None:
    with pytest.raises(ValueError, match="only 3 tokens"):
        foretell(LITTLE, build_vocabulary(), [1, 2, 3], 1)
