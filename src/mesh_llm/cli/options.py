"""The options of serving, in sections, shared by `mesh-llm` and `mesh-llm serve`; and option types that click lacks.

Imported for every `--help`, so it imports nothing but click. `cli.settings` turns the values into settings.
"""

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

_SPAN = re.compile(r"(\d{1,9}(?:\.\d+)?)\s*([smhdw])")
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


class Duration(click.ParamType[float]):
    """A click type: a number and a unit, to seconds."""

    name = "span"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds of `7d` and the like; a number without a unit is ambiguous, and refused."""
        if isinstance(value, float):
            return value
        found = _SPAN.fullmatch(str(value).strip().lower())
        if found is None or float(found[1]) == 0:
            self.fail(f"{value!r} is not a time span; write it as 30m, 12h or 7d.", param, ctx)
        return float(found[1]) * _UNITS[found[2]]


class Number(click.FloatRange):
    """A click.FloatRange of finite numbers: click's own takes `nan` everywhere, and `inf` without a maximum."""

    name = "number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """A finite number in the range."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number.", param, ctx)
        return number


class Seconds(Number):
    """A click type: a number of seconds, or a number and a unit, such as `30m`, to seconds."""

    name = "time in seconds, or with a unit as in 30m, 12h or 7d"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds in the range."""
        found = _SPAN.fullmatch(value.strip().lower()) if isinstance(value, str) else None
        return super().convert(float(found[1]) * _UNITS[found[2]] if found is not None else value, param, ctx)


class _AutoNumber(click.ParamType[int | None]):
    """A click type: a number from `least` to `most`, or `auto`, which is None."""

    name = "number or auto"

    def __init__(self, least: int = 0, most: int = 9999) -> None:
        self._least = least
        self._most = most

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """The number; None for `auto`."""
        if isinstance(value, int):
            return value
        text = str(value).strip().lower()
        if text == "auto":
            return None
        if not re.fullmatch(r"\d{1,4}", text):
            self.fail(f"{value!r} is neither a number nor auto.", param, ctx)
        if not self._least <= int(text) <= self._most:
            self.fail(f"{value!r} is not from {self._least} to {self._most}.", param, ctx)
        return int(text)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
"""For verbs that print for people, or for programs."""

scope_type = click.Choice(["client", "serve", "split"])

_PORT = click.IntRange(0, 65535)
_CONSOLE_PORT = 3131
_FILE = click.Path(path_type=Path)
_POSITIVE = Number(min=0, min_open=True)


MERGE_HELD = "held"
"""The value of `--merge` without a key."""


def _option(*names: str, **attributes: Any) -> click.Option:
    return click.Option(list(names), **attributes)


def _renamed(old: str, new: str, *, is_flag: bool = False) -> click.Option:
    """A hidden alias for one release: its value becomes the default of the option that is now called `new`."""

    def use(context: click.Context, _: click.Parameter, value: str | bool | None) -> None:
        if not value or context.resilient_parsing:
            return
        click.echo(f"warning: {old} is now called {new}.\n  The old name goes away with the next release.", err=True)
        # A value on the command line wins over the default map, which the new option reads after this.
        context.default_map = {**(context.default_map or {}), new.removeprefix("--").replace("-", "_"): value}

    name = old.removeprefix("--").replace("-", "_")
    return _option(old, name, is_flag=is_flag, hidden=True, is_eager=True, expose_value=False, callback=use)


def _without_effect(name: str, why: str) -> click.Option:
    """A hidden flag of an earlier release, whose effect is the default now."""

    def warn(context: click.Context, _: click.Parameter, value: bool) -> None:
        if value and not context.resilient_parsing:
            click.echo(f"warning: {name} has no effect. {why}", err=True)

    return _option(name, is_flag=True, hidden=True, expose_value=False, callback=warn)


def _nostr_relays(name: str, text: str = "", *, hidden: bool = False) -> click.Option:
    return _option(name, "nostr_relays", multiple=True, metavar="URL", help=text, hidden=hidden)


def nostr_relay_options(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add `--nostr-relay`, and its hidden other name `--relay`, to a function that becomes a click command.

    Both add to one list.
    """
    return lambda command: _add(command, (_nostr_relays("--nostr-relay", text), _nostr_relays("--relay", hidden=True)))


