"""Random TXT records of the local network: the result is a bounded, harmless value."""

from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.discovery.lan import MAX_ADDRESSES, read_answer
from mesh_llm.runtime.network import is_near
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.discovery import MAX_MODELS, MAX_NAME, MAX_RECORD, LanListing, decode_txt, encode_txt

KEYS = st.sampled_from([b"txtvers", b"p", b"mesh", b"node", b"mn", b"n", b"v", b"m0", b"m7", b"more", b"MN"])
HEX = st.text("0123456789abcdef", min_size=64, max_size=64)
VALUES = st.none() | st.binary(max_size=300) | st.sampled_from([b"1", b"0", b"99999", b"a" * 64])
PROPER = {b"txtvers": b"1", b"p": b"1", b"mesh": b"e" * 64, b"node": b"a" * 64}


@given(st.dictionaries(KEYS | st.binary(max_size=20), VALUES, max_size=40), st.booleans())
def test_any_record_is_a_bounded_listing_or_malformed(entries: dict[bytes, bytes | None], proper: bool):
    value = decode_txt((PROPER | entries) if proper else entries)
    if isinstance(value, Malformed):
        return
    shown = (value.name, value.mesh_name, value.version, *value.models)
    assert all(text.isprintable() for text in shown)
    assert all(len(text.encode()) <= 96 for text in shown)
    assert len(value.models) <= MAX_MODELS
    assert len(value.mesh) == len(value.node) == 64


@given(
    HEX,
    HEX,
    st.text(max_size=200),
    st.text(max_size=200),
    st.lists(st.text(max_size=200), max_size=30),
    st.integers(0, 10**6),
)
def test_any_names_fit_into_a_record_that_can_be_read(
    mesh: str, node: str, name: str, mesh_name: str, models: list[str], more: int
):
    listing = LanListing(
        mesh=MeshId(mesh),
        node=NodeId(node),
        name=name,
        mesh_name=mesh_name,
        version="1",
        models=tuple(models),
        more_models=more,
    )
    entries = encode_txt(listing)
    assert sum(len(key) + len(value) + 2 for key, value in entries.items()) <= MAX_RECORD
    assert all(len(key) + 1 + len(value) <= 255 for key, value in entries.items())
    read = decode_txt({key.encode(): value for key, value in entries.items()})
    assert isinstance(read, LanListing)
    assert (read.mesh, read.node) == (mesh, node)
    assert len(read.name.encode()) <= MAX_NAME
    assert encode_txt(read) == entries


@given(st.lists(st.text(max_size=60) | st.ip_addresses().map(str), max_size=100), st.integers(-1, 70_000) | st.none())
def test_any_address_is_near_by_or_left_out(addresses: list[str], port: int | None):
    from ipaddress import ip_network

    networks = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    node = read_answer(PROPER, addresses, port, networks)
    if node is None:
        return
    assert 1 <= len(node.addresses) <= MAX_ADDRESSES
    assert all(is_near(address, networks) for address in node.addresses)
