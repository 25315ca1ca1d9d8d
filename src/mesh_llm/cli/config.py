"""`mesh-llm config`: shows, checks, edits and begins the configuration file, and has a running node read it again."""

import difflib
import os
import shlex
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, node_home, node_option
from mesh_llm.cli.config_text import schema_text, template_text
from mesh_llm.cli.configuration import (
    OPTIONS,
    ConfigurationSource,
    Source,
    check_file,
    choose,
    is_secret,
    read_files,
    shown,
    variable,
)
from mesh_llm.cli.options import json_option
from mesh_llm.cli.output import print_error, print_json, printable, table
from mesh_llm.console.schema import Reloaded
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.configuration import LIVE_OPTIONS
from mesh_llm.daemon.model_tables import ModelTables, merge_tables, nearest
from mesh_llm.runtime.config_file import parse_config, read_config, system_path, user_path
from mesh_llm.runtime.home import Home, write_atomic

_OTHER_VARIABLES = frozenset(
    f"MESH_LLM_{name}"
    for name in (
        "AGENT_KEY", "COMPLETE", "ENGINE_INDEX", "EPHEMERAL_KEY", "HOME", "LISTING_PERIOD", "MODELS", "RELAY",
        "SYSTEM_CONFIG",
    )
)  # fmt: skip
"""Variables that are no options."""


class ShownValue(msgspec.Struct, frozen=True, kw_only=True):
    """One option.

    `source`: command line, variable, user file, system file or default; `place`: which one, and where. `live`: it
    changes while the node runs.
    """

    key: str
    value: str
    source: str
    place: str
    live: bool


@click.group()
def config() -> None:
    """Show, check and edit the configuration file, and have the node read it again.

    Each option of mesh-llm can be in the file by its name. docs/configuration.md says more.
    """


@config.command("show")
@click.option("--set", "only_set", is_flag=True, help="Leave out what is at its default.")
@json_option
def show_config(*, only_set: bool, as_json: bool) -> None:
    """Show each option's value, and where it comes from. Secrets are not shown."""
    files = read_files()
    values = [
        ShownValue(
            key=key,
            value=shown(key, one.raw),
            source=one.source.value,
            place=one.place,
            live=key in LIVE_OPTIONS,
        )
        for key, one in choose({}, os.environ, files).items()
        if not (only_set and one.source is Source.DEFAULT)
    ]
    values += _added_secrets()
    tables = merge_tables(files)
    if as_json:
        print_json(
            {
                "files": [str(file.path) for file in files],
                "options": values,
                "models": tables.models,
                "aliases": tables.aliases,
            }
        )
        return
    lines = [f"Files: {', '.join(str(file.path) for file in files) or 'none'}", ""]
    lines += table(("OPTION", "VALUE", "FROM"), [(one.key, one.value, one.place) for one in values], "nothing is set")
    for name, settings in tables.models.items():
        lines += ["", f'[models."{name}"]']
        lines += [f"  {key} = {shown('', value)}" for key, value in msgspec.to_builtins(settings).items()]
    if tables.aliases:
        lines += ["", "[aliases]", *(f"  {alias} = {shown('', model)}" for alias, model in tables.aliases.items())]
    click.echo(printable("\n".join(lines)))


def _added_secrets() -> list[ShownValue]:
    """Variables that add keys and invites to those of the other sources."""
    return [
        ShownValue(
            key=key, value=shown(key, "x"), source=Source.VARIABLE.value, place=variable(key), live=key in LIVE_OPTIONS
        )
        for key in OPTIONS
        if is_secret(key) and os.environ.get(variable(key))
    ]


@config.command()
@click.argument("file", required=False, type=click.Path(path_type=Path))
@json_option
def check(file: Path | None, *, as_json: bool) -> None:
    """Check the configuration, or a FILE that is not in use yet. The first error is shown with its line."""
    if file is not None:
        found = read_config(file)
        if found is None:
            raise MeshError(code="config_unreadable", message=f"There is no file {file}.", hint="Correct its path.")
        tables = check_file(found)
        paths = [str(file)]
    else:
        read = ConfigurationSource({}).load()
        tables = ModelTables(models=read.settings.model_settings, aliases=read.settings.aliases)
        paths = [str(path) for path in read.files]
    warnings = [*_unknown_variables(), *_unknown_models(tables)]
    if as_json:
        print_json({"files": paths, "warnings": warnings})
        return
    text = f"{', '.join(paths)}: no errors." if paths else "There is no configuration file: mesh-llm config init"
    click.echo(printable("\n".join([text, *warnings])))


def _unknown_variables() -> list[str]:
    known = {variable(key) for key in OPTIONS} | _OTHER_VARIABLES
    unknown = [name for name in sorted(os.environ) if name.startswith("MESH_LLM_") and name not in known]
    near = {name: difflib.get_close_matches(name, known, 1, 0.85) for name in unknown}
    return [
        f"warning: {name} is no variable of mesh-llm. Did you mean {found[0]}?" for name, found in near.items() if found
    ]


