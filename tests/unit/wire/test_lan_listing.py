import pytest

from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.discovery import MAX_MODEL, MAX_MODELS, MAX_NAME, MAX_RECORD, LanListing, decode_txt, encode_txt

MESH, NODE = MeshId("e" * 64), NodeId("a" * 64)
LISTING = LanListing(
    mesh=MESH, node=NODE, mesh_name="Kitchen", name="desk", version="1.0", models=("tiny", "qwen 7b"), more_models=2
)


def as_read(listing: LanListing) -> dict[bytes, bytes | None]:
    return {key.encode(): value for key, value in encode_txt(listing).items()}


def decoded(listing: LanListing) -> LanListing:
    value = decode_txt(as_read(listing))
    assert isinstance(value, LanListing)
    return value


def changed(**entries: bytes | None) -> LanListing | Malformed:
    return decode_txt(as_read(LISTING) | {key.encode(): value for key, value in entries.items()})


def test_what_is_announced_is_read():
    assert decoded(LISTING) == LISTING


def test_nothing_but_this_is_announced():
    assert set(encode_txt(LISTING)) == {"txtvers", "p", "mesh", "node", "mn", "n", "v", "m0", "m1", "more"}


def test_too_many_and_too_long_models_are_counted_and_not_sent():
    listing = LanListing(mesh=MESH, node=NODE, models=tuple(f"{number:03}" + "x" * 500 for number in range(50)))
    entries = encode_txt(listing)
    assert sum(len(key) + len(value) + 2 for key, value in entries.items()) <= MAX_RECORD
    assert all(len(key) + 1 + len(value) <= 255 for key, value in entries.items())
    read = decoded(listing)
    assert 1 <= len(read.models) <= MAX_MODELS
    assert len(read.models) + read.more_models == 50
    assert all(len(model.encode()) <= MAX_MODEL for model in read.models)


def test_names_are_cut_between_letters():
    read = decoded(LanListing(mesh=MESH, node=NODE, name="é" * 100))
    assert read.name == "é" * (MAX_NAME // 2)


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\r\nb", "a\u202eb", "a\x00b"])
def test_what_moves_a_cursor_is_gone_from_names_and_models(text: str):
    raw = text.encode()
    listing = changed(n=raw, mn=raw, m0=raw, v=raw)
    assert isinstance(listing, LanListing)
    for shown in (listing.name, listing.mesh_name, listing.version, listing.models[0]):
        assert shown.isprintable()
        assert shown[0] == "a"


@pytest.mark.parametrize(
    "entries",
    [
        {"txtvers": b"2"},
        {"txtvers": None},
        {"mesh": b"e" * 63},
        {"mesh": b"E" * 64},
        {"node": b"g" * 64},
        {"node": None},
        {"p": b"one"},
        {"p": b"123456"},
        {"more": b"-1"},
        {"more": "٣".encode()},
        {"n": b"\xff\xfe"},
        {"x": b"y" * MAX_RECORD},
        {f"x{number}": b"" for number in range(40)},
    ],
)
def test_what_is_none_of_ours_is_malformed(entries: dict[str, bytes | None]):
    assert isinstance(changed(**entries), Malformed)


def test_later_entries_are_ignored():
    assert changed(later=b"something") == LISTING
