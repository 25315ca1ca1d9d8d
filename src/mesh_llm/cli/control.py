"""`mesh-llm load`: serve one more model; what is not on the disk is fetched first, and shown while it comes.

Verbs that change the running node: stop, drop.
"""

import click
import msgspec
import psutil

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.fetching import follow_to_end
from mesh_llm.cli.option_types import Number
from mesh_llm.cli.output import printable
from mesh_llm.console.schema import DownloadRecord
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home


@click.command()
@click.argument("model")
@click.option("--background", is_flag=True, help="Do not wait for a model that has to be fetched.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def load(model: str, *, background: bool, as_json: bool) -> None:
    """Serve MODEL on the running node, beside what it serves.

    What is not on its disk is fetched first: from other nodes of the mesh that have it, else from the hub. MODEL is a
    name here, in the mesh or in the catalogue, hf:OWNER/REPO, a URL, or a file's path.
    """
    client = DaemonClient(Home.default())
    try:
        name = client.send("POST", "/api/load", {"model": model})["model"]
    except MeshError as error:
        if error.code != "model_not_found":
            raise
        _fetch(client, model, error, background=background, as_json=as_json)
        return
    _loading(name, as_json=as_json)


def _fetch(client: DaemonClient, model: str, missing: MeshError, *, background: bool, as_json: bool) -> None:
    try:
        answer = client.send("POST", "/api/downloads", {"model": model, "load": True})
    except MeshError as error:
        # Of two that know no such model, the second has looked in the mesh and in the catalogue too, and says so.
        raise missing if error.code == "not_available" else error from error
    record = msgspec.convert(answer, DownloadRecord)
    if background:
        text = f"Fetching {record.name or model} to serve it. See: mesh-llm status --watch"
        click.echo(msgspec.json.encode(record).decode() if as_json else printable(text))
        return
    record = follow_to_end(client, record, record.name or model, quiet=as_json)
    _loading(record.name, as_json=as_json)


def _loading(name: str, *, as_json: bool) -> None:
    text = printable(f"Loading {name}. See: mesh-llm status")
    click.echo(msgspec.json.encode({"model": name, "loading": True}).decode() if as_json else text)


def _say(result: dict[str, object], text: str, *, as_json: bool) -> None:
    click.echo(msgspec.json.encode(result).decode() if as_json else text)


@click.command()
@click.option(
    "--drain",
    type=Number(0, 3600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Let running answers finish for this long first; other nodes go on with those that do not.",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def stop(drain: float, *, as_json: bool) -> None:
    """Stop the running node, and wait until it has ended."""
    client = DaemonClient(Home.default())
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
                hint=f"See mesh-llm logs; as a last resort: kill -9 {pid} (its engines end with it).",
            ) from error
    _say({"stopped": True, "pid": pid}, f"Stopped (pid {pid}).", as_json=as_json)


@click.command()
@click.argument("model")
@click.option(
    "--drain",
    type=Number(0, 3600),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Let running answers finish for this long; other nodes go on with those that do not.",
)
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def drop(model: str, drain: float, *, as_json: bool) -> None:
    """Stop serving MODEL on the running node; its running answers finish first."""
    name = DaemonClient(Home.default()).send("POST", "/api/drop", {"model": model, "drain_seconds": drain})["model"]
    _say({"model": name, "dropping": True}, f"Dropping {name}.", as_json=as_json)
