"""Who may join this mesh: `mesh-llm invite`, and `mesh-llm approve` for machines that ask without an invite."""

import time
from collections.abc import Sequence
from urllib.parse import quote

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, node_home, node_option
from mesh_llm.cli.options import Duration, json_option, scope_type
from mesh_llm.cli.output import print_json, printable, table
from mesh_llm.console.schema import Approved, MemberRevoked, MemberScope, Waiting
from mesh_llm.console.status import Status
from mesh_llm.core.membership.names import AmbiguousNode, UnknownNode, resolve_node
from mesh_llm.core.types.errors import MeshError, duration
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission.records import InviteRecord, WaitingNode
from mesh_llm.wire.mesh.invites import Invite, parse_invite

_GRANT_SECONDS = 45.0


@click.command()
@click.argument("key", required=False)
@click.option(
    "--scope",
    type=scope_type,
    help="What it may do: client sends requests, serve also answers them, split also lends memory for split models.  "
    "[default: what it asks for]",
)
@click.option("--deny", is_flag=True, help="Deny; the machine is notified.")
@json_option
@node_option
def approve(key: str | None, scope: str | None, *, deny: bool, as_json: bool) -> None:
    """Approve the machine with this KEY; without a KEY, list the machines that ask to join.

    Compare KEY with the key that the asking machine shows: anybody can choose any name. The first characters of a key
    are enough if no other begins with them.
    """
    client = DaemonClient(node_home())
    if key is None:
        _list(client, as_json=as_json)
        return
    body = {"approved": not deny} | ({"scope": scope} if scope and not deny else {})
    answer = msgspec.convert(client.send("POST", f"/api/approvals/{quote(key, safe='')}", body), Approved)
    if as_json:
        print_json(answer, one_line=True)
        return
    name = printable(answer.name or answer.id)
    said = f"Approved {name} with scope {answer.scope}." if answer.approved else f"Denied {name}."
    click.echo(said)


def _list(client: DaemonClient, *, as_json: bool) -> None:
    waiting = client.get("/api/approvals", Waiting).waiting
    if as_json:
        print_json(Waiting(waiting=waiting))
        return
    own = client.get("/api/status", Status).fingerprint
    click.echo(f"This node's key: {own}")
    if not waiting:
        click.echo("No machine asks to join. On the other machine, run: mesh-llm --lan")
        return
    click.echo("\n".join(waiting_table(waiting)))
    click.echo("Approve one: mesh-llm approve KEY. Deny it: mesh-llm approve KEY --deny")


def waiting_table(waiting: Sequence[WaitingNode]) -> list[str]:
    """Lines of a table. Texts from other machines are made harmless."""
    now = time.time()
    rows = [
        (node.id, node.name or "-", node.address, node.scope, f"{duration(max(0.0, now - node.since))} ago")
        for node in waiting
    ]
    return table(("KEY", "NAME", "ADDRESS", "ASKS FOR", "SINCE"), rows, "")


SCOPE_WORDS = {
    "client": "it may send requests to models",
    "serve": "it may send requests and answer them",
    "split": "it may send requests, answer them, and lend memory",
}


def invite_lines(token: str, scope: str, own_scope: str) -> list[str]:
    """How to add a machine by the invite of this node: the command, what it gives, and how to give less or more."""
    lines = [
        "Add a machine: type this there. Keep the token secret: whoever has it can join.",
        f"  mesh-llm {'--client ' if scope == 'client' else ''}--join {token}",
        f"Its scope is {scope}: {SCOPE_WORDS.get(scope, '')}.",
    ]
    if scope == "split":
        lines += ["To give less: mesh-llm invite create --scope serve, or client."]
        return [*lines, "To have the printed token give less: start the node with --invite-scope serve, or client."]
    if scope == own_scope:
        return [*lines, f"This node was admitted with scope {own_scope} itself, and can give no more."]
    return [*lines, "To give more: mesh-llm invite create --scope split"]


class _Invites(msgspec.Struct):
    invites: list[InviteRecord]


@click.group()
def invite() -> None:
    """Create, list and revoke invites to this mesh; change what its members may do, or cut them off."""


@invite.command()
@click.option(
    "--scope",
    type=scope_type,
    help="What its holder may do: client sends requests, serve also answers them, split also lends memory for split "
    "models.  [default: split, or what the node was started with (--invite-scope) or may itself do]",
)
@click.option(
    "--expires",
    type=Duration(),
    default="7d",
    show_default=True,
    metavar="SPAN",
    help="How long it can be used, for example 30m, 12h or 7d.",
)
@click.option(
    "--uses",
    type=click.IntRange(1, 1_000_000),
    metavar="N",
    help="How many nodes may use it. Only this node can then admit them.  [default: no limit]",
)
@json_option
@node_option
def create(scope: str | None, expires: float, uses: int | None, *, as_json: bool) -> None:
    """Create an invite and print its token."""
    body = {"scope": scope, "lifetime_seconds": expires, "uses": uses}
    record = msgspec.convert(DaemonClient(node_home()).send("POST", "/api/invites", body), InviteRecord)
    if as_json:
        print_json(record)
        return
    click.echo(record.token)
    if scope is None:
        # Not on standard output: a script takes the token from there.
        click.echo(f"Its scope is {record.scope}: {SCOPE_WORDS[record.scope]}. To give less: --scope", err=True)


