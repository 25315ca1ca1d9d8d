"""Random bytes as gossip: the result is a message within bounds, or Malformed."""

import math

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.types import gossip as bounds
from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.types.gossip import Ack, Exchange, Ping, PingRequest
from mesh_llm.core.types.ids import Incarnation, MeshId, NodeId
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.announcement import decode_announcement, encode_announcement
from mesh_llm.wire.mesh.gossip import decode_message, encode_message

_WORD = Announcement(
    mesh=MeshId("00" * 32), node=NodeId("11" * 32), incarnation=Incarnation(5), sequence=6, demand={"m": 1.0}
)
_PAYLOAD = encode_announcement(_WORD)
_GOOD = encode_message(
    Exchange(
        entries=(SignedAnnouncement(announcement=_WORD, payload=_PAYLOAD, signature=bytes(64)),),
        span=(NodeId("00" * 32), NodeId("ff" * 32)),
    )
)

_keys = st.one_of(st.binary(min_size=32, max_size=32), st.binary(max_size=40))
_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=20)
    | _keys
    | st.just(_PAYLOAD),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


def check(payload: bytes) -> None:
    message = decode_message(payload)
    assert isinstance(message, Malformed | Ping | Ack | PingRequest | Exchange)
    if isinstance(message, Exchange):
        assert len(message.digests) <= bounds.MAX_DIGESTS
        assert len(message.entries) <= bounds.MAX_ENTRIES
        assert decode_message(encode_message(message)) == message


@given(st.binary(max_size=2000))
def test_any_bytes(payload: bytes) -> None:
    check(payload)


@given(st.lists(_values, max_size=10), st.integers(0, 5))
def test_any_array(values: list[object], kind: int) -> None:
    check(msgspec.msgpack.encode([kind, *values]))


@given(st.integers(0, len(_GOOD) - 1), st.binary(min_size=1, max_size=8), st.booleans())
def test_a_damaged_message(position: int, damage: bytes, cut: bool) -> None:
    tail = b"" if cut else _GOOD[position + len(damage) :]
    check(_GOOD[:position] + damage + tail)


@given(st.dictionaries(st.sampled_from([*Announcement.__struct_fields__, "later"]), _values, max_size=16))
def test_any_announcement(fields: dict[str, object]) -> None:
    raw = msgspec.msgpack.decode(_PAYLOAD) | fields
    word = decode_announcement(msgspec.msgpack.encode(raw))
    if isinstance(word, Announcement):
        assert all(math.isfinite(rate) for rate in word.demand.values())
        assert len(word.node) == 64
        assert decode_announcement(encode_announcement(word)) == word


@given(st.binary(max_size=500))
def test_any_announcement_bytes(payload: bytes) -> None:
    assert isinstance(decode_announcement(payload), Announcement | Malformed)
