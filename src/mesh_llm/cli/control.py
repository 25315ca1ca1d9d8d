"""Verbs that change the running node: stop, drop."""

import click
import msgspec
import psutil

from mesh_llm.cli.client import DaemonClient
from mesh_llm.cli.option_types import Number
from mesh_llm.core.errors import MeshError
from mesh_llm.runtime.home import Home


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
