"""Which slot of an engine gets a request."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.routing.slots import WORTH_BYTES, choose_slot, passes

SLOTS = st.integers(0, 7)


@pytest.mark.parametrize(
    ("busy", "expected"), [((), 0), ((3,), 1), ((0, 1, 2), 1), ((0, 2), 2), ((0, 2, 3, 6), 3), ((1, 3, 5), 3)]
)
def test_slots_that_follow_each_other_are_one_pass(busy: tuple[int, ...], expected: int) -> None:
    assert passes(set(busy)) == expected


def test_a_free_slot_between_two_busy_ones_comes_first() -> None:
    # Also where it was used last.
    assert choose_slot([0, 9, 0, 0], {0, 2}, {}) == 1


def test_else_one_beside_those_that_are_busy() -> None:
    assert choose_slot([0, 0, 0, 0, 0], {2}, {}) == 1
    assert choose_slot([0, 5, 0, 4, 0], {2}, {}) == 3


def test_without_others_the_one_that_was_used_least_recently() -> None:
    assert choose_slot([4, 2, 3], set(), {}) == 1


def test_what_is_cached_of_a_long_prompt_is_worth_a_pass_and_of_a_short_one_it_is_not() -> None:
    assert choose_slot([0, 0, 0, 7], {0}, {3: WORTH_BYTES}) == 3
    assert choose_slot([0, 0, 0, 7], {0}, {3: WORTH_BYTES - 1}) == 1
    assert choose_slot([0, 0, 6, 7], {0}, {2: WORTH_BYTES, 3: WORTH_BYTES + 1}) == 3
    # It works on a request: a second one would wait there.
    assert choose_slot([0, 0, 0, 7], {3}, {3: 10 * WORTH_BYTES}) == 2


@given(
    used=st.lists(st.integers(0, 50), min_size=1, max_size=8), busy=st.sets(SLOTS), cached=st.dictionaries(SLOTS, SLOTS)
)
def test_it_is_free_and_no_other_would_make_fewer_passes(
    used: list[int], busy: set[int], cached: dict[int, int]
) -> None:
    free = set(range(len(used))) - busy
    chosen = choose_slot(used, busy, cached)
    assert (chosen is None) == (not free)
    if chosen is not None:
        assert chosen in free
        assert passes(busy | {chosen}) == min(passes(busy | {one}) for one in free)


@given(st.lists(st.tuples(st.booleans(), SLOTS), max_size=60))
def test_requests_that_come_and_go_never_make_more_passes_than_they_left(events: list[tuple[bool, int]]) -> None:
    busy: set[int] = set()
    used = [0] * 8
    for number, (comes, which) in enumerate(events, 1):
        if comes:
            before = passes(busy)
            slot = choose_slot(used, busy, {})
            if slot is not None:
                busy.add(slot)
                used[slot] = number
            assert passes(busy) <= max(1, before)
        elif busy:
            busy.discard(sorted(busy)[which % len(busy)])
