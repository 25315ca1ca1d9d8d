"""Which of its addresses a node announces."""

from mesh_llm.net.quic.endpoint import MAX_ADVERTISED, advertised


def test_loopback_is_told_only_where_there_is_nothing_else():
    assert advertised(["127.0.0.1:5", "[::1]:5"]) == ("127.0.0.1:5", "[::1]:5")
    assert advertised(["127.0.0.1:5", "[fe80::1%eth0]:5", "10.0.0.1:5", "[2001:db8::1]:5", "10.0.0.1:5"]) == (
        "10.0.0.1:5",
        "[2001:db8::1]:5",
        "[fe80::1%eth0]:5",
    )
    assert len(advertised([f"10.0.0.{host}:5" for host in range(1, 100)])) == MAX_ADVERTISED
