"""`mesh-llm console`: makes a link that opens the console signed in, and opens a browser at it."""

import html
import os
import sys
import webbrowser

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, neighbours, node_home, node_option
from mesh_llm.cli.output import print_json
from mesh_llm.console.schema import SignedOut, SignInLink
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home, write_atomic

_WAY_IN = """<!doctype html>
<meta charset="utf-8"><meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={url}"><title>mesh-llm</title>
<p>Opening the console: <a href="{url}">go there</a>.</p>
"""


@click.command()
@click.option("--no-browser", is_flag=True, help="Only print the link.")
@click.option("--sign-out", is_flag=True, help="End all browser sessions, and discard unused links.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and open no browser.")
@node_option
def console(*, no_browser: bool, sign_out: bool, as_json: bool) -> None:
    """Open the console in a browser, signed in.

    The link that signs in works once, within 15 minutes. Only the user who runs the node can make one. A session ends
    with the node, by --sign-out, or after a week without use.
    """
    home = node_home()
    client = DaemonClient(home)
    if sign_out:
        ended = msgspec.convert(client.send("DELETE", "/api/sessions", None), SignedOut)
        text = f"Ended {ended.ended} session{'' if ended.ended == 1 else 's'}."
        if as_json:
            print_json(ended, one_line=True)
        else:
            click.echo(text)
        return
    link = msgspec.convert(client.send("POST", "/api/sign-in-links", None), SignInLink)
    if as_json:
        print_json(link)
        return
    opened = not no_browser and _has_screen() and _open(home, link.urls[0])
    click.echo("Opening the console in your browser. If it does not come up, open this link:" if opened else "Open:")
    for url in link.urls:
        click.echo(f"  {url}")
    click.echo(f"It works once, within {link.expires_seconds / 60:.0f} minutes.")
    for line in neighbours(home, "console"):
        click.echo(line)


def _has_screen() -> bool:
    """Whether a browser would open on the screen in front of the user: not over ssh, and not without a desktop."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(home: Home, url: str) -> bool:
    """Open a browser at a file that leads to the link, and that only this user can read.

    Other users of the machine can read the browser's command line, and could use the link first.
    """
    try:
        write_atomic(home.console_link, _WAY_IN.format(url=html.escape(url, quote=True)).encode())
        return webbrowser.open(home.console_link.absolute().as_uri())
    except (OSError, webbrowser.Error) as error:
        raise MeshError(
            code="no_browser",
            message=f"No browser could be opened: {error}.",
            hint="Print the link instead: mesh-llm console --no-browser",
        ) from error
