"""`mesh-llm discover`: which meshes there are to join."""

import asyncio
import os

import click

from mesh_llm.cli.option_types import Number
from mesh_llm.core.errors import MeshError
from mesh_llm.runtime.leave import leave


@click.command()
@click.option("--model", default="", metavar="PART", help="Only meshes with a model of such a name.")
@click.option("--region", default="", metavar="REGION", help="Only meshes there.")
@click.option(
    "--min-vram",
    type=Number(min=0),
    default=0.0,
    metavar="GB",
    help="Only meshes with so much memory.",
)
@click.option(
    "--scope",
    type=click.Choice(["client", "serve", "split"]),
    default="client",
    show_default=True,
    help="Only meshes that let strangers do this at least.",
)
@click.option("--auto", is_flag=True, help="Print the best mesh's token, and nothing else.")
@click.option("--explain", is_flag=True, help="Say what each score is made of.")
@click.option(
    "--nostr-relay",
    "--relay",
    "relays",
    multiple=True,
    metavar="URL",
    help="Ask this relay instead of the public ones.",
)
@click.option("--lan", is_flag=True, help="Look on the local network instead; of the others only --json goes with it.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def discover(
    model: str,
    region: str,
    min_vram: float,
    scope: str,
    relays: tuple[str, ...],
    *,
    auto: bool,
    explain: bool,
    lan: bool,
    as_json: bool,
) -> None:
    """List meshes that others published, best first; those that cannot be reached are left out.

    \b
      mesh-llm discover --model glm --min-vram 50
      mesh-llm --client --join "$(mesh-llm discover --auto)"
      mesh-llm discover --lan

    Exit code 4 when there is none, 5 when no relay answered, so that nobody knows.
    """
    if lan:
        _discover_lan(as_json=as_json)
        return
    from mesh_llm.cli.discover_nostr import as_json_text, as_table
    from mesh_llm.cli.errors import tell
    from mesh_llm.core.listing_choice import Wish
    from mesh_llm.core.publicity import SCOPES, ListingScope
    from mesh_llm.daemon.finding import search
    from mesh_llm.daemon.log import silence
    from mesh_llm.discovery.relay_urls import relay_urls
    from mesh_llm.net.endpoint import EndpointSettings

    silence()
    wanted: ListingScope = SCOPES[[*SCOPES].index(scope)]
    wish = Wish(model=model, region=region, min_memory_bytes=int(min_vram * 1e9), scope=wanted)
    endpoint = EndpointSettings(relay=os.environ.get("MESH_LLM_RELAY", "") not in {"off", "disabled"})
    status = 0
    try:
        found = asyncio.run(search(relay_urls(relays), wish, endpoint))
        if as_json:
            click.echo(as_json_text(found))
        found.check(wish)
        if auto:
            click.echo(found.candidates[0].token)
        elif not as_json:
            click.echo(as_table(found, explain=explain))
    except MeshError as error:
        status = tell(error)
    # An endpoint was open in this process.
    leave(status)


def _discover_lan(*, as_json: bool) -> None:
    import msgspec

    from mesh_llm.cli.discover_lan import as_table, meshes
    from mesh_llm.cli.errors import EXIT_NOTHING_FOUND
    from mesh_llm.discovery.lan_browse import browse

    found = meshes(asyncio.run(browse()))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"meshes": found})).decode())
    elif found:
        click.echo("\n".join(as_table(found)))
    else:
        click.echo("No mesh was found on this network. Nodes are found when they run with --lan.", err=True)
    if not found:
        raise SystemExit(EXIT_NOTHING_FOUND)