SECTIONS: dict[str, tuple[click.Option, ...]] = {
    "Models": (
        _option("--model", "models", multiple=True, metavar="PATH|NAME|hf:...",
                help="Model to serve: a GGUF file, a name on this machine or in the catalogue, hf:OWNER/REPO, a URL, "
                "or tiny. Repeatable."),
        _option("--on-demand", type=click.Choice(["off", "own", "members", "clients", "strangers"]), default="members",
                show_default=True,
                help="Load a model that is on disk when a request asks for it: requests of this node's own clients "
                "only, of other members of the mesh too, of passive clients too, or even of strangers that came by a "
                "public listing. With strangers, a node on standby also heeds what these want and serve."),
        _option("--load-wait", type=Seconds(0, 86_400), default=600.0, show_default=True, metavar="SECONDS",
                help="How long a request waits for its model to be loaded; 0: not at all."),
        _option("--fetch-on-demand", is_flag=True,
                help="Also fetch models of the catalogue that are on no disk of the mesh and are asked for."),
        _option("--pin", "pins", multiple=True, metavar="MODEL",
                help="Never unload this model for lack of requests or to make room for another. Repeatable."),
        _option("--ttl", type=Seconds(min=0), metavar="SECONDS",
                help="Unload a model when nobody asked for it for so long; 0: never.  [default: 1800 for a model that "
                "a request loaded, never for the others]"),
        _option("--min-lifetime", type=Seconds(min=0), metavar="SECONDS",
                help="Do not unload a model to make room before it has been loaded for so long.  [default: as long as "
                "its load took, 1 to 60]"),
        _option("--models-dir", "models_dirs", multiple=True, type=_FILE, metavar="DIR",
                help="Look for models in this directory too. Repeatable."),
        _option("--yes", is_flag=True, help="Do not ask: fetch the best model for this machine (without --model), "
                "install what its GPU needs, and list the mesh (with --publish)."),
        _option("--no-fetch", is_flag=True,
                help="Never fetch a model because the mesh needs it, nor layers of a split model."),
        _option("--no-seed", is_flag=True, help="Never send model files to other nodes."),
        _option("--seed-strangers", is_flag=True,
                help="Send model files also to nodes that came by a public listing."),
        _option("--seed-limit", type=_POSITIVE, metavar="MB",
                help="Send at most this many megabytes a second to other nodes.  [default: no limit]"),
        _option("--ctx-size", type=click.IntRange(min=1), metavar="N", help="Context of each slot, in tokens."),
        _option("--parallel", type=click.IntRange(1, 256), metavar="N",
                help="Slots of each model: requests that it answers at the same time."),
        _option("--cache-type", type=click.Choice(["auto", "f16", "q8_0", "q4_0"]), default="auto", show_default=True,
                help="Type of the KV cache: auto keeps f16 where 16384 tokens of context (or --ctx-size) fit, else "
                "takes q8_0, else q4_0. Of a split model: auto is f16."),
        _option("--prompt-cache", default="4GB", show_default=True, metavar="SIZE|off",
                help="Keep the caches of long prompts on the disk, encrypted, up to this size: a conversation goes on "
                "at once after a restart."),
        _option("--spec", type=click.Choice(["auto", "draft", "ngram", "mtp", "eagle3", "off"]), default="auto",
                show_default=True,
                help="How tokens are guessed ahead: draft: by a draft model; ngram: by what followed the same words "
                "before; mtp: by the model's own heads; eagle3: by the EAGLE-3 draft that --draft names; off: not at "
                "all; auto: mtp, else a draft that fits, else ngram, and only while that pays."),
        _option("--draft", metavar="PATH|NAME", help="Draft model for speculative decoding."),
        _option("--draft-max", type=click.IntRange(1, 64), default=16, show_default=True, metavar="N",
                help="Most tokens drafted at a time."),
        _option("--no-draft", is_flag=True, help="Never use a draft model, unless the settings of a model name one."),
        _option("--no-mmproj", is_flag=True, help="Serve models without their vision projectors."),
    ),
    "Mesh": (
        _option("--join", "tokens", multiple=True, metavar="TOKEN|-",
                help="Join a mesh by an invite; - reads it from standard input. Repeatable: one that can be reached is "
                "enough. Also MESH_LLM_JOIN."),
        _option("--join-file", "token_files", multiple=True, type=_FILE, metavar="FILE",
                help="Join by the invites in a file, one per line. Other users of this machine can read a command "
                "line, but not this file."),
        _option("--invite-scope", type=scope_type,
                help="What the printed invite lets a machine do: client sends requests, serve also answers them, split "
                "also lends memory for split models.  [default: split, or what this node itself may do]"),
        _option("--client", is_flag=True, help="Only use the mesh: no engine, no model, no gossip."),
        _option("--name", default="", metavar="NAME", help="Name of this node.  [default: the host's name]"),
        _option("--mesh-name", default="", metavar="NAME",
                help="Name of this mesh. With --lan and no invite: the mesh to join."),
        _option("--region", default="", metavar="REGION", help="Where this node is, for example AU or eu-west."),
        _option("--lan", is_flag=True,
                help="Announce this mesh on the local network. Without an invite: find a mesh there and ask to join."),
        _option("--auto", is_flag=True,
                help="Find meshes on Nostr and join the best. With --model: start a mesh if none is found."),
        _option("--publish", is_flag=True, help="List this mesh on Nostr, for anybody to find and join."),
        _option("--publish-scope", type=scope_type,
                help="What nodes that find the listing may do: client sends requests only; with serve they may also "
                "be given, and read, prompts of this mesh.  [default: client]"),
        _option("--stranger-limit", "stranger_limits", metavar="LIMITS",
                default="concurrent=2,tokens_per_day=500000,all_concurrent=8,all_tokens_per_day=5000000",
                show_default=True,
                help="What nodes that came by a public listing may use of this node: requests at once and tokens a day "
                "(from midnight UTC) of one node or address, and of all of them together. Those not named keep their "
                "default; off lifts one, or all."),
        _option("--max-clients", type=click.IntRange(1, 1_000_000), metavar="N",
                help="Stop listing the mesh when it has this many clients.  [default: no limit]"),
        _option("--merge", "merge", multiple=True, is_flag=False, flag_value=MERGE_HELD, metavar="[KEY]",
                help="While this node is alone in its listed mesh: move to the mesh whose key begins with KEY. Without "
                "KEY: to a larger mesh of the same name that this node was in before. Repeatable."),
        _nostr_relays("--nostr-relay", "Use this Nostr relay instead of the public ones. Repeatable."),
        _option("--quic-port", "--bind-port", type=_PORT, default=0, show_default=True, metavar="PORT",
                help="UDP port of the mesh, and TCP port of its direct connections; 0 for any."),
        _option("--transport", type=click.Choice(["auto", "quic"]), default="auto", show_default=True,
                help="What carries requests and split models between nodes. auto: TLS over TCP where they reach each "
                "other directly, else QUIC. quic: always QUIC."),
        _option("--no-relay", is_flag=True,
                help="Connect directly only: no public relays, no address lookup. Also MESH_LLM_RELAY=off."),
        _option("--resume-wait", type=Seconds(0, 3600), default=30.0, show_default=True, metavar="SECONDS",
                help="How long an answer that lost its node waits for another node to continue it."),
    ),
    "Split models": (
        _option("--split", is_flag=True, help="Split the model over several nodes even if it fits on this one."),
        _option("--tensor-split", metavar="R,R", help="Parts of a split model: the host's, then each worker's."),
        _option("--max-rtt", type=_POSITIVE, default=80.0, show_default=True, metavar="MS",
                help="Split only with nodes at most this round-trip time away."),
        _option("--groups", type=_AutoNumber(least=1, most=4), default="auto", show_default=True, metavar="N|auto",
                help="Engines over a split model that this node hosts. They share its weights and divide its slots, so "
                "that a machine computes for one while another's tokens are elsewhere; auto: as many as pay."),
        _option("--wire", type=click.Choice(["auto", "f32", "f16", "q8"]), default="auto", show_default=True,
                help="How activations of models that this node splits travel. f32: as they are. f16, q8: in half and "
                "about a quarter of the bytes, rounded: answers may differ. auto: f16 where a link is slow, else f32."),
        _option("--lend-unconfined", is_flag=True,
                help="Lend memory to split models even where the RPC server cannot be confined."),
    ),
    "Machine": (
        _option("--use", default="100%", show_default=True, metavar="PART",
                help="Use at most this part of the machine's memory and processors, for example 50%."),
        _option("--max-vram", type=_POSITIVE, metavar="GB",
                help="Use at most this much memory for models: video memory on a machine with a GPU."),
        _option("--gpu-layers", type=_AutoNumber(), default="auto", show_default=True, metavar="N|auto",
                help="Layers of a model on the GPU, counted from the last; auto: as many as fit. The others are "
                "computed by the processor, from main memory."),
        _option("--cpu-moe", type=_AutoNumber(), default="auto", show_default=True, metavar="N|auto",
                help="Of a mixture of experts: layers whose experts are in main memory, counted from the first; auto: "
                "as few as possible, before whole layers."),
        _option("--device", "devices", multiple=True, metavar="D",
                help="Use only this device; mesh-llm engine list shows them. Repeatable."),
        _option("--gpu", type=click.Choice(["auto", "cuda", "rocm", "vulkan", "none"]), default="auto",
                show_default=True,
                help="The plugin for this machine's GPU, which is installed in the background if no engine can use the "
                "GPU; none: never."),
        _option("--bin-dir", type=_FILE, metavar="DIR",
                help="Use the llama.cpp binaries in this directory, not the embedded engine."),
        _option("--yield", "yields", multiple=True, metavar="WHEN",
                help="Give the machine back to its owner: load[:50%], battery, fullscreen, auto (all three), or "
                "HH:MM-HH:MM. Repeatable."),
    ),
    "API and console": (
        _option("--port", "api_port", type=_PORT, default=9337, show_default=True, metavar="PORT",
                help="Port of the API; 0 for any."),
        _option("--listen", default="127.0.0.1", show_default=True, metavar="ADDR",
                help="Address of the API. Any but loopback needs an API key."),
        _option("--allow-host", "allow_hosts", multiple=True, metavar="NAME",
                help="Answer requests for this host name too, for example host.docker.internal, or the name of a "
                "proxy. Repeatable."),
        _option("--allow-origin", "allow_origins", multiple=True, metavar="ORIGIN",
                help="Let this page or browser extension use the API, for example https://chat.example, "
                "app://obsidian.md or chrome-extension://ID. Repeatable."),
        _option("--queue-wait", type=Seconds(0, 3600), default=60.0, show_default=True, metavar="SECONDS",
                help="How long a request may wait until its model is ready and has a place for it. What cannot begin "
                "within this time gets 429."),
        _option("--ollama-port", "ollama_port", type=_PORT, metavar="PORT",
                help="Another port for clients of Ollama, which expect 11434; 0 for any.  [default: they use --port]"),
        _option("--default-model", default="", metavar="NAME",
                help="Model that answers requests which name none, or one that no node of the mesh knows, such as "
                "gpt-4o.  [default: unknown names are refused]"),
        _option("--no-store", is_flag=True,
                help="Keep no answers to Responses; previous_response_id is refused."),
        _option("--privacy", type=click.Choice(["own", "group", "any"]), default="any", show_default=True,
                help="Which nodes may see prompts of this node's clients: own: this node and those of its owner "
                "(mesh-llm owner); group: also those of the owners that --group names; any: all of the mesh. A request "
                "may only be stricter, by the header x-mesh-llm-privacy."),
        _option("--group", "group", multiple=True, metavar="KEY",
                help="Owner key of somebody whose nodes may see prompts with --privacy group. Repeatable."),
        _option("--canaries", type=click.Choice(["on", "off"]), default="on", show_default=True,
                help="Now and then ask a host that clients of this node use for a short answer, compare it with that "
                "of another copy of the same file (here, on a machine of your own or of --group, or recorded), and "
                "avoid a host that answers with another model. See: mesh-llm trust list."),
        _option("--canary-share", type=Number(0.001, 100), default=1.0, show_default=True, metavar="PERCENT",
                help="Of the work that clients of this node give a host, so much may canaries add."),
        _option("--receipts", is_flag=True,
                help="Make a signed receipt for each answer: which nodes saw the prompt, and which model answered. "
                "Without it, only for requests with the header x-mesh-llm-receipt: on."),
        _option("--drain", type=Seconds(0, 3600), default=30.0, show_default=True, metavar="SECONDS",
                help="How long answers under way may go on after SIGTERM, as a service manager sends it."),
        _option("--api-key", "api_keys", multiple=True, metavar="[NAME:]KEY|@FILE",
                help="Key that requests must carry; usage is counted by its name. Repeatable. Other users of this "
                "machine can read it here: use "
                "--api-key-file or MESH_LLM_API_KEY."),
        _option("--api-key-file", "api_key_files", multiple=True, type=_FILE, metavar="FILE",
                help="File with API keys, one per line. Repeatable."),
        _option("--key-limit", "key_limits", multiple=True, metavar="NAME:LIMITS",
                help="Limits of the API keys of that name: tokens_per_day=N (prompts and answers, from midnight UTC), "
                "concurrent=N (requests at once), privacy=own or group (as --privacy), or several with commas. "
                "Repeatable."),
        _option("--console", "console_port", type=_PORT, default=_CONSOLE_PORT, show_default=True, metavar="[PORT]",
                is_flag=False, flag_value=str(_CONSOLE_PORT),
                help="Port of the console; 0 for any. Without PORT: the default one."),
        _option("--console-listen", default="127.0.0.1", show_default=True, metavar="ADDR",
                help="Address of the console. Any but loopback needs an API key."),
        _option("--console-origin", "console_origins", multiple=True, metavar="URL",
                help="Public https address of a TLS proxy in front of the console; see docs/console.md. Repeatable."),
        _option("--headless", is_flag=True, help="Serve the management API without the console's page."),
    ),
    "Diagnosis": (
        _option("--journal", type=_FILE, metavar="FILE",
                help="Record every event of the core, for mesh-llm simulate --replay."),
        _option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info",
                show_default=True, help="What the node's log holds."),
    ),
}  # fmt: skip

