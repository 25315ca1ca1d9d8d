import msgspec
import pytest

from mesh_llm.core.types import gossip as bounds
from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.types.gossip import Ack, Digest, Exchange, MeshMessage, Ping, PingRequest, Verdict
from mesh_llm.core.types.ids import Incarnation, MeshId, NodeId
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.announcement import encode_announcement
from mesh_llm.wire.mesh.gossip import MAX_MESSAGE, decode_message, encode_message

A, B, C = NodeId("aa" * 32), NodeId("bb" * 32), NodeId("cc" * 32)


def signed(node: NodeId) -> SignedAnnouncement:
    word = Announcement(mesh=MeshId("00" * 32), node=node, incarnation=Incarnation(5), sequence=6)
    return SignedAnnouncement(announcement=word, payload=encode_announcement(word), signature=b"s" * 64)


EXCHANGE = Exchange(
    digests=(Digest(A, Incarnation(1), 2, "a"), Digest(B, Incarnation(3), 4, "d")),
    entries=(signed(A), signed(C)),
    wanted=(B,),
    verdicts=(Verdict(node=B, incarnation=Incarnation(3), state="d", by=A),),
    revocations=(b"opaque",),
    reply=True,
    fingerprint=(1 << 53) - 1,
    span=(A, C),
)


@pytest.mark.parametrize(
    "message",
    [
        Ping(nonce=0),
        Ping(nonce=2**53),
        Ack(nonce=1),
        Ack(nonce=1, about=C),
        PingRequest(nonce=9, target=B),
        EXCHANGE,
        Exchange(),
        Exchange(reply=True, fingerprint=1),
    ],
)
def test_messages_round_trip(message: MeshMessage) -> None:
    assert decode_message(encode_message(message)) == message


def test_small_messages_are_small() -> None:
    assert len(encode_message(Ping(nonce=2**53))) <= 11
    assert len(encode_message(Exchange(reply=True, fingerprint=2**53))) <= 20
    assert len(encode_message(Exchange(digests=(Digest(A, Incarnation(1_700_000_000), 1, "a"),)))) < 60


def raw(message: MeshMessage) -> list[object]:
    return msgspec.msgpack.decode(encode_message(message), type=list[object])


def mutated(index: int, value: object) -> bytes:
    fields = raw(EXCHANGE)
    fields[index] = value
    return msgspec.msgpack.encode(fields)


def test_later_versions_may_append() -> None:
    assert decode_message(msgspec.msgpack.encode([*raw(EXCHANGE), "later"])) == EXCHANGE


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([9, 1]),
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode([1, -1]),
        msgspec.msgpack.encode([1, 2**53 + 1]),
        msgspec.msgpack.encode([3, 1, b"short"]),
        msgspec.msgpack.encode({"type": 1, "nonce": 1}),
        mutated(1, [[bytes(32), 1, 1, "x"]]),
        mutated(1, [[bytes(32), 1, 1, "a"]] * (bounds.MAX_DIGESTS + 1)),
        mutated(2, [[b"no announcement", bytes(64)]]),
        mutated(2, [[signed(A).payload, bytes(63)]]),
        mutated(3, [bytes(32)] * (bounds.MAX_ASKED + 1)),
        mutated(4, [[bytes(32), 1, "a", bytes(32)]]),
        mutated(4, [[bytes(32), 1, "d", bytes(32)]] * (bounds.MAX_VERDICTS + 1)),
        mutated(5, [b"x" * (bounds.MAX_REVOCATION + 1)]),
        mutated(7, -1),
        mutated(8, [bytes(32)]),
        encode_message(EXCHANGE)[:-1],
        encode_message(EXCHANGE) + b"\x00",
    ],
)
def test_malformed_messages(payload: bytes) -> None:
    assert isinstance(decode_message(payload), Malformed)


def test_a_too_long_message_is_malformed() -> None:
    long = msgspec.msgpack.encode([*raw(EXCHANGE), b"x" * MAX_MESSAGE])
    outcome = decode_message(long)
    assert isinstance(outcome, Malformed)
    assert "at most" in outcome.reason
