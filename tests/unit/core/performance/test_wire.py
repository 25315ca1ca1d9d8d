"""When activations are rounded unasked, and what is predicted then."""

import msgspec
import pytest
from tests.property.test_experience import SPEED, model

from mesh_llm.core.performance.prediction import MICRO_BATCH, Link, split_prompt_seconds, split_seconds
from mesh_llm.core.performance.wire import WIRE_GAIN, choose_wire, fixed_wire, wired_prompt_seconds, wired_seconds
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import Rates, SplitLayout, SplitShare, Wire

SPEEDY = msgspec.structs.replace(SPEED, cores=1, batch=Rates(f16=50 * 10**9, q8=30 * 10**9, q4=15 * 10**9))
FACTS = model("red")
NODES = [NodeId(digit * 64) for digit in "012"]
LAYOUT = SplitLayout(term=1, shares=tuple(SplitShare(node=node, layers=FACTS.layers // 3) for node in NODES))
SPEEDS = dict.fromkeys(NODES, SPEEDY)


def links(rate: float, delay: float = 0.001) -> dict[tuple[NodeId, NodeId], Link]:
    link = Link(one_way_seconds=delay, bytes_per_second=rate)
    return {(one, other): link for one in NODES for other in NODES if one < other}


def chosen(setting: str, rate: float, delay: float = 0.001) -> Wire:
    return choose_wire(setting, FACTS, LAYOUT, SPEEDS, links(rate, delay))


def test_where_machines_are_slower_than_links_nothing_is_rounded() -> None:
    assert chosen("auto", 1e9) == Wire()
    assert chosen("auto", 0.0) == Wire()
    # A long way is no narrow one.
    assert chosen("auto", 1e9, delay=0.5) == Wire()


def test_a_narrow_link_halves_what_it_carries_first_of_prompts() -> None:
    found = {rate: chosen("auto", rate) for rate in (1e9, 1e8, 1e7, 1e6, 1e5, 1e4, 1e3)}
    texts = [wire.text for wire in found.values()]
    assert texts[0] == "f32"
    assert texts[-1] == "f16"
    assert "f16 for prompts, f32 for tokens" in texts
    for rate, wire in found.items():
        ways = links(rate)
        prompts = [wired_prompt_seconds(FACTS, LAYOUT, SPEEDS, ways, Wire(prompts=kind)) for kind in ("f32", "f16")]
        exact, half = (one.total() for one in prompts if one is not None)
        assert (wire.prompts == "f16") is (exact >= WIRE_GAIN * half)


def test_what_was_chosen_stays_where_the_gain_is_near_the_limit() -> None:
    half = Wire(prompts="f16", tokens="f16")
    rates = [10 ** (exponent / 20) for exponent in range(60, 180)]
    exact = {rate: choose_wire("auto", FACTS, LAYOUT, SPEEDS, links(rate)) for rate in rates}
    kept = {rate: choose_wire("auto", FACTS, LAYOUT, SPEEDS, links(rate), half) for rate in rates}
    assert kept[rates[0]] == half
    assert kept[rates[-1]] == Wire()
    assert sum(one.prompts == "f16" for one in kept.values()) > sum(one.prompts == "f16" for one in exact.values())
    assert all(kept[rate].prompts == "f16" for rate in rates if exact[rate].prompts == "f16")


def test_eight_bits_are_never_taken_unasked_and_what_is_asked_for_is_taken() -> None:
    assert all("q8" not in chosen("auto", rate).text for rate in (1e3, 1e5, 1e7, 1e9))
    for rate in (1e3, 1e9):
        assert [chosen(name, rate).text for name in ("f32", "f16", "q8")] == ["f32", "f16", "q8"]


def test_what_is_not_known_is_not_rounded() -> None:
    assert choose_wire("auto", FACTS, LAYOUT, {}, links(1e3)) == Wire()
    assert choose_wire("auto", FACTS, LAYOUT, SPEEDS, {}) == Wire()
    assert choose_wire("q8", FACTS, LAYOUT, {}, {}) == Wire(prompts="q8", tokens="q8")
    assert fixed_wire("auto") is None


def test_predictions_count_the_bytes_that_travel() -> None:
    ways = links(1e4)
    whole = split_prompt_seconds(FACTS, LAYOUT, SPEEDS, ways, MICRO_BATCH)
    assert whole == wired_prompt_seconds(FACTS, LAYOUT, SPEEDS, ways, Wire(), MICRO_BATCH)
    assert split_seconds(FACTS, LAYOUT, SPEEDS, ways) == wired_seconds(FACTS, LAYOUT, SPEEDS, ways, Wire())
    half, eighth = (
        wired_prompt_seconds(FACTS, LAYOUT, SPEEDS, ways, Wire(prompts=kind), MICRO_BATCH) for kind in ("f16", "q8")
    )
    assert whole is not None
    assert half is not None
    assert eighth is not None
    assert whole.network / half.network == pytest.approx(2.0, rel=0.01)
    assert whole.network / eighth.network == pytest.approx(4 / (34 / 32), rel=0.01)
    assert whole.machines == half.machines == eighth.machines
