from ipaddress import ip_network

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.daemon.lan import choose
from mesh_llm.discovery import lan as lan_announce
from mesh_llm.discovery.lan import LanNode, near_place, read_answer
from mesh_llm.runtime.network import is_near
from mesh_llm.wire.discovery import LanListing, encode_txt

NETWORKS = (ip_network("192.168.1.0/24"), ip_network("fd00::/64"))
NODE = NodeId("a" * 64)


def node(mesh: str, name: str = "", key: str = "a") -> LanNode:
    listing = LanListing(mesh=MeshId(mesh * 64), node=NodeId(key * 64), mesh_name=name, name="desk")
    return LanNode(listing=listing, addresses=("192.168.1.2:1",))


@pytest.mark.parametrize(
    ("address", "near"),
    [
        ("192.168.1.7:443", True),
        ("192.168.1.7", True),
        ("[fd00::1]:443", True),
        ("[::ffff:192.168.1.7]:443", True),
        ("169.254.3.4:1", True),
        ("[fe80::1%eth0]:5", True),
        ("192.168.2.7:443", False),
        ("203.0.113.7:443", False),
        ("[2001:db8::1]:443", False),
        ("224.0.0.251:1", False),
        ("0.0.0.0:1", False),
        ("relay", False),
        ("", False),
        ("256.1.1.1:1", False),
    ],
)
def test_near_is_what_needs_no_router(address: str, near: bool):
    assert is_near(address, NETWORKS) is near


def test_an_answer_counts_with_its_near_addresses_only():
    entries: dict[bytes, bytes | None] = {key.encode(): value for key, value in encode_txt(node("e").listing).items()}
    read = read_answer(entries, ["8.8.8.8", "192.168.1.9", "fd00::9"], 443, NETWORKS)
    assert read is not None
    assert read.addresses == ("192.168.1.9:443", "[fd00::9]:443")
    assert read_answer(entries, ["8.8.8.8"], 443, NETWORKS) is None
    assert read_answer(entries, ["192.168.1.9"], 0, NETWORKS) is None
    assert read_answer({}, ["192.168.1.9"], 443, NETWORKS) is None


def test_what_is_announced_is_near_and_has_one_port(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lan_announce, "local_networks", lambda: (*NETWORKS, ip_network("127.0.0.0/8")))
    addresses = ("203.0.113.1:7", "192.168.1.2:5", "192.168.1.3:5", "[fd00::2]:6", "127.0.0.1:5")
    assert near_place(addresses) == (("192.168.1.2", "192.168.1.3"), 5)
    assert near_place(("[fd00::2]:6",)) == (("fd00::2",), 6)
    assert near_place(("203.0.113.1:7", "127.0.0.1:5")) is None


def test_the_only_mesh_is_asked_at_all_its_nodes():
    assert len(choose([node("e"), node("e", key="b")], "")) == 2


def test_of_several_one_must_be_named():
    found = [node("e", "Kitchen"), node("f", "Office"), node("d")]
    with pytest.raises(MeshError, match=r"3 meshes were found .*Kitchen.*unnamed \(dddddddddd"):
        choose(found, "")
    assert choose(found, "kitchen")[0].listing.mesh == "e" * 64
    assert choose(found, "dddddd")[0].listing.mesh == "d" * 64
    with pytest.raises(MeshError, match="No mesh called Attic"):
        choose(found, "Attic")


def test_two_of_one_name_are_told_apart_by_their_ids():
    found = [node("e", "Kitchen"), node("f", "Kitchen")]
    with pytest.raises(MeshError, match="2 meshes"):
        choose(found, "Kitchen")
    assert len(choose(found, "ffffffff")) == 1
    assert [found.listing.mesh[:1] for found in choose(found, "kitchen (ffff)")] == ["f"]
