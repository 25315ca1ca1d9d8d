"""`mesh-llm owner`: say which nodes are yours, so that prompts can be kept to them."""

import re
import time

import click

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import print_json, printable
from mesh_llm.console.status import Status
from mesh_llm.core.membership.names import AmbiguousNode, UnknownNode, resolve_node
from mesh_llm.core.types.errors import MeshError, duration
from mesh_llm.core.types.ids import NodeId
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.nodes import running_nodes
from mesh_llm.wire.codec import fingerprint

_NODE = re.compile(r"[0-9a-f]{64}")
_LATER = "It is announced from the start of the node on."
_NOW = "That is announced in the mesh now."


@click.group()
def owner() -> None:
    """Say which nodes are yours, so that prompts can be kept to them (--privacy own or group).

    \b
      mesh-llm owner create           on one machine of yours: make your key
      mesh-llm owner add              there: its node is yours
      mesh-llm owner add NODE         there: for another machine; prints what to type on it
      mesh-llm owner remove           the node of this home is nobody's any more
      mesh-llm owner show             whose node this is, and your key for the --group of others
    """


@owner.command()
@json_option
def create(*, as_json: bool) -> None:
    """Make your owner key on this machine."""
    from mesh_llm.daemon.ownership import create_owner

    home = Home.default()
    made = create_owner(home)
    if as_json:
        _reread(home)
        print_json({"owner": made, "file": str(home.owner_key)}, one_line=True)
        return
    click.echo(f"Your owner key is {made}.")
    click.echo(f"Its secret is in {home.owner_key}: who has that file can say that nodes are yours. Keep a copy.")
    _reread(home)
    click.echo("Next: mesh-llm owner add")


@owner.command()
@click.argument("node", required=False)
@click.option("--days", type=click.IntRange(1, 3650), default=365, show_default=True, help="How long that holds.")
@json_option
def add(node: str | None, *, days: int, as_json: bool) -> None:
    """Sign that NODE is yours: a key of 64 hex digits, or a name in the mesh. Without NODE: the node of this home."""
    from mesh_llm.daemon.ownership import accept, owner_key, sign_for
    from mesh_llm.net.admission.credentials import load_or_make_key

    home = Home.default()
    key = owner_key(home)
    here = load_or_make_key(home.key).node_id
    wanted = here if node is None else _find(home, node)
    text = sign_for(key, wanted, days)
    if wanted == here:
        accept(home, text)
        announced = _reread(home)
    else:
        announced = False
    if as_json:
        print_json({"node": wanted, "statement": text, "here": wanted == here}, one_line=True)
    elif wanted == here:
        click.echo(f"This node ({here[:10]}) is yours. {_NOW if announced else _LATER}")
    else:
        click.echo(f"Compare the key of that node, which mesh-llm status shows there: {fingerprint(wanted)}")
        click.echo("On its machine, type:")
        click.echo(f"  mesh-llm owner accept {text}")


@owner.command("accept")
@click.argument("statement")
@json_option
def accept_statement(statement: str, *, as_json: bool) -> None:
    """Keep the STATEMENT of an owner that the node of this home is theirs."""
    from mesh_llm.daemon.ownership import accept

    home = Home.default()
    owned = accept(home, statement)
    announced = _reread(home)
    if as_json:
        print_json({"node": owned.node, "owner": owned.ownership.owner}, one_line=True)
        return
    click.echo(f"This node belongs to owner {owned.ownership.owner}. {_NOW if announced else _LATER}")


@owner.command()
@json_option
def remove(*, as_json: bool) -> None:
    """Take back on this machine that its node is somebody's. A lost machine: mesh-llm invite revoke NODE."""
    from mesh_llm.daemon.ownership import take_back

    home = Home.default()
    found = take_back(home)
    announced = _reread(home)
    if as_json:
        print_json({"removed": found}, one_line=True)
        return
    text = "The node of this home is nobody's now." if found else "Nobody said that the node of this home is theirs."
    click.echo(f"{text} {_NOW}" if found and announced else text)
    if found and home.owner_key.exists():
        click.echo("Your owner key stays: what this node sends with --privacy own still goes to your other nodes.")


@owner.command()
@json_option
def show(*, as_json: bool) -> None:
    """Show whose node this is, and your own key."""
    from mesh_llm.daemon.ownership import kept_ownership
    from mesh_llm.net.admission.credentials import load_key

    home = Home.default()
    owned, key = kept_ownership(home), load_key(home.owner_key)
    ends = owned.ownership.expires - time.time() if owned is not None else 0.0
    if as_json:
        print_json(
            {
                "owner": owned.ownership.owner if owned is not None else "",
                "node": owned.node if owned is not None else "",
                "expires": owned.ownership.expires if owned is not None else 0,
                "key": key.public.hex() if key is not None else "",
            },
            one_line=True,
        )
        return
    if owned is None:
        click.echo("Nobody says that the node of this home is theirs.")
    else:
        click.echo(f"Node {owned.node[:10]} belongs to owner {owned.ownership.owner}, for {duration(ends)} more.")
    if key is None:
        click.echo("There is no owner key here. Make one: mesh-llm owner create")
    else:
        click.echo(f"Your owner key, for the --group of people who trust you: {key.public.hex()}")


def _reread(home: Home) -> bool:
    """Let the nodes that run with this home announce what it says now about their owner; False: none runs."""
    nodes = running_nodes(home)
    for node in nodes:
        DaemonClient(node.home).send("POST", "/api/owner/reload", {})
    return bool(nodes)


def _find(home: Home, node: str) -> NodeId:
    """The key of a node by its name in the mesh of the running node, or by its whole key."""
    if _NODE.fullmatch(node):
        return NodeId(node)
    status = DaemonClient(home).get("/api/status", Status)
    names = {NodeId(status.node_id): status.name, **{NodeId(one.node_id): one.name for one in status.peers}}
    found = resolve_node(node, names)
    if isinstance(found, UnknownNode | AmbiguousNode):
        raise MeshError(
            "unknown_node", f"No one node of the mesh is meant by {printable(node)[:80]}.",
            "mesh-llm status --json shows the keys of all nodes; give the whole key.", 404,
        )  # fmt: skip
    return found
