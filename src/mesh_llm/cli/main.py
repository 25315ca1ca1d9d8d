"""The `mesh-llm` command: the root group, which serves, and its verbs.

A verb's module is imported only when the verb is called, so that `--help` answers at once.
"""

import difflib
import importlib
import sys
from typing import Any

import click

from mesh_llm import __version__
from mesh_llm.cli.options import serve_options, write_sections

VERBS: dict[str, tuple[str, str, str]] = {
    "serve": ("mesh_llm.cli.serve", "serve", "Serve models; the same as mesh-llm without a command."),
    "status": ("mesh_llm.cli.status", "status", "Show the running node and its mesh."),
    "console": ("mesh_llm.cli.console", "console", "Open the console in a browser, signed in."),
    "chat": ("mesh_llm.cli.chat", "chat", "Chat with a model of the mesh."),
    "run": ("mesh_llm.cli.agents", "run", "Start a coding agent on the mesh: claude, codex, goose, aider ..."),
    "stop": ("mesh_llm.cli.control", "stop", "Stop the running node."),
    "load": ("mesh_llm.cli.control", "load", "Serve one more model on the running node."),
    "unload": ("mesh_llm.cli.control", "unload", "Unload a model on the running node until a request asks for it."),
    "drop": ("mesh_llm.cli.control", "drop", "Stop serving a model on the running node."),
    "plan": ("mesh_llm.cli.plan", "plan", "Show where a model would run, whether it fits, and how fast."),
    "download": ("mesh_llm.cli.download", "download", "Fetch a model, or list the catalogue."),
    "models": ("mesh_llm.cli.models", "models", "List, search, show, verify and remove models."),
    "invite": (
        "mesh_llm.cli.invite",
        "invite",
        "Invite machines, and change or end what members may do.",
    ),
    "approve": ("mesh_llm.cli.invite", "approve", "Approve or deny machines that ask to join on this network."),
    "discover": ("mesh_llm.cli.discover", "discover", "Find meshes to join."),
    "rotate-key": ("mesh_llm.cli.discover", "rotate_key", "Replace the Nostr key of this node's listings."),
    "owner": ("mesh_llm.cli.owner", "owner", "Say which nodes are yours, to keep prompts to them."),
    "receipt": ("mesh_llm.cli.receipt", "receipt", "Show and verify receipts: who saw a prompt, and what answered."),
    "trust": ("mesh_llm.cli.trust", "trust", "Show which hosts were checked, and forget what was found."),
    "cache": ("mesh_llm.cli.cache", "cache", "Show or delete the saved prompt caches."),
    "logs": ("mesh_llm.cli.logs", "logs", "Show the logs of the node and its engines."),
    "doctor": ("mesh_llm.cli.engine", "doctor", "Check engine, devices, ports, disk and network."),
    "engine": ("mesh_llm.cli.engine", "engine", "List llama.cpp engines, and install the RPC plugin."),
    "service": ("mesh_llm.cli.service", "service", "Run the node as a service of systemd or launchd."),
    "simulate": ("mesh_llm.cli.simulate", "simulate", "Simulate a mesh of many nodes, or replay a journal."),
    "config": ("mesh_llm.cli.config", "config", "Show, check, edit and reload the configuration file."),
    "completion": ("mesh_llm.cli.main", "completion", "Print the completion script for your shell."),
}
"""Verb to its module, its name there, and a line of help."""


class LazyGroup(click.Group):
    """A group of the verbs in VERBS. Listing them imports none."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Names of all verbs, in the table's order."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - click's signature
        """Import and return one verb; None if there is no such verb."""
        entry = VERBS.get(cmd_name)
        if entry is None:
            return None
        module, attribute, _ = entry
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command), cmd_name  # noqa: S101 - a wrong table is a bug of ours
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does; an unknown word gets the verbs that are spelled like it, or may be a model's name."""
        word = args[0]
        if word not in VERBS and not word.startswith("-"):
            close = difflib.get_close_matches(word, VERBS, 2)
            meant = f"Did you mean {' or '.join(close)}?" if close else f"If it is a model: mesh-llm --model {word}"
            ctx.fail(f"No such command '{word}'. {meant}")
        return super().resolve_command(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the verbs, then the options of serving by section."""
        self.format_commands(ctx, formatter)
        write_sections(self, ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click's signature
        """List verbs with the table's help, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in VERBS.items()])


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__, "-V", "--version", prog_name="mesh-llm", message="%(prog)s %(version)s")
@serve_options
@click.pass_context
def cli(context: click.Context, **options: Any) -> None:
    """Several ordinary machines, one computer for open language models.

    Without a command it serves: an OpenAI-compatible API on port 9337 and a console on port 3131.

    \b
      mesh-llm --model tiny                  serve the built-in tiny model
      mesh-llm --model ~/models/qwen.gguf    serve a GGUF file
      mesh-llm --join TOKEN                  join another machine's mesh and serve
      mesh-llm --client --join TOKEN         only use it
      mesh-llm --auto --model tiny           find a mesh on Nostr and join it, or start one
      mesh-llm status                        show what is running
    """
    if context.invoked_subcommand is None:
        from mesh_llm.cli.serve import run_serve

        run_serve(options)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script for SHELL.

    \b
      bash:  mesh-llm completion bash > ~/.local/share/bash-completion/completions/mesh-llm
      zsh:   mesh-llm completion zsh  > "${fpath[1]}/_mesh-llm"
      fish:  mesh-llm completion fish > ~/.config/fish/completions/mesh-llm.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell  # noqa: S101 - click has all three
    click.echo(kind(cli, {}, "mesh-llm", "_MESH_LLM_COMPLETE").source())


def main() -> None:
    """Run the command. A MeshError becomes a line that says what happened, and one that says what to do."""
    from mesh_llm.cli import output

    output.prepare()
    try:
        status = _run()
        output.flush()
    except output.OutputLostError as error:
        status = output.print_output_lost(error)
    sys.exit(status)


def _run() -> int | str | None:
    """The exit status, as `sys.exit` takes it."""
    from mesh_llm.cli import output
    from mesh_llm.core.types.errors import MeshError

    try:
        cli(prog_name="mesh-llm")
    except MeshError as error:
        return output.print_error(error)
    except OSError as error:
        return output.print_error(output.from_system(error))
    except SystemExit as end:
        return end.code
    except output.OutputLostError:
        raise
    except Exception as error:  # noqa: BLE001 - the end of the command: nobody above could make sense of it
        return output.print_error(output.from_fault(error))
    return 0
