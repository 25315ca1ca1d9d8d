"""The model benchmark, small: over slow links taking a model is as fast as plain bytes, and two seeds beat one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from bench.mesh.models import Scene, measure
from tests.netlab.lab import unavailable_reason


@pytest.mark.skipif(unavailable_reason() is not None, reason=str(unavailable_reason()))
def test_two_seeds_over_slow_links(random_model: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "m.gguf"
    model.write_bytes(random_model("small").read_bytes() + bytes(range(256)) * (12 << 12))
    found = measure(Scene("slow links", 2, 1, rate_mbps=20.0), model, tmp_path)
    plain, one, two = (found[way]["MB_s"] for way in ("plain bytes", "model, 1 seed", "model, 2 seeds"))
    assert one >= 0.75 * plain
    assert two >= 1.2 * one
    # Nothing came twice, but for the last few chunks that both were asked for.
    assert found["model, 2 seeds"]["received_MB"] <= model.stat().st_size / 1e6 + 9
