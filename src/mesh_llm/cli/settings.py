"""From the options of serving to the daemon's settings: what each value means, and which contradict each other."""

import os
import re
import stat
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm.api.types import KeyLimit, split_key
from mesh_llm.cli.options import MERGE_HELD
from mesh_llm.core.config import MINUTES_A_DAY, OnDemandPolicy, SplitOptions, YieldPolicy
from mesh_llm.core.listing.content import MESH_KEY_DIGITS
from mesh_llm.core.trust.circle import MAX_OWNERS, Privacy
from mesh_llm.core.trust.strangers import NO_LIMITS, StrangerLimits
from mesh_llm.core.types.announcement import MAX_MESH_NAME, MAX_NAME, MAX_REGION, ListingPolicy
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import OwnerId
from mesh_llm.core.types.model import MAX_SPLIT_NODES, LaunchOptions
from mesh_llm.core.types.model_settings import AUTO, EngineOptions, takes_draft
from mesh_llm.daemon.settings import LISTING_PERIOD, PUBLISH_SCOPE, DiscoverySettings, Settings
from mesh_llm.discovery.nostr import parse_relay_urls
from mesh_llm.runtime.home import Home, expand
from mesh_llm.wire.http.http1 import (
    canonical_origin,
    is_loopback_address,
    split_authority,
    split_origin,
    unbracketed,
)

_KEY_VARIABLE, _JOIN_VARIABLE = "MESH_LLM_API_KEY", "MESH_LLM_JOIN"
SECRET_VARIABLES = (_KEY_VARIABLE, _JOIN_VARIABLE)
PERIOD_VARIABLE = "MESH_LLM_LISTING_PERIOD"
_LEAST_PERIOD, _MOST_PERIOD = 0.5, 600.0
_MOST_INPUT = 1 << 20

DEFAULT_LOAD = 0.5
_SPAN = re.compile(r"^(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})$")
_PERCENT = re.compile(r"^(\d{1,3}(?:\.\d+)?)\s*%$")
_SIZE = re.compile(r"^(\d{1,6}(?:\.\d+)?)\s*(MB|GB|TB)?$", re.IGNORECASE)
_UNITS = {"mb": 10**6, "gb": 10**9, "tb": 10**12}
_LIMIT = re.compile(r"(tokens_per_day|concurrent|privacy)\s*=\s*([1-9]\d{0,14}|own|group|any)")
_STRANGER_LIMIT = re.compile(
    r"(concurrent|tokens_per_day|all_concurrent|all_tokens_per_day)=([1-9][0-9]{0,14}|off)(?=,|$)"
)
_OWNER = re.compile(r"[0-9a-f]{64}")
_PATH = re.compile(r"[A-Za-z0-9._~/-]*")
_MESH_KEY = re.compile(rf"[0-9a-f]{{{MESH_KEY_DIGITS},64}}")
_WHEN = (
    "Use load, load:70%, battery, fullscreen, auto (all three) or a time such as 09:00-17:30; separate several by "
    "commas."
)


