"""`mesh-llm approve`: machines of this network that ask to join without an invite."""

import time
from collections.abc import Sequence
from urllib.parse import quote

import click
import msgspec

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.errors import printable
from mesh_llm.cli.table import table
from mesh_llm.cli.units import duration
from mesh_llm.core.console_values import Approved, Waiting, WaitingNode
from mesh_llm.core.status import Status
from mesh_llm.runtime.home import Home


@click.command()
@click.argument("key", required=False)
@click.option(
    "--scope",
    type=click.Choice(["client", "serve", "split"]),
    help="What it may do: ask; also answer; also lend memory for split models.  [default: what it asks for]",
)
@click.option("--deny", is_flag=True, help="Turn it away; it is told.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def approve(key: str | None, scope: str | None, *, deny: bool, as_json: bool) -> None:
    """Let in the machine with this KEY, or list those that ask.

    Compare KEY with what the asking machine shows: its name is only what it says of itself. The beginning is enough.
    """
    client = DaemonClient(Home.default())
    if key is None:
        _list(client, as_json=as_json)
        return
    body = {"let_in": not deny} | ({"scope": scope} if scope and not deny else {})
    answer = msgspec.convert(client.send("POST", f"/api/approvals/{quote(key, safe='')}", body), Approved)
    if as_json:
        click.echo(msgspec.json.encode(answer).decode())
        return
    name = printable(answer.name or answer.id)
    said = f"{name} may join with scope {answer.scope}." if answer.let_in else f"{name} is told that it may not join."
    click.echo(said)


def _list(client: DaemonClient, *, as_json: bool) -> None:
    waiting = client.get("/api/approvals", Waiting).waiting
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(Waiting(waiting=waiting))).decode())
        return
    own = client.get("/api/status", Status).fingerprint
    click.echo(f"This node's key: {own}")
    if not waiting:
        click.echo("Nobody asks to join. On the other machine: mesh-llm --lan")
        return
    click.echo("\n".join(waiting_table(waiting)))
    click.echo("Let one in: mesh-llm approve KEY. Turn it away: mesh-llm approve KEY --deny")


def waiting_table(waiting: Sequence[WaitingNode]) -> list[str]:
    """Lines of a table; texts of strangers are made harmless."""
    now = time.time()
    rows = [
        (node.id, node.name or "-", node.address, node.scope, f"{duration(max(0.0, now - node.since))} ago")
        for node in waiting
    ]
    return table(("KEY", "NAME", "ADDRESS", "ASKS FOR", "SINCE"), rows, "")
