"""What two nodes say on MEASURE and MODEL streams, and the speed in announcements."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import node_id

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import AttentionRates, Rates, Speed
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.announcement import SPEED
from mesh_llm.wire.mesh.streams import (
    CHUNK_BYTES,
    MAX_ROUND_TRIPS,
    REPLY_HEAD,
    Facts,
    ModelParameters,
    ModelRefused,
    ModelRequest,
    Offer,
    OfferedFile,
    Preparing,
    ReplyHead,
    ReplyKind,
    WantChunk,
    WantDigests,
    WantOffer,
    decode_facts,
    decode_model_parameters,
    decode_model_refused,
    decode_model_request,
    decode_offer,
    decode_preparing,
    decode_reply_head,
    encode_facts,
    encode_model_reply,
    reply_head,
)

millions = st.integers(0, 2000).map(lambda number: number * 10**6)
rates = st.builds(Rates, f16=millions, q8=millions, q4=millions)
speeds = st.builds(
    Speed,
    cores=st.integers(0, 512),
    cached=rates,
    one=rates,
    full=rates,
    step_ns=st.integers(0, 10**6),
    full_step_ns=st.integers(0, 10**6),
    batch=st.one_of(st.just(Rates()), rates),
    attention=st.one_of(
        st.just(AttentionRates()),
        st.builds(
            AttentionRates, **{one: st.integers(0, 2000).map(lambda n: n * 10**6) for one in ("prompt", "token")}
        ),
    ),
)


@given(speeds)
def test_speed_round_trip(speed: Speed) -> None:
    assert SPEED.read(SPEED.write(speed)) == speed


@given(speeds)
def test_a_speed_of_a_node_that_knows_no_attention_is_read(speed: Speed) -> None:
    sent = msgspec.json.decode(msgspec.json.encode(SPEED.write(speed)))[:7]
    read = SPEED.read(msgspec.convert(sent, SPEED.type))
    assert read == msgspec.structs.replace(speed, attention=AttentionRates())


@given(
    speeds,
    st.dictionaries(st.integers(1, 99).map(node_id), st.floats(0, 1000), max_size=80),
    st.integers(0, 2**50),
    st.booleans(),
)
def test_facts_round_trip(speed: Speed, trips: dict[NodeId, float], free: int, takes: bool) -> None:
    facts = decode_facts(encode_facts(Facts(speed=speed, round_trips=trips, free_bytes=free, takes=takes)))
    assert isinstance(facts, Facts)
    assert (facts.speed, facts.free_bytes, facts.takes) == (speed, free, takes)
    assert facts.round_trips.items() <= trips.items()
    assert len(facts.round_trips) == min(len(trips), MAX_ROUND_TRIPS)


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x93", b"\x93\x96", b"\x92\x96\x02\x93"]))
def test_any_bytes_are_facts_or_malformed(data: bytes, head: bytes) -> None:
    decoded = decode_facts(head + data)
    assert isinstance(decoded, Facts | Malformed)


PART = OfferedFile(5 << 20, b"s" * 32, b"c" * 32)
PROJECTOR = OfferedFile(9, b"s" * 32, b"c" * 32, "mmproj-F16.gguf")


def body(data: bytes) -> tuple[ReplyHead, bytes]:
    head = decode_reply_head(data[:REPLY_HEAD])
    assert isinstance(head, ReplyHead)
    assert head.length == len(data) - REPLY_HEAD
    return head, data[REPLY_HEAD:]


def test_bytes_on_the_wire():
    assert encode(ModelParameters("m", "ab")) == bytes.fromhex("92 a16d a26162")
    assert encode(WantOffer()) == bytes.fromhex("91 a56f66666572")
    assert encode(WantDigests(1)) == bytes.fromhex("92 a46c697374 01")
    assert encode(WantChunk(0, 300)) == bytes.fromhex("93 a56368756e6b 00 cd012c")
    assert reply_head(ReplyKind.CHUNK, CHUNK_BYTES) == bytes.fromhex("04 00400000")
    assert encode_model_reply(Preparing(1, 2)) == bytes.fromhex("01 00000003 92 01 02")


@pytest.mark.parametrize("request_", [WantOffer(), WantDigests(511), WantChunk(3, 70_000)])
def test_requests_round_trip(request_: ModelRequest):
    assert decode_model_request(encode(request_)) == request_


def test_replies_round_trip():
    head, data = body(encode_model_reply(Offer((PART, PART, PROJECTOR))))
    assert head.kind is ReplyKind.OFFER
    assert decode_offer(data) == Offer((PART, PART, PROJECTOR))
    assert decode_preparing(body(encode_model_reply(Preparing(5, 9)))[1]) == Preparing(5, 9)
    assert decode_model_refused(body(encode_model_reply(ModelRefused("it is gone")))[1]) == ModelRefused("it is gone")
    assert decode_model_parameters(encode(ModelParameters("a/b: c", "0f"))) == ModelParameters("a/b: c", "0f")


@pytest.mark.parametrize(
    "files",
    [
        (),
        (PROJECTOR,),
        (PROJECTOR, PART),
        (PART, PROJECTOR, PROJECTOR),
        (OfferedFile(0, b"s" * 32, b"c" * 32),),
        (OfferedFile(1 << 43, b"s" * 32, b"c" * 32),),
        (OfferedFile(1, b"short", b"c" * 32),),
        (PART,) * 513,
    ],
)
def test_inconsistent_offers_are_malformed(files: tuple[OfferedFile, ...]):
    assert isinstance(decode_offer(body(encode_model_reply(Offer(files)))[1]), Malformed)


@pytest.mark.parametrize(
    "name",
    ["../mmproj.gguf", "/mmproj.gguf", "a/mmproj.gguf", "..", ".mmproj.gguf", "mmproj", "mm\\proj.gguf", "x\n.gguf"],
)
def test_a_projectors_name_cannot_be_a_path(name: str):
    offer = Offer((PART, OfferedFile(9, b"s" * 32, b"c" * 32, name)))
    assert isinstance(decode_offer(body(encode_model_reply(offer))[1]), Malformed)


@pytest.mark.parametrize(
    "head", [b"", b"\x04\x00", b"\x00\x00\x00\x00\x00", b"\x04\x00\x40\x00\x01", b"\x05\xff\xff\xff\xff"]
)
def test_heads_of_too_long_bodies_are_malformed(head: bytes):
    assert isinstance(decode_reply_head(head), Malformed)


def test_a_head_over_the_limit_is_not_written():
    with pytest.raises(ValueError, match="at most"):
        reply_head(ReplyKind.CHUNK, CHUNK_BYTES + 1)
