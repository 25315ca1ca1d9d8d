"""`mesh-llm models clean`: gives back what unfinished downloads hold."""

import sys

import click
import msgspec

from mesh_llm.cli.errors import printable
from mesh_llm.cli.table import table
from mesh_llm.cli.units import size
from mesh_llm.core.errors import MeshError


@click.command()
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def clean(*, yes: bool, as_json: bool) -> None:
    """Remove downloads that were begun and not ended; those that go on at present are left alone."""
    from mesh_llm.models.hub_cache import hub_cache_directory
    from mesh_llm.models.leftovers import find_leftovers, remove_leftover
    from mesh_llm.models.library import model_directories

    found = find_leftovers(hub_cache_directory(), model_directories())
    total = sum(one.size_bytes for one in found)
    if found and not yes:
        if as_json or not sys.stdin.isatty():
            raise MeshError(
                code="not_confirmed",
                message=f"Removing {len(found)} unfinished downloads ({size(total)}) needs to be confirmed.",
                hint="On a terminal you are asked; else: mesh-llm models clean --yes",
            )
        click.echo(
            printable("\n".join(table(("UNFINISHED", "SIZE"), [(one.what, size(one.size_bytes)) for one in found], "")))
        )
        if not click.confirm(
            f"Remove them and give back {size(total)}? They would have to be fetched from the beginning."
        ):
            return
    removed = [one for one in found if remove_leftover(one)]
    kept = [one for one in found if one not in removed]
    given_back = sum(one.size_bytes for one in removed)
    if as_json:
        answer = {"removed": [one.what for one in removed], "bytes": given_back, "going_on": [one.what for one in kept]}
        click.echo(msgspec.json.format(msgspec.json.encode(answer)).decode())
        return
    lines = [f"Removed {one.what}: {size(one.size_bytes)}." for one in removed]
    lines += [f"Left {one.what}: it is being fetched." for one in kept]
    click.echo(printable("\n".join(lines or ["There is nothing to remove."])))
