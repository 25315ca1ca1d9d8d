"""`mesh-llm serve`, and `mesh-llm` alone: start a node and show how it starts."""

import os
from typing import Any, NoReturn

import click

from mesh_llm.cli.options import SECRET_VARIABLES, serve_options, to_settings


@click.command()
@serve_options
def serve(**options: Any) -> None:
    """Serve models: the same as mesh-llm alone."""
    run_serve(options)


def run_serve(options: dict[str, Any]) -> NoReturn:
    """Be a node until it is stopped, and end the process. Raises MeshError where options contradict each other."""
    settings = to_settings(options)
    for name in SECRET_VARIABLES:
        # Engines inherit the environment, and have no use for these.
        os.environ.pop(name, None)

    from mesh_llm.cli.display import choose_display
    from mesh_llm.cli.errors import tell
    from mesh_llm.cli.output import go_on_without
    from mesh_llm.cli.start import show
    from mesh_llm.core.errors import MeshError
    from mesh_llm.daemon.daemon import run_daemon
    from mesh_llm.runtime.leave import leave

    go_on_without()
    if any(not key.startswith("@") for key in options["api_keys"]):
        click.echo(
            "warning: other users of this machine can read the --api-key in the list of processes.\n"
            "  Use --api-key-file FILE, or set MESH_LLM_API_KEY.",
            err=True,
        )
    display = choose_display()
    try:
        code = run_daemon(settings, show(display), display.ask)
        display.close()
    except MeshError as error:
        display.close()
        code = tell(error)
    leave(code)
