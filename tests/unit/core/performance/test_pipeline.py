"""How many engines over one split model, and what they give together: properties, and what was measured."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import facts, node_id

from mesh_llm.core.performance.pipeline import MOST_GROUPS, Ring, Stage, choose_groups, even_ring, measured_ring
from mesh_llm.core.performance.prediction import Link
from mesh_llm.core.types.model import Rates, Speed, SplitLayout, SplitShare

stages = st.builds(Stage, per_pass=st.floats(1e-4, 0.1), per_token=st.floats(1e-5, 0.02))
rings = st.builds(
    Ring,
    stages=st.lists(stages, min_size=1, max_size=8).map(tuple),
    way=st.builds(Stage, per_pass=st.floats(0.0, 0.2), per_token=st.floats(0.0, 0.001)),
)
slots_ = st.integers(1, 64)


def equal(machines: int, per_pass: float, per_token: float, delay: float, beside: float = 0.0) -> Ring:
    """Machines that divide a model evenly. Milliseconds: of a pass and a token of all machines, of a link, of each."""
    stage = Stage(per_pass=(per_pass / machines + beside) / 1e3, per_token=per_token / machines / 1e3)
    return Ring(stages=(stage,) * machines, way=Stage(per_pass=machines * delay / 1e3, per_token=0.0))


@given(rings, slots_, st.integers(1, MOST_GROUPS))
def test_no_machine_computes_more_than_all_the_time_and_no_batch_is_faster_than_alone(
    ring: Ring, slots: int, groups: int
) -> None:
    rate, batch = ring.tokens_per_second(slots, groups), slots / groups
    alone = ring.way.seconds(batch) + sum(stage.seconds(batch) for stage in ring.stages)
    assert 0.0 < rate <= batch / max(stage.seconds(batch) for stage in ring.stages) * (1 + 1e-9)
    assert rate <= slots / alone * (1 + 1e-9)
    around = ring.way.seconds(slots) + sum(stage.seconds(slots) for stage in ring.stages)
    assert ring.tokens_per_second(slots, 1) == pytest.approx(slots / around)


@given(rings, slots_, st.integers(1, MOST_GROUPS), st.floats(0.001, 0.5))
def test_no_delay_makes_it_faster(ring: Ring, slots: int, groups: int, more: float) -> None:
    way = Stage(per_pass=ring.way.per_pass + more, per_token=ring.way.per_token)
    far = msgspec.structs.replace(ring, way=way)
    assert far.tokens_per_second(slots, groups) <= ring.tokens_per_second(slots, groups) * (1 + 1e-9)


@given(st.lists(stages, min_size=1, max_size=8), slots_, st.integers(1, MOST_GROUPS))
def test_where_nearly_all_time_is_on_the_way_engines_gain_nothing(found: list[Stage], slots: int, groups: int) -> None:
    """All slots travel at once with one engine too."""
    computing = sum(stage.seconds(slots) for stage in found)
    ring = Ring(stages=tuple(found), way=Stage(per_pass=100 * computing, per_token=0.0))
    assert ring.gain(slots, groups) == pytest.approx(1.0, abs=0.05)


@given(rings, slots_, st.one_of(st.none(), st.integers(1, MOST_GROUPS)))
def test_what_is_chosen_divides_the_slots_and_says_why(ring: Ring, slots: int, most: int | None) -> None:
    chosen = choose_groups(ring, slots, most)
    assert slots % chosen.count == 0
    assert chosen.count <= (most or MOST_GROUPS)
    assert chosen.why
    if most is None and chosen.count > 1:
        assert slots // chosen.count >= 2
        assert ring.gain(slots, chosen.count) >= 1.15


@given(stages, slots_)
def test_one_machine_alone_gains_nothing(stage: Stage, slots: int) -> None:
    assert choose_groups(Ring(stages=(stage,)), slots, None).count == 1


# As measured on an idle machine: 12 ms to read the weights, 6.9 ms a token; a worker takes 1.2 ms beside.
@pytest.mark.parametrize(
    ("ring", "slots", "groups", "least", "most"),
    [
        (equal(2, 12.0, 6.9, 0.0, 1.2), 8, 2, 1.20, 1.37),
        (equal(3, 12.0, 6.9, 10.0, 1.2), 8, 2, 1.15, 1.31),
        (equal(2, 12.0, 6.9, 1.0), 16, 2, 1.43, 1.56),
        (equal(4, 12.0, 6.9, 1.0), 16, 4, 2.05, 2.40),
    ],
)
def test_gains_are_as_measured(ring: Ring, slots: int, groups: int, least: float, most: float) -> None:
    assert least <= ring.gain(slots, groups) <= most


@pytest.mark.parametrize(
    ("machines", "slots", "count"),
    [(2, 1, 1), (2, 2, 1), (2, 4, 1), (2, 7, 1), (2, 8, 2), (3, 9, 3), (4, 16, 4), (2, 32, 2), (8, 32, 4)],
)
def test_where_nothing_was_measured_machines_count_as_equal(machines: int, slots: int, count: int) -> None:
    assert choose_groups(even_ring(machines), slots, None).count == count


def test_engines_are_for_machines_that_wait_for_each_other_and_not_for_the_network() -> None:
    """A ring that computes most of the time gains, one that is on its way most of the time does not."""
    assert [choose_groups(equal(4, 12.0, 6.9, delay), 16, None).count for delay in (0.0, 20.0, 200.0)] == [4, 4, 1]


def test_engines_may_be_more_than_machines_where_links_are_long() -> None:
    """Stand-ins, 3 machines 10 ms apart, 8 clients, × one engine: 3 engines 1.41, 4 engines 1.81."""
    assert [choose_groups(equal(3, 12.0, 6.9, delay, 1.2), 8, None).count for delay in (0.0, 10.0)] == [2, 4]
    assert choose_groups(equal(2, 12.0, 6.9, 0.0, 1.2), 8, None).count == 2


def test_a_user_says_how_many_engines() -> None:
    ring = even_ring(2)
    assert [choose_groups(ring, 4, most).count for most in (1, 2, 3, 4)] == [1, 2, 2, 4]
    assert choose_groups(ring, 1, 4).count == 1
    assert "cannot be divided by 3" in choose_groups(ring, 4, 3).why


def test_the_ring_of_a_layout_comes_from_what_is_measured() -> None:
    host, worker = node_id(1), node_id(2)
    layout = SplitLayout(term=1, shares=(SplitShare(node=host, layers=10), SplitShare(node=worker, layers=30)))
    rates = Rates(f16=10**10, q8=10**10, q4=10**10)
    speed = Speed(full=rates, batch=Rates(f16=4 * 10**10, q8=4 * 10**10, q4=4 * 10**10))
    links = {(host, worker): Link(one_way_seconds=0.01, bytes_per_second=1e6)}
    model = msgspec.structs.replace(facts("big", 4.0), layers=40, embedding_length=1000, active_bytes=4 * 10**9)
    ring = measured_ring(model, layout, {host: speed, worker: speed}, links)
    assert ring is not None
    # Many tokens at once take a quarter of what each alone would; the worker has three times the host's layers.
    assert all(stage.per_pass >= 3 * stage.per_token for stage in ring.stages)
    assert ring.stages[1].per_token > 2 * ring.stages[0].per_token
    assert ring.way == Stage(per_pass=0.02, per_token=pytest.approx(0.008))  # pyright: ignore[reportArgumentType]
    slow = measured_ring(model, layout, {host: speed, worker: speed}, links, lag=2.0)
    assert slow is not None
    assert slow.stages[0].seconds(4) == pytest.approx(2 * ring.stages[0].seconds(4))
    assert measured_ring(model, layout, {host: speed}, links) is None
    assert measured_ring(model, layout, {host: speed, worker: Speed()}, links) is None
    assert measured_ring(model, layout, {host: speed, worker: speed}, {}) is None
