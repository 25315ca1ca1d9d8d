"""`mesh-llm trust`: what the node of this machine found out about hosts: by canaries, and of what they announce."""

import time
from urllib.parse import quote

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, node_home, node_option
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import print_json, printable, table
from mesh_llm.console.schema import TrustForgotten, TrustList, TrustRecord
from mesh_llm.console.status import StatusCorrection
from mesh_llm.core.types.errors import duration

_HEAD = ("HOST", "KEY", "MODEL", "STANDING", "CANARIES", "TESTS", "LAST")
_SHOWN_ID = 10
_SILENT = 5


@click.group()
def trust() -> None:
    """Show what this node found out about hosts, and forget it.

    That is whether they serve the model that they announce, and what they announce and did not keep: context, speed,
    memory. It is this node's own: no other node learns of it.
    """


@trust.command("list")
@json_option
@node_option
def list_hosts(*, as_json: bool) -> None:
    """List the hosts that were checked, distrusted ones first, and the figures that are corrected."""
    answer = DaemonClient(node_home()).get("/api/trust", TrustList)
    if as_json:
        print_json(answer)
        return
    none = (
        "No host was checked yet. A host is checked while clients of this node use it, if the same file is loaded here "
        "or on a machine of --group."
        if answer.asks
        else "No host is checked: canaries are off. See: mesh-llm serve --help (--canaries)"
    )
    lines = list(table(_HEAD, [_row(one) for one in answer.hosts], none))
    lines += [f"  {one.text}" for one in answer.hosts if one.text]
    lines += [
        f"  {one.name} gave no answer with probabilities to the last {one.unanswered} canaries for {one.model}."
        for one in answer.hosts
        if one.unanswered >= _SILENT
    ]
    if answer.corrections:
        lines += ["", "Announced and not kept. This node counts on what it saw:"]
        lines += [f"  {one.text} ({_ends(one)})" for one in answer.corrections]
    if answer.corrections or any(one.text for one in answer.hosts):
        lines += ["", "  mesh-llm trust forget HOST [MODEL]   to use it, and to believe it, again; it is checked anew"]
    click.echo(printable("\n".join(lines)))


@trust.command()
@click.argument("host")
@click.argument("model", required=False, default="")
@json_option
@node_option
def forget(host: str, model: str, *, as_json: bool) -> None:
    """Forget what was found about HOST: its name, or the beginning of its key. It is used and checked again.

    With MODEL only what was found about that model there. What it announces counts again at once.
    """
    query = f"?model={quote(model, safe='')}" if model else ""
    answer = DaemonClient(node_home()).send("DELETE", f"/api/trust/{quote(host, safe='')}{query}", {})
    forgotten = msgspec.convert(answer, TrustForgotten)
    if as_json:
        print_json(forgotten, one_line=True)
        return
    lines: list[str] = []
    if forgotten.models or not forgotten.corrections:
        models = f" ({', '.join(forgotten.models)})" if forgotten.models else ""
        lines.append(f"Forgot what canaries said about {forgotten.name}{models}. It is used and checked again.")
    lines += [f"Counts again as announced: {one.text}." for one in forgotten.corrections]
    click.echo(printable("\n".join(lines)))


def _ends(one: StatusCorrection) -> str:
    return f"for {duration(max(0.0, one.until - time.time()))} more"


def _row(one: TrustRecord) -> tuple[str, ...]:
    return (
        one.name,
        one.node_id[:_SHOWN_ID],
        one.model,
        one.standing,
        str(one.canaries),
        str(one.tests),
        f"{duration(max(0.0, time.time() - one.at))} ago" if one.at else "-",
    )
