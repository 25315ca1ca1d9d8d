"""What `--yield` and `--share` say, parsed: how a node is a good neighbour of its machine's other work.

What the options about finding meshes and being found mean together.

The options of serving, shared by `mesh-llm` and `mesh-llm serve`, and what they mean together.
"""

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import click

from mesh_llm.cli.option_types import Number
from mesh_llm.core.config import MINUTES_A_DAY, YieldPolicy
from mesh_llm.core.types.announcement import MAX_MESH_NAME, MAX_REGION, Publicity
from mesh_llm.core.types.errors import MeshError
from mesh_llm.daemon.settings import LISTING_PERIOD, DiscoverySettings
from mesh_llm.discovery.nostr.relay_urls import relay_urls

DEFAULT_LOAD = 0.5
_SPAN = re.compile(r"^(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})$")
_PERCENT = re.compile(r"^(\d{1,3}(?:\.\d+)?)\s*%$")
_HOW = "Give load, load:70%, battery, fullscreen, auto (all three), or a time as in 09:00-17:30; several by commas."


def read_yield(values: Iterable[str]) -> YieldPolicy:
    """Parse all `--yield`. Raises MeshError `options`."""
    load, battery, fullscreen = 0.0, False, False
    schedule: list[tuple[int, int]] = []
    for word in (part.strip() for value in values for part in value.split(",")):
        kind, _, limit = word.partition(":") if word.startswith("load") else (word, "", "")
        if kind == "load":
            load = read_part(limit, "--yield load") if limit else DEFAULT_LOAD
        elif word == "auto":
            load, battery, fullscreen = load or DEFAULT_LOAD, True, True
        elif word == "battery":
            battery = True
        elif word == "fullscreen":
            fullscreen = True
        elif match := _SPAN.match(word):
            schedule.append(_span(word, *(int(number) for number in match.groups())))
        else:
            raise MeshError(code="options", message=f"--yield {word} is not known.", hint=_HOW)
    return YieldPolicy(load=load, battery=battery, fullscreen=fullscreen, schedule=tuple(schedule))


def read_part(text: str, what: str) -> float:
    """Parse a part of a whole: `50%` or `0.5`. Raises MeshError `options`."""
    match = _PERCENT.match(text)
    try:
        part = float(match[1]) / 100 if match else float(text)
    except ValueError:
        part = 0.0
    if not 0.0 < part <= 1.0:
        raise MeshError(
            code="options", message=f"{what} {text} is not a part of a whole.", hint="Give it as in 50% or 0.5."
        )
    return part


def most_slots(share: float) -> int:
    """How many requests at once are planned unasked by a node that offers this part of its machine."""
    return 4 if share > 0.75 else 2 if share > 0.25 else 1


def _span(word: str, first_hour: int, first_minute: int, last_hour: int, last_minute: int) -> tuple[int, int]:
    begin, end = first_hour * 60 + first_minute, last_hour * 60 + last_minute
    if begin >= MINUTES_A_DAY or end > MINUTES_A_DAY or max(first_minute, last_minute) > 59 or begin == end:
        raise MeshError(code="options", message=f"--yield {word} is not a span of a day.", hint=_HOW)
    return begin, end


PERIOD_VARIABLE = "MESH_LLM_LISTING_PERIOD"
_LEAST_PERIOD, _MOST_PERIOD = 0.5, 600.0


