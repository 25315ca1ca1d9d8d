"""The user's own llama.cpp programs as an engine source: `--bin-dir`, or what is found on PATH."""

import asyncio
import os
import shutil
from dataclasses import replace
from pathlib import Path

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.binary_flags import server_arguments
from mesh_llm.engine.binary_output import BinaryVersion, parse_devices, parse_flags, parse_version
from mesh_llm.engine.capture import run
from mesh_llm.engine.command import Command
from mesh_llm.engine.confinement import library as sockets
from mesh_llm.engine.confinement.launcher import CPU, GPU
from mesh_llm.engine.confinement.policy import UNCONFINED, RpcPolicy, program_directories
from mesh_llm.engine.cpu import cpu_device
from mesh_llm.engine.rpc_probe import answering
from mesh_llm.engine.source import DeviceInfo, EngineInfo
from mesh_llm.engine.spec import CPU_DEVICE, EngineSpec, RpcWorkerSpec
from mesh_llm.engine.threads import with_threads
from mesh_llm.runtime.home import expand

NAME = "binaries"
SERVER = "llama-server"
RPC_SERVERS = ("rpc-server", "ggml-rpc-server")

_QUESTION_SECONDS = 30.0
_UNIX_SOCKETS = ".sock"
"""Stands in the help of builds that listen on Unix sockets (`--host`, since March 2025)."""


class BinarySource:
    """llama-server and, where it is there, rpc-server; see EngineSource for the meaning of each method."""

    def __init__(self, server: Path, rpc_server: Path | None, policy: RpcPolicy) -> None:
        self._server = server
        self._rpc_server = rpc_server
        self._policy = policy
        self._help: str | None = None

    @classmethod
    def find(cls, bin_dir: Path | None, cache: Path, *, unconfined: bool = False) -> "BinarySource | None":
        """The programs in `bin_dir`, or on PATH where it is None; None when there is no llama-server.

        Args:
            bin_dir: where they are.
            cache: the home's cache directory.
            unconfined: lend memory also where RPC servers cannot be confined.

        Raises:
            MeshError: `bin_dir_empty`, when a directory was named and holds none.
        """
        places = str(expand(bin_dir)) if bin_dir else os.environ.get("PATH", os.defpath)
        server = shutil.which(SERVER, path=places)
        if server is None:
            if bin_dir is None:
                return None
            raise MeshError(
                code="bin_dir_empty",
                message=f"There is no program {SERVER} in {bin_dir}.",
                hint="Give the directory that llama.cpp's programs are in, as in --bin-dir ~/llama.cpp/build/bin.",
                status=400,
            )
        # Both must be of one build, so the RPC server is taken from beside llama-server first.
        beside = os.pathsep.join((str(Path(server).parent), places))
        rpc = next((path for name in RPC_SERVERS if (path := shutil.which(name, path=beside))), None)
        policy = RpcPolicy(cache=cache, unconfined=unconfined)
        return cls(Path(server).absolute(), Path(rpc).absolute() if rpc else None, policy)

    @property
    def name(self) -> str:
        """`binaries`."""
        return NAME

    @property
    def path(self) -> Path:
        """llama-server."""
        return self._server

    async def info(self) -> EngineInfo:
        """Ask the programs for version, devices and RPC protocol."""
        (version, trouble), devices = await asyncio.gather(self._version(), self._devices())
        kind = GPU if any(device.holds_models for device in devices) else CPU
        rpc, rpc_trouble, not_lent = await self._rpc_version(kind)
        return EngineInfo(
            source=NAME,
            version=version.version,
            build=version.build,
            rpc_version=rpc,
            confinement=self._policy.how(kind) if rpc else "",
            not_lent=not_lent,
            path=str(self._server),
            devices=devices,
            problems=tuple(text for text in (trouble, rpc_trouble) if text),
            usable=not trouble,
        )

    async def server(self, spec: EngineSpec) -> Command:
        """llama-server with the options that this build knows."""
        text = await self._help_text()
        reaching: dict[str, str] = {}
        if any(map(sockets.unix_path, spec.rpc)):
            library = await asyncio.to_thread(sockets.provide, self._policy.cache)
            endpoints, reaching = sockets.client_environment(spec.rpc, library)
            spec = replace(spec, rpc=endpoints)
        if _UNIX_SOCKETS not in text:
            spec = replace(spec, socket=None)
        arguments = server_arguments(with_threads(spec), parse_flags(text))
        address = f"unix:{spec.socket}" if spec.socket is not None else ""
        return Command(argv=(str(self._server), *arguments), env=reaching, address=address, embeddings=spec.embeddings)

    async def rpc_worker(self, spec: RpcWorkerSpec) -> Command:
        """rpc-server, without its file cache: what a host sends is not written to this disk."""
        if self._rpc_server is None:
            raise MeshError(
                code="engine_without_rpc",
                message=f"There is no {' or '.join(RPC_SERVERS)} beside {self._server}.",
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
            done = await run((str(self._server), "--help"), {}, _QUESTION_SECONDS)
            text = (done.stdout + done.stderr).decode(errors="replace")
            if "--model" not in parse_flags(text):
                raise MeshError(
                    code="engine_cannot_start",
                    message=f"{self._server} does not answer --help: {done.last_lines()}",
                    hint="Run it by hand to see why, or leave out --bin-dir to use the embedded engine.",
                    status=503,
                )
            self._help = text
        return self._help

    async def _version(self) -> tuple[BinaryVersion, str]:
        done = await run((str(self._server), "--version"), {}, _QUESTION_SECONDS)
        version = parse_version((done.stdout + b"\n" + done.stderr).decode(errors="replace"))
        if version.version:
            return version, ""
        if done.code == 0:
            return version, ""
        return version, f"{self._server} does not run ({done.last_lines() or f'status {done.code}'})."

    async def _devices(self) -> tuple[DeviceInfo, ...]:
        done = await run((str(self._server), "--list-devices"), {}, _QUESTION_SECONDS)
        return (*parse_devices(done.stdout.decode(errors="replace")), cpu_device())

    async def _rpc_version(self, kind: str) -> tuple[str, str, str]:
        """The protocol's version; what is wrong; and why the RPC server may not be started."""
        if self._rpc_server is None:
            missing = f"Models cannot be split with these programs: no {' or '.join(RPC_SERVERS)} beside {SERVER}."
            return "", missing, ""
        spec = RpcWorkerSpec(devices=(CPU_DEVICE,) if kind == CPU else (), threads=1)
        try:
            async with answering(self.rpc_worker, spec) as answered:
                if answered.version:
                    return answered.version, "", ""
        except MeshError as error:
            problem = f"{error.message} {error.hint}"
            return "", problem, problem if error.code == UNCONFINED else ""
        why = f"{self._rpc_server} does not answer as an RPC server ({answered.problem})"
        return "", f"{why}: run it by hand to see why.", ""