def _unknown_models(tables: ModelTables) -> list[str]:
    """Models with settings, or with an alias, that are neither on this machine nor in the catalogue."""
    from mesh_llm.cli.models import scan_disk
    from mesh_llm.models.hub.catalog import catalog

    wanted = {*tables.models, *tables.aliases.values()}
    if not wanted:
        return []
    library = scan_disk()
    known = {*map(str, library.models), *map(str, library.drafts), *(entry.stem for entry in catalog() if entry.stem)}
    folded = {name.casefold() for name in known}
    return [
        f"warning: there is no model {name} on this machine. {nearest(name, sorted(known))}"
        for name in sorted(wanted)
        if name.casefold() not in folded
    ]


@config.command()
def init() -> None:
    """Write a configuration file in which every option is explained, and none is set."""
    path = user_path()
    Home.default()
    try:
        # It may get an API key later, so only its owner reads it.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(template_text())
    except FileExistsError:
        raise MeshError(
            code="config_exists",
            message=f"There is a file {path} already.",
            hint="Change it: mesh-llm config edit",
        ) from None
    click.echo(printable(f"Wrote {path}. Change it: mesh-llm config edit"))


@config.command()
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write it to FILE.")
def schema(output: Path | None) -> None:
    """Print a JSON schema of the configuration file, for editors."""
    if output is None:
        click.echo(schema_text(), nl=False)
        return
    write_atomic(output, schema_text().encode(), 0o644)
    click.echo(printable(f"Wrote {output}."))


@config.command()
@node_option
@json_option
def reload(*, as_json: bool) -> None:
    """Have the running node read the configuration again. SIGHUP does the same."""
    answer = msgspec.convert(DaemonClient(node_home(), 60.0).send("POST", "/api/config/reload", {}), Reloaded)
    if as_json:
        print_json(answer)
        return
    click.echo(printable(answer.text))


@config.command()
@click.option("--system", is_flag=True, help="Edit the file of the machine, not your own.")
def edit(*, system: bool) -> None:
    """Edit the configuration file with $VISUAL or $EDITOR. It is checked before it is kept."""
    path = system_path() if system else user_path()
    if not system:
        Home.default()
    before = read_config(path)
    text = before.text if before is not None else template_text()
    mode = before.mode if before is not None else 0o644 if system else 0o600
    draft = _draft(text)
    kept = False
    try:
        kept = _edit_until_right(draft, path, text, mode)
    finally:
        if kept:
            draft.unlink(missing_ok=True)
    if draft.exists():
        click.echo(printable(f"{path} stays as it was. Your text is in {draft}."), err=True)
        raise SystemExit(1)


def _draft(text: str) -> Path:
    """A file with the text that only this user reads."""
    handle, name = tempfile.mkstemp(prefix="mesh-llm-", suffix=".toml")
    with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
        file.write(text)
    return Path(name)


def _edit_until_right(draft: Path, path: Path, before: str, mode: int) -> bool:
    """Edit and check, until the text is right or the user gives up. Returns whether the draft is of no use any more."""
    while True:
        _run_editor(draft)
        data = draft.read_bytes()
        if data == before.encode() and path.exists():
            click.echo("Nothing changed.")
            return True
        try:
            check_file(parse_config(path, data, stat.S_IMODE(mode)))
        except MeshError as error:
            print_error(error)
            if sys.stdin.isatty() and click.confirm("Edit it again?", default=True):
                continue
            return False
        found = read_config(path)
        if found is not None and found.text != before:
            click.echo(printable(f"{path} was changed by another program meanwhile."), err=True)
            return False
        write_atomic(path.resolve(), data, mode)
        click.echo(printable(f"Wrote {path}. A running node takes it with: mesh-llm config reload"))
        _warn_of_contradictions()
        return True


def _warn_of_contradictions() -> None:
    """Say what `config check` finds between options. The file is kept: the command line may add what is missing."""
    try:
        ConfigurationSource({}).load()
    except MeshError as error:
        click.echo(printable(f"warning: no node starts with this alone: {error.message}\n  {error.hint}"), err=True)


def _run_editor(draft: Path) -> None:
    """Run the user's editor. Raises MeshError(editor_failed)."""
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        done = subprocess.run([*shlex.split(command), str(draft)], check=False)
        problem = f"ended with status {done.returncode}" if done.returncode else ""
    except (OSError, ValueError) as error:
        problem = f"cannot be started: {getattr(error, 'strerror', None) or error}"
    if problem:
        raise MeshError(
            code="editor_failed",
            message=f"The editor {command} {problem}.",
            hint=f"Name another one in EDITOR. Your text is in {draft}.",
        )
