import math

import msgspec
import pytest

from mesh_llm.core.split.layout import split_memory
from mesh_llm.core.types import announcement as bounds
from mesh_llm.core.types.announcement import (
    Announcement,
    ListingPolicy,
    LoadOffer,
    Serving,
    SplitPreferences,
    SplitState,
    trimmed,
)
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelKind, ModelStatus, Rates, Role, Speed, SplitShare
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh import announcement as announcement_codecs
from mesh_llm.wire.mesh.announcement import decode_announcement, encode_announcement
from mesh_llm.wire.mesh.structs import derive

FACTS = ModelFacts(
    name=ModelName("tiny"),
    kind=ModelKind.CHAT,
    size_bytes=10**9,
    layers=32,
    context_train=131072,
    embedding_length=4096,
    vocabulary=128256,
    kv_bytes_per_token=131072,
    output_bytes=5,
    fingerprint="ab" * 16,
    source="hf:owner/repo:file@main",
)
FULL = Announcement(
    mesh=MeshId("ab" * 32),
    node=NodeId("cd" * 32),
    incarnation=Incarnation(1_700_000_000),
    sequence=7,
    name="Küche",
    role=Role.STANDBY,
    version="1.2.3",
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
            aliases=("tiny-q4",),
        ),
    ),
    on_disk=(FACTS,),
    wanted=(ModelName("tiny"), ModelName("big")),
    demand={"tiny": 3.5, "big": 1.0},
    capacity=Capacity(
        memory_bytes=5, memory_total_bytes=6, devices=("CPU",), engine="embedded b1", rpc_version="8.0.0"
    ),
    addresses=("10.0.0.1:7000", "[::1]:7000"),
    relay="https://relay.example/",
    certificate=b"\x00\xff" * 40,
    left=True,
    split=SplitState(
        model=ModelName("big"),
        fingerprint="cd" * 16,
        memory_bytes=10**10,
        seeds=True,
        asked=True,
        max_rtt_ms=40.0,
        round_trips={NodeId("ab" * 32): 12.0},
        term=3,
        leads=True,
        shares=(SplitShare(node=NodeId("cd" * 32), layers=20, memory_bytes=10**9),),
        wish=SplitPreferences(context=4096, slots=2, shares=(2.0, 1.0)),
    ),
)


def test_all_fields_round_trip() -> None:
    assert decode_announcement(encode_announcement(FULL)) == FULL


def test_what_a_node_offers_to_models_that_are_asked_for_travels() -> None:
    loads = LoadOffer(clients=True, free_bytes=1, room_bytes=2, free_host_bytes=3, room_host_bytes=4, hub=True)
    serving = msgspec.structs.replace(FULL.serving[0], load_seconds=7.0)
    word = msgspec.structs.replace(FULL, loads=loads, serving=(serving,))
    assert decode_announcement(encode_announcement(word)) == word


def test_a_wish_with_marked_invites_is_one_element_longer_which_older_versions_skip() -> None:
    wishes = (ListingPolicy(name="lab"), ListingPolicy(name="lab", marked=True))
    plain, marked = (msgspec.structs.replace(FULL, publicity=wish) for wish in wishes)
    sent = [msgspec.msgpack.decode(encode_announcement(one))["publicity"] for one in (plain, marked)]
    assert sent == [["lab", "", 0, "serve", False], ["lab", "", 0, "serve", False, True]]
    assert [decode_announcement(encode_announcement(one)) for one in (plain, marked)] == [plain, marked]


def test_older_versions_do_not_elect_a_node_without_the_file() -> None:
    assert FULL.split is not None
    bare = msgspec.structs.replace(FULL.split, bare=True, leads=False, shares=())
    payload = encode_announcement(msgspec.structs.replace(FULL, split=bare))
    read = decode_announcement(payload)
    assert isinstance(read, Announcement)
    assert read.split == bare
    fields = msgspec.msgpack.decode(payload)["split"]
    assert fields[1] == ""
    assert fields[-1] == bare.fingerprint


def test_defaults_are_left_out() -> None:
    bare = Announcement(mesh=FULL.mesh, node=FULL.node, incarnation=Incarnation(1), sequence=1)
    payload = encode_announcement(bare)
    assert decode_announcement(payload) == bare
    assert len(payload) < 130


