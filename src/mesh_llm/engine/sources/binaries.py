"""The user's own llama.cpp programs as an engine source: `--bin-dir`, or what is found on PATH.

Builds differ in their options and in what they print (llama.cpp: common/arg.cpp, common/build-info.cpp.in).
"""

import asyncio
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.arguments import read_arguments
from mesh_llm.engine.confinement.launcher import CPU, GPU
from mesh_llm.engine.confinement.policy import RpcPolicy, client_environment, program_directories
from mesh_llm.engine.devices import cpu_device, with_threads
from mesh_llm.engine.probe import RpcProbe, probe_rpc_server
from mesh_llm.engine.process import Command, run
from mesh_llm.engine.spec import (
    CPU_DEVICE,
    LOOPBACK,
    NGRAM,
    NGRAM_KEY,
    NO_PROGRAMS,
    DeviceInfo,
    DeviceKind,
    EngineInfo,
    EngineSpec,
    RpcWorkerSpec,
    experts_override,
    output_override,
)
from mesh_llm.runtime.home import expand

NAME = "binaries"
SERVER = "llama-server"
RPC_SERVERS = ("rpc-server", "ggml-rpc-server")

_QUESTION_SECONDS = 30.0
_UNIX_SOCKETS = ".sock"
"""In the help of builds that listen on Unix sockets (`--host`, since March 2025)."""


@dataclass(frozen=True, kw_only=True)
class BinaryVersion:
    """Of `--version`: the build number if there is one, else the version; and the rest for people."""

    version: str = ""
    build: str = ""