def to_settings(options: dict[str, Any], environment: Mapping[str, str] = os.environ) -> Settings:
    """Turn parsed options into settings. Raises MeshError where a value is wrong, or options contradict each other."""
    if options["draft"] and options["no_draft"]:
        raise _refused("--draft and --no-draft contradict each other.", "Leave one of them out.")
    speculation = _speculation(options)
    if options["client"]:
        _check_client(options)
    key_files = (f"@{file}" for file in options["api_key_files"])
    keys = read_api_keys((*options["api_keys"], *key_files), environment.get(_KEY_VARIABLE))
    tokens = read_invites(options["tokens"], options["token_files"], environment.get(_JOIN_VARIABLE))
    listen, console_listen = unbracketed(options["listen"]), unbracketed(options["console_listen"])
    if not is_loopback_address(listen) and not keys:
        raise MeshError(
            code="api_key_required",
            message=f"--listen {listen} opens the API to other machines, so it needs an API key.",
            hint="Add --api-key-file FILE, or set MESH_LLM_API_KEY. Make a key with: openssl rand -hex 24",
        )
    _check_ports(options["api_port"], listen, options["console_port"], console_listen)
    _check_ollama_port(options)
    use = read_part(options["use"], "--use")
    return Settings(
        home=Home.default().root,
        models=tuple(options["models"]),
        join=tokens,
        client=options["client"],
        name=_read_name(options["name"]),
        api_port=options["api_port"],
        ollama_port=options["ollama_port"],
        console_port=options["console_port"],
        console_listen=console_listen,
        console_origins=read_origins(options["console_origins"]),
        console_page=not options["headless"],
        listen=listen,
        allow_hosts=read_hosts(options["allow_hosts"]),
        allow_origins=read_allowed_origins(options["allow_origins"]),
        api_keys=keys,
        key_limits=read_key_limits(options["key_limits"], keys),
        stranger_limits=read_stranger_limits(options["stranger_limits"]),
        max_memory_bytes=None if options["max_vram"] is None else int(options["max_vram"] * 1e9),
        devices=tuple(options["devices"]),
        gpu=options["gpu"],
        bin_dir=options["bin_dir"],
        lend_unconfined=options["lend_unconfined"],
        launch=LaunchOptions(
            context=options["ctx_size"],
            slots=options["parallel"],
            draft=options["draft"],
            draft_max=options["draft_max"],
            use_draft=takes_draft(speculation) and not options["no_draft"],
            use_projector=not options["no_mmproj"],
            cache_type=options["cache_type"],
            gpu_layers=options["gpu_layers"],
            cpu_moe=options["cpu_moe"],
            most_slots=most_slots(use),
            engine=EngineOptions(speculation=speculation),
        ),
        split=SplitOptions(
            asked=options["split"],
            shares=read_tensor_split(options["tensor_split"]),
            max_rtt_ms=options["max_rtt"],
            groups=options["groups"],
            wire=options["wire"],
        ),
        models_dirs=tuple(options["models_dirs"]),
        quic_port=options["quic_port"],
        tls=options["transport"] == "auto",
        relay=not options["no_relay"] and os.environ.get("MESH_LLM_RELAY", "") not in {"off", "disabled"},
        journal=options["journal"],
        log_level=options["log_level"],
        lan=options["lan"],
        fetch=not options["no_fetch"],
        seed=not options["no_seed"],
        seed_strangers=options["seed_strangers"],
        seed_limit=None if options["seed_limit"] is None else options["seed_limit"] * 1e6,
        yes=options["yes"],
        default_model=options["default_model"].strip(),
        store=not options["no_store"],
        receipts=options["receipts"],
        canaries=options["canaries"] == "on",
        canary_share=options["canary_share"] / 100.0,
        privacy=Privacy(options["privacy"]),
        group=read_group(options["group"]),
        drain=options["drain"],
        queue_wait=options["queue_wait"],
        resume_wait=options["resume_wait"],
        on_demand=OnDemandPolicy(
            scope=options["on_demand"],
            pinned=tuple(options["pins"]),
            ttl=options["ttl"],
            min_lifetime=options["min_lifetime"],
        ),
        load_wait=options["load_wait"],
        fetch_on_demand=options["fetch_on_demand"],
        yields=read_yield(options["yields"]),
        use=use,
        mesh_name=options["mesh_name"].strip(),
        discovery=_read_discovery({**options, "tokens": tokens}),
        invite_scope=options["invite_scope"] or "split",
        prompt_cache_bytes=read_cache_size(options["prompt_cache"]),
    )


def _speculation(options: Mapping[str, Any]) -> str:
    """The kind of speculation that `--spec` names; empty for `auto`. Raises MeshError."""
    kind: str = options["spec"]
    if options["draft"] and not takes_draft(kind):
        raise _refused(f"--draft and --spec {kind} contradict each other.", "Leave one of them out.")
    if options["no_draft"] and kind != AUTO and takes_draft(kind):
        raise _refused(f"--no-draft and --spec {kind} contradict each other.", "Leave one of them out.")
    if kind == "eagle3" and not options["draft"]:
        raise _refused("--spec eagle3 needs the draft that was made for the model.", "Add --draft FILE.")
    return "" if kind == AUTO else kind


def _check_client(options: dict[str, Any]) -> None:
    if options["models"]:
        raise _refused(
            "--client serves nothing, so it takes no --model.",
            "Name the model in each request; or leave --client out to serve.",
        )
    if options["split"] or options["tensor_split"]:
        raise _refused(
            "--client computes nothing, so it takes no --split.", "Leave --client out to take part in a split model."
        )
    if options["yields"]:
        raise _refused("--client serves nothing, so it has nothing to --yield.", "Leave one of them out.")
    if options["invite_scope"]:
        raise _refused("--client invites nobody, so it takes no --invite-scope.", "Leave one of them out.")
    if options["publish"]:
        raise _refused("--client has no mesh of its own to --publish.", "Publish on a node that serves.")


