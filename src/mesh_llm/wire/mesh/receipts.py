"""Receipts as bytes and as text. Strict: what does not encode to the same bytes again is refused.

What is digested, exactly:

- a request between nodes: SHA-256 over `METHOD SP TARGET LF` and the content, `TARGET` being the path with its query;
- a request of a client, and every answer: SHA-256 over the content alone, without chunk framing.
"""

import base64
import binascii
import hashlib
import re
from typing import Any

import msgspec

from mesh_llm.core.trust.receipts import Checked
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.receipt import (
    MAX_FIRST,
    MAX_RECEIPT,
    MAX_STATEMENT,
    FirstPart,
    Outcome,
    Receipt,
    Statement,
    Step,
)
from mesh_llm.wire.codec import SIGNATURE_BYTES, Malformed, Sign, Verify, copied, decode, encode, key_of, statement
from mesh_llm.wire.mesh.structs import Codec, derive

FIRST = "receipt-first"
STATEMENT = "receipt-part"
RECEIPT = "receipt"
STEP = "receipt-step"

PREFIX = "receipt1."
"""A receipt as text: this, then base64url of the signature and the payload, without padding."""

_DIGEST_SIZES = (0, 32)
_FIRST_TEXT = re.compile(rb"[A-Za-z0-9_-]{100,%d}" % (MAX_FIRST * 4 // 3 + 1))
_TEXT = re.compile(r"receipt1\.([A-Za-z0-9_-]+)", re.ASCII)
MAX_TEXT = len(PREFIX) + (MAX_RECEIPT + SIGNATURE_BYTES) * 4 // 3 + 4
"""Characters of a receipt as text."""

_FIRST = derive(FirstPart)
_STATEMENT = derive(Statement)
_STEP = derive(Step, {Outcome: Codec(Outcome)})
_RECEIPT = derive(Receipt, {Step: _STEP})
_firsts: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_FIRST.type)
_statements: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_STATEMENT.type)
_receipts: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(_RECEIPT.type)


def request_digest(method: str, target: str, content: bytes) -> bytes:
    """The digest of a request between two nodes."""
    hashed = hashlib.sha256(f"{method} {target}\n".encode())
    hashed.update(content)
    return hashed.digest()


def step_digest(step: Step) -> bytes:
    """The digest of a step without what its host signed: the next host is sent it before that is there."""
    bare = msgspec.structs.replace(step, statement=b"", signature=b"")
    return hashlib.sha256(statement(STEP, encode(_STEP.write(bare)))).digest()


def sign_first(made: FirstPart, sign: Sign) -> bytes:
    """The signature of a first part by the host's key, and its bytes, as a step has them."""
    payload = encode(_FIRST.write(made))
    return sign(statement(FIRST, payload)) + payload


def first_text(signed: bytes) -> bytes:
    """A signed first part as the value of a header."""
    return base64.urlsafe_b64encode(signed).rstrip(b"=")