def read_discovery(options: dict[str, Any]) -> DiscoverySettings:
    """Check the options and put them together. Raises MeshError(options, nostr_relay)."""
    name, region = options["mesh_name"].strip(), options["region"].strip()
    for option, text, most in (("--mesh-name", name, MAX_MESH_NAME), ("--region", region, MAX_REGION)):
        if len(text) > most or not text.isprintable():
            raise _refused(f"{option} takes up to {most} printable characters.", "Shorten it.")
    publish = options["publish"]
    if publish and options["client"]:
        raise _refused("--client has no mesh of its own to --publish.", "Publish on a node that serves.")
    if options["auto"] and options["tokens"]:
        raise _refused("--auto finds a mesh, and --join names one.", "Leave one of them out.")
    only = [
        option
        for option, given in (
            ("--max-clients", options["max_clients"] is not None),
            ("--publish-scope", options["publish_scope"] is not None),
            ("--no-merge", options["no_merge"]),
        )
        if given
    ]
    if only and not publish:
        raise _refused(f"{', '.join(only)} is about --publish, which is not there.", "Add --publish, or leave it out.")
    publicity = Publicity(
        name=name,
        region=region,
        max_clients=options["max_clients"] or 0,
        scope=options["publish_scope"] or "serve",
    )
    return DiscoverySettings(
        auto=options["auto"],
        publicity=publicity if publish else None,
        relays=relay_urls(options["nostr_relays"]),
        region=region,
        merge=not options["no_merge"],
        period=_period(os.environ.get(PERIOD_VARIABLE, "")),
    )


def _period(text: str) -> float:
    """How often an unchanged listing is renewed: for trials, and for private relays."""
    if not text:
        return LISTING_PERIOD
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _LEAST_PERIOD <= seconds <= _MOST_PERIOD:
        raise _refused(
            f"{PERIOD_VARIABLE}={text[:20]} is no time in seconds.", f"From {_LEAST_PERIOD} to {_MOST_PERIOD:.0f}."
        )
    return seconds


def _refused(message: str, hint: str) -> MeshError:
    return MeshError(code="options", message=message, hint=hint)


_Command = TypeVar("_Command", bound=Callable[..., Any])

_PORT = click.IntRange(0, 65535)
_FILE = click.Path(path_type=Path)
_PATH = re.compile(r"[A-Za-z0-9._~/-]*")
_MOST_INPUT = 1 << 20
_KEY_VARIABLE, _JOIN_VARIABLE = "MESH_LLM_API_KEY", "MESH_LLM_JOIN"
SECRET_VARIABLES = (_KEY_VARIABLE, _JOIN_VARIABLE)

