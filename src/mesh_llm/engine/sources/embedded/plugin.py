"""The RPC backend as a plugin for the wheel: compiled and tested once, or carried by mesh-llm's own wheel.

The engine's wheel has no RPC. The plugin is compiled from the source archive of the very release that this version of
mesh-llm pins. `install` runs the build; `engine/installation.py` knows the result.
"""

import asyncio
import errno
import shutil
import sysconfig
import tempfile
import time
from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import compiler
from mesh_llm.engine.confinement.launcher import CPU
from mesh_llm.engine.confinement.policy import RpcPolicy, find_library, provide_library, python_directories
from mesh_llm.engine.installation import (
    BUNDLED,
    Found,
    Part,
    build_directories,
    digest,
    look,
    record_failure,
    record_part,
    system,
    writable_directory,
)
from mesh_llm.engine.probe import RpcProbe, started_rpc_server
from mesh_llm.engine.process import Command, python_module
from mesh_llm.engine.sources.embedded.archive import (
    VERSION,
    Progress,
    check_digest,
    no_room,
    provide_archive,
    require_room,
    unpack,
)
from mesh_llm.engine.spec import CPU_DEVICE, EnginePart, PartState, RpcWorkerSpec

RPC = "rpc"
"""The plugin's name among the installation's parts."""

RPC_VERSION = "8.0.0"
"""The ggml RPC protocol that this release speaks."""

LOG_NAME = "build-rpc.log"

_ROOM_BYTES = 30 * 10**6
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
        writable_directory(build_directories(cache, key()))
    except MeshError as error:
        return error
    return None


def install(cache: Path, progress: Progress, archive: Path | None = None, force: bool = False) -> Plugin:
    """Build the plugin unless it is there. Blocks. Two processes at once build one. A failure is remembered.

    Args:
        cache: the home's cache directory.
        progress: called at each step.
        archive: the source archive, if the user has it; it must be the pinned one.
        force: build again even if there is one.

    Raises:
        MeshError: `compiler_missing`, `plugin_compile_failed`, `plugin_self_test_failed`, `plugin_not_writable`, and as
            `provide_archive`.
    """
    began = time.time()
    found = None if force else find(cache)
    if found is None or find_library(cache) is None:
        directory = writable_directory(build_directories(cache, key()))
        lock = FileLock(directory.with_name(f"{directory.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress("wait", "Another mesh-llm on this machine builds the RPC plugin: waiting for it.")
            lock.acquire()
        try:
            part = examine(cache).part
            found = find(cache) if part is not None and (not force or part.built >= began) else None
            failure = look(RPC, VERSION, [directory]).failure
            if found is None and failure is not None and failure.at >= began:
                # The other one tried meanwhile, and failed.
                raise MeshError(code=failure.code, message=failure.message, hint=failure.hint, status=503)
            found = _recorded_build(cache, directory, progress, archive, found)
        finally:
            lock.release()
    progress("done", f"The RPC plugin is at {found.path} (RPC {found.rpc_version}).")
    return found


def _recorded_build(
    cache: Path, directory: Path, progress: Progress, archive: Path | None, found: Plugin | None
) -> Plugin:
    try:
        provide_library(cache)
        return found or build(cache, directory, progress, archive)
    except OSError as error:
        failure = no_room(directory) if error.errno == errno.ENOSPC else _unwritten(directory, error)
        record_failure(directory, VERSION, RPC, failure)
        raise failure from error
    except MeshError as error:
        record_failure(directory, VERSION, RPC, error)
        raise


def build(cache: Path, directory: Path, progress: Progress, archive: Path | None) -> Plugin:
    """Build into `directory`, and note it in its manifest. Only while holding the directory's lock."""
    command = compiler.find_compiler()
    for left in directory.glob(".build-*"):
        # Of a build that was killed.
        shutil.rmtree(left, ignore_errors=True)
    require_room(directory, _ROOM_BYTES)
    library, log = directory / library_name(), directory / LOG_NAME
    if archive is None:
        archive = provide_archive(cache, progress)
    else:
        progress("verify", f"Checking {archive.name}.")
        check_digest(archive)
    # On the same file system as the destination, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as name:
        work = Path(name)
        progress("unpack", "Extracting the RPC backend.")
        ggml = unpack(archive, work)
        progress("compile", f"Compiling the RPC plugin with {Path(command[0]).name}; about ten seconds.")
        built = work / library.name
        compiler.compile_plugin(ggml, built, command, log)
        progress("self-test", "Loading it and testing it.")
        rpc_version = self_test(built)
        part = Part(
            name=RPC,
            file=library.name,
            sha256=digest(built),
            version=rpc_version,
            how=f"compiled with {' '.join(command)}",
            log=log.name,
            built=time.time(),
        )
        built.replace(library)
    record_part(directory, VERSION, part)
    return Plugin(path=library, rpc_version=rpc_version)


def _unwritten(directory: Path, error: OSError) -> MeshError:
    return MeshError(
        code="plugin_not_writable",
        message=f"The RPC plugin could not be written to {directory}: {error.strerror or error}.",
        hint="Mend that, then run `mesh-llm engine install`.",
        status=503,
    )


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
