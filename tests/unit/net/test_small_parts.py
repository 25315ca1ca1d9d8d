"""Parts of the room that are a few lines each."""

from dataclasses import dataclass

import pytest
from tests.unit.net.members import Member

from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.connection_manager import SIMULTANEOUS_SECONDS, AddressBook, Backoff, new_one_stays
from mesh_llm.net.event_adapter import changed_noticeably
from mesh_llm.net.quic.bindings import close_reason, stream_failure
from mesh_llm.net.quic.connection import PathSample, Peer
from mesh_llm.net.quic.endpoint import MAX_ADVERTISED, advertised
from mesh_llm.wire.mesh.frames import CloseCode

LOW, HIGH = NodeId("0" * 64), NodeId("f" * 64)


# Back-off


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


# Twins


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


# Addresses


def test_loopback_is_told_only_where_there_is_nothing_else():
    assert advertised(["127.0.0.1:5", "[::1]:5"]) == ("127.0.0.1:5", "[::1]:5")
    assert advertised(["127.0.0.1:5", "[fe80::1%eth0]:5", "10.0.0.1:5", "[2001:db8::1]:5", "10.0.0.1:5"]) == (
        "10.0.0.1:5",
        "[2001:db8::1]:5",
        "[fe80::1%eth0]:5",
    )
    assert len(advertised([f"10.0.0.{host}:5" for host in range(1, 100)])) == MAX_ADVERTISED


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


# What is told


@pytest.mark.parametrize(
    ("told", "seen", "news"),
    [
        (PathSample(1.0, False), PathSample(2.0, False), False),
        (PathSample(1.0, False), PathSample(4.0, False), True),
        (PathSample(40.0, False), PathSample(48.0, False), False),
        (PathSample(40.0, False), PathSample(51.0, False), True),
        (PathSample(40.0, True), PathSample(40.0, False), True),
    ],
)
def test_only_marked_changes_of_a_path_are_news(told: PathSample, seen: PathSample, news: bool):
    assert changed_noticeably(told, seen) is news


@pytest.mark.parametrize(
    ("text", "reason", "code"),
    [
        ("closed by peer: idle (code 1)", "idle", CloseCode.IDLE),
        ("closed by peer: two\nlines (code 0)", "two\nlines", CloseCode.GOODBYE),
        ("closed by peer: later version (code 99)", "later version", None),
        ("timed out", "timed out", None),
        ("", "connection lost", None),
        (None, "connection lost", None),
    ],
)
def test_why_a_connection_ended(text: str | None, reason: str, code: CloseCode | None):
    assert close_reason(text) == (reason, code)


class Failure:
    """As the binding's error: its text is in a method."""

    def __init__(self, text: str) -> None:
        self._text = text

    def message(self) -> str:
        return self._text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("ConnectionLost(LocallyClosed)", "this node closed it"),
        ("ConnectionLost(TimedOut)", "the other node did not answer in time"),
        ("ConnectionLost(ApplicationClosed(ApplicationClose { error_code: 0 }))", "the other node closed it"),
        ("ConnectionLost(SomethingNew)", "the connection broke"),
    ],
)
def test_a_lost_connection_is_explained_in_words(text: str, says: str):
    assert str(stream_failure(Failure(text))) == says  # pyright: ignore[reportArgumentType]