def _check_ports(api_port: int, listen: str, console_port: int, console_listen: str) -> None:
    """Refuse one port for both: the second to listen would blame another program."""
    everywhere = {"0.0.0.0", "::"}  # noqa: S104 - compared, not bound
    meet = listen == console_listen or everywhere & {listen, console_listen}
    if api_port == console_port and api_port != 0 and meet:
        raise _refused(
            f"--port and --console are both {api_port}.",
            "Give them two ports. The defaults are 9337 for the API and 3131 for the console.",
        )


def _check_ollama_port(options: dict[str, Any]) -> None:
    port = options["ollama_port"]
    if port and port in {options["api_port"], options["console_port"]}:
        other = "--port" if port == options["api_port"] else "--console"
        raise _refused(
            f"--ollama-port and {other} are both {port}.",
            "Give it a port of its own; clients of Ollama expect 11434. On --port they are answered without it.",
        )


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
            raise _refused(f"--yield {word} is not known.", _WHEN)
    return YieldPolicy(load=load, battery=battery, fullscreen=fullscreen, schedule=tuple(schedule))


def _span(word: str, first_hour: int, first_minute: int, last_hour: int, last_minute: int) -> tuple[int, int]:
    begin, end = first_hour * 60 + first_minute, last_hour * 60 + last_minute
    if begin >= MINUTES_A_DAY or end > MINUTES_A_DAY or max(first_minute, last_minute) > 59 or begin == end:
        raise _refused(f"--yield {word} is not a span of a day.", _WHEN)
    return begin, end


def read_part(text: str, option: str) -> float:
    """Parse a part of a whole: `50%` or `0.5`. Raises MeshError `options`."""
    match = _PERCENT.match(text)
    try:
        part = float(match[1]) / 100 if match else float(text)
    except ValueError:
        part = 0.0
    if not 0.0 < part <= 1.0:
        raise _refused(f"{option} {text} is not a part of a whole.", "Write it as 50% or 0.5.")
    return part


def read_cache_size(text: str) -> int:
    """Parse `--prompt-cache`: `off`, or bytes as in `4GB`, `500MB`; without a unit, GB. Raises MeshError `options`."""
    word = text.strip()
    if word.lower() in {"off", "none", "0"}:
        return 0
    match = _SIZE.match(word)
    if match is None:
        raise _refused(f"--prompt-cache {word[:40]} is not a size.", "Write it as 4GB or 500MB; off saves nothing.")
    return int(float(match[1]) * _UNITS[(match[2] or "gb").lower()])


def most_slots(use: float) -> int:
    """Most slots that are planned for a model, without `--parallel`, on a node that offers this part of its machine."""
    return 4 if use > 0.75 else 2 if use > 0.25 else 1


def read_tensor_split(text: str | None) -> tuple[float, ...]:
    """Parse `--tensor-split`: relative parts, the host's first. Raises MeshError `options`."""
    if text is None:
        return ()
    try:
        parts = tuple(float(part) for part in text.split(","))
    except ValueError:
        parts = ()
    if not 2 <= len(parts) <= MAX_SPLIT_NODES or not all(0 <= part < 1e9 for part in parts) or not any(parts[1:]):
        raise _refused(
            f"--tensor-split {text} does not say how to split a model.",
            "Give the host's part and each worker's, as in --tensor-split 2,1 or 60,30,10.",
        )
    return parts


def read_api_keys(values: Iterable[str], environment: str | None) -> tuple[str, ...]:
    """Collect API keys from options and the environment. `@FILE` names a file with one key a line, # for comments.

    Raises:
        MeshError: `api_key_file`, `api_key_bad`.
    """
    keys: list[str] = []
    for value in (*values, *([environment] if environment else [])):
        keys += _lines(value[1:], "API keys", "api_key_file") if value.startswith("@") else [value]
    for key in keys:
        if not key.isascii() or not key.isprintable() or " " in key or not key:
            raise MeshError(
                code="api_key_bad",
                message="An API key has characters that an HTTP header cannot carry.",
                hint="Use printable ASCII without spaces. Make a key with: openssl rand -hex 24",
            )
    return tuple(dict.fromkeys(keys))


def exposed_secrets(options: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[Path, ...]:
    """Files with API keys or invites that other users can read; none where permissions are not POSIX's."""
    keys = (*options["api_keys"], environment.get(_KEY_VARIABLE, ""))
    files = (*options["api_key_files"], *options["token_files"], *(key[1:] for key in keys if key.startswith("@")))
    paths = [path for path in map(expand, files) if os.name == "posix" and path.is_file()]
    return tuple(path for path in paths if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH))


