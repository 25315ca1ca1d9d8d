"""Receipts of made-up nodes: keys, hosts that sign, and the asking node."""

from collections.abc import Sequence
from hashlib import sha256, sha512
from typing import Any

from msgspec.structs import replace

from mesh_llm.core.trust.receipts import Checked
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.receipt import FirstPart, Outcome, Receipt, Statement, Step
from mesh_llm.wire.codec import Sign, copied
from mesh_llm.wire.mesh.receipts import read_receipt, sign_first, sign_receipt, sign_statement, step_digest

ASKER, HOST, OTHER, WORKER = (NodeId(letter * 64) for letter in "abcd")
REQUEST, ANSWER = sha256(b"the request").digest(), sha256(b"the answer").digest()


def signer(node: NodeId) -> Sign:
    """Signs for a node. Everybody could: it stands for a key."""
    return lambda payload: sha512(bytes.fromhex(node) + payload).digest()


def verify(key: bytes, payload: bytes, signature: bytes) -> bool:
    return signature == sha512(key + payload).digest()


def statement(host: NodeId = HOST, **changes: Any) -> Statement:
    values: dict[str, Any] = {
        "host": host,
        "asker": ASKER,
        "challenge": b"c" * 16,
        "previous": b"",
        "request": REQUEST,
        "answer": ANSWER,
        "answer_bytes": 10,
        "status": 200,
        "whole": True,
        "model": "tiny",
        "content": b"m" * 32,
        "fingerprint": "f" * 32,
        "quantisation": "Q8_0",
        "context": 2048,
        "engine": "embedded b1",
        "cache_type": "f16",
        "wire_type": "",
        "system_prompt": False,
        "workers": (),
        "prompt_tokens": 5,
        "cached_tokens": 1,
        "tokens": 7,
        "began": 1000,
        "ended": 2000,
    }
    return Statement(**(values | changes))


def step(node: NodeId = HOST, outcome: Outcome = Outcome.ANSWERED, **changes: Any) -> Step:
    values: dict[str, Any] = {
        "node": node,
        "outcome": outcome,
        "challenge": b"c" * 16,
        "previous": b"",
        "request": REQUEST,
        "answer": ANSWER,
        "answer_bytes": 10,
        "status": 200,
        "fingerprint": "f" * 32,
        "workers": (),
    }
    return Step(**(values | changes))


def signed(made: Step, said: Statement | None = None, by: NodeId | None = None) -> Step:
    """A step with what its host says about it, if it is not to say something else, `by` whose key it may be."""
    if said is None:
        said = statement(
            made.node,
            challenge=made.challenge,
            previous=made.previous,
            request=made.request,
            answer=made.answer,
            answer_bytes=made.answer_bytes,
            workers=made.workers,
            whole=made.outcome is Outcome.ANSWERED,
        )
    payload, signature = sign_statement(said, signer(by or made.node))
    return replace(made, statement=payload, signature=signature)


def first(host: NodeId = HOST, **changes: Any) -> FirstPart:
    return copied(FirstPart, statement(host, **changes))


def begun(made: Step, said: FirstPart | None = None, by: NodeId | None = None) -> Step:
    """A step with the first part of its host, if that is not to say something else, `by` whose key it may be."""
    if said is None:
        said = first(
            made.node,
            challenge=made.challenge,
            previous=made.previous,
            request=made.request,
            workers=made.workers,
        )
    return replace(made, first=sign_first(said, signer(by or made.node)))


def chained(outcomes: Sequence[tuple[NodeId, Outcome, bool | str]]) -> tuple[Step, ...]:
    """Steps that follow each other: the host, what became of it, and whether it signed; "first": its first part."""
    steps: list[Step] = []
    for number, (node, outcome, signs) in enumerate(outcomes):
        previous = step_digest(steps[-1]) if steps else b""
        made = step(node, outcome, previous=previous, challenge=number.to_bytes(16, "big"))
        steps.append(begun(made) if signs == "first" else signed(made) if signs else made)
    return tuple(steps)


def receipt(*steps: Step, by: NodeId = ASKER, **changes: Any) -> str:
    values: dict[str, Any] = {
        "node": ASKER,
        "id": b"i" * 16,
        "path": "/v1/chat/completions",
        "request": sha256(b"question").digest(),
        "answer": sha256(b"what came").digest(),
        "answer_bytes": 9,
        "status": 200,
        "began": 900,
        "ended": 2100,
        "steps": steps,
    }
    return sign_receipt(Receipt(**(values | changes)), signer(by))


def read(text: str) -> Checked:
    checked = read_receipt(text, verify)
    assert isinstance(checked, Checked), checked
    return checked
