"""`mesh-llm discover`: which meshes there are to join."""

import asyncio

import click
import msgspec

from mesh_llm.core.errors import MeshError

EXIT_NOTHING_FOUND = 4


@click.command()
@click.option("--lan", is_flag=True, help="Look on the local network.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
@click.pass_context
def discover(context: click.Context, *, lan: bool, as_json: bool) -> None:
    """Find meshes."""
    if not lan:
        raise MeshError(
            code="options",
            message="Say where to look for meshes.",
            hint="On the local network: mesh-llm discover --lan",
        )
    from mesh_llm.cli.discover_lan import as_table, meshes
    from mesh_llm.discovery.lan_browse import browse

    found = meshes(asyncio.run(browse()))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode({"meshes": found})).decode())
    elif found:
        click.echo("\n".join(as_table(found)))
    else:
        click.echo("No mesh was found on this network. Nodes are found when they run with --lan.", err=True)
    if not found:
        context.exit(EXIT_NOTHING_FOUND)
