"""Receipts as bytes: one form only, bounded, and nothing of another key."""

import base64
from hashlib import sha256
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.receipts import ASKER, HOST, OTHER, begun, chained, read, receipt, signed, signer, step, verify
from tests.support.receipts import first as begins
from tests.support.receipts import statement as said

from mesh_llm.core.trust.receipts import Checked, examine, holds
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import MAX_SPLIT_NODES
from mesh_llm.core.types.receipt import MAX_FIRST, MAX_STATEMENT, MAX_STEPS, FirstPart, Outcome, Statement
from mesh_llm.wire.codec import Malformed, encode, statement
from mesh_llm.wire.mesh.receipts import (
    FIRST,
    MAX_TEXT,
    PREFIX,
    RECEIPT,
    STATEMENT,
    first_text,
    parse_first_text,
    read_first,
    read_receipt,
    read_statement,
    request_digest,
    says_the_same,
    sign_first,
    sign_statement,
)

TEXT = receipt(*chained([(OTHER, Outcome.LOST, False), (HOST, Outcome.ANSWERED, True)]))


def unpacked(text: str) -> tuple[bytes, bytes]:
    raw = base64.urlsafe_b64decode(text.removeprefix(PREFIX) + "==")
    return raw[:64], raw[64:]


def packed(payload: bytes, by: NodeId = ASKER) -> str:
    """Bytes as a receipt, signed as they are."""
    signature = signer(by)(statement(RECEIPT, payload))
    return PREFIX + base64.urlsafe_b64encode(signature + payload).decode().rstrip("=")


def holds_up(text: str) -> bool:
    checked = read_receipt(text, verify)
    return isinstance(checked, Checked) and holds(examine(checked))


def test_what_was_signed_is_read() -> None:
    checked = read(TEXT)
    assert checked.signed
    assert [one.node for one in checked.receipt.steps] == [OTHER, HOST]
    assert checked.statements[0] is None
    assert isinstance(checked.statements[1], Statement)
    assert holds_up(TEXT)
    assert packed(unpacked(TEXT)[1]) == TEXT


@given(at=st.integers(0, 10_000), to=st.sampled_from("AQgw5_-z"))
def test_no_changed_letter_passes(at: int, to: str) -> None:
    at %= len(TEXT)
    changed = TEXT[:at] + to + TEXT[at + 1 :]
    assert changed == TEXT or not holds_up(changed)


@given(at=st.integers(0, 10_000))
def test_no_truncated_receipt_passes(at: int) -> None:
    assert not holds_up(TEXT[: at % len(TEXT)])


@given(at=st.integers(0, 10_000))
def test_a_payload_that_is_cut_and_signed_anew_is_malformed(at: int) -> None:
    payload = unpacked(TEXT)[1]
    assert isinstance(read_receipt(packed(payload[: at % len(payload)]), verify), Malformed)


@given(st.binary(max_size=2000))
def test_noise_never_raises(noise: bytes) -> None:
    assert not holds_up(packed(noise))
    assert not holds_up(noise.decode("latin-1"))
    assert isinstance(read_statement(HOST, noise, signer(HOST)(statement(STATEMENT, noise)), verify), Malformed)
    assert isinstance(read_first(HOST, signer(HOST)(statement(FIRST, noise)) + noise, verify), Malformed)
    assert isinstance(read_first(HOST, noise, verify), Malformed)
    assert not parse_first_text(noise) or first_text(parse_first_text(noise)) == noise


@given(at=st.integers(0, 10_000), to=st.sampled_from(b"AQgw5_-z+/=\n "), cut=st.booleans())
def test_no_changed_or_cut_first_part_is_taken_for_its_hosts(at: int, to: int, cut: bool) -> None:
    made = begins()
    text = first_text(sign_first(made, signer(HOST)))
    assert read_first(HOST, parse_first_text(text), verify) == made
    at %= len(text)
    changed = text[:at] if cut else text[:at] + bytes([to]) + text[at + 1 :]
    assert changed == text or isinstance(read_first(HOST, parse_first_text(changed), verify), Malformed)


def test_a_first_part_is_no_statement_and_of_one_host_only() -> None:
    signed_first = sign_first(begins(), signer(HOST))
    signature, payload = signed_first[:64], signed_first[64:]
    assert isinstance(read_statement(HOST, payload, signature, verify), Malformed)
    assert isinstance(read_first(OTHER, signed_first, verify), Malformed)
    made, of_made = sign_statement(said(), signer(HOST))
    assert isinstance(read_first(HOST, of_made + made, verify), Malformed)
    assert isinstance(read_first(HOST, signed_first + b"\xc0", verify), Malformed)


def test_a_header_that_is_too_long_is_no_first_part() -> None:
    assert parse_first_text(first_text(b"x" * MAX_FIRST))
    assert not parse_first_text(first_text(b"x" * (MAX_FIRST + 1)))
    assert not parse_first_text(b"A" * (1 << 16))


def test_a_first_part_has_the_statements_fields_that_are_known_before_the_answer() -> None:
    """They are declared twice, since the order of fields is that of the signed bytes: alike, and in the same order."""
    first, whole = (list(get_type_hints(kind, include_extras=True).items()) for kind in (FirstPart, Statement))
    assert first == [one for one in whole if one in first]
    assert len(whole) - len(first) == 8