def read_key_limits(values: Iterable[str], keys: Iterable[str]) -> dict[str, KeyLimit]:
    """Parse `--key-limit`: `NAME:tokens_per_day=N,concurrent=N`. Raises MeshError `options`."""
    names = {split_key(key)[0] for key in keys}
    limits: dict[str, KeyLimit] = {}
    for value in values:
        name, _, text = value.partition(":")
        found = _LIMIT.findall(text)
        if not found or ",".join(f"{word}={number}" for word, number in found) != text.replace(" ", ""):
            raise _refused(
                f"--key-limit {value[:80]} is not understood.",
                "Write it as --key-limit laptop:tokens_per_day=100000,concurrent=4. Keys without a name are `unnamed`.",
            )
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise _refused(
                f"--key-limit names the key {name[:40]!r}, which is not there.",
                f"There are: {known}. Name a key with --api-key-file FILE, and a line {name[:40] or 'NAME'}:KEY in it.",
            )
        if any(number.isdigit() == (word == "privacy") for word, number in found):
            hint = "Write it as --key-limit laptop:privacy=own,concurrent=4."
            raise _refused(f"--key-limit {value[:80]} is not understood.", hint)
        given = {word: Privacy(number) if word == "privacy" else int(number) for word, number in found}
        limits[name] = msgspec.structs.replace(limits.get(name, KeyLimit()), **given)
    return limits


def read_group(values: Iterable[str]) -> tuple[OwnerId, ...]:
    """Parse `--group`. Raises MeshError `options`."""
    keys = tuple(dict.fromkeys(value.strip().lower() for value in values))
    for key in keys:
        if not _OWNER.fullmatch(key):
            hint = "It has 64 hex digits; its owner sees it with: mesh-llm owner show"
            raise _refused(f"--group {key[:80]} is no owner key.", hint)
    if len(keys) >= MAX_OWNERS:
        raise _refused(f"--group names {len(keys)} owners.", f"Name {MAX_OWNERS - 1} at most.")
    return tuple(map(OwnerId, keys))


def read_invites(values: Iterable[str], files: Iterable[Path], environment: str | None) -> tuple[str, ...]:
    """Collect invites from options (`-`: all of standard input), files and the environment (separated by white space).

    Raises:
        MeshError: `invite_file`; `options` if standard input holds none.
    """
    tokens: list[str] = []
    for value in values:
        if value != "-":
            tokens.append(value)
            continue
        read = sys.stdin.read(_MOST_INPUT).split() if sys.stdin is not None else []
        if not read:
            raise _refused(
                "--join - reads an invite from standard input, and there was none.",
                "Pipe it in: mesh-llm --join - < FILE",
            )
        tokens += read
    for file in files:
        tokens += _lines(str(file), "invites", "invite_file")
    return tuple(dict.fromkeys([*tokens, *(environment or "").split()]))


def _lines(name: str, what: str, code: str) -> list[str]:
    """The lines of a file, without comments (#). Raises MeshError."""
    path = expand(name)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise MeshError(
            code=code,
            message=f"Cannot read {what} from {path}: {getattr(error, 'strerror', None) or error}.",
            hint="Give a text file with one per line.",
        ) from error
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def read_origins(urls: Iterable[str]) -> tuple[str, ...]:
    """Check `--console-origin`: https, a host, and the path below which the proxy has the console.

    Returns each as a URL that ends in a slash. Raises MeshError `options`.
    """
    checked: list[str] = []
    for url in urls:
        scheme, _, rest = url.partition("://")
        authority, _, path = rest.partition("/")
        if scheme.lower() != "https" or split_origin(f"https://{authority}") is None or _PATH.fullmatch(path) is None:
            raise _refused(
                f"--console-origin {url} is not the public address of a TLS proxy.",
                "Write it as browsers show it: https://mesh.example, or https://example.org/mesh/",
            )
        checked.append(f"https://{authority.lower()}/{path.rstrip('/') + '/' if path else ''}")
    return tuple(dict.fromkeys(checked))


def read_stranger_limits(text: str) -> StrangerLimits:
    """Parse `--stranger-limit`: `off`, or quotas as in `concurrent=2,tokens_per_day=off`; those not named stay.

    Raises MeshError `options`.
    """
    words = text.replace(" ", "")
    if words == "off":
        return NO_LIMITS
    found = _STRANGER_LIMIT.findall(words)
    names = [name for name, _ in found]
    if not found or ",".join(f"{name}={number}" for name, number in found) != words or len(set(names)) < len(names):
        raise _refused(
            f"--stranger-limit {text[:80]} is not understood.",
            "Write it as concurrent=2,tokens_per_day=500000,all_concurrent=8,all_tokens_per_day=5000000; off in place "
            "of a number lifts that quota, and --stranger-limit off all of them.",
        )
    values = {name: 0 if number == "off" else int(number) for name, number in found}
    return msgspec.structs.replace(StrangerLimits(), **values)