def test_the_order_of_a_dictionary_does_not_change_the_signed_bytes() -> None:
    turned = msgspec.structs.replace(FULL, demand={"big": 1.0, "tiny": 3.5})
    assert encode_announcement(turned) == encode_announcement(FULL)


def test_fields_of_later_versions_are_skipped() -> None:
    raw = msgspec.msgpack.decode(encode_announcement(FULL))
    raw["color"] = {"of": "paint"}
    raw["serving"][0] += [0.0, "", "later"]
    assert decode_announcement(msgspec.msgpack.encode(raw)) == FULL


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("node", b"\x01" * 31),
        ("mesh", "text"),
        ("incarnation", -1),
        ("incarnation", 2**53 + 1),
        ("sequence", 1.5),
        ("name", "x" * (bounds.MAX_NAME + 1)),
        ("name", "\x1b[2J"),
        ("name", "two\nlines"),
        ("wanted", ["x"] * (bounds.MAX_WANTED + 1)),
        ("wanted", [""]),
        ("demand", {"tiny": math.nan}),
        ("demand", {"tiny": math.inf}),
        ("demand", {"tiny": -1.0}),
        ("role", "king"),
        ("addresses", ["x" * 300]),
        ("certificate", b"x" * (bounds.MAX_CERTIFICATE + 1)),
        ("left", 1),
    ],
)
def test_values_out_of_bounds_are_malformed(field: str, value: object) -> None:
    raw = msgspec.msgpack.decode(encode_announcement(FULL))
    raw[field] = value
    assert isinstance(decode_announcement(msgspec.msgpack.encode(raw)), Malformed)


def test_a_too_long_payload_is_malformed() -> None:
    raw = msgspec.msgpack.decode(encode_announcement(FULL))
    raw["later"] = "x" * bounds.MAX_PAYLOAD
    assert isinstance(decode_announcement(msgspec.msgpack.encode(raw)), Malformed)


def test_a_too_long_announcement_is_refused_and_fits_when_trimmed() -> None:
    huge = msgspec.structs.replace(
        FULL,
        name="n" * 500,
        on_disk=tuple(msgspec.structs.replace(FACTS, name=ModelName(f"{'m' * 200}{i}")) for i in range(500)),
        serving=tuple(
            Serving(model=ModelName(f"served-{i}"), status=ModelStatus.WARM, reason="é" * 100) for i in range(40)
        ),
        wanted=tuple(ModelName(f"wanted-{i}" * 9) for i in range(100)),
        demand={f"asked-{i}": float(i) for i in range(1000)},
        addresses=tuple(f"10.0.0.{i}:1" for i in range(100)),
    )
    with pytest.raises(ValueError, match="at most"):
        encode_announcement(huge)
    word = trimmed(huge)
    certified = msgspec.structs.replace(word, certificate=b"x" * bounds.MAX_CERTIFICATE)
    assert decode_announcement(encode_announcement(certified)) == certified
    assert len(word.serving) > 1
    assert word.demand["asked-999"] == 999.0
    assert 10 < len(word.on_disk) < 64


def test_trimming_removes_control_characters_and_invalid_names() -> None:
    odd = msgspec.structs.replace(
        FULL,
        name="bad\x1b[2Jname",
        wanted=(ModelName("good"), ModelName("bad\nname")),
        on_disk=(FACTS, msgspec.structs.replace(FACTS, name=ModelName("\udcff.gguf"))),
    )
    word = trimmed(odd)
    assert word.name == "bad [2Jname"
    assert word.wanted == ("good",)
    assert word.on_disk == (FACTS,)
    assert decode_announcement(encode_announcement(word)) == word


def test_trimming_clamps_numbers_to_their_limits() -> None:
    odd = msgspec.structs.replace(
        FULL,
        demand={"tiny": math.inf},
        serving=(Serving(model=ModelName("m"), status=ModelStatus.WARM, in_flight=-3, tokens_per_second=math.nan),),
    )
    back = decode_announcement(encode_announcement(trimmed(odd)))
    assert isinstance(back, Announcement)
    assert back.demand == {"tiny": 0.0}
    assert back.serving[0].in_flight == 0
    assert back.serving[0].tokens_per_second == 0.0


