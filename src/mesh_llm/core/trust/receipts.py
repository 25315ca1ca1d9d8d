"""What a receipt proves: checks of its parts against each other, and against what the user has.

A signature proves who said something, not that it is true. `examine` says for each part which of the two it is.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.receipt import Outcome, Receipt, Statement, Step

_SHOWN_ID = 10


class Mark(StrEnum):
    """What a finding says: something holds, something does not, or something is to be known."""

    HOLDS = "holds"
    FAILS = "fails"
    NOTE = "note"


class Finding(msgspec.Struct, frozen=True):
    """One result of an examination, as a sentence for people."""

    mark: Mark
    text: str


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """A receipt with the results of the checks that need keys and hashes; the edge makes it.

    Attributes:
        receipt: as decoded.
        signed: the asking node's signature over it holds.
        statements: for each step what its host signed; None: nothing. A text: why it does not count.
        chain: for each step its digest (`wire.mesh.receipts.step_digest`).
    """

    receipt: Receipt
    signed: bool
    statements: tuple[Statement | str | None, ...]
    chain: tuple[bytes, ...]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One node that saw the prompt.

    Attributes:
        node: its id.
        part: `asked`, `host`, `worker`; `refused` and `lost` for hosts that did not give the answer's end.
        signed: it signed its part itself. Else the asking node says so, or the host for its workers.
    """

    node: NodeId
    part: str
    signed: bool


def why_not(step: Step, statement: Statement, asker: NodeId) -> str:
    """Why a host's statement does not belong to a step, as a clause; empty: it does."""
    problems = (
        (statement.host != step.node, "it was signed by another node"),
        (statement.asker != asker, "it was made for another node"),
        (statement.challenge != step.challenge, "it answers another request: the challenge differs"),
        (statement.previous != step.previous, "it follows another part"),
        (statement.request != step.request, "the host got another request than was sent"),
        (statement.ended < statement.began, "it ends before it begins"),
        (step.outcome is Outcome.ANSWERED and not statement.whole, "the host did not send the answer's end"),
        (
            step.outcome is Outcome.ANSWERED
            and (statement.answer, statement.answer_bytes) != (step.answer, step.answer_bytes),
            "the host signed another answer than came",
        ),
        (step.outcome is Outcome.ANSWERED and statement.status != step.status, "its status differs"),
    )
    return next((text for wrong, text in problems if wrong), "")


def who_saw(checked: Checked) -> tuple[Seen, ...]:
    """All nodes that saw the prompt, as far as the receipt says: each once, the asked node first."""
    receipt = checked.receipt
    found: dict[NodeId, Seen] = {receipt.node: Seen(node=receipt.node, part="asked", signed=checked.signed)}

    def add(node: NodeId, part: str, *, signed: bool) -> None:
        known = found.get(node)
        if known is None:
            found[node] = Seen(node=node, part=part, signed=signed)
        elif known.part == "asked" and part == "host":
            # It answered the request itself.
            found[node] = Seen(node=node, part=part, signed=known.signed or signed)

    for step, statement in zip(receipt.steps, checked.statements, strict=True):
        good = isinstance(statement, Statement) and not why_not(step, statement, receipt.node)
        part = {Outcome.ANSWERED: "host", Outcome.LEFT: "host", Outcome.LOST: "lost"}.get(step.outcome, "refused")
        add(step.node, part, signed=good)
        workers = statement.workers if isinstance(statement, Statement) else ()
        for worker in dict.fromkeys((*workers, *step.workers)):
            add(worker, "worker", signed=False)
    return tuple(found.values())


def answered_by(checked: Checked) -> Statement | None:
    """The statement of the host that gave the answer's end, if it signed one that belongs to the answer."""
    step, statement = checked.receipt.steps[-1], checked.statements[-1]
    if not isinstance(statement, Statement) or why_not(step, statement, checked.receipt.node):
        return None
    return statement


