"""A click group that imports a verb only when it is called, so that `--help` answers at once.

The `mesh-llm` command: the root group, which serves, and its verbs, each loaded when it is called.
"""

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import click

from mesh_llm import __version__
from mesh_llm.cli.options import serve_options

Verbs = Mapping[str, tuple[str, str, str]]
"""Verb name to (module, attribute, one-line help)."""


class LazyGroup(click.Group):
    """A group whose verbs are named in a table; listing them imports none of them."""

    def __init__(self, *args: Any, verbs: Verbs, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all verbs, in the table's order."""
        return [*self._verbs, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one verb; None if there is no such verb."""
        entry = self._verbs.get(cmd_name)
        if entry is None:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = entry
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), cmd_name  # noqa: S101 - a wrong table is a bug of ours
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """List verbs with the table's help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in self._verbs.items()])


VERBS = {
    "serve": ("mesh_llm.cli.serve", "serve", "Serve models: the same as mesh-llm alone."),
    "status": ("mesh_llm.cli.status", "status", "Show what the running node knows and does."),
    "console": ("mesh_llm.cli.console", "console", "Open the console in a browser, signed in."),
    "chat": ("mesh_llm.cli.chat", "chat", "Talk to a model of the mesh."),
    "run": ("mesh_llm.cli.agents", "run", "Start goose, pi, opencode, claude, aider ... on the mesh."),
    "stop": ("mesh_llm.cli.control", "stop", "Stop the running node."),
    "load": ("mesh_llm.cli.control", "load", "Serve one more model on the running node."),
    "drop": ("mesh_llm.cli.control", "drop", "Stop serving a model on the running node."),
    "plan": ("mesh_llm.cli.plan", "plan", "Say where a model would run, whether it fits, and how fast."),
    "download": ("mesh_llm.cli.download", "download", "Fetch a model, or list what can be had by name."),
    "models": ("mesh_llm.cli.models", "models", "List, find, show, remove and check models."),
    "invite": ("mesh_llm.cli.invite", "invite", "Create, list and revoke invites to this mesh."),
    "approve": ("mesh_llm.cli.invite", "approve", "Let in, or turn away, who asks to join on this network."),
    "discover": ("mesh_llm.cli.discover", "discover", "Find meshes to join."),
    "rotate-key": ("mesh_llm.cli.discover", "rotate_key", "Take a new Nostr identity; the old listing goes first."),
    "logs": ("mesh_llm.cli.logs", "logs", "Show the logs of the node and its engines."),
    "doctor": ("mesh_llm.cli.engine", "doctor", "Check engine, devices, ports, disk and network."),
    "engine": ("mesh_llm.cli.engine", "engine", "List llama.cpp engines, and install the RPC plugin."),
    "simulate": ("mesh_llm.cli.simulate", "simulate", "What a mesh of many nodes would do; or replay a journal."),
    "completion": ("mesh_llm.cli.console", "completion", "Print the completion script for your shell."),
}


@click.group(
    cls=LazyGroup,
    verbs=VERBS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "-V", "--version", prog_name="mesh-llm", message="%(prog)s %(version)s")
@serve_options
@click.pass_context
def cli(context: click.Context, **options: Any) -> None:
    """Several ordinary machines, one computer for open language models.

    Without a verb it serves: an OpenAI-compatible API on :9337 and a console on :3131.

    \b
      mesh-llm --model tiny                  serve the built-in tiny model
      mesh-llm --model ~/models/qwen.gguf    serve a GGUF file
      mesh-llm --join TOKEN                  join another machine's mesh and serve
      mesh-llm --client --join TOKEN         only use it
      mesh-llm --auto --model tiny           find a mesh on Nostr and join it, or start one
      mesh-llm status                        what is running
    """
    if context.invoked_subcommand is None:
        from mesh_llm.cli.serve import run_serve

        run_serve(options)


def main() -> None:
    """Run the command; a MeshError becomes one line of what happened and one of what to do."""
    from mesh_llm.cli import output

    output.prepare()
    try:
        status = _run()
        output.flush()
    except output.OutputLostError as error:
        status = output.tell_lost(error)
    sys.exit(status)


def _run() -> int | str | None:
    """The exit status, as of `sys.exit`."""
    from mesh_llm.cli import output
    from mesh_llm.core.types.errors import MeshError

    try:
        cli(prog_name="mesh-llm")
    except MeshError as error:
        from mesh_llm.cli.output import tell

        return tell(error)
    except OSError as error:
        from mesh_llm.cli.output import from_system, tell

        return tell(from_system(error))
    except SystemExit as end:
        return end.code
    except output.OutputLostError:
        raise
    except Exception as error:  # noqa: BLE001 - the end of the command: nobody above could make sense of it
        from mesh_llm.cli.output import from_fault, tell

        return tell(from_fault(error))
    return 0
