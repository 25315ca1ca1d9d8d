"""The wire format does not change: what an earlier version wrote is read, and written again byte for byte.

`tests/data/wire/gossip.json` was recorded by version 0.1, before the wire's structs were derived from the core's.
"""

import json
from pathlib import Path

import msgspec
import pytest

from mesh_llm.core.types.announcement import (
    Announcement,
    ListingPolicy,
    Serving,
    SignedAnnouncement,
    SplitPreferences,
    SplitState,
    trimmed,
)
from mesh_llm.core.types.gossip import Ack, Digest, Exchange, MeshMessage, Ping, PingRequest, Verdict
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import (
    Capacity,
    ModelFacts,
    ModelKind,
    ModelStatus,
    Rates,
    Role,
    Speed,
    SplitShare,
)
from mesh_llm.wire.mesh.announcement import decode_announcement, encode_announcement
from mesh_llm.wire.mesh.gossip import decode_message, encode_message

RECORDED = Path(__file__).parents[3] / "data" / "wire" / "gossip.json"

MESH, A, B, C = MeshId("00ff" * 16), NodeId("aa01" * 16), NodeId("bb02" * 16), NodeId("cc03" * 16)


def facts(name: str, kind: ModelKind = ModelKind.CHAT) -> ModelFacts:
    return ModelFacts(
        name=ModelName(name),
        kind=kind,
        size_bytes=4_920_739_232,
        layers=32,
        context_train=131_072,
        embedding_length=4096,
        vocabulary=128_256,
        kv_bytes_per_token=131_072,
        output_bytes=431_456_256,
        architecture="llama",
        fingerprint="0123456789abcdef" * 2,
        source="hf:owner/repo:file.gguf@main",
    )


SPEED = Speed(
    cores=8,
    cached=Rates(f16=80_000_000_000, q8=60_000_000_000, q4=40_000_000_000),
    one=Rates(f16=12_000_000_000, q8=11_000_000_000, q4=9_000_000_000),
    full=Rates(f16=50_000_000_000, q8=48_000_000_000, q4=45_000_000_000),
    step_ns=900,
    full_step_ns=4_200,
)
SMALL = Announcement(mesh=MESH, node=A, incarnation=Incarnation(1), sequence=1)
GROUP = SplitState(
    model=ModelName("big"),
    fingerprint="cd" * 16,
    memory_bytes=10**10,
    seeds=True,
    asked=True,
    max_rtt_ms=40.0,
    round_trips={C: 12.5, B: 3.0},
    term=3,
    leads=True,
    shares=(SplitShare(node=A, layers=20, memory_bytes=10**9), SplitShare(node=B, layers=12)),
    wish=SplitPreferences(context=4096, slots=2, shares=(2.0, 1.0)),
)
FULL = Announcement(
    mesh=MESH,
    node=A,
    incarnation=Incarnation(1_700_000_000_000),
    sequence=300,
    name="Küche",
    role=Role.STANDBY,
    version="0.1.0",
    serving=(
        Serving(
            model=ModelName("tiny"),
            status=ModelStatus.FAILED,
            term=3,
            context=4096,
            slots=4,
            in_flight=2,
            tokens_per_second=12.5,
            size_bytes=10**9,
            reason="line one\nline two",
            embeddings=False,
            aliases=("tiny-q4", "tiny"),
            kind=ModelKind.RERANK,
        ),
        Serving(model=ModelName("plain"), status=ModelStatus.WARM),
    ),
    on_disk=(facts("tiny"), facts("ranker", ModelKind.RERANK), facts("draft", ModelKind.DRAFT)),
    wanted=(ModelName("tiny"), ModelName("big")),
    demand={"tiny": 3.5, "big": 1.0},
    capacity=Capacity(
        memory_bytes=24 * 10**9,
        memory_total_bytes=32 * 10**9,
        devices=("CPU", "NVIDIA RTX 4090"),
        engine="embedded b11549",
        rpc_version="8.0.0",
        speed=SPEED,
    ),
    addresses=("10.0.0.1:7000", "[::1]:7000"),
    relay="https://relay.example/",
    certificate=bytes(range(256)),
    left=True,
    split=GROUP,
    shares=True,
    publicity=ListingPolicy(name="lab", region="AU", max_clients=12, scope="split", failing=True),
    clients=7,
)
ANNOUNCEMENTS: dict[str, Announcement] = {
    "small": SMALL,
    "full": FULL,
    "client": msgspec.structs.replace(SMALL, role=Role.CLIENT, clients=1_000_000, shares=True),
    "bare worker": msgspec.structs.replace(
        SMALL, split=msgspec.structs.replace(GROUP, bare=True, leads=False, shares=(), wish=SplitPreferences())
    ),
    "new group": msgspec.structs.replace(SMALL, split=SplitState(model=ModelName("big"))),
    "plain publicity": msgspec.structs.replace(SMALL, publicity=ListingPolicy()),
    "speed unknown": msgspec.structs.replace(SMALL, capacity=Capacity(devices=("CPU",))),
    "trimmed": trimmed(
        msgspec.structs.replace(
            FULL,
            name="bad\x1b[2Jname" + "n" * 100,
            demand={"inf": float("inf"), "negative": -1.0, "bad\nname": 1.0, "nan": float("nan")},
            serving=(
                Serving(
                    model=ModelName("m"),
                    status=ModelStatus.WARM,
                    in_flight=-3,
                    tokens_per_second=float("nan"),
                    reason="é\x07" * 400,
                    aliases=tuple(f"alias-{number}" for number in range(20)),
                ),
                *(Serving(model=ModelName(f"served-{number}"), status=ModelStatus.COLD) for number in range(40)),
            ),
            on_disk=tuple(facts(f"{'m' * 90}{number}") for number in range(100)),
            addresses=tuple(f"10.0.0.{number}:1" for number in range(100)),
            certificate=b"",
            split=msgspec.structs.replace(
                GROUP,
                memory_bytes=-1,
                max_rtt_ms=float("inf"),
                round_trips={NodeId(f"{number:064x}"): number / 2 for number in range(60)},
                wish=SplitPreferences(context=-5, shares=(float("nan"), 1e15, 1.0)),
            ),
            publicity=ListingPolicy(name="lab\n" * 40, region="r" * 80, max_clients=5),
            clients=5_000_000,
        )
    ),
}


