"""`mesh-llm serve`, and `mesh-llm` alone: start a node and show how it starts."""

from typing import Any

import click

from mesh_llm.cli.options import serve_options, to_settings


@click.command()
@serve_options
@click.pass_context
def serve(context: click.Context, **options: Any) -> None:
    """Serve models: the same as mesh-llm alone."""
    context.exit(run_serve(options))


def run_serve(options: dict[str, Any]) -> int:
    """Run a node until it is stopped; returns the exit code. Raises MeshError where it cannot start."""
    settings = to_settings(options)

    from mesh_llm.cli.display import choose_display
    from mesh_llm.cli.start import show
    from mesh_llm.daemon.daemon import run_daemon

    display = choose_display()
    try:
        return run_daemon(settings, show(display))
    finally:
        display.close()