class BinarySource:
    """The EngineSource of the user's llama-server and, if there is one, rpc-server."""

    name = NAME

    def __init__(self, server: Path, rpc_server: Path | None, policy: RpcPolicy) -> None:
        self.path = server
        self._rpc_server = rpc_server
        self._policy = policy
        self._help: str | None = None

    @classmethod
    def find(cls, bin_dir: Path | None, cache: Path, *, unconfined: bool = False) -> "BinarySource | None":
        """The programs in `bin_dir`, or on PATH if that is None; None if there is no llama-server.

        Args:
            bin_dir: their directory.
            cache: the home's cache directory.
            unconfined: lend memory even if RPC servers cannot be confined.

        Raises:
            MeshError: `bin_dir_empty`, if a directory was given and contains none.
        """
        places = str(expand(bin_dir)) if bin_dir else os.environ.get("PATH", os.defpath)
        server = shutil.which(SERVER, path=places)
        if server is None:
            if bin_dir is None:
                return None
            raise MeshError(
                code="bin_dir_empty",
                message=f"There is no program {SERVER} in {bin_dir}.",
                hint="Give the directory of llama.cpp's programs, as in --bin-dir ~/llama.cpp/build/bin.",
                status=400,
            )
        # Both must be from one build, so the RPC server is searched beside llama-server first.
        beside = os.pathsep.join((str(Path(server).parent), places))
        rpc = next((path for name in RPC_SERVERS if (path := shutil.which(name, path=beside))), None)
        policy = RpcPolicy(cache=cache, unconfined=unconfined)
        return cls(Path(server).absolute(), Path(rpc).absolute() if rpc else None, policy)

    async def info(self) -> EngineInfo:
        """Ask the programs for their version, devices and RPC protocol."""
        (version, trouble), devices = await asyncio.gather(self._version(), self._devices())
        kind = GPU if any(device.holds_models for device in devices) else CPU
        rpc = await self._probe_rpc(kind)
        return EngineInfo(
            source=NAME,
            version=version.version,
            build=version.build,
            rpc_version=rpc.version,
            confinement=self._policy.how(kind) if rpc.version else "",
            not_lent=rpc.refusal,
            path=str(self.path),
            devices=devices,
            problems=tuple(text for text in (trouble, rpc.problem) if text),
            usable=not trouble,
        )

    async def server(self, spec: EngineSpec) -> Command:
        """llama-server with the options that this build knows."""
        text = await self._help_text()
        endpoints, env = await asyncio.to_thread(client_environment, spec.rpc, self._policy.cache)
        spec = replace(spec.unswitched, rpc=endpoints)
        if _UNIX_SOCKETS not in text:
            spec = replace(spec, socket=None)
        if spec.rpc and spec.devices and not spec.uses_cpu_only:
            spec = with_places(spec, tuple(one.id for one in await self._devices() if one.holds_models))
        arguments = server_arguments(with_threads(spec), parse_flags(text))
        address = f"unix:{spec.socket}" if spec.socket is not None else ""
        return Command(
            argv=(str(self.path), *arguments),
            env=dict(spec.environment) | env,
            address=address,
            embeddings=spec.embeddings,
        )

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """rpc-server, without its file cache, which would write what a host sends to this disk."""
        if self._rpc_server is None:
            raise MeshError(
                code="engine_without_rpc",
                message=f"There is no {' or '.join(RPC_SERVERS)} beside {self.path}.",
                hint="Build llama.cpp with GGML_RPC=ON, or leave out --bin-dir to use the embedded engine.",
                status=503,
            )
        host, _, port = spec.endpoint.rpartition(":")
        arguments = ["--host", host, "--port", port]
        if spec.devices:
            arguments += ["--device", ",".join(spec.devices)]
        if spec.threads is not None:
            arguments += ["--threads", str(spec.threads)]
        kind = CPU if spec.devices == (CPU_DEVICE,) else GPU
        readable = await asyncio.to_thread(program_directories, self._rpc_server) if kind == GPU else ()
        return await self._policy.command((str(self._rpc_server), *arguments), {}, spec, kind, readable)

    async def _help_text(self) -> str:
        if self._help is None:
            done = await run((str(self.path), "--help"), {}, _QUESTION_SECONDS)
            text = (done.stdout + done.stderr).decode(errors="replace")
            if "--model" not in parse_flags(text):
                raise MeshError(
                    code="engine_cannot_start",
                    message=f"{self.path} does not answer --help: {done.last_lines()}",
                    hint="Run it by hand to see why, or leave out --bin-dir to use the embedded engine.",
                    status=503,
                )
            self._help = text
        return self._help

    async def _version(self) -> tuple[BinaryVersion, str]:
        done = await run((str(self.path), "--version"), {}, _QUESTION_SECONDS)
        version = parse_version((done.stdout + b"\n" + done.stderr).decode(errors="replace"))
        if version.version or done.code == 0:
            return version, ""
        return version, f"{self.path} does not run ({done.last_lines() or f'status {done.code}'})."

    async def _devices(self) -> tuple[DeviceInfo, ...]:
        done = await run((str(self.path), "--list-devices"), {}, _QUESTION_SECONDS)
        return (*parse_devices(done.stdout.decode(errors="replace")), cpu_device())

    async def _probe_rpc(self, kind: str) -> RpcProbe:
        if self._rpc_server is None:
            missing = f"Models cannot be split with these programs: no {' or '.join(RPC_SERVERS)} beside {SERVER}."
            return RpcProbe(problem=missing)
        spec = RpcWorkerSpec(devices=(CPU_DEVICE,) if kind == CPU else (), threads=1)
        return await probe_rpc_server(self.rpc_worker, spec, self._broken)

    def _broken(self, problem: str) -> str:
        return f"{self._rpc_server} does not answer as an RPC server ({problem}): run it by hand to see why."


# What the programs print

# `version: 1.2.3 (build 4567, commit abc1234)`; before 2026 `version: 4567 (abc1234)`
_VERSION = re.compile(
    r"^version: (?P<version>\S+) \((?:build (?P<build>\d+), commit )?(?P<commit>[0-9a-z]+)\)", re.MULTILINE
)
_BUILT = re.compile(r"^built with (?P<compiler>.+)$", re.MULTILINE)
# `  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23816 MiB free)`
_DEVICE = re.compile(r"^ +(?P<id>[^\s:]+): (?P<name>.+) \((?P<total>\d+) MiB, (?P<free>\d+) MiB free\)$", re.MULTILINE)
_FLAG = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")

