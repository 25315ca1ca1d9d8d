"""Tickets: each is good once, for one peer, for a while."""

import itertools

from tests.support.core_values import node_id

from mesh_llm.net.tls.listener import MAX_TICKETS_IN_ALL, MAX_TICKETS_PER_PEER, TicketBook
from mesh_llm.wire.mesh.transport import TICKET_BYTES, TICKET_SECONDS

A, B = node_id(1), node_id(2)


def book() -> TicketBook:
    numbers = itertools.count()
    return TicketBook(lambda size: next(numbers).to_bytes(size, "big"))


def test_a_ticket_is_good_once() -> None:
    tickets = book()
    first, second = tickets.issue(A, 2, 0.0)
    assert len(first) == TICKET_BYTES
    assert tickets.redeem(first, 1.0) == A
    assert tickets.redeem(first, 1.0) is None
    assert tickets.redeem(second, 1.0) == A
    assert len(tickets) == 0


def test_an_unknown_ticket_is_none() -> None:
    tickets = book()
    tickets.issue(A, 1, 0.0)
    assert tickets.redeem(b"x" * TICKET_BYTES, 0.0) is None
    assert tickets.redeem(b"", 0.0) is None


def test_an_old_ticket_is_none() -> None:
    tickets = book()
    (old,) = tickets.issue(A, 1, 0.0)
    (new,) = tickets.issue(A, 1, 1.0)
    assert tickets.redeem(old, TICKET_SECONDS) is None
    assert tickets.redeem(new, TICKET_SECONDS) == A


def test_a_forgotten_peer_has_no_tickets_and_others_keep_theirs() -> None:
    tickets = book()
    (lost,) = tickets.issue(A, 1, 0.0)
    (kept,) = tickets.issue(B, 1, 0.0)
    tickets.forget(A)
    assert tickets.redeem(lost, 0.0) is None
    assert tickets.redeem(kept, 0.0) == B


def test_one_peer_has_a_bounded_number_until_they_are_old() -> None:
    tickets = book()
    for _ in range(4):
        tickets.issue(A, 16, 0.0)
    assert len(tickets) == MAX_TICKETS_PER_PEER
    assert tickets.issue(A, 1, 0.0) == ()
    assert len(tickets.issue(B, 16, 0.0)) == 16
    assert len(tickets.issue(A, 16, TICKET_SECONDS)) == 16


def test_all_peers_together_have_a_bounded_number() -> None:
    tickets = book()
    for number in range(MAX_TICKETS_IN_ALL // 16 + 10):
        tickets.issue(node_id(number + 1), 16, 0.0)
    assert len(tickets) == MAX_TICKETS_IN_ALL
