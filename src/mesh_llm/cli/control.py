"""Verbs that change the running node: `mesh-llm load`, `drop` and `stop`."""

import click
import msgspec
import psutil

from mesh_llm.cli.client import DaemonClient, neighbours, node_home, node_option
from mesh_llm.cli.fetching import follow_to_end
from mesh_llm.cli.options import Seconds, json_option
from mesh_llm.cli.output import print_json, printable
from mesh_llm.console.schema import DownloadRecord, ModelAccepted
from mesh_llm.core.types.errors import MeshError

_drain_option = click.option(
    "--drain",
    type=Seconds(0, 3600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Let running answers finish for this long. Other nodes continue those that do not.",
)


@click.command()
@click.argument("model")
@click.option("--background", is_flag=True, help="Do not wait while the model is fetched.")
@json_option
@node_option
def load(model: str, *, background: bool, as_json: bool) -> None:
    """Serve MODEL on the running node, in addition to what it serves now.

    A model that is not on its disk is fetched first: from other nodes of the mesh, or else from the hub. MODEL is a
    name on this machine, in the mesh or in the catalogue; hf:OWNER/REPO; a URL; or the path of a file.
    """
    client = DaemonClient(node_home())
    try:
        accepted = msgspec.convert(client.send("POST", "/api/load", {"model": model}), ModelAccepted)
    except MeshError as error:
        if error.code != "model_not_found":
            raise
        _fetch(client, model, error, background=background, as_json=as_json)
        return
    _loading(accepted.model, accepted.waiting, as_json=as_json)


def _fetch(client: DaemonClient, model: str, missing: MeshError, *, background: bool, as_json: bool) -> None:
    try:
        answer = client.send("POST", "/api/downloads", {"model": model, "load": True})
    except MeshError as error:
        # The first error lists what is on this machine; it helps more than "no node has it".
        raise missing if error.code == "not_available" else error from error
    record = msgspec.convert(answer, DownloadRecord)
    if background:
        text = f"Fetching {record.name or model} to serve it. See: mesh-llm status --watch"
        _say(record, text, as_json=as_json)
        return
    record = follow_to_end(client, record, record.name or model, quiet=as_json)
    _loading(record.name, record.waiting, as_json=as_json)


def _loading(name: str, waiting: str, *, as_json: bool) -> None:
    text = f"{name} is not loaded yet: {waiting}" if waiting else f"Loading {name}. See: mesh-llm status"
    _say({"model": name, "loading": not waiting, "waiting": waiting}, text, as_json=as_json)


def _say(result: object, text: str, *, as_json: bool) -> None:
    if as_json:
        print_json(result, one_line=True)
    else:
        click.echo(printable(text))


@click.command()
@_drain_option
@json_option
@node_option
def stop(drain: float, *, as_json: bool) -> None:
    """Stop the running node, and wait until it has ended."""
    home = node_home()
    client = DaemonClient(home)
    pid = client.pid
    try:
        process = psutil.Process(pid) if pid else None
    except psutil.NoSuchProcess:
        process = None
    client.send("POST", "/api/stop", {"drain_seconds": drain})
    if process is not None:
        try:
            process.wait(timeout=drain + 10.0)
        except psutil.TimeoutExpired as error:
            raise MeshError(
                code="still_running",
                message=f"The node (pid {pid}) has not ended yet.",
                hint=f"See mesh-llm logs. As a last resort: kill -9 {pid} (its engines end with it).",
            ) from error
    text = "\n".join([f"Stopped (pid {pid}).", *neighbours(home, "stop")])
    _say({"stopped": True, "pid": pid}, text, as_json=as_json)


@click.command()
@click.argument("model")
@_drain_option
@json_option
@node_option
def drop(model: str, drain: float, *, as_json: bool) -> None:
    """Stop serving MODEL on the running node, after its running answers."""
    name = DaemonClient(node_home()).send("POST", "/api/drop", {"model": model, "drain_seconds": drain})["model"]
    _say({"model": name, "dropping": True}, f"Dropping {name}.", as_json=as_json)


@click.command()
@click.argument("model")
@_drain_option
@json_option
@node_option
def unload(model: str, drain: float, *, as_json: bool) -> None:
    """Unload MODEL on the running node, after its running answers. A request loads it again."""
    body = {"model": model, "drain_seconds": drain, "rest": True}
    name = DaemonClient(node_home()).send("POST", "/api/drop", body)["model"]
    _say({"model": name, "unloading": True}, f"Unloading {name}. A request loads it again.", as_json=as_json)
