"""What a receipt proves, and the lies that it does not let through."""

from hashlib import sha256
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from tests.support.receipts import (
    ANSWER,
    ASKER,
    HOST,
    OTHER,
    REQUEST,
    WORKER,
    chained,
    read,
    receipt,
    signed,
    statement,
    step,
)

from mesh_llm.core.trust.receipts import Mark, answered_by, examine, holds, who_saw
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.receipt import Outcome
from mesh_llm.wire.mesh.receipts import step_digest


def fails(text: str, **given_by_user: Any) -> list[str]:
    """What does not hold."""
    return [one.text for one in examine(read(text), **given_by_user) if one.mark is Mark.FAILS]


def test_an_honest_receipt_holds_and_says_who_saw_the_prompt() -> None:
    made = signed(step(workers=(WORKER,)))
    checked = read(receipt(made))
    wanted: dict[str, Any] = {
        "request": sha256(b"question").digest(),
        "answer": sha256(b"what came").digest(),
        "node": ASKER,
    }
    assert holds(examine(checked, **wanted))
    assert [(one.node, one.part, one.signed) for one in who_saw(checked)] == [
        (ASKER, "asked", True),
        (HOST, "host", True),
        (WORKER, "worker", False),
    ]
    said = answered_by(checked)
    assert said is not None
    assert (said.model, said.quantisation, said.tokens) == ("tiny", "Q8_0", 7)


def test_a_node_that_answers_itself_is_named_once() -> None:
    made = signed(step(ASKER))
    assert [(one.node, one.part) for one in who_saw(read(receipt(made)))] == [(ASKER, "host")]


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"challenge": b"x" * 16}, "another request: the challenge differs"),
        ({"request": b"x" * 32}, "another request than was sent"),
        ({"answer": b"x" * 32}, "another answer than came"),
        ({"answer_bytes": 11}, "another answer than came"),
        ({"asker": OTHER}, "made for another node"),
        ({"host": OTHER}, "signed by another node"),
        ({"previous": b"x" * 32}, "follows another part"),
        ({"whole": False}, "did not send the answer's end"),
        ({"status": 500}, "its status differs"),
        ({"ended": 999}, "ends before it begins"),
    ],
)
def test_what_a_host_signed_about_something_else_does_not_hold(lie: dict[str, Any], said: str) -> None:
    """Replayed: it belongs to another request. Swapped: to another answer."""
    text = receipt(signed(step(), statement(**lie)))
    (problem,) = fails(text)
    assert said in problem
    assert answered_by(read(text)) is None
    assert not any(one.signed for one in who_saw(read(text)) if one.node == HOST)


def test_a_statement_by_another_key_does_not_hold() -> None:
    (problem,) = fails(receipt(signed(step(), by=OTHER)))
    assert "the signature is not its host's" in problem


def test_a_receipt_by_another_key_does_not_hold() -> None:
    assert fails(receipt(signed(step()), by=OTHER)) == [f"Node {ASKER[:10]}, which was asked, signed this receipt."]


def test_a_receipt_for_another_request_answer_or_node_is_found_out() -> None:
    text = receipt(signed(step()))
    assert fails(text, request=REQUEST) == ["It is about this request."]
    assert fails(text, answer=ANSWER) == ["It is about this answer."]
    assert fails(text, node=OTHER) == [f"The node that was asked is {OTHER[:10]}."]


def test_an_answer_whose_host_signed_nothing_proves_nothing() -> None:
    (problem,) = fails(receipt(step()))
    assert "signed nothing" in problem


def test_hosts_that_refused_or_were_lost_saw_the_prompt_too() -> None:
    steps = chained([(OTHER, Outcome.REFUSED, False), (WORKER, Outcome.LOST, False), (HOST, Outcome.ANSWERED, True)])
    checked = read(receipt(*steps))
    assert holds(examine(checked))
    assert [(one.node, one.part) for one in who_saw(checked)] == [
        (ASKER, "asked"),
        (OTHER, "refused"),
        (WORKER, "lost"),
        (HOST, "host"),
    ]


def test_an_asking_node_cannot_leave_out_a_host_that_came_before_one_that_signed() -> None:
    first, second = chained([(OTHER, Outcome.LOST, False), (HOST, Outcome.ANSWERED, True)])
    assert holds(examine(read(receipt(first, second))))
    assert fails(receipt(second))
    assert "follows another part" in fails(receipt(replace(second, previous=b"")))[0]
    changed = replace(first, node=WORKER)
    assert "follows another part" in fails(receipt(changed, replace(second, previous=step_digest(changed))))[0]


def test_another_file_than_announced_and_workers_that_were_kept_quiet_are_said() -> None:
    assert "announced another file" in fails(receipt(signed(step(fingerprint="0" * 32), statement())))[0]
    made = signed(step(workers=(WORKER,)), statement(workers=()))
    notes = [one.text for one in examine(read(receipt(made))) if one.mark is Mark.NOTE]
    assert any("workers that it did not sign" in note for note in notes)
    assert (WORKER, "worker") in [(one.node, one.part) for one in who_saw(read(receipt(made)))]


NODES = st.sampled_from((HOST, OTHER, WORKER, ASKER))
EARLY = st.tuples(NODES, st.sampled_from((Outcome.REFUSED, Outcome.LOST)), st.just(value=False))


@given(early=st.lists(EARLY, max_size=5), host=NODES, at=st.integers(0, 5))
def test_honest_chains_hold_and_none_with_a_part_less(
    early: list[tuple[NodeId, Outcome, bool]], host: NodeId, at: int
) -> None:
    steps = chained([*early, (host, Outcome.ANSWERED, True)])
    checked = read(receipt(*steps))
    assert holds(examine(checked))
    assert {one.node for one in who_saw(checked)} == {ASKER, host, *(node for node, _, _ in early)}
    if at < len(early):
        assert fails(receipt(*steps[:at], *steps[at + 1 :]))


@given(field=st.sampled_from(("challenge", "request", "answer", "previous")), noise=st.binary(min_size=32, max_size=32))
def test_no_other_digest_passes(field: str, noise: bytes) -> None:
    value = noise[:16] if field == "challenge" else noise
    honest = statement()
    if getattr(honest, field) != value:
        assert fails(receipt(signed(step(), replace(honest, **{field: value}))))
