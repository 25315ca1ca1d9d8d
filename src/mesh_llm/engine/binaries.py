"""The user's own llama.cpp programs as an engine source: `--bin-dir`, or what is found on PATH."""

import asyncio
import os
import shutil
from pathlib import Path

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.binary_flags import server_arguments
from mesh_llm.engine.binary_output import BinaryVersion, parse_devices, parse_flags, parse_version
from mesh_llm.engine.capture import run
from mesh_llm.engine.command import Command, Readiness
from mesh_llm.engine.cpu import cpu_device
from mesh_llm.engine.ports import ReservedPort
from mesh_llm.engine.rpc_probe import answering
from mesh_llm.engine.source import DeviceInfo, EngineInfo
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.engine.threads import with_threads
from mesh_llm.runtime.home import expand

NAME = "binaries"
SERVER = "llama-server"
RPC_SERVERS = ("rpc-server", "ggml-rpc-server")

_QUESTION_SECONDS = 30.0


class BinarySource:
    """llama-server and, where it is there, rpc-server; see EngineSource for the meaning of each method."""

    def __init__(self, server: Path, rpc_server: Path | None) -> None:
        self._server = server
        self._rpc_server = rpc_server
        self._flags: frozenset[str] | None = None

    @classmethod
    def find(cls, bin_dir: Path | None) -> "BinarySource | None":
        """The programs in `bin_dir`, or on PATH where it is None; None when there is no llama-server.

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
        return cls(Path(server).absolute(), Path(rpc).absolute() if rpc else None)

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
        (version, trouble), devices, (rpc, rpc_trouble) = await asyncio.gather(
            self._version(), self._devices(), self._rpc_version()
        )
        return EngineInfo(
            source=NAME,
            version=version.version,
            build=version.build,
            rpc_version=rpc,
            path=str(self._server),
            devices=devices,
            problems=tuple(text for text in (trouble, rpc_trouble) if text),
            usable=not trouble,
        )

    async def server(self, spec: EngineSpec) -> Command:
        """llama-server with the options that this build knows."""
        arguments = server_arguments(with_threads(spec), await self._known_flags())
        return Command(argv=(str(self._server), *arguments), embeddings=spec.embeddings)

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
        return Command(argv=(str(self._rpc_server), *arguments), readiness=Readiness.RPC, address=spec.endpoint)

    async def _known_flags(self) -> frozenset[str]:
        if self._flags is None:
            done = await run((str(self._server), "--help"), {}, _QUESTION_SECONDS)
            flags = parse_flags((done.stdout + done.stderr).decode(errors="replace"))
            if "--model" not in flags:
                raise MeshError(
                    code="engine_cannot_start",
                    message=f"{self._server} does not answer --help: {done.last_lines()}",
                    hint="Run it by hand to see why, or leave out --bin-dir to use the embedded engine.",
                    status=503,
                )
            self._flags = flags
        return self._flags

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

    async def _rpc_version(self) -> tuple[str, str]:
        if self._rpc_server is None:
            return "", f"Models cannot be split with these programs: no {' or '.join(RPC_SERVERS)} beside {SERVER}."
        with ReservedPort() as port:
            spec = RpcWorkerSpec(port=port.number, threads=1)
            async with answering(await self.rpc_worker(spec)) as version:
                if version:
                    return version, ""
        return "", f"{self._rpc_server} does not answer as an RPC server: run it by hand to see why."
