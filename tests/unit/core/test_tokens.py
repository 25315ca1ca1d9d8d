from mesh_llm.core.membership.timers import Tokens


def test_so_many_at_once_and_so_many_per_second() -> None:
    tokens = Tokens(rate=2.0, burst=3.0)
    assert [tokens.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert tokens.take(0.5)
    assert not tokens.take(0.5)
    assert [tokens.take(100.0) for _ in range(4)] == [True, True, True, False]


def test_a_clock_that_steps_back_gives_nothing() -> None:
    tokens = Tokens(rate=1.0, burst=1.0)
    assert tokens.take(10.0)
    assert not tokens.take(0.0)
    assert not tokens.take(10.5)
    assert tokens.take(11.0)


def test_several_are_taken_together_or_not_at_all() -> None:
    tokens = Tokens(rate=1.0, burst=5.0)
    assert not tokens.take(0.0, 6.0)
    assert tokens.take(0.0, 5.0)