def test_a_first_part_says_the_same_as_the_end_or_not() -> None:
    key = signer(HOST)
    assert says_the_same(sign_first(begins(), key), said())
    assert says_the_same(sign_first(begins(content=b""), key), said())
    assert not says_the_same(sign_first(begins(content=b"x" * 32), key), said())
    assert not says_the_same(sign_first(begins(context=1), key), said())
    assert not says_the_same(b"noise", said())


def test_a_step_without_a_first_part_has_the_bytes_that_it_always_had() -> None:
    """Receipts of earlier versions are read, and earlier versions read those of whole answers."""
    (steps,) = (msgspec.msgpack.decode(unpacked(TEXT)[1])[9],)
    assert [len(one) for one in steps] == [12, 12]
    taken = receipt(begun(step(outcome=Outcome.LOST)))
    fields = msgspec.msgpack.decode(unpacked(taken)[1])
    assert [len(one) for one in fields[9]] == [13]
    assert isinstance(read(taken).firsts[0], FirstPart)
    # An empty one is left out: there is one form only.
    fields[9][0][12] = b""
    assert isinstance(read_receipt(packed(encode(fields)), verify), Malformed)


@pytest.mark.parametrize("more", [["extra"], [None]])
def test_what_is_not_in_its_only_form_is_refused(more: list[Any]) -> None:
    payload = unpacked(TEXT)[1]
    fields = msgspec.msgpack.decode(payload)
    assert packed(encode(fields)) == TEXT
    assert isinstance(read_receipt(packed(encode([*fields, *more])), verify), Malformed)
    assert isinstance(read_receipt(packed(payload + b"\xc0"), verify), Malformed)
    made, signature = sign_statement(said(), signer(HOST))
    longer = encode([*msgspec.msgpack.decode(made), *more])
    assert isinstance(read_statement(HOST, longer, signer(HOST)(statement(STATEMENT, longer)), verify), Malformed)
    assert isinstance(read_statement(HOST, made, signature, verify), Statement)


def test_a_signature_of_one_kind_holds_for_no_other() -> None:
    made, _ = sign_statement(said(), signer(HOST))
    assert isinstance(read_statement(HOST, made, signer(HOST)(statement(RECEIPT, made)), verify), Malformed)
    assert isinstance(read_statement(HOST, made, signer(HOST)(made), verify), Malformed)


def test_padding_another_alphabet_and_other_versions_are_refused() -> None:
    for text in (TEXT + "=", TEXT.replace("receipt1", "receipt2"), "", PREFIX, TEXT + " " + TEXT):
        assert isinstance(read_receipt(text, verify), Malformed)
    assert holds_up(f"  {TEXT}\n")


def test_the_longest_statement_and_receipt_fit_and_a_longer_one_is_refused() -> None:
    workers = tuple(NodeId(f"{number:064x}") for number in range(MAX_SPLIT_NODES))
    long = "\N{HEDGEHOG}" * 120
    most = said(model="\N{HEDGEHOG}" * 256, engine=long, fingerprint=long, quantisation=long, cache_type=long)
    most = msgspec.structs.replace(most, wire_type=long, workers=workers)
    payload, signature = sign_statement(most, signer(HOST))
    assert len(payload) <= MAX_STATEMENT
    assert read_statement(HOST, payload, signature, verify) == most
    steps = chained([(HOST, Outcome.REFUSED, False)] * MAX_STEPS)
    whole = tuple(
        msgspec.structs.replace(
            one,
            workers=workers,
            fingerprint="\N{HEDGEHOG}" * 256,
            statement=b"x" * MAX_STATEMENT,
            signature=b"x" * 64,
            first=b"x" * MAX_FIRST,
        )
        for one in steps
    )
    text = receipt(*whole)
    assert len(text) <= MAX_TEXT
    assert isinstance(read_receipt(text, verify), Checked)
    assert isinstance(read_receipt(receipt(*whole, whole[0]), verify), Malformed)
    assert isinstance(read_receipt("x" * (MAX_TEXT + 1), verify), Malformed)
    assert isinstance(read_receipt(receipt(), verify), Malformed)


def test_a_digest_has_32_bytes_or_none() -> None:
    for wrong in (b"x", b"x" * 31):
        made, signature = sign_statement(said(content=wrong), signer(HOST))
        assert isinstance(read_statement(HOST, made, signature, verify), Malformed)
        assert isinstance(read_receipt(receipt(signed(step(previous=wrong))), verify), Malformed)


def test_a_request_is_digested_with_its_method_and_target() -> None:
    seen = {
        request_digest("POST", "/v1/chat/completions", b"{}"),
        request_digest("POST", "/v1/completions", b"{}"),
        request_digest("GET", "/v1/chat/completions", b"{}"),
        request_digest("POST", "/v1/chat/completions", b"{} "),
    }
    assert len(seen) == 4
    assert request_digest("POST", "/a", b"b") == sha256(b"POST /a\nb").digest()