def parse_first_text(text: bytes) -> bytes:
    """A first part from the value of a header, not checked; empty where it is none, or is longer than one can be."""
    if _FIRST_TEXT.fullmatch(text) is None:
        return b""
    try:
        signed = base64.urlsafe_b64decode(text + b"=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        return b""
    return signed if first_text(signed) == text and len(signed) <= MAX_FIRST else b""


def read_first(node: NodeId, signed: bytes, verify: Verify) -> FirstPart | Malformed:
    """A first part that this node signed."""
    signature, payload = signed[:SIGNATURE_BYTES], signed[SIGNATURE_BYTES:]
    return _read_signed(node, FIRST, payload, signature, verify, _firsts, _FIRST)


def says_the_same(signed: bytes, made: Statement) -> bool:
    """Whether a first part says nothing that the statement of the same host does not; no signature is checked."""
    same = copied(FirstPart, made)
    # The file may have been read while the answer was given.
    unread = msgspec.structs.replace(same, content=b"")
    return signed[SIGNATURE_BYTES:] in {encode(_FIRST.write(one)) for one in (same, unread)}


def sign_statement(made: Statement, sign: Sign) -> tuple[bytes, bytes]:
    """A statement's bytes, and the signature over them by the host's key."""
    payload = encode(_STATEMENT.write(made))
    return payload, sign(statement(STATEMENT, payload))


def read_statement(node: NodeId, payload: bytes, signature: bytes, verify: Verify) -> Statement | Malformed:
    """A statement that this node signed."""
    return _read_signed(node, STATEMENT, payload, signature, verify, _statements, _STATEMENT)


def _read_signed(
    node: NodeId,
    kind: str,
    payload: bytes,
    signature: bytes,
    verify: Verify,
    decoder: msgspec.msgpack.Decoder[Any],
    codec: Codec,
) -> Any:
    if len(payload) > MAX_STATEMENT:
        return Malformed("it is too long")
    if len(signature) != SIGNATURE_BYTES or not verify(key_of(node), statement(kind, payload), signature):
        return Malformed("the signature is not its host's")
    made = _strictly(decoder, codec, payload)
    if isinstance(made, Malformed):
        return made
    sizes = len(made.previous), len(made.content)
    return made if all(size in _DIGEST_SIZES for size in sizes) else Malformed("a digest has the wrong length")


def sign_receipt(receipt: Receipt, sign: Sign) -> str:
    """A receipt as text, signed by the asking node's key."""
    payload = encode(_RECEIPT.write(receipt))
    signature = sign(statement(RECEIPT, payload))
    return PREFIX + base64.urlsafe_b64encode(signature + payload).decode().rstrip("=")


def read_receipt(text: str, verify: Verify) -> Checked | Malformed:
    """Read a receipt, and check its signatures. One whose signatures fail is read as well: `Checked` says so."""
    if len(text) > MAX_TEXT:
        return Malformed("it is too long to be a receipt")
    found = _TEXT.fullmatch(text.strip())
    if found is None:
        return Malformed(f"a receipt begins with {PREFIX}")
    body = found[1]
    try:
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except (binascii.Error, ValueError):
        return Malformed("it is not base64url")
    if base64.urlsafe_b64encode(raw).decode().rstrip("=") != body:
        return Malformed("it is not base64url in its only form")
    signature, payload = raw[:SIGNATURE_BYTES], raw[SIGNATURE_BYTES:]
    if len(payload) > MAX_RECEIPT:
        return Malformed("it is too long to be a receipt")
    receipt = _strictly(_receipts, _RECEIPT, payload)
    if isinstance(receipt, Malformed):
        return receipt
    if any(len(step.previous) not in _DIGEST_SIZES for step in receipt.steps):
        return Malformed("a digest has the wrong length")
    return Checked(
        receipt=receipt,
        signed=verify(key_of(receipt.node), statement(RECEIPT, payload), signature),
        firsts=tuple(_first_of(step, verify) for step in receipt.steps),
        statements=tuple(_statement_of(step, verify) for step in receipt.steps),
        chain=tuple(map(step_digest, receipt.steps)),
    )


def _first_of(step: Step, verify: Verify) -> FirstPart | str | None:
    if not step.first:
        return None
    made = read_first(step.node, step.first, verify)
    return made.reason if isinstance(made, Malformed) else made


def _statement_of(step: Step, verify: Verify) -> Statement | str | None:
    if not step.statement and not step.signature:
        return None
    made = read_statement(step.node, step.statement, step.signature, verify)
    return made.reason if isinstance(made, Malformed) else made


def _strictly(decoder: msgspec.msgpack.Decoder[Any], codec: Codec, payload: bytes) -> Any:
    """The value of these bytes, where it has no other bytes."""
    wire = decode(decoder, payload)
    if isinstance(wire, Malformed):
        return wire
    value = codec.read(wire)
    return value if encode(codec.write(value)) == payload else Malformed("it is not in its only form")