_OPTIONS = (
    click.option(
        "--model", "models", multiple=True, metavar="PATH|NAME|hf:...",
        help="Model to serve: a GGUF file, a name of a model here or in the catalogue, hf:OWNER/REPO, a URL, or tiny.",
    ),
    click.option("--no-fetch", is_flag=True,
                 help="Never fetch a model because the mesh calls for it, nor help with one that is not here."),
    click.option("--no-share", is_flag=True, help="Never give models' files to other nodes of the mesh."),
    click.option("--share-limit", type=Number(min=0, min_open=True), metavar="MB",
                 help="Most megabytes a second to give to other nodes.  [default: no limit]"),
    click.option("--yes", is_flag=True, help="Without --model: fetch the best for this machine without asking."),
    click.option("--join", "tokens", multiple=True, metavar="TOKEN|-",
                 help="Join a mesh by an invite; repeatable, one reachable is enough. -: read it from standard input. "
                 "Also MESH_LLM_JOIN."),
    click.option("--join-file", "token_files", multiple=True, type=_FILE, metavar="FILE",
                 help="Join by the invites in a file, one a line: other users of this machine see a command line."),
    click.option("--client", is_flag=True, help="Only use the mesh: no engine, no model, no gossip."),
    click.option("--port", "api_port", type=_PORT, default=9337, show_default=True, help="Port of the API; 0: any."),
    click.option("--console", "console_port", type=_PORT, default=3131, show_default=True,
                 help="Port of the console; 0: any."),
    click.option("--console-listen", default="127.0.0.1", show_default=True, metavar="ADDR",
                 help="Address that the console binds; others than loopback need --api-key."),
    click.option("--console-origin", "console_origins", multiple=True, metavar="URL",
                 help="Public https address of a proxy with TLS before the console; see docs/console.md."),
    click.option("--headless", is_flag=True, help="Only the management API on the console's port, no page."),
    click.option("--ctx-size", type=click.IntRange(min=1), metavar="N", help="Context of each slot, in tokens."),
    click.option("--parallel", type=click.IntRange(1, 256), metavar="N", help="Requests answered at once."),
    click.option("--max-vram", type=Number(min=0, min_open=True), metavar="GB",
                 help="Most memory that models may take."),
    click.option("--device", "devices", multiple=True, metavar="D", help="Use only this device; see engine list."),
    click.option("--bin-dir", type=_FILE, metavar="DIR", help="Use llama-server from here, not the embedded engine."),
    click.option("--lend-unconfined", is_flag=True,
                 help="Lend memory to split models also where the RPC server cannot be confined."),
    click.option("--draft", metavar="PATH|NAME", help="Draft model for speculative decoding."),
    click.option("--draft-max", type=click.IntRange(1, 64), default=16, show_default=True, metavar="N",
                 help="Most tokens drafted at once."),
    click.option("--no-draft", is_flag=True, help="Never use a draft model."),
    click.option("--no-mmproj", is_flag=True, help="Serve models without the vision projectors beside them."),
    click.option("--split", is_flag=True, help="Share the model with other nodes even where it fits this one."),
    click.option("--tensor-split", metavar="R,R", help="Parts of a shared model: the host's, then each worker's."),
    click.option("--max-rtt", type=Number(min=0, min_open=True), default=80.0, show_default=True,
                 metavar="MS", help="Longest round trip to a node that a model is shared with."),
    click.option("--yield", "yields", multiple=True, metavar="WHEN",
                 help="Give the machine back to its owner: load[:50%], battery, fullscreen, auto, HH:MM-HH:MM."),
    click.option("--share", default="100%", show_default=True, metavar="PART",
                 help="Most of the machine's memory and processors to offer."),
    click.option("--models-dir", "models_dirs", multiple=True, type=_FILE, metavar="DIR",
                 help="Look for models here too."),
    click.option("--listen", default="127.0.0.1", show_default=True, metavar="ADDR",
                 help="Address that the API binds; others than loopback need --api-key."),
    click.option("--api-key", "api_keys", multiple=True, metavar="KEY|@FILE",
                 help="Key that requests must show. Other users of this machine see a key that is written here: "
                 "use --api-key-file, or MESH_LLM_API_KEY."),
    click.option("--api-key-file", "api_key_files", multiple=True, type=_FILE, metavar="FILE",
                 help="File with API keys, one a line."),
    click.option("--lan", is_flag=True,
                 help="Announce this mesh on the local network; without a token: find one there and ask to join."),
    click.option("--mesh-name", default="", metavar="NAME",
                 help="What to call this mesh; with --lan and no token: the one to join."),
    click.option("--resume-wait", type=Number(0, 3600), default=30.0, show_default=True, metavar="SECONDS",
                 help="How long an answer whose node was lost waits for another that goes on with it."),
    click.option("--auto", is_flag=True, help="Find a mesh on Nostr and join the best; with --model: else start one."),
    click.option("--publish", is_flag=True, help="List this mesh on Nostr, for anybody to find and join."),
    click.option("--region", default="", metavar="REGION", help="Where this node is, as in AU or eu-west."),
    click.option("--max-clients", type=click.IntRange(1, 1_000_000), metavar="N",
                 help="Clients at which the mesh is full, and no longer listed.  [default: no limit]"),
    click.option("--publish-scope", type=click.Choice(["client", "serve", "split"]),
                 help="What whoever finds the mesh may do.  [default: serve]"),
    click.option("--no-merge", is_flag=True, help="Stay, when a larger mesh of this one's name is listed."),
    click.option("--nostr-relay", "nostr_relays", multiple=True, metavar="URL",
                 help="Use this Nostr relay instead of the public ones; repeatable."),
    click.option("--name", default="", metavar="NAME", help="What to call this node.  [default: the host's name]"),
    click.option("--quic-port", type=_PORT, default=0, show_default=True, metavar="PORT",
                 help="UDP port of the mesh; 0: any."),
    click.option(
        "--no-relay",
        is_flag=True,
        help="Only direct connections: no public relays and lookup. Also MESH_LLM_RELAY=off.",
    ),
    click.option("--journal", type=_FILE, metavar="FILE", help="Record every decision's cause, for replay."),
    click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info",
                 show_default=True, help="What the node's own log holds."),
)  # fmt: skip