def read_hosts(names: Iterable[str]) -> tuple[str, ...]:
    """Check `--allow-host`: a name or address, with a port if only that one is meant. Raises MeshError `options`."""
    hosts = [name.strip().lower() for name in names]
    for host in hosts:
        if split_authority(host) is None:
            raise _refused(
                f"--allow-host {host[:80]} is not one host name.",
                "Write it as in an address, without http:// and path: host.docker.internal, mybox.local:8080. Each "
                "name is given by itself: any name (*) would let every web page in by DNS rebinding.",
            )
    return tuple(dict.fromkeys(hosts))


def read_allowed_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Check `--allow-origin`. Raises MeshError `options`."""
    found: list[str] = []
    for origin in origins:
        named = canonical_origin(origin.strip().removesuffix("/"))
        if named is None:
            raise _refused(
                f"--allow-origin {origin[:80]} is not the origin of one page or program.",
                "Write it as browsers send it, without a path: https://chat.example, app://obsidian.md, "
                "chrome-extension://ID. `*` and `null` would let every page in, and are not accepted.",
            )
        found.append(named)
    return tuple(dict.fromkeys(found))


def _read_name(name: str) -> str:
    _check_one_line("--name", name, MAX_NAME)
    return name


def _check_one_line(option: str, text: str, most: int) -> None:
    if len(text) > most or not text.isprintable():
        raise _refused(f"{option} takes up to {most} printable characters.", "Give a shorter one, on one line.")


def _read_discovery(options: dict[str, Any]) -> DiscoverySettings:
    """What the options about finding meshes, and being found, mean together. Raises MeshError(options, nostr_relay)."""
    name, region = options["mesh_name"].strip(), options["region"].strip()
    for option, text, most in (("--mesh-name", name, MAX_MESH_NAME), ("--region", region, MAX_REGION)):
        _check_one_line(option, text, most)
    publish = options["publish"]
    if options["auto"] and options["tokens"]:
        raise _refused("--auto finds a mesh, and --join names one.", "Leave one of them out.")
    only = [
        option
        for option, given in (
            ("--max-clients", options["max_clients"] is not None),
            ("--publish-scope", options["publish_scope"] is not None),
            ("--merge", options["merge"]),
        )
        if given
    ]
    if only and not publish:
        raise _refused(f"{', '.join(only)} means nothing without --publish.", "Add --publish, or leave it out.")
    publicity = ListingPolicy(
        name=name,
        region=region,
        max_clients=options["max_clients"] or 0,
        scope=options["publish_scope"] or PUBLISH_SCOPE,
    )
    return DiscoverySettings(
        auto=options["auto"],
        publicity=publicity if publish else None,
        relays=parse_relay_urls(options["nostr_relays"]),
        region=region,
        merge_keys=_read_mesh_keys(options["merge"]),
        merge_held=MERGE_HELD in options["merge"],
        period=_listing_period(os.environ.get(PERIOD_VARIABLE, "")),
    )


def _read_mesh_keys(values: Iterable[str]) -> tuple[str, ...]:
    """The keys of `--merge`, each at least as long as `discover` shows it. Raises MeshError `options`."""
    keys = [value.strip().lower() for value in values if value != MERGE_HELD]
    for key in keys:
        if not _MESH_KEY.fullmatch(key):
            raise _refused(
                f"--merge {key[:80]} is not the key of a mesh.",
                f"Give at least its first {MESH_KEY_DIGITS} digits, as mesh-llm discover shows them under KEY. "
                "Names do not count: a stranger can use the same one.",
            )
    return tuple(dict.fromkeys(keys))


def _listing_period(text: str) -> float:
    """How often an unchanged listing is renewed. The variable is for trials, and for private relays."""
    if not text:
        return LISTING_PERIOD
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not _LEAST_PERIOD <= seconds <= _MOST_PERIOD:
        raise _refused(
            f"{PERIOD_VARIABLE}={text[:20]} is not a number of seconds that can be used.",
            f"Use {_LEAST_PERIOD} to {_MOST_PERIOD:.0f}.",
        )
    return seconds


def _refused(message: str, hint: str) -> MeshError:
    return MeshError(code="options", message=message, hint=hint)
