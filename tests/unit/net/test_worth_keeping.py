from mesh_llm.core.effects import KnownPeer
from mesh_llm.core.ids import NodeId
from mesh_llm.net.joining import worth_keeping


def peer(letter: str, *addresses: str) -> KnownPeer:
    return KnownPeer(node=NodeId(letter * 64), addresses=addresses)


def test_a_passive_node_that_is_left_last_does_not_replace_who_can_be_dialled() -> None:
    member, passive = peer("a", "10.0.0.1:1"), peer("b")
    assert worth_keeping([member, passive], []) == (member, passive)
    assert worth_keeping([passive], [member, passive]) == (member, passive)


def test_who_is_there_comes_first_with_its_newest_address() -> None:
    before = [peer("a", "10.0.0.1:1"), peer("b", "10.0.0.2:1"), peer("c")]
    present = [peer("b", "10.0.0.2:7"), peer("c", "10.0.0.3:1")]
    assert worth_keeping(present, before) == (present[0], present[1], before[0])


def test_no_more_are_kept_than_are_tried() -> None:
    many = [KnownPeer(node=NodeId(f"{number:064x}"), addresses=("10.0.0.1:1",)) for number in range(100)]
    assert worth_keeping([peer("f")], many) == tuple(many[:64])
