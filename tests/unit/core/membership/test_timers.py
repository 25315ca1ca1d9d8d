from mesh_llm.core.membership.timers import Timers, TokenBucket


def test_the_earliest_comes_first_and_once() -> None:
    timers: Timers[str] = Timers()
    timers.set("late", 3.0)
    timers.set("early", 1.0)
    assert timers.next() == 1.0
    assert timers.pop(0.5) is None
    assert timers.pop(5.0) == "early"
    assert timers.pop(5.0) == "late"
    assert timers.pop(5.0) is None
    assert timers.next() is None


def test_setting_again_replaces_both_ways() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.set("a", 5.0)
    assert timers.pop(2.0) is None
    timers.set("a", 3.0)
    assert timers.next() == timers.at("a") == 3.0
    assert len(timers) == 1


def test_cancelled_ones_do_not_come() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.cancel("a")
    timers.cancel("never set")
    assert "a" not in timers
    assert timers.at("a") is None
    assert timers.next() is None
    assert timers.pop(9.0) is None


def test_equal_times_come_in_the_order_they_were_set() -> None:
    timers: Timers[str] = Timers()
    for name in "cab":
        timers.set(name, 1.0)
    assert [timers.pop(1.0) for _ in range(3)] == ["c", "a", "b"]


def test_all_can_be_put_off() -> None:
    timers: Timers[str] = Timers()
    timers.set("a", 1.0)
    timers.set("b", 2.0)
    timers.cancel("b")
    timers.shift(10.0)
    assert timers.pop(10.9) is None
    assert timers.pop(11.0) == "a"
    assert timers.next() is None


def test_setting_again_and_again_does_not_pile_up() -> None:
    timers: Timers[str] = Timers()
    for number in range(10_000):
        timers.set("a", 10_000.0 - number)
        timers.set("b", float(number))
    assert len(timers._heap) < 200
    assert timers.pop(1e9) == "a"
    assert timers.pop(1e9) == "b"


def test_so_many_at_once_and_so_many_per_second() -> None:
    tokens = TokenBucket(rate=2.0, burst=3.0)
    assert [tokens.take(0.0) for _ in range(4)] == [True, True, True, False]
    assert tokens.take(0.5)
    assert not tokens.take(0.5)
    assert [tokens.take(100.0) for _ in range(4)] == [True, True, True, False]


def test_a_clock_that_steps_back_gives_nothing() -> None:
    tokens = TokenBucket(rate=1.0, burst=1.0)
    assert tokens.take(10.0)
    assert not tokens.take(0.0)
    assert not tokens.take(10.5)
    assert tokens.take(11.0)


def test_several_are_taken_together_or_not_at_all() -> None:
    tokens = TokenBucket(rate=1.0, burst=5.0)
    assert not tokens.take(0.0, 6.0)
    assert tokens.take(0.0, 5.0)
