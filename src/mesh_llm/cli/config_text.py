"""What is written about configuration files: the file of `config init`, the JSON schema, and the table of the docs."""

import re
from typing import Any

import click
import msgspec

from mesh_llm import __version__
from mesh_llm.cli.configuration import OPTIONS, example, is_secret, variable
from mesh_llm.cli.options import SECTIONS, Seconds
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.daemon.configuration import LIVE_OPTIONS

_MODEL_EXAMPLE = """
# The settings of one model, by its name. mesh-llm models list shows the names.
#
# [models."qwen3-30b"]
# ctx-size = 16384              # as the options above, for this model only:
# parallel = 2                  # parallel, cache-type, gpu-layers, cpu-moe, draft, draft-max
# mmproj = false                # without its vision projector
# speculation = "ngram"         # auto, draft, ngram, mtp, eagle3, off; or llama.cpp's own ngram-simple, ngram-map-k,
#                               # ngram-map-k4v, ngram-mod, ngram-cache
# temperature = 0.7             # defaults for requests that do not name them:
# top-p = 0.9                   # top-p, top-k, min-p, repeat-penalty, presence-penalty, frequency-penalty,
# max-tokens = 4096             # seed, max-tokens
# system-prompt = "Be brief."   # for requests that have none
# chat-template = "@~/my.jinja" # a template, the name of a built-in one, or @FILE
# reasoning-budget = 2048       # tokens of reasoning at most; 0: none, -1: no limit
# aliases = ["gpt-4o"]          # further names for it
# ttl = "30m"                   # unload it after so long without a request; 0: never
# pin = true                    # never unload it to make room for another
# min-lifetime = "5m"           # nor sooner than this after its load
# environment = { CUDA_VISIBLE_DEVICES = "0" }
# engine-args = ["--flash-attn", "on"]   # further options of llama-server; each is checked

# Further names for models. * stands for any characters.
#
# [aliases]
# "gpt-4o-mini" = "qwen3-30b"
# "claude-*" = "qwen3-30b"
"""

_SPANS = {"type": ["number", "string"], "minimum": 0, "pattern": r"^\d+(\.\d+)?\s*[smhdw]?$"}


_UNITS = {"SECONDS": 'In seconds, or with a unit, as "5m".', "GB": "In GB.", "MS": "In milliseconds."}
"""By the word that stands for the value in the help."""


def _help(option: click.Option) -> str:
    """What an option means. In a file neither its unit nor a default in words is seen otherwise."""
    text = re.sub(r" {2,}\[default: (.*)\]$", r" Default: \1.", option.help or "")
    unit = _UNITS.get(option.metavar or "")
    return f"{text} {unit}" if unit is not None else text


def template_text() -> str:
    """A file in which every option is explained and none is set."""
    lines = [
        "# The configuration of mesh-llm. Look for errors: mesh-llm config check. See what is in effect: config show.",
        "# The command line comes first, then MESH_LLM_... variables, this file, and /etc/mesh-llm/config.toml.",
        "# mesh-llm config reload (or SIGHUP) has a running node read it again.",
    ]
    for title, options in SECTIONS.items():
        lines += ["", f"# {title}"]
        for option in options:
            key = next(name for name in option.opts if name.startswith("--"))[2:]
            lines += ["", *(f"# {line}" for line in click.wrap_text(_help(option), 116).splitlines())]
            if is_secret(key):
                lines.append("# A secret: only you may read this file then (chmod 600).")
            lines.append(f"# {example(key)}")
    return "\n".join(lines) + "\n" + _MODEL_EXAMPLE


def schema_text() -> str:
    """A JSON schema of the file, for editors."""
    return msgspec.json.format(msgspec.json.encode(config_schema()), indent=2).decode() + "\n"


def config_schema() -> dict[str, Any]:
    """The schema of the file (JSON Schema 2020-12)."""
    (_, components) = msgspec.json.schema_components([ModelSettings], ref_template="#/$defs/{name}")
    model = dict(components["ModelSettings"])
    properties = dict(model["properties"])
    for key, entry in properties.items():
        kinds = [one for one in entry.get("anyOf", ()) if one != {"type": "null"}]
        if kinds:
            rest = {name: value for name, value in entry.items() if name not in ("anyOf", "default")}
            properties[key] = {**rest, **(kinds[0] if len(kinds) == 1 else {"anyOf": kinds})}
        if key in ("ttl", "min-lifetime"):
            properties[key] = dict(_SPANS)
    model |= {"properties": properties, "description": "The settings of one model."}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"The configuration of mesh-llm {__version__}",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            **{key: {"description": _help(option), **_option_schema(option)} for key, option in OPTIONS.items()},
            "models": {
                "description": "Settings of single models, by name.",
                "type": "object",
                "additionalProperties": {"$ref": "#/$defs/ModelSettings"},
            },
            "aliases": {
                "description": "Further names of models, and patterns of names.",
                "type": "object",
                "additionalProperties": {"type": "string", "minLength": 1},
            },
        },
        "$defs": {"ModelSettings": model},
    }


def _option_schema(option: click.Option) -> dict[str, Any]:
    if option.is_flag:
        return {"type": "boolean"}
    kind = option.type
    if isinstance(kind, click.Choice):
        single: dict[str, Any] = {"enum": [str(one) for one in kind.choices]}
    elif isinstance(kind, click.IntRange | click.FloatRange):
        single = {"type": "integer" if isinstance(kind, click.IntRange) else "number"}
        if isinstance(kind, Seconds):
            # A limit counts for numbers only, and the pattern for texts only.
            single = {"type": ["number", "string"], "pattern": r"^\d{1,9}(\.\d+)?\s*[smhdwSMHDW]?$"}
        least, most = ("exclusiveMinimum" if kind.min_open else "minimum"), "maximum"
        single |= {} if kind.min is None else {least: kind.min}
        single |= {} if kind.max is None else {most: kind.max}
    else:
        single = {"type": ["string", "number"]}
    return {"anyOf": [single, {"type": "array", "items": single}]} if option.multiple else single


def options_table() -> str:
    """The options as a table for docs/configuration.md."""
    lines: list[str] = []
    for title, options in SECTIONS.items():
        lines += [f"### {title}", "", "| In the file | Variable | Reload | |", "|---|---|---|---|"]
        for option in options:
            key = next(name for name in option.opts if name.startswith("--"))[2:]
            name = variable(key)
            live = "at once" if key in LIVE_OPTIONS else "next start"
            text = _help(option).replace("|", "\\|").replace("\n", " ")
            lines.append(f"| `{example(key)}` | `{name}` | {live} | {text} |")
        lines.append("")
    return "\n".join(lines)
