"""`mesh-llm discover`: meshes to join, on Nostr or on the local network. `mesh-llm rotate-key`: a new Nostr key.

Strangers wrote every text that is found.
"""

import asyncio
import os
from collections.abc import Sequence

import click
import msgspec

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.options import Number, json_option, nostr_relay_options, scope_type
from mesh_llm.cli.output import EXIT_NOTHING_FOUND, print_error, print_json, printable, table
from mesh_llm.console.schema import Publication
from mesh_llm.core.listing.content import MESH_KEY_DIGITS, Listing, ListingQuery, named
from mesh_llm.core.membership.names import tell_apart
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.daemon.mesh_discovery import Candidate, Search
from mesh_llm.discovery.lan import LanNode
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.process import exit_process
from mesh_llm.wire.codec import fingerprint


@click.command()
@click.option("--model", default="", metavar="PART", help="Only meshes with a model whose name contains this.")
@click.option("--region", default="", metavar="REGION", help="Only meshes in this region.")
@click.option(
    "--min-vram",
    type=Number(min=0),
    default=0.0,
    metavar="GB",
    help="Only meshes with at least this much memory.",
)
@click.option(
    "--scope",
    type=scope_type,
    default="client",
    show_default=True,
    help="Only meshes that allow newcomers at least this.",
)
@click.option("--auto", is_flag=True, help="Print only the token of the best mesh.")
@click.option("--explain", is_flag=True, help="Show how each score is made up.")
@nostr_relay_options("Ask this relay instead of the public ones. Repeatable.")
@click.option("--lan", is_flag=True, help="Look on the local network instead. Goes with --json only.")
@json_option
def discover(
    model: str,
    region: str,
    min_vram: float,
    scope: str,
    nostr_relays: tuple[str, ...],
    *,
    auto: bool,
    explain: bool,
    lan: bool,
    as_json: bool,
) -> None:
    """List published meshes that can be reached, best first.

    \b
      mesh-llm discover --model glm --min-vram 50
      mesh-llm --client --join "$(mesh-llm discover --auto)"
      mesh-llm discover --lan

    The exit code is 4 if none was found, and 5 if no relay answered.
    """
    if lan:
        _discover_lan(as_json=as_json)
        return
    from mesh_llm.core.types.announcement import SCOPES, ListingScope
    from mesh_llm.daemon.log import silence
    from mesh_llm.daemon.mesh_discovery import search
    from mesh_llm.discovery.nostr import parse_relay_urls
    from mesh_llm.net.quic.endpoint import EndpointSettings

    silence()
    wanted: ListingScope = SCOPES[[*SCOPES].index(scope)]
    wish = ListingQuery(model=model, region=region, min_memory_bytes=int(min_vram * 1e9), scope=wanted)
    endpoint = EndpointSettings(relay=os.environ.get("MESH_LLM_RELAY", "") not in {"off", "disabled"})
    status = 0
    try:
        found = asyncio.run(search(parse_relay_urls(nostr_relays), wish, endpoint))
        if as_json:
            print_json(found)
        found.check(wish)
        if auto:
            click.echo(found.candidates[0].token)
        elif not as_json:
            click.echo(nostr_table(found, wish, explain=explain))
    except MeshError as error:
        status = print_error(error)
    # Not sys.exit: this process had a QUIC endpoint open.
    exit_process(status)


def _discover_lan(*, as_json: bool) -> None:
    from mesh_llm.discovery.lan import browse

    found = meshes(asyncio.run(browse()))
    if as_json:
        print_json({"meshes": found})
    elif found:
        click.echo("\n".join(lan_table(found)))
    else:
        click.echo("No mesh was found on this network. Only nodes that run with --lan are found.", err=True)
    if not found:
        raise SystemExit(EXIT_NOTHING_FOUND)


@click.command("rotate-key")
@nostr_relay_options("Delete the old listing from this relay. Repeatable.")
@click.option("--force", is_flag=True, help="Go on even if no relay answers. The old listing then expires.")
@json_option
def rotate_key(nostr_relays: tuple[str, ...], *, force: bool, as_json: bool) -> None:
    """Delete the listings of the old Nostr key, and make a new key. A running node then lists with the new key.

    The two keys cannot be linked, but the listings can: the keys of the mesh and of its nodes stay the same. The exit
    code is 5 if no relay answered.
    """
    from mesh_llm.daemon.log import silence
    from mesh_llm.discovery.nostr import parse_relay_urls
    from mesh_llm.discovery.nostr.consent import PublicationConsent
    from mesh_llm.discovery.nostr.identity import rotate

    silence()
    home = Home.default()
    client = _running(home)
    before = client.get("/api/publication", Publication) if client is not None else None
    PublicationConsent(home).withhold()
    urls = parse_relay_urls(nostr_relays or (before.relays if before is not None else ()))
    on = client is not None and before is not None and before.on
    if on and client is not None:
        client.send("POST", "/api/publication", {"on": False})
    try:
        done = asyncio.run(rotate(home.nostr_key, urls, force=force))
    finally:
        if on and client is not None:
            client.send("POST", "/api/publication", {"on": True})
    if as_json:
        print_json(done)
        return
    click.echo(f"New key {done.new[:16]}; {_count(done.deleted)} of the old one deleted.")
    for url, reason in done.failed.items():
        click.echo(f"  {url} did not answer ({reason}): what it holds expires within two minutes.")


