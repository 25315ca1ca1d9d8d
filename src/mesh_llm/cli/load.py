"""`mesh-llm load`: serve one more model; what is not on the disk is fetched first, and shown while it comes."""

import click
import msgspec

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.errors import printable
from mesh_llm.cli.following import follow_to_end
from mesh_llm.core.console_values import DownloadRecord
from mesh_llm.core.errors import MeshError
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
