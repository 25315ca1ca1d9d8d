"""The split benchmark compares what was measured side by side, and lets no single pass decide."""

import pytest
from bench.split.report import Result, against_ring, bars, joined, off


def passes(way: str, *milliseconds: float, predicted: float | None = None, ring: float = 0.0) -> Result:
    return joined([
        Result(way, 0.0, ring, ms, load_s=1.0, load_bytes=10, predicted_ms=predicted) for ms in milliseconds
    ])  # fmt: skip


def test_a_machine_that_gets_slower_changes_no_ratio():
    stock, ours = passes("stock", 20.0, 30.0, 40.0), passes("pushed", 22.0, 33.0, 44.0)
    (judged, _) = bars([stock, ours], 10**6, large=True)
    assert judged == "reached  0 ms, tokens/s against stock: 0.91 (>= 0.90)"


def test_one_bad_pass_decides_nothing():
    stock, ours = passes("stock", 20.0, 20.0, 20.0), passes("pushed", 21.0, 90.0, 21.0)
    assert bars([stock, ours], 0, large=True) == ["reached  0 ms, tokens/s against stock: 0.95 (>= 0.90)"]


def test_against_the_ring_and_the_machine_next_to_it():
    solo, ours = passes("solo", 20.0, 40.0, 20.0), passes("pushed", 88.0, 110.0, 96.0, ring=60.0)
    assert against_ring(ours, solo) == pytest.approx(1.1)


def test_a_prediction_is_judged_by_the_pass_it_was_made_for():
    assert off(passes("pushed", 24.0, 25.0, 40.0, predicted=20.0)) == pytest.approx(0.25)
    assert off(passes("pushed", 24.0)) is None


def test_one_pass_with_other_tokens_is_told():
    same = Result("pushed", 5.0, 15.0, 40.0, load_s=1.0)
    other = Result("pushed", 5.0, 15.0, 40.0, load_s=1.0, same_tokens=False)
    assert bars([joined([same, other, same])], 0, large=True) == ["MISSED   tokens differ from those on one machine"]
