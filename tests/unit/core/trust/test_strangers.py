"""Quotas of strangers, and when misuse cuts them off."""

from mesh_llm.core.trust.strangers import (
    CUT_OFF_SECONDS,
    MAX_BLAMED,
    MAX_COUNTED,
    MOST_CUT_OFF_SECONDS,
    NO_LIMITS,
    RELAY,
    CutOff,
    Misconduct,
    Quota,
    StrangerLimits,
    StrangerQuotas,
    UsedToday,
)

LIMITS = StrangerLimits(concurrent=2, tokens_per_day=100, all_concurrent=5, all_tokens_per_day=250)
HERE, THERE = "192.0.2.1", "2001:db8::/64"


def test_requests_at_once_are_limited_by_key_by_address_and_together():
    quotas = StrangerQuotas(LIMITS)
    assert quotas.begin("a", HERE, 1) is None
    assert quotas.begin("b", HERE, 1) is None
    assert quotas.begin("c", HERE, 1) is Quota.CONCURRENT  # a new key at the same address
    assert quotas.begin("a", THERE, 1) is None
    assert quotas.begin("a", "192.0.2.9", 1) is Quota.CONCURRENT  # the same key elsewhere
    assert quotas.begin("d", "192.0.2.3", 1) is None
    assert quotas.begin("e", "192.0.2.4", 1) is None
    assert quotas.begin("f", "192.0.2.5", 1) is Quota.ALL_CONCURRENT
    quotas.end("b", HERE)
    assert quotas.begin("f", "192.0.2.5", 1) is None
    assert quotas.running == 5


def test_tokens_are_limited_by_key_by_address_and_together_until_the_day_ends():
    quotas = StrangerQuotas(LIMITS)
    assert quotas.begin("a", HERE, 1) is None
    quotas.end("a", HERE)
    quotas.used("a", HERE, 1, 120)  # a request that was let in may end
    assert quotas.begin("a", THERE, 1) is Quota.TOKENS
    assert quotas.begin("new", HERE, 1) is Quota.TOKENS
    quotas.used("b", THERE, 1, 99)
    assert quotas.begin("b", THERE, 1) is None
    quotas.used("b", THERE, 1, 31)
    assert quotas.begin("c", "192.0.2.3", 1) is Quota.ALL_TOKENS
    assert quotas.begin("a", HERE, 2) is None
    assert quotas.today(2) == UsedToday(day=2)


def test_relays_have_half_and_a_key_behind_one_has_no_more_than_its_own():
    quotas = StrangerQuotas(LIMITS)
    for node in "abc":
        assert quotas.begin(node, RELAY, 1) is None
    assert quotas.begin("d", RELAY, 1) is Quota.CONCURRENT
    assert quotas.begin("d", HERE, 1) is None
    for node in "abc":
        quotas.end(node, RELAY)
        quotas.used(node, RELAY, 1, 45)
    assert quotas.begin("new", RELAY, 1) is Quota.TOKENS
    assert quotas.begin("new", THERE, 1) is None


def test_without_limits_all_are_let_in():
    quotas = StrangerQuotas(NO_LIMITS)
    quotas.used("a", HERE, 1, 10**12)
    assert all(quotas.begin("a", source, 1) is None for source in (HERE, RELAY) for _ in range(1000))


def test_what_was_used_survives_and_many_keys_that_use_little_do_not_wash_it_off():
    quotas = StrangerQuotas(LIMITS)
    quotas.used("heavy", HERE, 7, 100)
    for number in range(2 * MAX_COUNTED):
        quotas.used(f"k{number}", f"s{number}", 7, 1)
    unlimited_together = StrangerLimits(concurrent=2, tokens_per_day=100, all_concurrent=5, all_tokens_per_day=0)
    again = StrangerQuotas(unlimited_together, quotas.today(7))
    assert again.begin("heavy", THERE, 7) is Quota.TOKENS
    assert again.begin("other", HERE, 7) is Quota.TOKENS
    used = again.today(7)
    assert MAX_COUNTED // 2 < len(used.nodes) == len(used.sources) <= MAX_COUNTED
    assert used.total == 100 + 2 * MAX_COUNTED


def test_a_key_is_cut_off_and_its_address_later_and_longer_each_time():
    misconduct = Misconduct()
    assert not any(misconduct.blame("a", HERE, 1.0, 0.0) for _ in range(9))
    assert misconduct.seconds_left("a", HERE, 0.0) == 0.0
    assert misconduct.blame("a", HERE, 1.0, 0.0) == [CutOff(who="a", source=False, seconds=CUT_OFF_SECONDS)]
    assert misconduct.seconds_left("a", THERE, 100.0) == CUT_OFF_SECONDS - 100.0
    assert misconduct.seconds_left("b", HERE, 100.0) == 0.0
    cut: list[CutOff] = []
    for node in "bc":
        cut = [one for _ in range(10) for one in misconduct.blame(node, HERE, 1.0, 0.0)]
    assert [(one.who, one.source) for one in cut] == [("c", False), (HERE, True)]
    assert misconduct.seconds_left("new", HERE, 1.0) > 0.0
    assert misconduct.seconds_left("new", THERE, 1.0) == 0.0
    now, seconds = 0.0, [CUT_OFF_SECONDS]
    for _ in range(5):
        now += seconds[-1] + 1.0
        seconds += [one.seconds for _ in range(10) for one in misconduct.blame("a", RELAY, 1.0, now)]
    assert seconds == [min(MOST_CUT_OFF_SECONDS, CUT_OFF_SECONDS * 2**times) for times in range(6)]


def test_who_errs_now_and_then_is_not_cut_off_and_relays_are_not_cut_off():
    misconduct = Misconduct()
    assert not any(misconduct.blame("a", HERE, 1.0, 7.0 * number) for number in range(1000))
    cut = [one for number in range(1000) for one in misconduct.blame(f"n{number}", RELAY, 9.0, 0.0)]
    assert cut == []


def test_the_memory_of_misconduct_is_bounded_and_keeps_who_is_cut_off():
    misconduct = Misconduct()
    misconduct.blame("bad", HERE, 10.0, 0.0)
    for number in range(2 * MAX_BLAMED):
        misconduct.blame(f"n{number}", RELAY, 0.1, 1.0)
    assert misconduct.seconds_left("bad", THERE, 1.0) > 0.0
    assert len(misconduct._blamed) <= MAX_BLAMED
