"""`mesh-llm receipt`: what a receipt says, and whether it holds. Needs no running node."""

import re
from codecs import BOM_UTF8
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

import click

from mesh_llm.api.receipts import COMMENT, shown
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import EXIT_FAILED, print_json, printable, table
from mesh_llm.core.trust.receipts import LIMITS, Checked, Mark, Seen, answered_by, begun_by, examine, holds, who_saw
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.receipt import FirstPart, Statement
from mesh_llm.wire.codec import Malformed, fingerprint

_MOST = 64 << 20
_RECEIPT = re.compile(rb"receipt1\.[A-Za-z0-9_-]+")
_NODE = re.compile(r"[0-9a-f]{64}")
_FILE = click.Path(path_type=Path, allow_dash=True, dir_okay=False)
_PARTS = {
    "asked": "was asked",
    "host": "answered",
    "worker": "computed layers (activations)",
    "refused": "did not take it",
    "lost": "was lost in the middle",
}


@click.group()
def receipt() -> None:
    """Show and verify receipts: which nodes saw a prompt, and which model answered.

    \b
    Ask with the header x-mesh-llm-receipt: on. The receipt is in the header x-mesh-llm-receipt of an answer in one
    piece, in the last line of a stream, and for a day at GET /v1/receipts/ID, ID being in x-mesh-llm-receipt-id.
    FILE may hold any of these; - is standard input.
    """


@receipt.command()
@click.argument("file", type=_FILE)
@json_option
def show(file: Path, *, as_json: bool) -> None:
    """Show what the receipt in FILE says."""
    text, checked = _read(file)
    if as_json:
        print_json(shown(checked, text, lambda _: ""))
        return
    for line in _lines(checked):
        click.echo(printable(line))
    if not holds(examine(checked)):
        click.echo(f"It does not hold. See: mesh-llm receipt verify {file}")


@receipt.command()
@click.argument("file", type=_FILE)
@click.option("--request", type=_FILE, metavar="FILE", help="The request as you sent it: check that it is about this.")
@click.option("--answer", type=_FILE, metavar="FILE", help="The answer as you got it: check that it is about this.")
@click.option("--node", metavar="ID", help="The node that you asked, as mesh-llm status --json shows it.")
@json_option
def verify(file: Path, *, request: Path | None, answer: Path | None, node: str | None, as_json: bool) -> None:
    """Verify the receipt in FILE: its signatures, and that its parts belong together.

    The exit status is 0 if everything holds, else 1. What no receipt can prove is printed at the end.
    """
    if node is not None and not _NODE.fullmatch(node):
        raise MeshError("invalid_node", f"{node[:80]} is no node id.", "A node id has 64 hex digits.")
    text, checked = _read(file)
    findings = examine(
        checked,
        request=None if request is None else sha256(_content(request).removeprefix(BOM_UTF8)).digest(),
        answer=None if answer is None else sha256(_without_receipt(_content(answer))).digest(),
        node=None if node is None else NodeId(node),
    )
    good = holds(findings)
    if as_json:
        result = {"holds": good, "findings": [{"mark": one.mark.value, "text": one.text} for one in findings]}
        print_json({**result, "limits": LIMITS, "receipt": text})
    else:
        words = {Mark.HOLDS: "holds", Mark.FAILS: "FAILS", Mark.NOTE: "note"}
        for one in findings:
            click.echo(printable(f"  {words[one.mark]:6} {one.text}"))
        given = [name for name, value in (("--request", request), ("--answer", answer)) if value is None]
        if given:
            click.echo(f"  note   Whether it is about your request and answer was not checked: {' and '.join(given)}.")
        click.echo("The receipt holds." if good else "The receipt does not hold.")
        click.echo("What it cannot prove:")
        for limit in LIMITS:
            click.echo(f"  - {limit}")
    if not good:
        raise SystemExit(EXIT_FAILED)


def _read(file: Path) -> tuple[str, Checked]:
    from mesh_llm.net.admission.credentials import verify as verify_signature
    from mesh_llm.wire.mesh.receipts import read_receipt

    found = set(_RECEIPT.findall(_content(file)))
    if len(found) != 1:
        what = "no receipt" if not found else "several receipts"
        raise MeshError(
            "no_receipt",
            f"There is {what} in {_shown_file(file)}.",
            "Give the text that begins with receipt1., the JSON of GET /v1/receipts/ID, or a saved stream.",
        )
    text = found.pop().decode()
    checked = read_receipt(text, verify_signature)
    if isinstance(checked, Malformed):
        raise MeshError(
            "bad_receipt", f"The receipt in {_shown_file(file)} cannot be read: {checked.reason}.", "Get it once more."
        )
    return text, checked


def _shown_file(file: Path) -> str:
    return "standard input" if str(file) == "-" else str(file)


def _content(file: Path) -> bytes:
    with click.open_file(str(file), "rb") as opened:
        data = opened.read(_MOST + 1)
    if len(data) > _MOST:
        raise MeshError(
            "too_large", f"{_shown_file(file)} is larger than {_MOST >> 20} MiB.", "Give the receipt alone."
        )
    return data


def _without_receipt(answer: bytes) -> bytes:
    """A saved stream without the comment at its end that holds the receipt."""
    at = answer.rfind(COMMENT)
    return answer if at < 0 else answer[:at]


def _lines(checked: Checked) -> list[str]:
    made, host = checked.receipt, answered_by(checked) or begun_by(checked)
    asked = datetime.fromtimestamp(made.began / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    lines = [
        f"Receipt {made.id.hex()}",
        f"  asked      {asked}, {made.path}, status {made.status}, {(made.ended - made.began) / 1000:.1f} s",
        *(_model_lines(host) if host is not None else ["  model      no host signed which"]),
        f"  request    sha256 {made.request.hex()}",
        f"  answer     sha256 {made.answer.hex()}, {made.answer_bytes} bytes",
        "Seen by:",
    ]
    return [*lines, *table(("NODE", "KEY", "PART", "SIGNED"), [_row(one) for one in who_saw(checked)], "nobody")]


def _model_lines(host: Statement | FirstPart) -> list[str]:
    kind = f" ({host.quantisation})" if host.quantisation else ""
    content = f"sha256 {host.content.hex()}" if host.content else "not digested yet"
    wire = f", between nodes {host.wire_type}" if host.wire_type else ""
    tokens = "the host did not sign how its answer ended"
    if isinstance(host, Statement):
        tokens = f"{host.prompt_tokens} of the prompt ({host.cached_tokens} cached), {host.tokens} of the answer"
    return [
        f"  model      {host.model}{kind}",
        f"  file       {content}, fingerprint {host.fingerprint or 'unknown'}",
        f"  engine     {host.engine or 'unknown'}, context {host.context}, KV cache {host.cache_type}{wire}",
        f"  tokens     {tokens}",
    ]


def _row(one: Seen) -> tuple[str, str, str, str]:
    return one.node[:10], fingerprint(one.node), _PARTS.get(one.part, one.part), _signed(one)


def _signed(one: Seen) -> str:
    if one.first_only:
        return "that it took the prompt; not how its answer ended"
    return "yes" if one.signed else "no"
