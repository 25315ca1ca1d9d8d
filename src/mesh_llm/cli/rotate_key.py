"""`mesh-llm rotate-key`: a new Nostr identity for this home's listings."""

import asyncio

import click
import msgspec

from mesh_llm.cli.client import DaemonClient
from mesh_llm.core.console_values import Publication
from mesh_llm.core.errors import MeshError
from mesh_llm.runtime.home import Home


@click.command("rotate-key")
@click.option(
    "--nostr-relay", "--relay", "relays", multiple=True, metavar="URL", help="Relay to delete the old listing from."
)
@click.option("--force", is_flag=True, help="Also where no relay answers; the old listing expires by itself.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON.")
def rotate_key(relays: tuple[str, ...], *, force: bool, as_json: bool) -> None:
    """Delete what the old key listed, and make a new one. A running node goes on under the new key.

    Nobody can tell then that both listings are of the same publisher, but for what is in them: the mesh's own key and
    its nodes' stay as they are. Exit code 5 when no relay answered.
    """
    from mesh_llm.daemon.log import silence
    from mesh_llm.discovery.relay_urls import relay_urls
    from mesh_llm.discovery.rotate import rotate

    silence()
    home = Home.default()
    client = _running(home)
    before = client.get("/api/publication", Publication) if client is not None else None
    urls = relay_urls(relays or (before.relays if before is not None else ()))
    on = client is not None and before is not None and before.on
    if on and client is not None:
        client.send("POST", "/api/publication", {"on": False})
    try:
        done = asyncio.run(rotate(home.nostr_key, urls, force=force))
    finally:
        if on and client is not None:
            client.send("POST", "/api/publication", {"on": True})
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(done)).decode())
        return
    click.echo(f"New key {done.new[:16]}; {_count(done.deleted)} of the old one deleted.")
    for url, reason in done.failed.items():
        click.echo(f"  {url} did not answer ({reason}): what it holds expires within two minutes.")


def _running(home: Home) -> DaemonClient | None:
    """The node of this home, if one answers."""
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
