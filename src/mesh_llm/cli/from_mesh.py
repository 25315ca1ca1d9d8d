"""Has the running node take a model from its neighbours, for `mesh-llm download`: the hub comes after them."""

import click
import msgspec

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.errors import printable
from mesh_llm.cli.following import follow_to_end
from mesh_llm.core.console_values import DownloadRecord
from mesh_llm.core.errors import MeshError
from mesh_llm.runtime.home import Home

_NOBODY = frozenset({"not_running", "not_available", "no_neighbour", "model_not_found", "already_here"})
_FINAL = frozenset({"disk_full", "disk_failed", "download_cancelled"})


def take_from_mesh(spec: str, label: str, *, hub: bool, quiet: bool) -> DownloadRecord | None:
    """Take `spec` from other nodes of the mesh; None where nobody gives it.

    Args:
        spec: a source, or a name in the mesh.
        label: what it is called while it comes.
        hub: let the node ask the hub for what neighbours do not give. Without, the caller is expected to do so: what
            went wrong is told, and not raised.
        quiet: show nothing.

    Raises:
        MeshError: what no other way would help against; with `hub` everything but that nobody has it.
        SystemExit: the user interrupted it, and was told that what has arrived is kept.
    """
    try:
        client = DaemonClient(Home.default())
        answer = client.send("POST", "/api/downloads", {"model": spec, "hub": hub})
        return follow_to_end(client, msgspec.convert(answer, DownloadRecord), label, quiet=quiet)
    except MeshError as error:
        if error.code in _NOBODY:
            return None
        if hub or error.code in _FINAL:
            raise
        if not quiet:
            click.echo(printable(f"Not from the mesh: {error.message} The hub is asked."), err=True)
        return None
