"""The TXT record on the local network, and the listing on Nostr relays."""

from typing import Any

import msgspec
import pytest
from tests.unit.wire.mesh.test_certificates import FOUNDER, MEMBER, MESH, NOW, admitted, founder
from tests.unit.wire.mesh.test_invites import terms
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.core.listing.content import ListedModel, Listing
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.discovery import (
    MAX_AHEAD,
    MAX_CONTENT,
    MAX_LIFE,
    MAX_MODEL,
    MAX_MODELS,
    MAX_NAME,
    MAX_RECORD,
    LanListing,
    Posting,
    author_proof,
    check_posting,
    check_times,
    decode_posting,
    decode_txt,
    encode_posting,
    encode_txt,
)
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.invites import Invite, format_invite, issue_invite

AUTHOR = ToyKey("a nostr key").public
LISTING = Listing(
    mesh=MESH.mesh_id,
    name="Sydney Lab",
    region="AU",
    nodes=3,
    clients=2,
    load=0.3,
    memory_bytes=48 * 10**9,
    serving=(ListedModel(name="qwen", context=8192),),
    wanted=(ListedModel(name="qwen"),),
    on_disk=(ListedModel(name="glm"),),
)


def token(issuer: ToyKey = FOUNDER, **changes: Any) -> str:
    certificate = None if issuer is FOUNDER else admitted(founder(), FOUNDER, issuer, Scope.SERVE)
    sign = MESH.sign if issuer is FOUNDER else issuer.sign
    invite = issue_invite(terms(issuer, **changes), certificate, sign)
    assert isinstance(invite, Invite)
    return format_invite(invite)


def posting(issuer: ToyKey = FOUNDER, listing: Listing = LISTING, **changes: Any) -> Posting:
    proof = author_proof(listing.mesh, AUTHOR, issuer.sign)
    return Posting(listing=listing, token=token(issuer, **changes), proof=proof)


def refused(shown: Posting, author: bytes = AUTHOR, now: float = NOW) -> str:
    outcome = check_posting(shown, author, now=now, verify=verify)
    assert isinstance(outcome, Malformed), outcome
    return outcome.reason


def test_listing_round_trip() -> None:
    for issuer in (FOUNDER, MEMBER):
        shown = posting(issuer)
        read = decode_posting(encode_posting(shown))
        assert read == shown
        assert isinstance(read, Posting)
        assert isinstance(check_posting(read, AUTHOR, now=NOW, verify=verify), Invite)


def test_a_copied_invite_does_not_allow_another_author_to_list_the_mesh() -> None:
    assert "named another author" in refused(posting(), author=ToyKey("somebody").public)
    forged = msgspec.structs.replace(posting(), proof=author_proof(MESH.mesh_id, AUTHOR, ToyKey("somebody").sign))
    assert "named another author" in refused(forged)


def test_the_invite_must_hold_and_be_what_the_listing_says() -> None:
    assert "expired" in refused(posting(), now=NOW + 1000)
    other = msgspec.structs.replace(LISTING, mesh=ToyKey("other").mesh_id)
    assert "its invite" in refused(msgspec.structs.replace(posting(listing=other), token=token()))
    wider = msgspec.structs.replace(LISTING, scope="split")
    assert "has scope serve, not split" in refused(posting(listing=wider))
    assert "limited number" in refused(posting(uses=3))
    assert "its invite" in refused(msgspec.structs.replace(posting(), token="mesh2" + "A" * 60))


def test_a_too_long_listing_leaves_out_models_that_are_not_served() -> None:
    many = tuple(ListedModel(name=f"{number:02}" + "x" * 240) for number in range(32))
    full = msgspec.structs.replace(LISTING, serving=many, wanted=many, on_disk=many)
    content = encode_posting(msgspec.structs.replace(posting(), listing=full))
    assert len(content.encode()) <= MAX_CONTENT
    read = decode_posting(content)
    assert isinstance(read, Posting)
    assert len(read.listing.serving) == 32
    assert len(read.listing.on_disk) == 0


def test_times_out_of_bounds_are_refused() -> None:
    assert check_times(NOW, NOW + 120, NOW) == ""
    assert check_times(NOW - 121, NOW - 1, NOW) == "it expired"
    assert check_times(NOW - MAX_LIFE, NOW + 10**9, NOW) == "it expired"
    assert check_times(NOW + MAX_AHEAD + 1, NOW + 1000, NOW) == "it comes from the future"


def test_control_characters_make_a_listing_malformed() -> None:
    for text in ("\x1b[2J\x1b[31mfree GPUs", "a\nb", "a\x9b31m", "a\x00"):
        encoded = encode_posting(
            msgspec.structs.replace(posting(), listing=msgspec.structs.replace(LISTING, name=text))
        )
        assert isinstance(decode_posting(encoded), Malformed)
        model = (ListedModel(name=text),)
        encoded = encode_posting(
            msgspec.structs.replace(posting(), listing=msgspec.structs.replace(LISTING, serving=model))
        )
        assert isinstance(decode_posting(encoded), Malformed)


def test_a_too_large_listing_is_malformed() -> None:
    assert isinstance(decode_posting("x" * (MAX_CONTENT + 1)), Malformed)
    assert isinstance(decode_posting("\u00e4" * MAX_CONTENT), Malformed)
    assert isinstance(decode_posting("[" * MAX_CONTENT), Malformed)


LAN_MESH, NODE = MeshId("e" * 64), NodeId("a" * 64)
LAN_LISTING = LanListing(
    mesh=LAN_MESH, node=NODE, mesh_name="Kitchen", name="desk", version="1.0", models=("tiny", "qwen 7b"), more_models=2
)


def as_read(listing: LanListing) -> dict[bytes, bytes | None]:
    return {key.encode(): value for key, value in encode_txt(listing).items()}


def read_back(listing: LanListing) -> LanListing:
    value = decode_txt(as_read(listing))
    assert isinstance(value, LanListing)
    return value


def changed(**entries: bytes | None) -> LanListing | Malformed:
    return decode_txt(as_read(LAN_LISTING) | {key.encode(): value for key, value in entries.items()})


def test_lan_record_round_trip():
    assert read_back(LAN_LISTING) == LAN_LISTING


def test_the_lan_record_has_no_other_entries():
    assert set(encode_txt(LAN_LISTING)) == {"txtvers", "p", "mesh", "node", "mn", "n", "v", "m0", "m1", "more"}


def test_too_many_and_too_long_models_are_counted_and_not_sent():
    listing = LanListing(mesh=LAN_MESH, node=NODE, models=tuple(f"{number:03}" + "x" * 500 for number in range(50)))
    entries = encode_txt(listing)
    assert sum(len(key) + len(value) + 2 for key, value in entries.items()) <= MAX_RECORD
    assert all(len(key) + 1 + len(value) <= 255 for key, value in entries.items())
    read = read_back(listing)
    assert 1 <= len(read.models) <= MAX_MODELS
    assert len(read.models) + read.more_models == 50
    assert all(len(model.encode()) <= MAX_MODEL for model in read.models)


def test_names_are_cut_between_characters():
    read = read_back(LanListing(mesh=LAN_MESH, node=NODE, name="é" * 100))
    assert read.name == "é" * (MAX_NAME // 2)


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\r\nb", "a\u202eb", "a\x00b"])
def test_control_characters_are_removed_from_names_and_models(text: str):
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
def test_malformed_and_foreign_lan_records_are_refused(entries: dict[str, bytes | None]):
    assert isinstance(changed(**entries), Malformed)


def test_later_entries_are_ignored():
    assert changed(later=b"something") == LAN_LISTING