def examine(
    checked: Checked, *, request: bytes | None = None, answer: bytes | None = None, node: NodeId | None = None
) -> list[Finding]:
    """All that holds, fails, or is to be known about a receipt.

    Args:
        checked: the receipt.
        request: SHA-256 of the request that the user sent; None: not given.
        answer: SHA-256 of the answer that the user got; None: not given.
        node: the node that the user asked; None: not given.
    """
    receipt = checked.receipt
    found = [_of(checked.signed, f"Node {_short(receipt.node)}, which was asked, signed this receipt.")]
    if node is not None:
        found.append(_of(receipt.node == node, f"The node that was asked is {_short(node)}."))
    if request is not None:
        found.append(_of(receipt.request == request, "It is about this request."))
    if answer is not None:
        found.append(_of(receipt.answer == answer, "It is about this answer."))
    found += _chain(checked)
    for index, (step, statement) in enumerate(zip(receipt.steps, checked.statements, strict=True)):
        found += _step(index, step, statement, receipt.node)
    if receipt.ended < receipt.began:
        found.append(Finding(Mark.FAILS, "The receipt ends before it begins."))
    if receipt.steps[-1].outcome is Outcome.LEFT:
        found.append(Finding(Mark.NOTE, "The client left before the answer's end."))
    elif receipt.steps[-1].outcome is not Outcome.ANSWERED:
        found.append(Finding(Mark.NOTE, "No host gave the answer's end."))
    return found


def holds(findings: Sequence[Finding]) -> bool:
    """Whether nothing fails."""
    return all(finding.mark is not Mark.FAILS for finding in findings)


_HONESTY = (
    "A signature proves who says it, not that it is true. No receipt can prove that the host computed the answer with "
    "the model that it names, that it used no other, or that it kept no copy."
)
_SECRECY = (
    "It names the nodes that the asking node and the hosts say saw the prompt. A host or worker that passes it on in "
    "secret is not in it."
)
LIMITS = (_HONESTY, _SECRECY, "Times are those of each node's own clock.")
"""What no receipt proves."""


def _chain(checked: Checked) -> list[Finding]:
    steps = checked.receipt.steps
    before = (b"", *checked.chain[:-1])
    if any(step.previous != previous for step, previous in zip(steps, before, strict=True)):
        return [Finding(Mark.FAILS, "The parts do not follow each other: one was taken out, put in or changed.")]
    if len({step.challenge for step in steps}) < len(steps):
        return [Finding(Mark.FAILS, "Two parts have the same challenge.")]
    early = [step for step in steps[:-1] if step.outcome is Outcome.ANSWERED and step.status < 400]
    if early:
        return [Finding(Mark.FAILS, "A part follows one that had given the answer's end.")]
    return [Finding(Mark.HOLDS, f"Its {len(steps)} parts follow each other.")] if len(steps) > 1 else []


def _step(index: int, step: Step, statement: Statement | str | None, asker: NodeId) -> list[Finding]:
    who = f"Node {_short(step.node)}"
    if statement is None:
        ends = {
            Outcome.ANSWERED: "answered, and signed nothing: its version may be older, or it was lost right after",
            Outcome.LEFT: "was answering when the client left, and signed nothing",
            Outcome.LOST: "saw the prompt and was lost. It signed nothing",
            Outcome.REFUSED: "saw the prompt and did not take the request. It signed nothing",
        }
        # Nothing is proved about the answer where its host signed nothing.
        mark = Mark.FAILS if step.outcome is Outcome.ANSWERED and step.status < 400 else Mark.NOTE
        return [Finding(mark, f"{who} {ends[step.outcome]}.")]
    problem = statement if isinstance(statement, str) else why_not(step, statement, asker)
    if problem or isinstance(statement, str):
        return [Finding(Mark.FAILS, f"What {who[0].lower()}{who[1:]} signed does not hold: {problem}.")]
    found = [Finding(Mark.HOLDS, f"{who} signed that it got this request and {_gave(step)} with {statement.model}.")]
    if step.fingerprint and statement.fingerprint and step.fingerprint != statement.fingerprint:
        found.append(Finding(Mark.FAILS, f"{who} had announced another file of {statement.model} than it signed."))
    missing = [one for one in step.workers if one not in statement.workers]
    if missing:
        text = f"{who} had announced workers that it did not sign: {', '.join(map(_short, missing))}."
        found.append(Finding(Mark.NOTE, text))
    if not statement.content:
        text = f"{who} had not read the whole file yet: the fingerprint covers its header and size only."
        found.append(Finding(Mark.NOTE, text))
    if statement.system_prompt:
        found.append(Finding(Mark.NOTE, f"{who} puts a system prompt of its own before requests that have none."))
    if index and not statement.previous:
        found.append(Finding(Mark.FAILS, f"{who} signed that it was the first."))
    return found


def _gave(step: Step) -> str:
    if step.outcome is Outcome.ANSWERED:
        return "gave this answer" if step.status < 400 else f"answered with error {step.status}"
    return "began to answer"


def _of(ok: bool, text: str) -> Finding:
    return Finding(Mark.HOLDS if ok else Mark.FAILS, text)


def _short(node: NodeId) -> str:
    return node[:_SHOWN_ID]