@invite.command("list")
@json_option
@node_option
def list_invites(*, as_json: bool) -> None:
    """List the invites that this node issued."""
    records = DaemonClient(node_home()).get("/api/invites", _Invites).invites
    if as_json:
        print_json({"invites": records})
        return
    if not records:
        click.echo("No invites yet. Create one: mesh-llm invite create")
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
    shown = {"listing": ", in the public listing", "start": ", printed at the start"}.get(record.shown, "")
    return f"{record.id}  {record.scope:<6}  {state}{uses}{shown}"


@invite.command()
@click.argument("what", metavar="ID|NODE")
@json_option
@node_option
def revoke(what: str, *, as_json: bool) -> None:
    """Revoke an invite, or cut off a member.

    ID is that of an invite, or its token: every node that joined by it is cut off, in the whole mesh. It works on the
    node that made the invite.

    NODE is a member's name, or the beginning of its key: it is cut off, in the whole mesh, with the nodes that came by
    it. The founder of the mesh may do that, and every node on which the member's admission rests. The founder may give
    the whole key of a node that is away.
    """
    client = DaemonClient(node_home())
    if means_invite(what, client.get("/api/invites", _Invites).invites, client.get("/api/status", Status)):
        record = msgspec.convert(client.send("DELETE", f"/api/invites/{quote(what, safe='')}", {}), InviteRecord)
        if as_json:
            print_json(record)
        else:
            click.echo(f"Revoked {record.id}. Every node that joined by it is cut off, in the whole mesh.")
        return
    cut = msgspec.convert(client.send("DELETE", f"/api/members/{quote(what, safe='')}", {}), MemberRevoked)
    if as_json:
        print_json(cut)
        return
    names = ", ".join(printable(name) for name in cut.others)
    beside = f", and so is what came by it: {names}" if names else ""
    click.echo(f"{printable(cut.name)} is cut off, in the whole mesh{beside}.")
    if not cut.final:
        click.echo("It can come back only by an invite of another member.")


def means_invite(what: str, issued: Sequence[InviteRecord], status: Status) -> bool:
    """Whether a person means an invite of this node, not a member.

    Raises MeshError if it could be both, or is neither.
    """
    if isinstance(parse_invite(what), Invite):
        return True
    wanted = what.strip().lower()
    invites = [one.id for one in issued if wanted and (one.id.startswith(wanted) or wanted.startswith(one.id))]
    names = {NodeId(peer.node_id): peer.name for peer in status.peers}
    found = resolve_node(what, names)
    if not isinstance(found, UnknownNode):
        if not invites:
            return False
        members = found.choices if isinstance(found, AmbiguousNode) else (f"{names[found]} ({found[:10]})",)
        listed = [*(f"invite {one}" for one in invites), *(f"member {printable(name)}" for name in members)]
        raise MeshError(
            code="revoke_ambiguous",
            message=f"{what[:40]!r} fits an invite and a member: {', '.join(listed)}.",
            hint="Give more of the invite's id, or more of the member's key.",
            status=409,
        )
    # The node itself answers for a whole key, and for its own name.
    if invites or len(wanted) == len(status.node_id) or wanted == status.name.strip().lower():
        return bool(invites)
    raise MeshError(
        code="nothing_to_revoke",
        message=f"No invite of this node and no member of the mesh is called {what[:40]!r}.",
        hint="See `mesh-llm invite list` and `mesh-llm status`. An invite is revoked where it was made. "
        f"Members: {', '.join(map(printable, found.choices)) or 'none'}.",
        status=404,
    )


@invite.command()
@click.argument("node", metavar="NODE")
@click.option(
    "--scope",
    type=click.Choice(["serve", "split"]),
    required=True,
    help="What the member may do: serve sends and answers requests, split also lends memory for split models.",
)
@json_option
@node_option
def grant(node: str, scope: str, *, as_json: bool) -> None:
    """Raise or lower what a member of the mesh may do, without a restart.

    NODE is its name, or the beginning of its key; `mesh-llm status` lists both. To raise a member, this node must have
    the scope itself. To lower one, its admission must rest on this node, or this node must have founded the mesh.
    """
    # The node dials a member that is away, and waits for its answer: it says itself what came of that.
    answer = DaemonClient(node_home(), timeout=_GRANT_SECONDS).send(
        "POST", f"/api/members/{quote(node, safe='')}", {"scope": scope}
    )
    member = msgspec.convert(answer, MemberScope)
    if as_json:
        print_json(member)
        return
    click.echo(f"{printable(member.name)} has scope {member.scope} now.")
