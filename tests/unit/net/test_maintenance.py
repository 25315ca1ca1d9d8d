"""Which peers a node remembers for its next start."""

from pathlib import Path
from typing import cast

import pytest
from tests.unit.net.members import Member

from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission import credentials as store
from mesh_llm.net.admission.credentials import MeshStores
from mesh_llm.net.connection_manager import AddressBook, ConnectionManager
from mesh_llm.net.event_adapter import EventAdapter
from mesh_llm.net.maintenance import MAX_REMEMBERED, Joiner, peers_to_remember
from mesh_llm.runtime.home import write_atomic


def peer(letter: str, *addresses: str) -> KnownPeer:
    return KnownPeer(node=NodeId(letter * 64), addresses=addresses)


def test_a_passive_node_that_is_left_last_does_not_replace_who_can_be_dialled() -> None:
    member, passive = peer("a", "10.0.0.1:1"), peer("b")
    assert peers_to_remember([member, passive], []) == (member, passive)
    assert peers_to_remember([passive], [member, passive]) == (member, passive)


def test_who_is_there_comes_first_with_its_newest_address() -> None:
    before = [peer("a", "10.0.0.1:1"), peer("b", "10.0.0.2:1"), peer("c")]
    present = [peer("b", "10.0.0.2:7"), peer("c", "10.0.0.3:1")]
    assert peers_to_remember(present, before) == (present[0], present[1], before[0])


def test_no_more_are_kept_than_are_tried() -> None:
    many = [KnownPeer(node=NodeId(f"{number:064x}"), addresses=("10.0.0.1:1",)) for number in range(100)]
    assert peers_to_remember([peer("f")], many) == tuple(many[:64])


class Connections:
    """Stands in for the connection manager: nothing is dialled here."""

    def __init__(self, member: Member) -> None:
        self.issuer = member.registrar
        self.addresses = AddressBook()

    def introduce(self, shown: tuple[bytes, ...]) -> None:
        assert shown == ()


class Memory:
    """A joiner with a home, and how often it wrote."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.written = 0
        connections = cast("ConnectionManager", Connections(Member(stores=MeshStores(home))))
        self.joiner = Joiner(connections, EventAdapter(lambda _: None, connections.issuer.credentials.key.node_id), [])

        def write(path: Path, data: bytes, mode: int = 0o600) -> None:
            self.written += 1
            write_atomic(path, data, mode)

        monkeypatch.setattr(store, "write_atomic", write)

    def keeps(self, present: list[KnownPeer], heard: list[KnownPeer]) -> bool:
        """Whether that is worth writing."""
        before = self.written
        self.joiner.remember(present, heard)
        return self.written > before


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memory:
    return Memory(tmp_path, monkeypatch)


def test_it_is_written_when_it_says_something_new_and_not_for_another_order(memory: Memory) -> None:
    a, b = peer("a", "10.0.0.1:1"), peer("b", "10.0.0.2:1")
    assert not memory.keeps([], [])
    assert memory.keeps([a], [b, a])
    for present, heard in (([a], [a, b]), ([b], [b, a]), ([b, a], []), ([], [])):
        assert not memory.keeps(present, heard), (present, heard)
    assert memory.joiner.remembered() == (a, b)
    moved = peer("b", "10.0.0.9:1")
    assert memory.keeps([a], [a, moved])
    assert memory.joiner.remembered() == (a, moved)


def test_in_a_large_mesh_who_was_heard_of_last_is_no_news(memory: Memory) -> None:
    many = [KnownPeer(node=NodeId(f"{number:064x}"), addresses=("10.0.0.1:1",)) for number in range(3 * MAX_REMEMBERED)]
    assert memory.keeps(many[:1], many[:MAX_REMEMBERED])
    for begin in range(1, MAX_REMEMBERED, 7):
        assert not memory.keeps(many[:1], many[begin : begin + MAX_REMEMBERED])
    assert memory.keeps(many[-1:], many[:MAX_REMEMBERED])
    assert memory.joiner.remembered()[0] == many[-1]
    assert len(memory.joiner.remembered()) == MAX_REMEMBERED
