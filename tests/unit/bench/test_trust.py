"""Simulated hosts, and models in other quantisations."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from bench.trust.hosts import WITHIN, ratio, simulate
from bench.trust.models import TYPES, converted

from mesh_llm.models.library.library import require_builtin

AGAINST, FOR = np.full((50, 1), 2.5), np.full((50, 1), -1.5)


def test_a_host_that_always_lies_is_found_as_soon_as_the_limit_allows() -> None:
    found = simulate(AGAINST, 100, 40, 1)
    assert (found.within, found.accused, found.tests) == (1.0, 100, 0)
    assert found.slowest == found.mean == 7


def test_an_honest_host_is_tested_again_and_again_and_never_accused() -> None:
    found = simulate(FOR, 100, 40, 1)
    assert (found.within, found.accused, found.slowest) == (0.0, 0, None)
    assert found.tests == 100 * (40 // 4)
    assert ratio(FOR) < 1.0


def test_a_host_that_lies_seldom_is_found_late() -> None:
    often = simulate(AGAINST, 1000, 200, 1, lies=0.9, truth=FOR)
    seldom = simulate(AGAINST, 1000, 200, 1, lies=0.5, truth=FOR)
    assert often.within > seldom.within
    assert often.mean > WITHIN / 4
    assert seldom.mean > often.mean


def test_a_host_that_one_of_two_tests_finds_is_found() -> None:
    found = simulate(np.hstack((FOR, AGAINST)), 100, 40, 1)
    assert (found.within, found.accused) == (1.0, 100)
    assert ratio(np.hstack((FOR, AGAINST))) > 1.0


@pytest.mark.parametrize("kind", ["f16", "q6_K", "q3_K"])
def test_a_converted_model_has_the_same_values_up_to_rounding(tmp_path: Path, kind: str) -> None:
    source = require_builtin("tiny-draft")
    if kind != "f16":
        # Rows of 128 values are too short for blocks of 256.
        source = require_builtin("tiny")
    converted(source, tmp_path / "made.gguf", kind)
    before, after = gguf.GGUFReader(source), gguf.GGUFReader(tmp_path / "made.gguf")
    assert [one.name for one in before.tensors] == [one.name for one in after.tensors]
    assert before.fields["tokenizer.ggml.tokens"].contents() == after.fields["tokenizer.ggml.tokens"].contents()
    for one, other in zip(before.tensors[:8], after.tensors[:8], strict=True):
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        made = gguf.quants.dequantize(other.data, other.tensor_type)
        if values.ndim == 1:
            assert np.array_equal(values, made)
            continue
        assert other.tensor_type is TYPES[kind]
        error = np.sqrt(np.mean((values - made) ** 2) / np.mean(values**2))
        assert error < {"f16": 0.001, "q6_K": 0.03, "q3_K": 0.25}[kind]
        assert error > {"f16": 0.0, "q6_K": 0.005, "q3_K": 0.05}[kind] / 10


def test_a_spread_model_is_not_the_rounded_one_and_rounds_to_it(tmp_path: Path) -> None:
    source = require_builtin("tiny-draft")
    converted(source, tmp_path / "whole.gguf", "f16", spread=True)
    converted(tmp_path / "whole.gguf", tmp_path / "rounded.gguf", "q8_0")
    values = [
        [gguf.quants.dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(path).tensors[:8]]
        for path in (source, tmp_path / "whole.gguf", tmp_path / "rounded.gguf")
    ]
    for before, whole, rounded in zip(*values, strict=True):
        if before.ndim > 1:
            assert np.mean(before == whole) < 0.5
            assert np.mean(np.isclose(before, rounded, rtol=2e-3, atol=1e-6)) > 0.95
