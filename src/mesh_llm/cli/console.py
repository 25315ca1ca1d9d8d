"""`mesh-llm completion`: shell completion, as click makes it.

`mesh-llm console`: a link that opens the console signed in, and a browser at it.
"""

import html
import os
import sys
import webbrowser

import click
import msgspec
from click.shell_completion import get_completion_class

from mesh_llm.cli.client import DaemonClient
from mesh_llm.console.schema import SignedOut, SignInLink
from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home, write_atomic


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
      bash:  mesh-llm completion bash > ~/.local/share/bash-completion/completions/mesh-llm
      zsh:   mesh-llm completion zsh  > "${fpath[1]}/_mesh-llm"
      fish:  mesh-llm completion fish > ~/.config/fish/completions/mesh-llm.fish
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise MeshError(code="no_completion", message=f"There is no completion for {shell}.")
    from mesh_llm.cli.main import cli

    click.echo(kind(cli, {}, "mesh-llm", "_MESH_LLM_COMPLETE").source())


_WAY_IN = """<!doctype html>
<meta charset="utf-8"><meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={url}"><title>mesh-llm</title>
<p>Opening the console: <a href="{url}">go there</a>.</p>
"""


@click.command()
@click.option("--no-browser", is_flag=True, help="Only print the link.")
@click.option("--sign-out", is_flag=True, help="End all sessions of browsers, and links that were not used.")
@click.option("--json", "as_json", is_flag=True, help="Answer in JSON; opens no browser.")
def console(*, no_browser: bool, sign_out: bool, as_json: bool) -> None:
    """Open the console in a browser, signed in by a link that works once, within 15 minutes.

    Only the user who runs the node can make such a link. A session lasts until the node ends, until --sign-out, or
    until nobody used it for a week.
    """
    home = Home.default()
    client = DaemonClient(home)
    if sign_out:
        ended = msgspec.convert(client.send("DELETE", "/api/sessions", None), SignedOut)
        text = f"Ended {ended.ended} session{'' if ended.ended == 1 else 's'}."
        click.echo(msgspec.json.encode(ended).decode() if as_json else text)
        return
    link = msgspec.convert(client.send("POST", "/api/sign-in-links", None), SignInLink)
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(link)).decode())
        return
    opened = not no_browser and _has_screen() and _open(home, link.urls[0])
    click.echo("Opening the console in your browser. If it does not come up, open this link:" if opened else "Open:")
    for url in link.urls:
        click.echo(f"  {url}")
    click.echo(f"It works once, within {link.expires_seconds / 60:.0f} minutes.")


def _has_screen() -> bool:
    """Whether a browser would be in front of whoever types: not at the other end of ssh, and not in a terminal."""
    if "SSH_CONNECTION" in os.environ:
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def _open(home: Home, url: str) -> bool:
    """Open a browser at the link, by a file that only this user can read.

    Other users of the machine can read a browser's command line, and could use the code before it does.
    """
    try:
        write_atomic(home.console_link, _WAY_IN.format(url=html.escape(url, quote=True)).encode())
        return webbrowser.open(home.console_link.absolute().as_uri())
    except (OSError, webbrowser.Error) as error:
        raise MeshError(
            code="no_browser",
            message=f"No browser could be opened: {error}.",
            hint="Have the link printed: mesh-llm console --no-browser",
        ) from error
