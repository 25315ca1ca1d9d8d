"""Back-off, tie-break, clones, and known addresses: the parts of the connection manager that need no network."""

from dataclasses import dataclass

import pytest
from tests.unit.net.members import Member

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.connection_manager import SIMULTANEOUS_SECONDS, AddressBook, Backoff, CloneDetector, new_one_stays
from mesh_llm.net.limits import DUPLICATE_KEY_REPORT_SECONDS
from mesh_llm.net.quic.connection import Peer

NODE, A, B, C = NodeId("a" * 64), b"sessionA", b"sessionB", b"sessionC"


def test_restarts_are_no_clones():
    detector = CloneDetector()
    for number, session in enumerate((A, A, B, B, C, C)):
        assert detector.seen(NODE, session, "10.0.0.1:1", float(number)) == ()


def test_a_session_that_comes_back_is_a_second_process():
    detector = CloneDetector()
    assert detector.seen(NODE, A, "10.0.0.1:1", 0.0) == ()
    assert detector.seen(NODE, B, "10.0.0.2:1", 1.0) == ()
    assert detector.seen(NODE, A, "10.0.0.1:1", 2.0) == ("10.0.0.2:1", "10.0.0.1:1")
    assert detector.cloned(NODE, 2.5)
    assert detector.seen(NODE, B, "10.0.0.2:1", 3.0) == (), "said a moment ago"
    assert not detector.cloned(NODE, 2.1 + DUPLICATE_KEY_REPORT_SECONDS)
    assert detector.seen(NODE, A, "10.0.0.1:1", 3.0 + DUPLICATE_KEY_REPORT_SECONDS) == ("10.0.0.2:1", "10.0.0.1:1")


def test_what_is_kept_is_bounded():
    detector = CloneDetector()
    for number in range(3000):
        detector.seen(NodeId(f"{number:064x}"), A, "x", 0.0)
        detector.seen(NODE, number.to_bytes(8, "big"), "x", 0.0)
    assert len(detector._nodes) <= 1024
    assert len(detector._nodes[NODE].addresses) <= 4


LOW, HIGH = NodeId("0" * 64), NodeId("f" * 64)


def test_pauses_double_up_to_the_most_and_end_with_success():
    backoff = Backoff(1.0, 4.0)
    assert backoff.blocked(LOW, 0.0) is None
    for pause in (1.0, 2.0, 4.0, 4.0):
        backoff.failed(LOW, 0.0, "no answer")
        assert backoff.blocked(LOW, pause - 0.1) == "no answer"
        assert backoff.blocked(LOW, pause + 0.1) is None
    assert backoff.blocked(HIGH, 0.0) is None
    backoff.succeeded(LOW)
    backoff.failed(LOW, 0.0, "again")
    assert backoff.blocked(LOW, 1.1) is None


def test_back_off_is_bounded():
    backoff = Backoff(1.0, 4.0)
    for number in range(5000):
        backoff.failed(NodeId(f"{number:064x}"), 0.0, "gone")
    assert len(backoff) <= 4096


@dataclass
class Side:
    dialed: bool
    established: float
    peer: Peer


def side(own: NodeId, dialed: bool, at: float, session: bytes = b"session1") -> Side:
    member = Member()
    assert member.standing.certificate is not None
    other = HIGH if own == LOW else LOW
    return Side(dialed, at, Peer(other, member.standing.certificate, "1.0", session))


@pytest.mark.parametrize("own", [LOW, HIGH])
@pytest.mark.parametrize("mine_first", [True, False])
def test_both_sides_keep_the_connection_of_the_lower_id(own: NodeId, mine_first: bool):
    old, new = side(own, mine_first, 0.0), side(own, not mine_first, 1.0)
    kept = new if new_one_stays(old, new, own) else old
    dialer = own if kept.dialed else kept.peer.node
    assert dialer == LOW


@pytest.mark.parametrize("own", [LOW, HIGH])
@pytest.mark.parametrize("dialed", [True, False])
def test_a_new_life_or_a_redial_always_wins(own: NodeId, dialed: bool):
    assert new_one_stays(side(own, not dialed, 0.0), side(own, dialed, 1.0, b"session2"), own)
    assert new_one_stays(side(own, dialed, 0.0), side(own, dialed, 1.0), own)
    assert new_one_stays(side(own, not dialed, 0.0), side(own, dialed, SIMULTANEOUS_SECONDS + 1.0), own)


def test_the_address_book_keeps_the_newest_word_and_forgets_the_oldest_node():
    book = AddressBook()
    book.learn(LOW, ("10.0.0.1:5",), "relay")
    book.learn(LOW, ())
    assert book.find(LOW).addresses == ("10.0.0.1:5",)
    book.learn(LOW, ("10.0.0.2:5",))
    assert book.find(LOW).addresses == ("10.0.0.2:5",)
    assert book.find(HIGH).addresses == ()
    for number in range(20_000):
        book.learn(NodeId(f"{number:064x}"), ("10.0.0.1:5",))
    assert len(book) <= 16384
    assert [peer.node for peer in book.recent(2)] == [NodeId(f"{number:064x}") for number in (19_998, 19_999)]
