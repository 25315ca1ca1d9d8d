from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.connection_manager import CloneDetector
from mesh_llm.net.limits import DUPLICATE_KEY_REPORT_SECONDS

NODE, A, B, C = NodeId("a" * 64), b"sessionA", b"sessionB", b"sessionC"


def test_restarts_are_no_clones():
    watch = CloneDetector()
    for number, session in enumerate((A, A, B, B, C, C)):
        assert watch.seen(NODE, session, "10.0.0.1:1", float(number)) == ()


def test_a_session_that_comes_back_is_a_second_process():
    watch = CloneDetector()
    assert watch.seen(NODE, A, "10.0.0.1:1", 0.0) == ()
    assert watch.seen(NODE, B, "10.0.0.2:1", 1.0) == ()
    assert watch.seen(NODE, A, "10.0.0.1:1", 2.0) == ("10.0.0.2:1", "10.0.0.1:1")
    assert watch.cloned(NODE, 2.5)
    assert watch.seen(NODE, B, "10.0.0.2:1", 3.0) == (), "said a moment ago"
    assert not watch.cloned(NODE, 2.1 + DUPLICATE_KEY_REPORT_SECONDS)
    assert watch.seen(NODE, A, "10.0.0.1:1", 3.0 + DUPLICATE_KEY_REPORT_SECONDS) == ("10.0.0.2:1", "10.0.0.1:1")


def test_what_is_kept_is_bounded():
    watch = CloneDetector()
    for number in range(3000):
        watch.seen(NodeId(f"{number:064x}"), A, "x", 0.0)
        watch.seen(NODE, number.to_bytes(8, "big"), "x", 0.0)
    assert len(watch._nodes) <= 1024
    assert len(watch._nodes[NODE].addresses) <= 4
