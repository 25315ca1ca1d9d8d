"""`mesh-llm approve`: machines of this network that ask to join without an invite.

`mesh-llm invite`: who may come into this mesh, and who no longer.
"""

import time
from collections.abc import Sequence
from urllib.parse import quote

import click
import msgspec

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.option_types import Duration
from mesh_llm.cli.output import printable
from mesh_llm.cli.table import duration, table
from mesh_llm.console.schema import Approved, Status, Waiting
from mesh_llm.net.admission.records import InviteRecord, WaitingNode
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
    body = {"approved": not deny} | ({"scope": scope} if scope and not deny else {})
    answer = msgspec.convert(client.send("POST", f"/api/approvals/{quote(key, safe='')}", body), Approved)
    if as_json:
        click.echo(msgspec.json.encode(answer).decode())
        return
    name = printable(answer.name or answer.id)
    said = f"{name} may join with scope {answer.scope}." if answer.approved else f"{name} is told that it may not join."
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


_JSON = click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")


class _Invites(msgspec.Struct):
    invites: list[InviteRecord]


def _dump(value: object) -> str:
    return msgspec.json.format(msgspec.json.encode(value)).decode()


@click.group()
def invite() -> None:
    """Create, list and revoke invites to this mesh."""


@invite.command()
@click.option(
    "--scope",
    type=click.Choice(["client", "serve", "split"]),
    default="serve",
    show_default=True,
    help="What its holder may do: ask; also answer; also lend memory for split models.",
)
@click.option(
    "--expires",
    type=Duration(),
    default="7d",
    show_default=True,
    metavar="SPAN",
    help="How long it can be used: 30m, 12h, 7d.",
)
@click.option(
    "--uses",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="How many nodes may use it; only this node can admit them then.",
)
@_JSON
def create(scope: str, expires: float, uses: int | None, *, as_json: bool) -> None:
    """Make an invite token and print it."""
    body = {"scope": scope, "lifetime_seconds": expires, "uses": uses}
    record = msgspec.convert(DaemonClient(Home.default()).send("POST", "/api/invites", body), InviteRecord)
    click.echo(_dump(record) if as_json else record.token)


@invite.command("list")
@_JSON
def list_invites(*, as_json: bool) -> None:
    """List the invites that this node issued."""
    records = DaemonClient(Home.default()).get("/api/invites", _Invites).invites
    if as_json:
        click.echo(_dump({"invites": records}))
        return
    if not records:
        click.echo("No invites yet: mesh-llm invite create")
    for record in records:
        click.echo(_line(record))


def _line(record: InviteRecord) -> str:
    left = record.expires - time.time()
    if record.revoked:
        state = "revoked"
    elif left <= 0:
        state = "expired"
    else:
        state = f"expires in {duration(left)}"
    uses = "" if record.uses_left is None else f", {record.uses_left} uses left"
    return f"{record.id}  {record.scope:<6}  {state}{uses}"


@invite.command()
@click.argument("invite_id", metavar="ID")
@_JSON
def revoke(invite_id: str, *, as_json: bool) -> None:
    """Revoke an invite: everybody who came by it is cut off, in the whole mesh."""
    from urllib.parse import quote

    answer = DaemonClient(Home.default()).send("DELETE", f"/api/invites/{quote(invite_id, safe='')}", {})
    record = msgspec.convert(answer, InviteRecord)
    click.echo(_dump(record) if as_json else f"Revoked {record.id}.")
