"""What configuration files say of models: `[models."NAME"]` and `[aliases]`."""

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from mesh_llm.core.routing.aliases import AliasError, check_alias
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.engine.arguments import check_environment, read_arguments
from mesh_llm.runtime.config_file import ConfigFile, plain
from mesh_llm.runtime.home import expand

MODELS, ALIASES = "models", "aliases"
MOST_MODELS, MOST_ALIASES = 1000, 1000

FIELDS = tuple(field.encode_name for field in msgspec.structs.fields(ModelSettings))
"""The keys of a model's table."""

_SPANS = frozenset({"ttl", "min-lifetime"})
_SPAN = re.compile(r"(\d{1,9}(?:\.\d+)?)\s*([smhdw]?)")
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_PATH = re.compile(r" - at `(\$[^`]*)`$")
_MOST_TEMPLATE = 64 * 1024
_MOST_LISTED = 400

Tables = dict[str, dict[str, Any]]


def model_tables(file: ConfigFile) -> Tables:
    """The tables of models in a file, by name, their keys with dashes; each is checked.

    Raises:
        MeshError: `config_invalid`.
    """
    tables = file.values.get(MODELS, {})
    if not isinstance(tables, dict):
        raise file.error(
            (MODELS,), "models holds tables.", 'Write [models."NAME"] above the settings of a model; or is it `model`?'
        )
    found: Tables = {}
    if len(cast("dict[str, Any]", tables)) > MOST_MODELS:
        raise file.error((MODELS,), f"there are more than {MOST_MODELS} models.", "Leave some out.")
    for name, table in cast("dict[str, Any]", tables).items():
        if not isinstance(table, dict):
            raise file.error((MODELS, name), f"{name} is not a table.", f'Write [models."{name}"] above its settings.')
        entries = {plain(key): value for key, value in cast("dict[str, Any]", table).items()}
        for key in entries:
            if key not in FIELDS:
                raise file.error((MODELS, name, key), f"{key} is no setting of a model.", nearest(key, FIELDS))
        settings = model_settings(entries, file, name)
        found[name] = {key: getattr(settings, key.replace("-", "_")) for key in entries}
    return found


def model_settings(entries: Mapping[str, Any], file: ConfigFile, name: str) -> ModelSettings:
    """The settings of one table. Raises MeshError(config_invalid)."""
    prepared = dict(entries)
    for key in _SPANS & prepared.keys():
        seconds = _seconds(prepared[key])
        if seconds is None:
            hint = 'Write seconds, or a text such as "30m", "12h" or "7d".'
            raise file.error((MODELS, name, key), f"{key} is a time.", hint)
        prepared[key] = seconds
    try:
        settings = msgspec.convert(prepared, ModelSettings)
    except msgspec.ValidationError as error:
        found = _PATH.search(str(error))
        key = re.split(r"[.\[]", found[1].removeprefix("$."))[0] if found else ""
        text = _PATH.sub("", str(error))
        hint = "mesh-llm config schema describes every setting."
        raise file.error((MODELS, name, key), f"{key or name}: {text[:1].lower()}{text[1:]}.", hint) from None
    try:
        read_arguments(settings.engine_args)
        check_environment(settings.environment)
    except MeshError as error:
        key = "environment" if error.code == "engine_variable" else "engine-args"
        raise file.error((MODELS, name, key), error.message, error.hint) from None
    return msgspec.structs.replace(settings, chat_template=_template(settings.chat_template, file, name))


def _seconds(value: object) -> float | None:
    """A time in seconds: a number, or a text such as `30m`; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = _SPAN.fullmatch(value.strip().lower()) if isinstance(value, str) else None
    return float(found[1]) * _UNITS[found[2]] if found is not None else None


def _template(value: str | None, file: ConfigFile, name: str) -> str | None:
    """A template; `@FILE` names a file with it."""
    if value is None or not value.startswith("@"):
        return value
    path = expand(value[1:])
    try:
        with path.open(encoding="utf-8") as template:
            text = template.read(_MOST_TEMPLATE + 1)
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise file.error((MODELS, name, "chat-template"), f"cannot read {path}: {why}.", "Correct its path.") from None
    if len(text) > _MOST_TEMPLATE:
        raise file.error((MODELS, name, "chat-template"), f"{path} is too long for a template.", "Give another file.")
    return text


def alias_table(file: ConfigFile) -> dict[str, str]:
    """The aliases of a file. Raises MeshError(config_invalid)."""
    table = file.values.get(ALIASES, {})
    if not isinstance(table, dict):
        raise file.error((ALIASES,), "aliases is a table.", 'Write [aliases], and below it lines such as x = "model".')
    aliases = cast("dict[str, Any]", table)
    if len(aliases) > MOST_ALIASES:
        raise file.error((ALIASES,), f"there are more than {MOST_ALIASES} aliases.", "Leave some out.")
    for alias, model in aliases.items():
        try:
            check_alias(alias, model)
        except AliasError as error:
            raise file.error((ALIASES, alias), str(error), 'Write alias = "model".') from None
    return {str(alias): str(model) for alias, model in aliases.items()}


class ModelTables(msgspec.Struct, frozen=True, kw_only=True):
    """What all files together say. A later file comes before an earlier one, key by key.

    Attributes:
        models: settings of models.
        aliases: aliases and patterns, with the model that each means.
    """

    models: dict[str, ModelSettings] = {}
    aliases: dict[str, str] = {}


def merge_tables(files: Iterable[ConfigFile]) -> ModelTables:
    """Read the tables of these files, the most important one last. Raises MeshError(config_invalid)."""
    merged: Tables = {}
    aliases: dict[str, str] = {}
    for file in files:
        for name, table in model_tables(file).items():
            merged[name] = {**merged.get(name, {}), **table}
        aliases |= alias_table(file)
    models = {name: msgspec.convert(table, ModelSettings) for name, table in merged.items()}
    own = {alias: name for name, settings in models.items() for alias in settings.aliases}
    return ModelTables(models=models, aliases={**own, **aliases})


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint with the known word that is most like this one."""
    choices = list(known)
    near = difflib.get_close_matches(word, choices, 1, 0.6)
    if near:
        return f"Did you mean {near[0]}?"
    listed = ", ".join(choices)
    return f"Possible are {listed}." if len(listed) < _MOST_LISTED else "mesh-llm config schema lists what there is."