def serve_options(command: _Command) -> _Command:
    """Add the options of serving to a click command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def read_api_keys(values: Iterable[str], environment: str | None) -> tuple[str, ...]:
    """Collect API keys from options and the environment; `@FILE` names a file with one key a line, # for comments.

    Raises:
        MeshError: `api_key_file`, `api_key_bad`.
    """
    from mesh_llm.core.types.errors import MeshError

    keys: list[str] = []
    for value in (*values, *([environment] if environment else [])):
        keys += _lines(value[1:], "API keys", "api_key_file") if value.startswith("@") else [value]
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise MeshError(
                code="api_key_bad",
                message="An API key has characters that cannot travel in a header.",
                hint="Use printable ASCII without spaces, as made by: openssl rand -hex 24",
            )
    return tuple(dict.fromkeys(keys))


def read_invites(values: Iterable[str], files: Iterable[Path], environment: str | None) -> tuple[str, ...]:
    """Collect invites from options (`-`: a line of standard input each), files and the environment (by white space).

    Raises:
        MeshError: `invite_file`; `options`, where standard input has none.
    """
    from mesh_llm.core.types.errors import MeshError

    tokens: list[str] = []
    for value in values:
        if value != "-":
            tokens.append(value)
            continue
        read = sys.stdin.read(_MOST_INPUT).split() if sys.stdin is not None else []
        if not read:
            raise MeshError(
                code="options",
                message="--join - reads an invite from standard input, and there was none.",
                hint="Pipe it in: mesh-llm --join - < FILE",
            )
        tokens += read
    for file in files:
        tokens += _lines(str(file), "invites", "invite_file")
    return tuple(dict.fromkeys([*tokens, *(environment or "").split()]))


def _lines(name: str, what: str, code: str) -> list[str]:
    """The lines of a file, without comments (#). Raises MeshError."""
    from mesh_llm.core.types.errors import MeshError
    from mesh_llm.runtime.home import expand

    path = expand(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MeshError(
            code=code,
            message=f"Cannot read {what} from {path}: {getattr(error, 'strerror', None) or error}.",
            hint="Give a text file with one a line.",
        ) from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def read_origins(urls: Iterable[str]) -> tuple[str, ...]:
    """Check `--console-origin`: https, a host, and a path where the proxy has the console below one.

    Returns each as a URL that ends in a slash. Raises MeshError(options).
    """
    from mesh_llm.core.types.errors import MeshError
    from mesh_llm.wire.http.authority import split_origin

    checked: list[str] = []
    for url in urls:
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        if scheme.lower() != "https" or split_origin(f"https://{authority}") is None or _PATH.fullmatch(path) is None:
            raise MeshError(
                code="options",
                message=f"--console-origin {url} is not the public address of a proxy with TLS.",
                hint="Give it as browsers show it: https://mesh.example, or https://example.org/mesh/",
            )
        checked.append(f"https://{authority.lower()}/{path.rstrip('/') + '/' if path else ''}")
    return tuple(dict.fromkeys(checked))


def read_shares(text: str | None) -> tuple[float, ...]:
    """Parse `--tensor-split`: relative parts, the host's first.

    Raises:
        MeshError: `options`.
    """
    from mesh_llm.core.types.errors import MeshError
    from mesh_llm.core.types.model import MOST_SHARES

    if text is None:
        return ()
    try:
        shares = tuple(float(part) for part in text.split(","))
    except ValueError:
        shares = ()
    if not 2 <= len(shares) <= MOST_SHARES or not all(0 <= share < 1e9 for share in shares) or not any(shares[1:]):
        raise MeshError(
            code="options",
            message=f"--tensor-split {text} does not say how to share a model.",
            hint="Give the host's part and each worker's, as in --tensor-split 2,1 or 60,30,10.",
        )
    return shares


def to_settings(options: dict[str, Any]) -> Any:
    """Turn parsed options into daemon settings. Raises MeshError where options contradict each other."""
    from mesh_llm.core.config import SplitOptions
    from mesh_llm.core.types.errors import MeshError
    from mesh_llm.core.types.model import LaunchOptions
    from mesh_llm.daemon.settings import Settings
    from mesh_llm.runtime.home import Home
    from mesh_llm.wire.http.authority import is_loopback_address, unbracketed

    if options["draft"] and options["no_draft"]:
        raise MeshError(
            code="options", message="--draft and --no-draft contradict each other.", hint="Leave one of them out."
        )
    if options["client"] and options["models"]:
        raise MeshError(
            code="options",
            message="--client serves nothing, so it takes no --model.",
            hint="Name the model in each request; or leave --client out to serve.",
        )
    key_files = (f"@{file}" for file in options["api_key_files"])
    keys = read_api_keys((*options["api_keys"], *key_files), os.environ.get(_KEY_VARIABLE))
    tokens = read_invites(options["tokens"], options["token_files"], os.environ.get(_JOIN_VARIABLE))
    listen, console_listen = unbracketed(options["listen"]), unbracketed(options["console_listen"])
    if not is_loopback_address(listen) and not keys:
        raise MeshError(
            code="api_key_required",
            message=f"--listen {listen} opens the API to other machines, so it needs an API key.",
            hint="Add --api-key-file FILE, or set MESH_LLM_API_KEY; make a key with: openssl rand -hex 24",
        )
    _check_ports(options["api_port"], listen, options["console_port"], console_listen)
    if options["client"] and (options["split"] or options["tensor_split"]):
        raise MeshError(
            code="options",
            message="--client computes nothing, so it takes no --split.",
            hint="Leave --client out to take part in a shared model.",
        )
    if options["client"] and options["yields"]:
        raise MeshError(
            code="options", message="--client serves nothing, so it has nothing to --yield.", hint="Leave one out."
        )
    share = read_part(options["share"], "--share")
    return Settings(
        home=Home.default().root,
        models=tuple(options["models"]),
        join=tokens,
        client=options["client"],
        name=options["name"],
        api_port=options["api_port"],
        console_port=options["console_port"],
        console_listen=console_listen,
        console_origins=read_origins(options["console_origins"]),
        console_page=not options["headless"],
        listen=listen,
        api_keys=keys,
        max_memory_bytes=None if options["max_vram"] is None else int(options["max_vram"] * 1e9),
        devices=tuple(options["devices"]),
        bin_dir=options["bin_dir"],
        lend_unconfined=options["lend_unconfined"],
        launch=LaunchOptions(
            context=options["ctx_size"],
            slots=options["parallel"],
            draft=options["draft"],
            draft_max=options["draft_max"],
            use_draft=not options["no_draft"],
            use_projector=not options["no_mmproj"],
            most_slots=most_slots(share),
        ),
        split=SplitOptions(
            asked=options["split"],
            shares=read_shares(options["tensor_split"]),
            max_rtt_ms=options["max_rtt"],
        ),
        models_dirs=tuple(options["models_dirs"]),
        quic_port=options["quic_port"],
        relay=not options["no_relay"] and os.environ.get("MESH_LLM_RELAY", "") not in {"off", "disabled"},
        journal=options["journal"],
        log_level=options["log_level"],
        lan=options["lan"],
        fetch=not options["no_fetch"],
        give=not options["no_share"],
        share_limit=None if options["share_limit"] is None else options["share_limit"] * 1e6,
        yes=options["yes"],
        resume_wait=options["resume_wait"],
        yields=read_yield(options["yields"]),
        share=share,
        mesh_name=options["mesh_name"].strip(),
        discovery=read_discovery({**options, "tokens": tokens}),
    )


def _check_ports(api_port: int, listen: str, console_port: int, console_listen: str) -> None:
    """Raise MeshError(options) where both would listen in one place: the second would blame another program."""
    from mesh_llm.core.types.errors import MeshError

    everywhere = {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    meet = listen == console_listen or everywhere & {listen, console_listen}
    if api_port == console_port and api_port != 0 and meet:
        raise MeshError(
            code="options",
            message=f"--port and --console are both {api_port}.",
            hint="Give them two ports: the API is on 9337 and the console on 3131 unless you say otherwise.",
        )