def signed(announcement: Announcement) -> SignedAnnouncement:
    return SignedAnnouncement(
        announcement=announcement, payload=encode_announcement(announcement), signature=bytes(range(64))
    )


MESSAGES: dict[str, MeshMessage] = {
    "ping": Ping(nonce=2**52 + 1),
    "ack": Ack(nonce=17),
    "ack about": Ack(nonce=17, about=C),
    "ping request": PingRequest(nonce=9, target=B),
    "empty exchange": Exchange(),
    "exchange": Exchange(
        digests=(
            Digest(A, Incarnation(1), 2),
            Digest(B, Incarnation(1_700_000_000_000), 4, "u"),
            Digest(C, Incarnation(3), 400, "d"),
        ),
        entries=(signed(SMALL), signed(FULL)),
        wanted=(B, C),
        verdicts=(
            Verdict(node=B, incarnation=Incarnation(3), state="d", by=A),
            Verdict(node=C, incarnation=Incarnation(3), state="s", by=B),
        ),
        revocations=(b"opaque", b""),
        reply=True,
        fingerprint=(1 << 53) - 1,
        span=(C, A),
        ceilings=(b"narrower",),
    ),
}


def recorded() -> dict[str, dict[str, str]]:
    return json.loads(RECORDED.read_text())


@pytest.mark.parametrize("name", ANNOUNCEMENTS)
def test_announcements_are_written_and_read_as_recorded(name: str) -> None:
    payload = bytes.fromhex(recorded()["announcements"][name])
    assert encode_announcement(trimmed(ANNOUNCEMENTS[name])) == payload
    read = decode_announcement(payload)
    assert isinstance(read, Announcement)
    assert encode_announcement(read) == payload
    if name != "trimmed":
        assert read == ANNOUNCEMENTS[name]


@pytest.mark.parametrize("name", MESSAGES)
def test_messages_are_written_and_read_as_recorded(name: str) -> None:
    payload = bytes.fromhex(recorded()["messages"][name])
    assert encode_message(MESSAGES[name]) == payload
    assert decode_message(payload) == MESSAGES[name]


@pytest.mark.parametrize("name", ["empty exchange", "exchange"])
def test_an_exchange_from_before_ceilings_is_read_and_a_newer_one_too(name: str) -> None:
    older = bytes.fromhex(recorded()["before ceilings"][name])
    assert decode_message(older) == msgspec.structs.replace(MESSAGES[name], ceilings=())
    newer = msgspec.msgpack.encode([*msgspec.msgpack.decode(encode_message(MESSAGES[name])), "a field to come"])
    assert decode_message(newer) == MESSAGES[name]


def test_everything_recorded_is_checked() -> None:
    assert recorded()["announcements"].keys() == ANNOUNCEMENTS.keys()
    assert recorded()["messages"].keys() == MESSAGES.keys()