_MIB = 1024 * 1024


def parse_version(text: str) -> BinaryVersion:
    """Read the output of `--version`; empty fields if it has another form."""
    found, built = _VERSION.search(text), _BUILT.search(text)
    if not found:
        return BinaryVersion()
    number = found["build"] or found["version"]
    parts = [f"commit {found['commit']}", built["compiler"] if built else ""]
    return BinaryVersion(version=f"b{number}", build=", ".join(part for part in parts if part))


def parse_devices(text: str) -> tuple[DeviceInfo, ...]:
    """Read the output of `--list-devices`, which leaves the CPU out."""
    return tuple(
        DeviceInfo(
            id=match["id"],
            name=match["name"].strip(),
            kind=_kind(match["id"]),
            memory_total=int(match["total"]) * _MIB,
            memory_free=int(match["free"]) * _MIB,
        )
        for match in _DEVICE.finditer(text)
    )


def _kind(device: str) -> DeviceKind:
    # The list contains BLAS and AMX too, which compute for the CPU and have no memory.
    return DeviceKind.ACCELERATOR if device.rstrip("0123456789").upper() in {"BLAS", "AMX", "ZDNN"} else DeviceKind.GPU


def parse_flags(text: str) -> frozenset[str]:
    """All options in the output of `--help`."""
    return frozenset(_FLAG.findall(text))


def with_places(spec: EngineSpec, local: tuple[str, ...]) -> EngineSpec:
    """A split spec whose `tensor_split` has a place for each local device: 0 for those that it does not name.

    With `--rpc`, `--device` would have to name the workers' devices too, and builds name them differently.
    """
    remote = len(spec.tensor_split) - len(spec.devices)
    named = dict(zip(spec.devices, spec.tensor_split[remote:], strict=True))
    places = (named.get(device, 0.0) for device in local)
    return replace(spec, tensor_split=(*spec.tensor_split[:remote], *places))


# The options of llama-server

_ALL_LAYERS = "999"


