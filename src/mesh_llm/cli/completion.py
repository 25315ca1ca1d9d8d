"""`mesh-llm completion`: shell completion, as click makes it."""

import click
from click.shell_completion import get_completion_class

from mesh_llm.core.errors import MeshError


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
