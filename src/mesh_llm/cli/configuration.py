"""The configuration of a node: options from the command line, variables and files, in this order of precedence.

command line > `MESH_LLM_...` variable > `MESH_LLM_HOME/config.toml` > `/etc/mesh-llm/config.toml` > default

Options, keys and variables are made from the click parameters of serving, so one that is added there is everywhere.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, cast

import click
import msgspec

from mesh_llm.cli.options import SECTIONS
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.model_tables import ALIASES, MODELS, ModelTables, merge_tables, nearest
from mesh_llm.daemon.settings import Configuration
from mesh_llm.runtime.config_file import ConfigFile, check_secrets, plain, read_config, system_path, user_path

OPTIONS: dict[str, click.Option] = {
    next(name for name in option.opts if name.startswith("--"))[2:]: option
    for section in SECTIONS.values()
    for option in section
}
"""The options of serving by their names in a file."""

_SECRETS = frozenset({"api-key", "join"})
_NO_SECRETS = frozenset({"key-limit"})
_SECRET_WORDS = ("key", "token", "secret", "password")
_ADDED = frozenset({"api-key", "join"})
"""Their variables add to what the other sources have, and `cli.settings` reads them."""

_GIVES_WAY = (
    ("no-draft", ("draft", "spec")),
    ("draft", ("no-draft", "spec")),
    ("spec", ("draft", "no-draft")),
    ("join", ("auto",)),
    ("join-file", ("auto",)),
    ("auto", ("join", "join-file")),
    ("client", ("model", "split", "tensor-split", "yield", "invite-scope", "publish", "publish-scope", "max-clients",
                "merge")),
)  # fmt: skip
"""An option that contradicts others of a less important source: those do not count then."""


class Source(StrEnum):
    """Where a value comes from; the first is the most important."""

    COMMAND_LINE = "command line"
    VARIABLE = "variable"
    USER_FILE = "user file"
    SYSTEM_FILE = "system file"
    DEFAULT = "default"


_RANKS = {source: rank for rank, source in enumerate(Source)}


_EXAMPLES = {
    "ttl": '"30m"',
    "min-lifetime": '"1m"',
    "seed-limit": "10",
    "ctx-size": "16384",
    "parallel": "4",
    "max-vram": "16",
    "max-clients": "50",
    "ollama-port": "11434",
}
"""What a number without a default is like, as it is written in a file."""


@dataclass(frozen=True)
class Chosen:
    """The value of one option. `raw`: as written; `value`: as `to_settings` takes it; `place`: for people."""

    raw: Any
    value: Any
    source: Source
    place: str


def is_secret(key: str) -> bool:
    """Whether the value of an option must not be shown."""
    named = not key.endswith("-file") and key not in _NO_SECRETS
    return key in _SECRETS or (named and any(word in key.split("-") for word in _SECRET_WORDS))


def variable(key: str) -> str:
    """The environment variable of an option."""
    return f"MESH_LLM_{key.replace('-', '_').upper()}"


def read_files() -> list[ConfigFile]:
    """The configuration files that there are, the user's last; their keys and tables are checked.

    Raises:
        MeshError: `config_unreadable`, `config_invalid`, `config_exposed`.
    """
    files = [file for path in dict.fromkeys((system_path(), user_path())) if (file := read_config(path)) is not None]
    for file in files:
        check_file(file)
    return files


def check_file(file: ConfigFile) -> ModelTables:
    """Check one file: its keys, the values of its options, its tables, and who may read it. Raises MeshError."""
    for key, value in file.values.items():
        name = plain(key)
        if key in (MODELS, ALIASES):
            continue
        if isinstance(value, dict):
            hint = nearest(key, (MODELS, ALIASES))
            raise file.error((key,), f"[{key}] is no table of this file.", hint)
        if name not in OPTIONS:
            raise file.error((key,), f"{key} is not known.", nearest(name, (*OPTIONS, MODELS, ALIASES)))
        _from_file(name, value, file, key)
    names = [plain(key) for key in file.values]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise file.error((twice,), f"{twice} is there twice, once with an underscore.", "Leave one of them out.")
    check_secrets(file, [key for key in file.values if is_secret(plain(key))])
    return merge_tables([file])


def choose(given: Mapping[str, Any], environment: Mapping[str, str], files: Iterable[ConfigFile]) -> dict[str, Chosen]:
    """The value of each option, by its key.

    Args:
        given: values of the command line, by the names of parameters.
        environment: all variables.
        files: the most important one last; checked.

    Raises:
        MeshError: `config_invalid`.
    """
    ordered = list(reversed(list(files)))
    chosen = {key: _choose(key, option, given, environment, ordered) for key, option in OPTIONS.items()}
    for key, others in _GIVES_WAY:
        if chosen[key].source is Source.DEFAULT or not chosen[key].value:
            continue
        for other in others:
            if _RANKS[chosen[other].source] > _RANKS[chosen[key].source]:
                chosen[other] = _default(OPTIONS[other])
    return chosen


def _choose(
    key: str,
    option: click.Option,
    given: Mapping[str, Any],
    environment: Mapping[str, str],
    files: list[ConfigFile],
) -> Chosen:
    if option.name in given:
        value = given[option.name]
        return Chosen(value, value, Source.COMMAND_LINE, str(Source.COMMAND_LINE))
    name = variable(key)
    text = environment.get(name, "")
    # Kubernetes sets variables of this form for a service that is called mesh-llm.
    if text and key not in _ADDED and not (key == "port" and text.startswith("tcp://")):
        return Chosen(text, _from_variable(name, option, text), Source.VARIABLE, name)
    for file in files:
        written = next((one for one in file.values if plain(one) == key), None)
        if written is not None:
            raw = file.values[written]
            source = Source.USER_FILE if file.path == user_path() else Source.SYSTEM_FILE
            return Chosen(raw, _from_file(key, raw, file, written), source, file.place(written))
    return _default(option)


def _default(option: click.Option) -> Chosen:
    return Chosen(plain_default(option), _context().params[str(option.name)], Source.DEFAULT, Source.DEFAULT.value)


def plain_default(option: click.Option) -> str | int | float | bool | None:
    """The default of an option as it would be written; None for none."""
    if isinstance(option.default, str | int | float):
        return option.default
    return False if option.is_flag else None


def _from_variable(name: str, option: click.Option, text: str) -> Any:
    value: Any = list(option.type.split_envvar_value(text)) if option.multiple else text
    try:
        return option.process_value(_context(), value)
    except click.UsageError as error:
        raise MeshError(
            code="config_invalid",
            message=f"{name}={text[:60]}: {_reason(error)}",
            hint=f"Correct the variable, or take it away: unset {name}",
            status=400,
        ) from None


def _from_file(key: str, raw: Any, file: ConfigFile, written: str) -> Any:
    option = OPTIONS[key]
    hint = f"mesh-llm --help explains --{key}."
    value = _prepared(option, raw)
    if value is None:
        wanted = "true or false" if option.is_flag else "a list of texts" if option.multiple else "a text or a number"
        raise file.error((written,), f"{key} takes {wanted}.", f"Write it as {example(key)}.")
    try:
        return option.process_value(_context(), value)
    except click.UsageError as error:
        raise file.error((written,), f"{key}: {_reason(error)}", hint) from None


def _prepared(option: click.Option, raw: Any) -> Any:
    """A value of a file as click takes it; None if it is of the wrong kind."""
    if option.is_flag:
        return raw if isinstance(raw, bool) else None
    if option.multiple:
        items: list[Any] = cast("list[Any]", raw) if isinstance(raw, list) else [raw]
        return [str(item) for item in items] if all(map(_is_scalar, items)) else None
    return str(raw) if _is_scalar(raw) else None


def _is_scalar(raw: object) -> bool:
    return isinstance(raw, str | int | float) and not isinstance(raw, bool)


@cache
def _context() -> click.Context:
    """A call of a command with these options and nothing typed: it has their defaults."""
    return click.Command("config", params=list(OPTIONS.values())).make_context("config", [])


def _reason(error: click.UsageError) -> str:
    return error.message if error.message.endswith(".") else f"{error.message}."


def example(key: str) -> str:
    """A line of a file for an option, with its default or a stand-in."""
    option = OPTIONS[key]
    if option.is_flag:
        return f"{key} = true"
    default = plain_default(option)
    if isinstance(option.type, click.Choice) and default is None:
        default = str(option.type.choices[0])
    if option.multiple:
        return f'{key} = ["{_stand_in(option)}"]'
    if isinstance(default, int | float):
        return f"{key} = {default}"
    if isinstance(default, str) and default:
        return f"{key} = {msgspec.json.encode(default).decode()}"
    return f"{key} = {_EXAMPLES[key]}" if key in _EXAMPLES else f'{key} = "{_stand_in(option)}"'


def _stand_in(option: click.Option) -> str:
    return (option.metavar or "TEXT").split("|")[0].strip("[]")


def shown(key: str, raw: Any) -> str:
    """A value for people, as it is written in a file. Secrets are not shown."""
    if is_secret(key) and raw not in (None, "", (), []):
        return "(secret, not shown)"
    if isinstance(raw, tuple | list):
        return f"[{', '.join(shown('', item) for item in cast('list[Any]', raw))}]"
    if raw is None or raw == "":
        return "-"
    if isinstance(raw, bool):
        return str(raw).lower()
    if isinstance(raw, dict):
        entries = (f"{name} = {shown('', value)}" for name, value in cast("dict[str, Any]", raw).items())
        return f"{{ {', '.join(entries)} }}"
    return str(raw) if isinstance(raw, int | float) else msgspec.json.encode(str(raw)).decode()


def from_command_line(context: click.Context) -> dict[str, Any]:
    """The options that were typed, by the names of their parameters."""
    typed: dict[str, Any] = {}
    for option in OPTIONS.values():
        assert option.name is not None  # noqa: S101 - click names every option
        value = context.params[option.name]
        # A hidden other name of an option counts too, and click notes no source for it.
        if context.get_parameter_source(option.name) is not click.core.ParameterSource.DEFAULT or (
            value != _default(option).value
        ):
            typed[option.name] = value
    return typed


class ConfigurationSource:
    """Reads the configuration of one node: at its start, and again at each reload."""

    def __init__(self, given: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        """`given`: what was typed. Neither that nor the variables change."""
        self._given = dict(given)
        self._environment = dict(os.environ if environment is None else environment)
        self._joined = False

    def load(self) -> Configuration:
        """Read everything. Raises MeshError: also where options contradict each other."""
        from mesh_llm.cli.settings import exposed_secrets, to_settings

        files = read_files()
        chosen = choose(self._given, self._environment, files)
        if "-" in (chosen["join"].value or ()):
            # Standard input can be read once.
            self._given["tokens"] = _read_tokens(chosen["join"].value)
            chosen = choose(self._given, self._environment, files)
        options = {str(OPTIONS[key].name): one.value for key, one in chosen.items()}
        if self._joined:
            # A node joins when it starts. Its invites may be gone since.
            options |= {"tokens": (), "token_files": ()}
        tables = merge_tables(files)
        settings = to_settings(options, self._environment)
        self._joined = True
        return Configuration(
            settings=msgspec.structs.replace(settings, model_settings=tables.models, aliases=tables.aliases),
            values={key: repr(one.value) for key, one in chosen.items()},
            files=tuple(file.path for file in files),
            exposed=exposed_secrets(options, self._environment),
        )


def _read_tokens(tokens: Iterable[str]) -> tuple[str, ...]:
    from mesh_llm.cli.settings import read_invites

    return read_invites(tokens, (), None)