def server_arguments(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    """The spec as llama-server's arguments.

    Args:
        spec: what to run.
        known: options in this build's `--help`. Options that only tune are left out if it does not know them.

    Raises:
        MeshError: `engine_option_unknown`, if the build lacks an option that the spec needs.
    """
    return [
        *("--model", str(spec.model), "--alias", spec.alias),
        *_address(spec, known),
        *("--ctx-size", str(spec.total_context), "--parallel", str(spec.slots)),
        *("--batch-size", str(spec.batch), "--ubatch-size", str(spec.even_micro_batch)),
        *("--cache-type-k", spec.cache_type, "--cache-type-v", spec.cache_type),
        *("--metrics", "--jinja"),
        *_devices_and_split(spec, known),
        *(("--embeddings", *(("--pooling", spec.pooling) if spec.pooling else ())) if spec.embeddings else ()),
        *(("--threads", str(spec.threads)) if spec.threads is not None else ()),
        *(("--mmproj", str(spec.mmproj)) if spec.mmproj is not None else ()),
        *_draft(spec, known),
        *_tuning(spec, known),
        *_chosen(spec, known),
    ]


def _address(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    """Where it listens, and the key that it requires: in a file, since all users can read command lines."""
    address = ["--host", LOOPBACK, "--port", str(spec.port)] if spec.socket is None else ["--host", str(spec.socket)]
    if spec.key_file is None:
        return address
    _require(known, "--api-key-file", "keeping other users of this machine out")
    return [*address, "--api-key-file", str(spec.key_file)]


def _devices_and_split(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    cpu_only = spec.uses_cpu_only and not spec.rpc
    layers = "0" if cpu_only else _ALL_LAYERS
    arguments = ["--n-gpu-layers", layers if spec.gpu_layers is None else str(spec.gpu_layers)]
    if spec.rpc:
        _require(known, "--rpc", "splitting a model")
        arguments += ["--rpc", ",".join(spec.rpc)]
    if cpu_only:
        arguments += ["--device", "none"]
    elif spec.devices and not spec.rpc:
        arguments += ["--device", ",".join(spec.devices)]
    if spec.tensor_split:
        arguments += ["--tensor-split", ",".join(f"{share:g}" for share in spec.tensor_split)]
    if spec.output_on_host:
        arguments += ["--override-tensor", output_override(spec.output_device)]
    if spec.cpu_moe:
        # Older builds know only the general option.
        newer = "--n-cpu-moe" in known
        arguments += (
            ["--n-cpu-moe", str(spec.cpu_moe)] if newer else ["--override-tensor", experts_override(spec.cpu_moe)]
        )
    return arguments


def _draft(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    if spec.draft is None:
        return []
    if "--spec-type" in known:
        arguments = ["--model-draft", str(spec.draft), "--spec-type", spec.speculation_type]
        arguments += ["--spec-draft-n-max", str(spec.draft_max)]
    else:
        if spec.speculation_type != "draft-simple":
            _require(known, "--spec-type", f"speculation by {spec.speculation_type}")
        _require(known, "--model-draft", "speculative decoding")
        arguments = ["--model-draft", str(spec.draft), "--draft-max", str(spec.draft_max)]
    if spec.rpc or spec.uses_cpu_only:
        # The draft runs on the host: guesses must not cross the network.
        local = spec.devices[0] if spec.devices and not spec.uses_cpu_only else "none"
        arguments += ["--device-draft", local]
    return arguments


def _tuning(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    wanted: Iterable[tuple[str, ...]] = (
        # Sizes were decided before the launch, and each trial of a fit costs round trips to every worker.
        ("--fit", "off"),
        ("--slots",),
        ("--no-webui",),
        ("--offline",),
        ("--log-colors", "off"),
        ("--cors-origins", "localhost"),
        ("--cache-ram", str(spec.prompt_cache_mib)),
        ("--video-ffmpeg-dir", NO_PROGRAMS),
    )
    return [word for words in wanted if words[0] in known for word in words]


_DEFAULTS = {
    "temperature": "--temp",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "min_p": "--min-p",
    "repeat_penalty": "--repeat-penalty",
    "presence_penalty": "--presence-penalty",
    "frequency_penalty": "--frequency-penalty",
    "seed": "--seed",
    "max_tokens": "--predict",
}


def _chosen(spec: EngineSpec, known: frozenset[str]) -> list[str]:
    """What the user set for this model."""
    values = {flag: getattr(spec.sampling, name) for name, flag in _DEFAULTS.items()}
    words = [
        (flag, f"{value:g}" if isinstance(value, float) else str(value))
        for flag, value in values.items()
        if value is not None
    ]
    if spec.chat_template:
        words.append(("--chat-template", spec.chat_template))
    if spec.reasoning_budget is not None:
        words.append(("--reasoning-budget", str(spec.reasoning_budget)))
    if spec.speculation and spec.draft is None:
        words.append(("--spec-type", spec.speculation_type))
        if spec.speculation == NGRAM:
            words.append(("--spec-ngram-map-k-size-n", str(NGRAM_KEY)))
            words.append(("--spec-ngram-map-k-size-m", str(spec.draft_max)))
        elif spec.speculation.startswith("draft-"):
            words.append(("--spec-draft-n-max", str(spec.draft_max)))
    words += [(argument.flag, text) for argument, text in read_arguments(spec.more)]
    for flag, _ in words:
        _require(known, flag, "a setting of the model")
    return [word for flag, text in words for word in ((flag, text) if text else (flag,))]


def _require(known: frozenset[str], flag: str, purpose: str) -> None:
    if flag not in known:
        raise MeshError(
            code="engine_without_rpc" if flag == "--rpc" else "engine_option_unknown",
            message=f"This llama-server does not have the option {flag}, which {purpose} needs.",
            hint="Give a newer build with GGML_RPC=ON by --bin-dir, or leave it out to use the embedded engine.",
            status=503,
        )
