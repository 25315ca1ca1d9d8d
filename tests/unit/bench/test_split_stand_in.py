"""How fast a stand-in is, and how rounds of the split benchmarks are compared."""

from pathlib import Path

import pytest
from bench.split.stand_in import Pace
from bench.split.ways import Measured, against, medians, middle

from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelFacts

FACTS = ModelFacts(
    name=ModelName("m"), size_bytes=1_200_000, layers=12, context_train=4096, embedding_length=64, vocabulary=100,
    kv_bytes_per_token=0, head_bytes=100_000, active_bytes=1_100_000, weight_bits=16.0,
)  # fmt: skip


def seconds(settings: dict[str, str], tokens: int) -> float:
    """What stand_in.cpp takes for the whole model."""
    blocks = FACTS.active_bytes - FACTS.head_bytes
    return blocks / float(settings["STAND_IN_BYTES"]) + tokens * (blocks / 2) / float(settings["STAND_IN_PRODUCTS"])


@pytest.mark.parametrize("slow", [1.0, 10.0])
def test_a_machine_has_both_of_its_rates(slow: float) -> None:
    settings = Pace(prompt=500.0, answer=25.0, slow_motion=slow).settings(FACTS, 512, Path("machine"))
    assert seconds(settings, 1) == pytest.approx(slow / 25.0)
    assert seconds(settings, 512) == pytest.approx(slow * 512 / 500.0)
    assert settings["STAND_IN_MACHINE"] == "machine"


def test_a_rate_that_no_machine_has_is_refused() -> None:
    with pytest.raises(ValueError, match="no machine reads 10 tokens a second and answers with 20"):
        Pace(prompt=10.0, answer=20.0).settings(FACTS, 512, Path("machine"))
    # A prompt is read faster than answers only because weights are read once for many tokens: not more than 512 times.
    with pytest.raises(ValueError, match="no machine reads"):
        Pace(prompt=20_000.0, answer=20.0).settings(FACTS, 512, Path("machine"))


def test_ratios_are_those_of_rounds() -> None:
    def rounds(way: str, machines: int, rates: list[float]) -> list[Measured]:
        return [Measured(way, machines, 0.0, 512, {"rate": rate}, ["a"], 0.5) for rate in rates]

    # The machine was slower in the second round: what counts is what both did then.
    grouped = medians([*rounds("solo", 1, [100.0, 50.0, 100.0]), *rounds("ours", 2, [180.0, 95.0, 150.0])])
    ours, solo = grouped["ours", 2, 0.0, 512], grouped["solo", 1, 0.0, 512]
    assert middle(ours, "rate") == 150.0
    assert against(ours, solo, "rate") == 1.8
    assert against(ours, None, "rate") is None
