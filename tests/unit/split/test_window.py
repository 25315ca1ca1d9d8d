"""A window is filled for what comes again, as far as it must be, and again after a while."""

from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.split.worker.transfers import AGAIN_SECONDS, WIDE, Window
from mesh_llm.wire.ggml_rpc.tunnel import MAX_FILLING


def test_filling_follows_what_comes_a_second_time() -> None:
    window = Window()
    assert [window.filling(4096, at) for at in (0.0, 0.1, 0.2)] == [0, WIDE * 4096, 0]


def test_what_comes_once_is_not_followed_by_filling() -> None:
    window = Window()
    assert [window.filling(size, 0.0) for size in (28_672, 4096, 8192, 12_288)] == [0, 0, 0, 0]


def test_smaller_ones_need_no_more_than_there_is() -> None:
    window = Window()
    window.filling(4096, 0.0)
    window.filling(4096, 0.0)
    assert [window.filling(2000, 0.1), window.filling(2000, 0.2)] == [0, 0]


def test_a_window_is_filled_again_after_a_while() -> None:
    window = Window()
    window.filling(4096, 0.0)
    window.filling(4096, 1.0)
    assert window.filling(4096, 1.0 + AGAIN_SECONDS / 2) == 0
    assert window.filling(4096, 1.0 + AGAIN_SECONDS) == WIDE * 4096


def test_large_ones_fill_it_themselves() -> None:
    window = Window()
    assert [window.filling(MAX_FILLING, at) for at in (0.0, 1.0, 2.0)] == [0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 1 << 22), st.floats(0.0, 5.0)), max_size=200))
def test_it_is_bounded_and_seldom(steps: list[tuple[int, float]]) -> None:
    window, now, filled = Window(), 0.0, list[tuple[float, int]]()
    for size, wait in steps:
        now += wait
        filling = window.filling(size, now)
        assert 0 <= filling <= MAX_FILLING
        if filling:
            # More than the last one, or long after it.
            assert not filled or filling > filled[-1][1] or now >= filled[-1][0] + AGAIN_SECONDS
            filled.append((now, filling))