def test_older_nodes_read_a_reranker_as_an_embedding_model() -> None:
    facts = msgspec.structs.replace(FULL.on_disk[0], kind=ModelKind.RERANK)
    serving = msgspec.structs.replace(FULL.serving[0], kind=ModelKind.RERANK)
    payload = encode_announcement(msgspec.structs.replace(FULL, on_disk=(facts,), serving=(serving,)))
    assert b"embedding" in payload
    read = decode_announcement(payload)
    assert isinstance(read, Announcement)
    assert (read.on_disk[0].kind, read.serving[0].kind) == (ModelKind.RERANK, ModelKind.RERANK)


def unbounded(kind: msgspec.inspect.Type, where: str) -> list[str]:
    """The parts of a decoded type that accept any number of bytes, or any number."""
    match kind:
        case msgspec.inspect.IntType(ge=ge, le=le) | msgspec.inspect.FloatType(ge=ge, le=le):
            return [] if ge is not None and le is not None else [where]
        case msgspec.inspect.StrType(max_length=most, pattern=pattern):
            return [] if most is not None and pattern is not None else [where]
        case msgspec.inspect.BytesType(max_length=most):
            return [] if most is not None else [where]
        case msgspec.inspect.VarTupleType(item_type=item, max_length=most):
            return [*([] if most is not None else [where]), *unbounded(item, where)]
        case msgspec.inspect.DictType(key_type=key, value_type=value, max_length=most):
            return [*([] if most is not None else [where]), *unbounded(key, where), *unbounded(value, where)]
        case msgspec.inspect.UnionType(types=types):
            return [found for one in types for found in unbounded(one, where)]
        case msgspec.inspect.StructType(fields=fields):
            return [found for field in fields for found in unbounded(field.type, f"{where}.{field.name}")]
        case _:
            return []


def test_no_field_of_an_announcement_is_unbounded_on_the_wire() -> None:
    class Later(Announcement, frozen=True, kw_only=True, omit_defaults=True):
        color: str = ""
        doors: int = 0

    for core in (Announcement, Later):
        wire = msgspec.inspect.type_info(derive(core, announcement_codecs.SPECIAL, as_map=True).type)
        assert unbounded(wire, core.__name__) == []


def test_later_fields_travel_only_where_they_say_something() -> None:
    speed = Speed(cores=8, full=Rates(f16=10**9, q8=2 * 10**9, q4=3 * 10**9))
    plain = msgspec.structs.replace(FULL, capacity=Capacity(memory_bytes=5))
    beside = msgspec.structs.replace(FULL, capacity=Capacity(memory_bytes=5, host_bytes=7, host_speed=speed))
    sent = [msgspec.msgpack.decode(encode_announcement(one))["capacity"] for one in (plain, beside)]
    assert [len(one) for one in sent] == [6, 8]
    assert sent[1][6] == 7
    assert [decode_announcement(encode_announcement(one)) for one in (plain, beside)] == [plain, beside]


def test_the_cache_type_of_a_split_model_travels() -> None:
    wish = SplitPreferences(context=4096, cache_type="q8_0")
    split = SplitState(model=ModelName("big"), fingerprint="ab" * 16, wish=wish)
    announced = msgspec.structs.replace(FULL, split=split)
    assert decode_announcement(encode_announcement(announced)) == announced


def test_a_node_without_the_file_sums_a_split_as_one_that_has_it() -> None:
    sized = msgspec.structs.replace(
        FACTS,
        kv_window_bytes_per_token=65536,
        window=1024,
        state_bytes=3_000_000,
        compute_width=90_000,
        companion_bytes=500_000_000,
    )
    plain = msgspec.structs.replace(FULL, on_disk=(FACTS,))
    announced = msgspec.structs.replace(FULL, on_disk=(sized,))
    heard = decode_announcement(encode_announcement(announced))
    assert isinstance(heard, Announcement)
    assert heard == announced
    assert split_memory(heard.on_disk[0], 8192, 4) == split_memory(sized, 8192, 4) != split_memory(FACTS, 8192, 4)
    # What says nothing stays away: the bytes are those of earlier versions.
    lengths = [len(msgspec.msgpack.decode(encode_announcement(one))["on_disk"][0]) for one in (plain, announced)]
    assert lengths[1] - lengths[0] == 5
    assert announcement_codecs._Facts.__struct_fields__[-5:] == bounds.LATER_SIZES
