"""Rates and counts per source address."""

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.limits import MAX_BANS, AdmissionRateLimit, Ban, NetLimits, source_key

LIMITS = NetLimits(admission_burst=10, admissions_per_second=2.0, pending_admissions=8, pending_per_address=3)


def test_burst_then_rate():
    limit = AdmissionRateLimit(LIMITS)
    taken = 0
    while limit.enter("10.0.0.1:5", 0.0):
        limit.leave("10.0.0.1:5", 0.0, refused=False)
        taken += 1
    assert taken == 10
    assert not limit.enter("10.0.0.1:5", 0.4)
    assert limit.enter("10.0.0.1:5", 0.6)
    assert limit.enter("10.0.0.2:5", 0.6)


def test_pending_per_address_and_in_all():
    limit = AdmissionRateLimit(LIMITS)
    assert [limit.enter("10.0.0.1:5", 0.0) for _ in range(4)] == [True, True, True, False]
    others = [limit.enter(f"10.0.0.{host}:5", 0.0) for host in range(2, 12)]
    assert others.count(True) == 5
    assert limit.pending == 8
    limit.leave("10.0.0.1:5", 0.0, refused=False)
    assert limit.enter("10.0.0.99:5", 0.0)


def test_refusals_cost_more():
    limit = AdmissionRateLimit(LIMITS)
    for _ in range(2):
        assert limit.enter("10.0.0.1:5", 0.0)
        limit.leave("10.0.0.1:5", 0.0, refused=True)
    assert not limit.enter("10.0.0.1:5", 0.0)


def test_the_table_is_bounded():
    limit = AdmissionRateLimit(LIMITS)
    for number in range(10_000):
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}:5"
        limit.enter(address, 0.0)
        limit.leave(address, 0.0, refused=False)
    assert len(limit._sources) <= 4096


def test_banned_for_a_while():
    limit, node = AdmissionRateLimit(LIMITS), NodeId("a" * 64)
    assert not limit.banned(node, 0.0)
    limit.ban(node, 0.0)
    assert limit.banned(node, 59.0)
    assert not limit.banned(node, 61.0)
    limit.ban(NodeId("b" * 64), 100.0)
    assert [(one.who[0], one.until) for one in limit.bans(100.0)] == [("b", 160.0)]


def test_a_ban_of_an_address_is_another_one_and_bans_are_bounded():
    limit = AdmissionRateLimit(LIMITS)
    limit.ban("192.0.2.1", 0.0, seconds=600.0, reason="it is cut off", source=True)
    assert limit.banned("192.0.2.1", 599.0, source=True) == Ban(
        who="192.0.2.1", source=True, until=600.0, reason="it is cut off"
    )
    assert not limit.banned("192.0.2.1", 1.0)
    assert not limit.banned("192.0.2.1", 601.0, source=True)
    for number in range(2 * MAX_BANS):
        limit.ban(f"{number:064x}", 1.0)
    bans = limit.bans(1.0)
    assert len(bans) == MAX_BANS
    # Those that end first make room.
    assert bans[0].who == "192.0.2.1"


def test_what_counts_as_one_source():
    assert source_key("10.0.0.1:80") == source_key("10.0.0.1:81")
    assert source_key("10.0.0.1:80") != source_key("10.0.0.2:80")
    assert source_key("[2001:db8:1:2::1]:80") == source_key("[2001:db8:1:2:ffff::9]:81")
    assert source_key("[2001:db8:1:2::1]:80") != source_key("[2001:db8:1:3::1]:80")
    assert source_key("[::ffff:10.0.0.1]:80") == source_key("10.0.0.1:80")
    # 10.0.0.1 by 6to4, from two of its networks.
    assert source_key("[2002:a00:1:7::1]:80") == source_key("[2002:a00:1:8::1]:80") == source_key("10.0.0.1:80")
    assert source_key("relay") == source_key("nonsense") == "relay"