def _running(home: Home) -> DaemonClient | None:
    """The running node of this home, if there is one."""
    try:
        client = DaemonClient(home)
        client.get("/api/publication", Publication)
    except MeshError as error:
        if error.code == "not_running":
            return None
        raise
    return client


def _count(listings: int) -> str:
    return f"{listings} listing{'' if listings == 1 else 's'}"


class FoundNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node that announces its mesh. `key`: the fingerprint of its key."""

    node_id: str
    key: str
    name: str
    addresses: tuple[str, ...]
    version: str


class FoundMesh(msgspec.Struct, frozen=True, kw_only=True):
    """A mesh of the local network, as its nodes announce it: unproven until joined. `more_models`: not in `models`."""

    mesh_id: str
    name: str
    models: tuple[str, ...]
    more_models: int
    nodes: tuple[FoundNode, ...]


def meshes(found: Sequence[LanNode]) -> list[FoundMesh]:
    """What was found, by mesh; the mesh with most nodes first."""
    by_mesh: dict[str, list[LanNode]] = {}
    for node in found:
        by_mesh.setdefault(node.listing.mesh, []).append(node)
    return sorted((_mesh(nodes) for nodes in by_mesh.values()), key=lambda mesh: (-len(mesh.nodes), mesh.mesh_id))


def lan_table(found: Sequence[FoundMesh]) -> list[str]:
    """Lines for a terminal: one per node, and how to join. Texts of strangers are made harmless."""
    mesh_names = tell_apart({mesh.mesh_id: mesh.name for mesh in found})
    node_names = tell_apart({node.node_id: node.name for mesh in found for node in mesh.nodes})
    rows = [
        (
            mesh_names[mesh.mesh_id],
            node_names[node.node_id],
            ", ".join(mesh.models) + (f" and {mesh.more_models} more" if mesh.more_models else "") or "-",
            node.addresses[0],
            node.version,
            node.key,
        )
        for mesh in found
        for node in mesh.nodes
    ]
    which = "" if len(found) == 1 else " --mesh-name NAME"
    return [
        *table(("MESH", "NODE", "MODELS", "ADDRESS", "VERSION", "KEY"), rows, ""),
        f"Join: mesh-llm --lan{which}. Then the user of one of these nodes must approve: mesh-llm approve",
    ]


def _mesh(nodes: Sequence[LanNode]) -> FoundMesh:
    best = max((node.listing for node in nodes), key=lambda listing: (len(listing.models), listing.node))
    return FoundMesh(
        mesh_id=best.mesh,
        name=next((node.listing.mesh_name for node in nodes if node.listing.mesh_name), ""),
        models=best.models,
        more_models=best.more_models,
        nodes=tuple(
            FoundNode(
                node_id=node.listing.node,
                key=fingerprint(node.listing.node),
                name=node.listing.name,
                addresses=node.addresses,
                version=node.listing.version,
            )
            for node in nodes
        ),
    )


_HEAD = ("MESH", "KEY", "REGION", "SCORE", "RTT", "NODES", "MEMORY", "CLIENTS", "LOAD", "FOR", "MODELS")


def nostr_table(found: Search, wish: ListingQuery, *, explain: bool) -> str:
    """One line per mesh, best first; with `explain` the parts of its score; then how to join the best."""
    lines = table(_HEAD, [_row(candidate, wish) for candidate in found.candidates], "none")
    if explain:
        lines = [
            lines[0],
            *(text for line, one in zip(lines[1:], found.candidates, strict=True) for text in _why(line, one)),
        ]
    lines += ["", "To join the best:", f"  mesh-llm --join {found.candidates[0].token}"]
    if found.failed:
        lines += ["", *(f"No answer from {url}: {reason}" for url, reason in found.failed.items())]
    if found.unreachable:
        lines.append(f"{found.unreachable} more could not be reached.")
    if found.refused:
        lines.append(f"{found.refused} listings were refused: forged, expired or damaged.")
    return printable("\n".join(lines))


def _row(candidate: Candidate, wish: ListingQuery) -> tuple[str, ...]:
    listing = candidate.listing
    clients = f"{listing.clients}/{listing.max_clients}" if listing.max_clients else str(listing.clients)
    return (
        listing.name or "-",
        listing.mesh[:MESH_KEY_DIGITS],
        listing.region or "-",
        f"{candidate.score.total:.0f}",
        f"{candidate.rtt_ms:.0f} ms",
        str(listing.nodes),
        size(listing.memory_bytes),
        clients,
        f"{listing.load:.0%}",
        listing.scope,
        ", ".join([*_found_elsewhere(listing, wish.model), *(model.name for model in listing.serving)]) or "-",
    )


def _found_elsewhere(listing: Listing, part: str) -> list[str]:
    """The models that match a search and are not served: why this mesh was found, if it serves none of that name."""
    if not part or named(listing.serving, part):
        return []
    wanted = named(listing.wanted, part)
    on_disk = [model for model in named(listing.on_disk, part) if model.name not in {one.name for one in wanted}]
    return [*(f"{model.name} (wanted)" for model in wanted), *(f"{model.name} (on disk)" for model in on_disk)]


def _why(line: str, candidate: Candidate) -> list[str]:
    parts = [f"      {part.what:<6} {part.points:5.1f} of {part.most:g}: {part.why}" for part in candidate.score.parts]
    return [line, *parts]
