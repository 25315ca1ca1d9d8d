"""The RPC backend as a plugin for the wheel: compiled and tested once, or carried by mesh-llm's own wheel.

The engine's wheel has no RPC. The plugin is compiled from the source archive of the very release that this version of
mesh-llm pins. `install` runs the build; `engine/installation.py` knows the result.
"""

import asyncio
import sysconfig
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import compiler
from mesh_llm.engine.confinement.launcher import CPU
from mesh_llm.engine.confinement.policy import RpcPolicy, find_library, provide_library, python_directories
from mesh_llm.engine.installation import (
    BUNDLED,
    Found,
    build_directories,
    look,
    system,
    writable_directory,
)
from mesh_llm.engine.probe import RpcProbe, started_rpc_server
from mesh_llm.engine.process import Command, python_module
from mesh_llm.engine.sources.embedded import library_build
from mesh_llm.engine.sources.embedded.archive import VERSION, Progress, unpack
from mesh_llm.engine.sources.embedded.library_build import Library, Work
from mesh_llm.engine.spec import CPU_DEVICE, EnginePart, PartState, RpcWorkerSpec

RPC = "rpc"
"""The plugin's name among the installation's parts."""

RPC_VERSION = "8.0.0"
"""The ggml RPC protocol that this release speaks."""

LOG_NAME = "build-rpc.log"

_LASTING = {"plugin_compile_failed", "plugin_self_test_failed", "plugin_source_wrong"}
"""Failures that the same attempt would meet again: a node does not try again by itself."""


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin whose bytes are those that passed the self-test."""

    path: Path
    rpc_version: str


def key() -> str:
    """Names the directory of what fits this release, system and processor."""
    return f"embedded-{VERSION}-{system()}"


def directories(cache: Path) -> list[Path]:
    """Where a plugin may lie, in the order of searching: what was built here comes before what the wheel carries."""
    return [*build_directories(cache, key()), BUNDLED]


def examine(cache: Path) -> Found:
    """What is known of the plugin."""
    return look(RPC, VERSION, directories(cache))


def find(cache: Path) -> Plugin | None:
    """The plugin that may be loaded; None if there is none."""
    found = examine(cache)
    if found.part is None or found.path is None:
        return None
    return Plugin(path=found.path, rpc_version=found.part.version)


def status(cache: Path) -> EnginePart:
    """The plugin for people, and whether a node builds it by itself."""
    found = examine(cache)
    if found.part is not None:
        log = str(found.path.with_name(found.part.log)) if found.path is not None and found.part.log else ""
        return EnginePart(
            name=RPC,
            state=PartState.READY,
            version=found.part.version,
            path=str(found.path or ""),
            text=" ".join((found.part.how, *found.set_aside)),
            log=log,
        )
    missing = _obstacle(cache)
    failure = found.failure
    if missing is None and (failure is None or failure.code not in _LASTING):
        text = " ".join(("The RPC plugin is not built yet.", *found.set_aside))
        return EnginePart(name=RPC, state=PartState.MISSING, text=text, hint="Run `mesh-llm engine install`.")
    message, hint = ("", "")
    if missing is not None:
        message, hint = missing.message, missing.hint
    elif failure is not None:
        message, hint = failure.message, failure.hint
    return EnginePart(name=RPC, state=PartState.FAILED, text=" ".join((message, *found.set_aside)), hint=hint)


def _obstacle(cache: Path) -> MeshError | None:
    """What would end a build at once."""
    try:
        compiler.find_compiler()
        writable_directory(_places(cache))
    except MeshError as error:
        return error
    return None


def install(cache: Path, progress: Progress, archive: Path | None = None, force: bool = False) -> Plugin:
    """Build the plugin unless it is there, and the library that confines it. Blocks. As `library_build.install`.

    Args:
        cache: the home's cache directory.
        progress: called at each step.
        archive: the source archive, if the user has it; it must be the pinned one.
        force: build again even if there is one.

    Raises:
        MeshError: `compiler_missing`, `plugin_compile_failed`, `plugin_self_test_failed`, `plugin_not_writable`, and as
            `provide_archive`.
    """
    if find_library(cache) is None:
        with library_build.failures_recorded(LIBRARY, writable_directory(_places(cache))):
            provide_library(cache)
    part, path = library_build.install(LIBRARY, cache, progress, archive, force=force)
    progress("done", f"The RPC plugin is at {path} (RPC {part.version}).")
    return Plugin(path=path, rpc_version=part.version)


def _places(cache: Path) -> list[Path]:
    return build_directories(cache, key())


def _make(work: Work) -> str:
    work.progress("unpack", "Extracting the RPC backend.")
    ggml = unpack(work.archive, work.directory)
    work.progress("compile", f"Compiling the RPC plugin with {Path(work.command[0]).name}; about ten seconds.")
    compiler.compile_plugin(ggml, work.target, work.command, work.log)
    work.progress("self-test", "Loading it and testing it.")
    return self_test(work.target)


def worker_command(
    library: Path, spec: RpcWorkerSpec, policy: RpcPolicy, kind: str, load: tuple[str, ...] = ()
) -> Awaitable[Command]:
    """The command of an RPC server with this plugin; `load`: arguments for an accelerator's.

    Raises MeshError `rpc_unconfined`.
    """
    argv, env = python_module("mesh_llm.engine.sources.embedded.rpc_main", spec.to_json(), str(library), *load)
    return policy.command(argv, env, spec, kind, python_directories(library.parent, *map(Path, load[1:])))


def library_name() -> str:
    """The plugin's file name on this system."""
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"
    return f"libggml-rpc{suffix}"


def self_test(library: Path, load: tuple[str, ...] = ()) -> str:
    """Load the library in a process of its own, serve, and send HELLO; returns the protocol's version.

    `load`: arguments for an accelerator, to test the plugin with it.

    Raises:
        MeshError: `plugin_self_test_failed`.
    """
    # No other machine can reach it, so it is tested even if it cannot be confined.
    policy = RpcPolicy(cache=library.parent, unconfined=True)

    async def ask() -> RpcProbe:
        spec = RpcWorkerSpec(devices=(CPU_DEVICE,), threads=1)
        async with started_rpc_server(lambda spec: worker_command(library, spec, policy, CPU, load), spec) as server:
            return server

    server = asyncio.run(ask())
    if not server.version:
        raise MeshError(
            code="plugin_self_test_failed",
            message=f"The RPC plugin was compiled but does not work: {server.problem}.",
            hint="Try another compiler, as in `CXX=clang++ mesh-llm engine install`. Models that fit on one machine "
            "do not need the plugin.",
            status=503,
        )
    return server.version


LIBRARY = Library(
    part=RPC,
    title="the RPC plugin",
    file=library_name(),
    log=LOG_NAME,
    room_bytes=30 * 10**6,
    places=_places,
    examine=examine,
    make=_make,
)
