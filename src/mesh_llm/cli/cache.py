"""`mesh-llm cache`: the saved prompt caches of this machine's node."""

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, node_home, node_option
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import print_json
from mesh_llm.console.status import Status, StatusPromptCaches
from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.daemon.prompt_cache import DIRECTORY
from mesh_llm.engine.prompt_cache.store import Usage, clear_directory, directory_usage
from mesh_llm.runtime.home import Home


@click.group()
def cache() -> None:
    """Show or delete the saved prompt caches: what the node keeps of long prompts, encrypted, for the next start."""


@cache.command()
@json_option
@node_option
def show(*, as_json: bool) -> None:
    """Show how many prompt caches are saved, and their size."""
    home = node_home()
    try:
        saved = DaemonClient(home).get("/api/status", Status).prompt_caches
    except MeshError as error:
        if error.code != "not_running":
            raise
        with home.explained():
            saved = _of(directory_usage(home.own_cache / DIRECTORY))
    if as_json:
        print_json(saved)
    elif saved is None:
        click.echo("This node saves no prompt caches. See: mesh-llm serve --help (--prompt-cache)")
    elif not saved.count:
        click.echo(
            "No prompt cache is saved yet. The node saves those of long prompts, when they have rested or it ends."
        )
    else:
        click.echo(f"Saved prompt caches: {saved.count}, {size(saved.bytes)}.")


@cache.command()
@json_option
@node_option
def clear(*, as_json: bool) -> None:
    """Delete the saved prompt caches, of a node that runs or not. Their prompts are read again, once."""
    home = node_home()
    try:
        cleared = msgspec.convert(DaemonClient(home).send("DELETE", "/api/prompt-caches", {}), StatusPromptCaches)
    except MeshError as error:
        if error.code not in {"not_running", "not_available"}:
            raise
        cleared = _clear(home)
    if as_json:
        print_json(cleared)
    else:
        click.echo(f"Deleted prompt caches: {cleared.count}, {size(cleared.bytes)}.")


def _clear(home: Home) -> StatusPromptCaches:
    """Of a node that does not run, or that saves none any more but did."""
    with home.explained():
        return _of(clear_directory(home.own_cache / DIRECTORY))


def _of(usage: Usage) -> StatusPromptCaches:
    return StatusPromptCaches(count=usage.count, bytes=usage.bytes)
