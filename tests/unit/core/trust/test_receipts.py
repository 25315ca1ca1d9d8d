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
    begun,
    chained,
    first,
    read,
    receipt,
    signed,
    statement,
    step,
)

from mesh_llm.core.trust.receipts import Mark, answered_by, begun_by, examine, holds, who_saw
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


def test_workers_that_only_their_host_names_are_said_to_be_its_word() -> None:
    made = signed(step(), statement(workers=(WORKER,)))
    notes = [one.text for one in examine(read(receipt(made))) if one.mark is Mark.NOTE]
    assert any("alone says that these computed for it" in note and WORKER[:10] in note for note in notes)
    assert [(one.part, one.signed) for one in who_saw(read(receipt(made))) if one.node == WORKER] == [("worker", False)]
    # Of its own split the asking node knows all.
    own = signed(step(ASKER), statement(ASKER, workers=(WORKER,)))
    assert not [one for one in examine(read(receipt(own))) if "alone says" in one.text]


def test_a_killed_host_signed_that_it_took_the_prompt_and_not_how_its_answer_ended() -> None:
    steps = chained([(OTHER, Outcome.LOST, "first"), (HOST, Outcome.ANSWERED, True)])
    checked = read(receipt(*steps))
    found = [(one.mark, one.text) for one in examine(checked)]
    assert holds(examine(checked)), found
    took = f"Node {OTHER[:10]} signed that it took the prompt, to answer it with tiny (Q8_0)."
    assert (Mark.HOLDS, took) in found
    assert (Mark.NOTE, f"Node {OTHER[:10]} did not sign how its answer ended: it was lost before.") in found
    assert [(one.node, one.part, one.signed, one.first_only) for one in who_saw(checked)] == [
        (ASKER, "asked", True, False),
        (OTHER, "lost", True, True),
        (HOST, "host", True, False),
    ]
    assert begun_by(checked) is None


def test_of_an_answer_that_nobody_ended_the_last_first_part_says_the_model_and_the_workers() -> None:
    made = begun(step(outcome=Outcome.LOST, workers=(WORKER,)))
    checked = read(receipt(made))
    assert holds(examine(checked))
    assert answered_by(checked) is None
    said = begun_by(checked)
    assert said is not None
    assert (said.model, said.quantisation, said.workers) == ("tiny", "Q8_0", (WORKER,))
    # A worker that only the first part names is named too.
    alone = begun(step(outcome=Outcome.LOST), first(workers=(WORKER,)))
    assert (WORKER, "worker") in [(one.node, one.part) for one in who_saw(read(receipt(alone)))]
    assert any("alone says" in one.text for one in examine(read(receipt(alone))))


@pytest.mark.parametrize(
    ("lie", "said"),
    [
        ({"challenge": b"x" * 16}, "another request: the challenge differs"),
        ({"request": b"x" * 32}, "another request than was sent"),
        ({"asker": OTHER}, "made for another node"),
        ({"host": OTHER}, "signed by another node"),
        ({"previous": b"x" * 32}, "follows another part"),
    ],
)
def test_a_first_part_of_something_else_does_not_hold(lie: dict[str, Any], said: str) -> None:
    text = receipt(begun(step(outcome=Outcome.LOST), first(**lie)))
    (problem,) = fails(text)
    assert said in problem
    assert "first part" in problem
    assert begun_by(read(text)) is None
    assert not any(one.signed for one in who_saw(read(text)) if one.node == HOST)


def test_a_first_part_by_another_key_does_not_hold() -> None:
    (problem,) = fails(receipt(begun(step(outcome=Outcome.LOST), by=OTHER)))
    assert "the signature is not its host's" in problem
    assert not any(one.signed for one in who_saw(read(receipt(begun(step(outcome=Outcome.LOST), by=OTHER))))[1:])


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"model": "huge"}, "model"),
        ({"content": b"x" * 32}, "file"),
        ({"fingerprint": ""}, "fingerprint"),
        ({"quantisation": "F16"}, "quantisation"),
        ({"context": 1}, "context"),
        ({"engine": "another"}, "engine"),
        ({"cache_type": "q4_0"}, "type of the KV cache"),
        ({"wire_type": "q8_0"}, "precision between nodes"),
        ({"system_prompt": True}, "system prompt"),
        ({"workers": (WORKER,)}, "workers"),
        ({"began": 999}, "time of its beginning"),
    ],
)
def test_an_end_that_contradicts_its_first_part_is_found_out(changed: dict[str, Any], word: str) -> None:
    text = receipt(begun(signed(step()), first(**changed)))
    (problem,) = fails(text)
    assert problem.startswith(f"Node {HOST[:10]} contradicts itself")
    assert problem.endswith(f"otherwise about: {word}.")


def test_a_file_that_was_read_while_the_answer_was_given_is_no_contradiction() -> None:
    assert not fails(receipt(begun(signed(step()), first(content=b""))))


def test_a_host_that_signs_only_the_first_part_of_a_whole_answer_proves_nothing_about_it() -> None:
    (problem,) = fails(receipt(begun(step())))
    assert "did not sign how its answer ended" in problem
    # Neither does one whose end does not hold.
    (problem,) = fails(receipt(begun(signed(step(), by=OTHER))))
    assert "the signature is not its host's" in problem
    seen = who_saw(read(receipt(begun(signed(step(), by=OTHER)))))
    assert [(one.signed, one.first_only) for one in seen if one.node == HOST] == [(True, True)]


def test_the_first_part_of_a_lost_host_cannot_be_taken_out_afterwards() -> None:
    lost, last = chained([(OTHER, Outcome.LOST, "first"), (HOST, Outcome.ANSWERED, True)])
    assert fails(receipt(replace(lost, first=b""), last))


NODES = st.sampled_from((HOST, OTHER, WORKER, ASKER))
EARLY = st.one_of(
    st.tuples(NODES, st.sampled_from((Outcome.REFUSED, Outcome.LOST)), st.just(value=False)),
    st.tuples(NODES, st.just(Outcome.LOST), st.just("first")),
)


@given(early=st.lists(EARLY, max_size=5), host=NODES, at=st.integers(0, 5))
def test_honest_chains_hold_and_none_with_a_part_less(
    early: list[tuple[NodeId, Outcome, bool | str]], host: NodeId, at: int
) -> None:
    steps = chained([*early, (host, Outcome.ANSWERED, True)])
    checked = read(receipt(*steps))
    assert holds(examine(checked))
    assert {one.node for one in who_saw(checked)} == {ASKER, host, *(node for node, _, _ in early)}
    if at < len(early):
        assert fails(receipt(*steps[:at], *steps[at + 1 :]))
        if steps[at].first:
            assert fails(receipt(*steps[:at], replace(steps[at], first=b""), *steps[at + 1 :]))


@given(field=st.sampled_from(("challenge", "request", "answer", "previous")), noise=st.binary(min_size=32, max_size=32))
def test_no_other_digest_passes(field: str, noise: bytes) -> None:
    value = noise[:16] if field == "challenge" else noise
    honest = statement()
    if getattr(honest, field) != value:
        assert fails(receipt(signed(step(), replace(honest, **{field: value}))))