_HIDDEN = (
    _nostr_relays("--relay", hidden=True),
    _renamed("--share", "--use"),
    _renamed("--share-limit", "--seed-limit"),
    _renamed("--no-share", "--no-seed", is_flag=True),
    _without_effect("--no-merge", "A node stays in its mesh unless you say --merge."),
)


def serve_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of serving to a function that becomes a click command."""
    return _add(command, [*(option for section in SECTIONS.values() for option in section), *_HIDDEN])


def _add(command: Callable[..., Any], options: Sequence[click.Option]) -> Callable[..., Any]:
    # As click's own decorators do it: the last decorator is the first option.
    known: list[click.Parameter] = getattr(command, "__click_params__", [])
    command.__click_params__ = [*known, *reversed(options)]  # pyright: ignore[reportFunctionMemberAccess]
    return command


def write_sections(command: click.Command, context: click.Context, formatter: click.HelpFormatter) -> None:
    """List a command's options for `--help`, those of serving by section."""
    serving = {option.name for section in SECTIONS.values() for option in section}
    rest = [option for option in command.get_params(context) if option.name not in serving]
    for title, options in {**SECTIONS, "Other": rest}.items():
        records = [record for option in options if (record := option.get_help_record(context)) is not None]
        with formatter.section(title):
            formatter.write_dl(records)


class ServeCommand(click.Command):
    """A command with the options of serving."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the options by section."""
        write_sections(self, ctx, formatter)
