"""Quotas of strangers under any sequence of requests, keys, addresses, days and restarts."""

from collections import Counter, defaultdict
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples

from mesh_llm.core.trust.strangers import RELAY, Misconduct, Quota, StrangerLimits, StrangerQuotas, UsedToday

NODES, SOURCES = st.sampled_from("abcde"), st.sampled_from(["1.1.1.1", "2.2.2.2", RELAY])
LIMITS = st.builds(
    StrangerLimits,
    concurrent=st.integers(0, 3),
    tokens_per_day=st.integers(0, 50),
    all_concurrent=st.integers(0, 5),
    all_tokens_per_day=st.integers(0, 120),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("begin"), NODES, SOURCES),
        st.tuples(st.just("end"), st.integers(0, 9), st.integers(0, 40)),
        st.tuples(st.just("restart"), st.none(), st.none()),
        st.tuples(st.just("tomorrow"), st.none(), st.none()),
    ),
    max_size=60,
)


@given(LIMITS, STEPS)
@examples(300)
def test_no_sequence_passes_a_quota_and_none_is_refused_below_it(
    limits: StrangerLimits, steps: list[tuple[Any, Any, Any]]
) -> None:
    quotas, day = StrangerQuotas(limits), 1
    open_ones: list[tuple[str, str]] = []
    nodes: Counter[str] = Counter()
    sources: Counter[str] = Counter()
    for kind, first, second in steps:
        match kind:
            case "begin":
                relayed = second == RELAY
                at_once = -(-limits.all_concurrent // 2) if relayed else limits.concurrent
                tokens = -(-limits.all_tokens_per_day // 2) if relayed else limits.tokens_per_day
                full = {
                    Quota.TOKENS: reached(nodes[first], limits.tokens_per_day) or reached(sources[second], tokens),
                    Quota.ALL_TOKENS: reached(nodes.total(), limits.all_tokens_per_day),
                    Quota.CONCURRENT: reached(sum(one == first for one, _ in open_ones), limits.concurrent)
                    or reached(sum(one == second for _, one in open_ones), at_once),
                    Quota.ALL_CONCURRENT: reached(len(open_ones), limits.all_concurrent),
                }
                outcome = quotas.begin(first, second, day)
                assert outcome == next((quota for quota, is_full in full.items() if is_full), None)
                if outcome is None:
                    open_ones.append((first, second))
            case "end" if open_ones:
                node, source = open_ones.pop(first % len(open_ones))
                quotas.end(node, source)
                quotas.used(node, source, day, second)
                nodes[node] += second
                sources[source] += second
            case "restart":
                saved = msgspec.json.decode(msgspec.json.encode(quotas.today(day)), type=UsedToday)
                quotas, open_ones = StrangerQuotas(limits, saved), []
            case "tomorrow":
                day += 1
                nodes.clear()
                sources.clear()
            case _:
                pass  # nothing is open that could end
        assert quotas.running == len(open_ones)
        assert quotas.today(day).total == nodes.total()


def reached(count: int, limit: int) -> bool:
    return 0 < limit <= count


@given(
    st.lists(st.tuples(NODES, SOURCES, st.sampled_from([0.1, 1.0, 5.0]), st.floats(0.0, 400.0)), max_size=80),
)
@examples(200)
def test_a_cut_is_bounded_and_never_falls_on_who_did_nothing(steps: list[tuple[str, str, float, float]]) -> None:
    misconduct, now = Misconduct(), 0.0
    blamed_nodes, blamed_sources = defaultdict[str, float](float), defaultdict[str, float](float)
    for node, source, points, pause in steps:
        now += pause
        blamed_nodes[node] += points
        blamed_sources[source] += points
        for cut in misconduct.blame(node, source, points, now):
            assert cut.seconds <= 3600.0
            assert cut.who != RELAY
            assert (blamed_sources[cut.who] >= 29.9) if cut.source else (blamed_nodes[cut.who] >= 9.9)
        assert misconduct.seconds_left("innocent", RELAY, now) == 0.0
        assert misconduct.seconds_left(node, source, now + 3601.0) == 0.0
