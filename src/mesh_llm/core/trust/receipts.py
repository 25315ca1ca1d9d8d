"""What a receipt proves: checks of its parts against each other, and against what the user has.

A signature proves who said something, not that it is true. `examine` says for each part which of the two it is.
"""

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.receipt import FirstPart, Outcome, Receipt, Statement, Step

_SHOWN_ID = 10
_WORDS = {
    "model": "model",
    "content": "file",
    "fingerprint": "fingerprint",
    "quantisation": "quantisation",
    "context": "context",
    "engine": "engine",
    "cache_type": "type of the KV cache",
    "wire_type": "precision between nodes",
    "system_prompt": "system prompt",
    "workers": "workers",
    "began": "time of its beginning",
}
"""What a first part and the statement after it must both say, for people."""


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
        firsts: for each step what its host signed with the head of its answer, as far as the step has it; None:
            nothing. A text: why it does not count.
        statements: for each step what its host signed at the answer's end; the same.
        chain: for each step its digest (`wire.mesh.receipts.step_digest`).
    """

    receipt: Receipt
    signed: bool
    firsts: tuple[FirstPart | str | None, ...]
    statements: tuple[Statement | str | None, ...]
    chain: tuple[bytes, ...]


class Seen(msgspec.Struct, frozen=True, kw_only=True):
    """One node that saw the prompt.

    Attributes:
        node: its id.
        part: `asked`, `host`, `worker`; `refused` and `lost` for hosts that did not give the answer's end.
        signed: it signed itself that it got the prompt. Else the asking node says so, or the host for its workers.
        first_only: it signed no more than that, as a host that was killed: not how its answer ended.
    """

    node: NodeId
    part: str
    signed: bool
    first_only: bool = False


def why_not(step: Step, statement: Statement, asker: NodeId) -> str:
    """Why a host's statement does not belong to a step, as a clause; empty: it does."""
    problems = (
        *_misplaced(step, statement, asker),
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


def why_not_first(step: Step, first: FirstPart, asker: NodeId) -> str:
    """Why a host's first part does not belong to a step, as a clause; empty: it does."""
    return next((text for wrong, text in _misplaced(step, first, asker) if wrong), "")


def _misplaced(step: Step, said: FirstPart | Statement, asker: NodeId) -> tuple[tuple[bool, str], ...]:
    return (
        (said.host != step.node, "it was signed by another node"),
        (said.asker != asker, "it was made for another node"),
        (said.challenge != step.challenge, "it answers another request: the challenge differs"),
        (said.previous != step.previous, "it follows another part"),
        (said.request != step.request, "the host got another request than was sent"),
    )


def differences(first: FirstPart, statement: Statement) -> tuple[str, ...]:
    """In what a host's first part and its statement contradict each other, in words.

    A file that had not been read when the answer began may have been read when it ended.
    """
    return tuple(
        text
        for name, text in _WORDS.items()
        if getattr(first, name) != getattr(statement, name) and (name != "content" or first.content)
    )


def who_saw(checked: Checked) -> tuple[Seen, ...]:
    """All nodes that saw the prompt, as far as the receipt says: each once, the asked node first."""
    receipt = checked.receipt
    found: dict[NodeId, Seen] = {receipt.node: Seen(node=receipt.node, part="asked", signed=checked.signed)}

    def add(node: NodeId, part: str, *, signed: bool, first_only: bool = False) -> None:
        known = found.get(node)
        if known is None:
            found[node] = Seen(node=node, part=part, signed=signed, first_only=first_only)
        elif known.part == "asked" and part == "host":
            # It answered the request itself.
            found[node] = Seen(node=node, part=part, signed=known.signed or signed)

    for step, first, statement in zip(receipt.steps, checked.firsts, checked.statements, strict=True):
        good = isinstance(statement, Statement) and not why_not(step, statement, receipt.node)
        took = isinstance(first, FirstPart) and not why_not_first(step, first, receipt.node)
        part = {Outcome.ANSWERED: "host", Outcome.LEFT: "host", Outcome.LOST: "lost"}.get(step.outcome, "refused")
        add(step.node, part, signed=good or took, first_only=took and not good)
        workers = [
            worker for said in (first, statement) if said and not isinstance(said, str) for worker in said.workers
        ]
        for worker in dict.fromkeys((*workers, *step.workers)):
            add(worker, "worker", signed=False)
    return tuple(found.values())


def answered_by(checked: Checked) -> Statement | None:
    """The statement of the host that gave the answer's end, if it signed one that belongs to the answer."""
    step, statement = checked.receipt.steps[-1], checked.statements[-1]
    if not isinstance(statement, Statement) or why_not(step, statement, checked.receipt.node):
        return None
    return statement


def begun_by(checked: Checked) -> FirstPart | None:
    """The first part of the last host, if it holds, and the host signed nothing about the end."""
    step, first, statement = checked.receipt.steps[-1], checked.firsts[-1], checked.statements[-1]
    if statement is not None or not isinstance(first, FirstPart) or why_not_first(step, first, checked.receipt.node):
        return None
    return first


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
    for step, first, statement in zip(receipt.steps, checked.firsts, checked.statements, strict=True):
        found += _step(step, first, statement, receipt.node)
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


def _step(step: Step, first: FirstPart | str | None, statement: Statement | str | None, asker: NodeId) -> list[Finding]:
    who, found = f"Node {_short(step.node)}", list[Finding]()
    problem = why_not_first(step, first, asker) if isinstance(first, FirstPart) else first or ""
    if problem:
        found.append(Finding(Mark.FAILS, f"The first part that {_inside(who)} signed does not hold: {problem}."))
    took = first if isinstance(first, FirstPart) and not problem else None
    if statement is None:
        return [*found, *_end_unsigned(who, step, took, asker)]
    problem = statement if isinstance(statement, str) else why_not(step, statement, asker)
    if problem or isinstance(statement, str):
        if took is not None:
            found += _took(who, step, took, asker)
        return [*found, Finding(Mark.FAILS, f"What {_inside(who)} signed does not hold: {problem}.")]
    found.append(
        Finding(Mark.HOLDS, f"{who} signed that it got this request and {_gave(step)} with {statement.model}.")
    )
    found += _remarks(who, step, statement, asker)
    if took is not None and (what := differences(took, statement)):
        text = (
            f"{who} contradicts itself: what it signed when its answer began says otherwise about: {', '.join(what)}."
        )
        found.append(Finding(Mark.FAILS, text))
    return found


def _end_unsigned(who: str, step: Step, took: FirstPart | None, asker: NodeId) -> list[Finding]:
    """About a host that signed at most the first part."""
    # Nothing is proved about the answer where its host signed nothing at its end.
    mark = Mark.FAILS if step.outcome is Outcome.ANSWERED and step.status < 400 else Mark.NOTE
    if took is None:
        ends = {
            Outcome.ANSWERED: "answered, and signed nothing: its version may be older, or it was lost right after",
            Outcome.LEFT: "was answering when the client left, and signed nothing",
            Outcome.LOST: "saw the prompt and was lost. It signed nothing",
            Outcome.REFUSED: "saw the prompt and did not take the request. It signed nothing",
        }
        return [Finding(mark, f"{who} {ends[step.outcome]}.")]
    ends = {
        Outcome.ANSWERED: "it was lost right after, or hides it",
        Outcome.LEFT: "the client left, and it did not say more",
        Outcome.LOST: "it was lost before",
        Outcome.REFUSED: "it then refused the request",
    }
    text = f"{who} did not sign how its answer ended: {ends[step.outcome]}."
    return [*_took(who, step, took, asker), Finding(mark, text)]


def _took(who: str, step: Step, first: FirstPart, asker: NodeId) -> list[Finding]:
    kind = f" ({first.quantisation})" if first.quantisation else ""
    text = f"{who} signed that it took the prompt, to answer it with {first.model}{kind}."
    return [Finding(Mark.HOLDS, text), *_remarks(who, step, first, asker)]


def _remarks(who: str, step: Step, said: FirstPart | Statement, asker: NodeId) -> list[Finding]:
    """What a host's words, that hold, leave open."""
    found: list[Finding] = []
    if step.fingerprint and said.fingerprint and step.fingerprint != said.fingerprint:
        found.append(Finding(Mark.FAILS, f"{who} had announced another file of {said.model} than it signed."))
    missing = [one for one in step.workers if one not in said.workers]
    if missing:
        text = f"{who} had announced workers that it did not sign: {', '.join(map(_short, missing))}."
        found.append(Finding(Mark.NOTE, text))
    unannounced = [one for one in said.workers if one not in step.workers]
    if unannounced and step.node != asker:
        text = f"{who} alone says that these computed for it, which it had not announced: "
        found.append(Finding(Mark.NOTE, f"{text}{', '.join(map(_short, unannounced))}."))
    if not said.content:
        text = f"{who} had not read the whole file yet: the fingerprint covers its header and size only."
        found.append(Finding(Mark.NOTE, text))
    if said.system_prompt:
        found.append(Finding(Mark.NOTE, f"{who} puts a system prompt of its own before requests that have none."))
    return found


def _inside(who: str) -> str:
    """The name of a node inside of a sentence."""
    return who[0].lower() + who[1:]


def _gave(step: Step) -> str:
    if step.outcome is Outcome.ANSWERED:
        return "gave this answer" if step.status < 400 else f"answered with error {step.status}"
    return "began to answer"


def _of(ok: bool, text: str) -> Finding:
    return Finding(Mark.HOLDS if ok else Mark.FAILS, text)


def _short(node: NodeId) -> str:
    return node[:_SHOWN_ID]
