"""An owner's statement that a node is theirs."""

import base64

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.core.types.announcement import Ownership
from mesh_llm.core.types.ids import NodeId, OwnerId
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.owners import (
    PREFIX,
    Owned,
    format_ownership,
    ownership_holds,
    parse_ownership,
    sign_ownership,
)

PERSON, OTHER, NODE, SECOND = (ToyKey(name) for name in ("person", "other person", "node", "second"))
OWNER = OwnerId(PERSON.public.hex())
MADE = sign_ownership(OWNER, NODE.node_id, 100, 1000, PERSON.sign)
TEXT = format_ownership(NODE.node_id, MADE)


def test_it_holds_for_its_node_and_its_time_only() -> None:
    assert ownership_holds(MADE, NODE.node_id, 999.0, verify)
    assert not ownership_holds(MADE, NODE.node_id, 1000.0, verify)
    assert not ownership_holds(MADE, SECOND.node_id, 500.0, verify)


@pytest.mark.parametrize(
    "change", [{"owner": OwnerId(OTHER.public.hex())}, {"expires": 2000}, {"issued": 99}, {"signature": b"s" * 64}]
)
def test_no_changed_statement_holds(change: dict[str, object]) -> None:
    changed: Ownership = msgspec.structs.replace(MADE, **change)
    assert not ownership_holds(changed, NODE.node_id, 500.0, verify)


def test_only_the_owner_can_make_it() -> None:
    made = sign_ownership(OWNER, NODE.node_id, 100, 1000, OTHER.sign)
    assert not ownership_holds(made, NODE.node_id, 500.0, verify)


def test_as_text_it_is_the_same() -> None:
    assert parse_ownership(TEXT) == Owned(NODE.node_id, MADE)
    assert parse_ownership(f" {TEXT[:40]}\n  {TEXT[40:]} ") == Owned(NODE.node_id, MADE)


@given(at=st.integers(0, 1000), to=st.sampled_from("AQgw5_-z"))
def test_no_changed_letter_makes_another_statement(at: int, to: str) -> None:
    at %= len(TEXT)
    read = parse_ownership(TEXT[:at] + to + TEXT[at + 1 :])
    assert isinstance(read, Malformed) or read == Owned(NODE.node_id, MADE) or not _holds(read)


@given(st.binary(max_size=400))
def test_noise_is_malformed(noise: bytes) -> None:
    text = PREFIX + base64.urlsafe_b64encode(noise).decode().rstrip("=")
    read = parse_ownership(text)
    assert isinstance(read, Malformed) or not _holds(read)
    assert isinstance(parse_ownership(noise.decode("latin-1")), Malformed)


def test_what_is_not_in_its_only_form_is_refused() -> None:
    fields = [PERSON.public, NODE.public, 100, 1000, MADE.signature]
    good = PREFIX + base64.urlsafe_b64encode(encode(fields)).decode().rstrip("=")
    assert good == TEXT
    longer = PREFIX + base64.urlsafe_b64encode(encode([*fields, 1])).decode().rstrip("=")
    assert isinstance(parse_ownership(longer), Malformed)
    assert isinstance(parse_ownership(TEXT + "A" * 700), Malformed)


def _holds(owned: Owned) -> bool:
    return ownership_holds(owned.ownership, NodeId(owned.node), 500.0, verify)
