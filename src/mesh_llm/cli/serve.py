"""`mesh-llm serve`, and `mesh-llm` alone: start a node and show how it starts."""

from typing import Any, NoReturn

import click

from mesh_llm.cli.options import serve_options, to_settings


@click.command()
@serve_options
def serve(**options: Any) -> None:
    """Serve models: the same as mesh-llm alone."""
    run_serve(options)


def run_serve(options: dict[str, Any]) -> NoReturn:
    """Be a node until it is stopped, and end the process. Raises MeshError where options contradict each other."""
    settings = to_settings(options)

    from mesh_llm.cli.display import choose_display
    from mesh_llm.cli.errors import tell
    from mesh_llm.cli.start import show
    from mesh_llm.core.errors import MeshError
    from mesh_llm.daemon.daemon import run_daemon
    from mesh_llm.runtime.leave import leave

    display = choose_display()
    try:
        code = run_daemon(settings, show(display), display.ask)
        display.close()
    except MeshError as error:
        display.close()
        code = tell(error)
    leave(code)
