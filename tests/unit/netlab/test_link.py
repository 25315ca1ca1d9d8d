"""The arithmetic of a link, in virtual time."""

import pytest
from tests.netlab.link import Link, LinkCounters, LinkSettings


def arrivals(link: Link, times: list[float], size: int = 1000) -> list[float | None]:
    return [link.admit(now, size) for now in times]


def test_a_plain_link_delivers_at_once() -> None:
    assert arrivals(Link(LinkSettings(), "s"), [0.0, 1.0, 1.5]) == [0.0, 1.0, 1.5]


def test_delay_is_added_to_each_packet() -> None:
    link = Link(LinkSettings(delay=0.02), "s")
    assert arrivals(link, [0.0, 1.0]) == pytest.approx([0.02, 1.02])


def test_rate_spaces_packets_out_by_their_size() -> None:
    link = Link(LinkSettings(delay=0.1, rate=10_000), "s")
    assert arrivals(link, [0.0, 0.0, 0.0], size=1000) == pytest.approx([0.2, 0.3, 0.4])
    assert link.admit(10.0, 500) == pytest.approx(10.15), "an idle line starts at once"


def test_a_full_queue_drops_the_packet_and_counts_it() -> None:
    link = Link(LinkSettings(rate=1000, queue_bytes=2000), "s")
    results = arrivals(link, [0.0] * 5, size=1000)
    assert results == [1.0, 2.0, 3.0, None, None], "two packets may wait while the first is sent"
    assert link.counters.overflowed == 2
    assert link.admit(1.0, 1000) == pytest.approx(4.0), "there is room again when one has left"


def test_loss_has_the_asked_for_frequency_and_is_counted() -> None:
    link = Link(LinkSettings(loss=0.1), "s")
    lost = arrivals(link, [0.0] * 10_000).count(None)
    assert 900 < lost < 1100
    assert link.counters.lost == lost


def test_the_seed_decides_which_packets_are_lost() -> None:
    def pattern(seed: str, settings: LinkSettings) -> list[bool]:
        return [arrival is None for arrival in arrivals(Link(settings, seed), [0.0] * 200)]

    lossy = LinkSettings(loss=0.3)
    assert pattern("1", lossy) == pattern("1", lossy)
    assert pattern("1", lossy) != pattern("2", lossy)
    assert pattern("1", lossy) == pattern("1", LinkSettings(loss=0.3, jitter=0.01)), "jitter has draws of its own"


@pytest.mark.parametrize(("loss", "expected"), [(0.0, 0), (1.0, 100)])
def test_no_loss_and_all_lost_are_exact(loss: float, expected: int) -> None:
    assert arrivals(Link(LinkSettings(loss=loss), "s"), [0.0] * 100).count(None) == expected


def test_jitter_stays_in_its_bounds_varies_and_keeps_the_order() -> None:
    link = Link(LinkSettings(delay=0.02, jitter=0.01), "s")
    times = [float(second) for second in range(100)]
    spread = [arrival - now for now, arrival in zip(times, arrivals(link, times), strict=True) if arrival is not None]
    assert 0.02 <= min(spread) < 0.022
    assert 0.028 < max(spread) <= 0.03 + 1e-9

    burst = arrivals(Link(LinkSettings(delay=0.02, jitter=0.01), "s"), [0.0] * 50)
    assert burst == sorted(arrival for arrival in burst if arrival is not None)


def test_a_cut_link_takes_nothing_in_and_loses_what_is_under_way() -> None:
    link = Link(LinkSettings(delay=1.0), "s")
    era = link.era
    assert link.admit(0.0, 100) == pytest.approx(1.0)
    link.cut()
    assert link.admit(0.5, 100) is None
    assert not link.arrived(era, 100)
    assert link.counters == LinkCounters(cut_off=2)

    link.heal()
    assert link.admit(2.0, 100) == pytest.approx(3.0)
    assert link.arrived(link.era, 100)
    assert link.counters == LinkCounters(packets=1, bytes=100, cut_off=2)


def test_a_packet_from_before_a_cut_does_not_arrive_after_the_heal() -> None:
    link = Link(LinkSettings(delay=1.0), "s")
    era = link.era
    link.admit(0.0, 100)
    link.cut()
    link.heal()
    assert not link.arrived(era, 100)


def test_a_cut_empties_the_queue() -> None:
    link = Link(LinkSettings(rate=1000), "s")
    arrivals(link, [0.0] * 50)
    link.cut()
    link.heal()
    assert link.admit(0.1, 1000) == pytest.approx(1.1)


def test_counters_add_up() -> None:
    assert LinkCounters(1, 2, 3, 4, 5) + LinkCounters(10, 20, 30, 40, 50) == LinkCounters(11, 22, 33, 44, 55)


@pytest.mark.parametrize(
    "values", [{"delay": -1.0}, {"jitter": -1.0}, {"loss": 1.1}, {"loss": -0.1}, {"rate": 0.0}, {"queue_bytes": -1}]
)
def test_impossible_settings_are_refused(values: dict[str, float | None]) -> None:
    with pytest.raises(ValueError, match=r"must|probability"):
        LinkSettings().changed(values)
