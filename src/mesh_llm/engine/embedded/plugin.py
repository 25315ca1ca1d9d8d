"""The RPC backend as a plugin for the wheel: built once, checked, and found again. Nothing is downloaded twice."""

import asyncio
import hashlib
import os
import platform
import sys
import sysconfig
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.command import Command, python_module
from mesh_llm.engine.confinement import library as sockets
from mesh_llm.engine.confinement.launcher import CPU
from mesh_llm.engine.confinement.policy import RpcPolicy, python_directories
from mesh_llm.engine.embedded import compiler, sdist
from mesh_llm.engine.embedded.release import PACKAGE, VERSION
from mesh_llm.engine.rpc_probe import Answered, answering
from mesh_llm.engine.spec import CPU_DEVICE, RpcWorkerSpec
from mesh_llm.runtime.files import write_atomic

Progress = Callable[[str, str], None]
"""Told of each step: a stable name (`download`, `verify`, `unpack`, `compile`, `self-test`, `done`), and a sentence."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What lies beside a plugin: what it was made from and what its self-test saw."""

    sha256: str
    rpc_version: str
    compiler: str


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A built plugin whose bytes are those that passed the self-test."""

    path: Path
    rpc_version: str


def key() -> str:
    """Tells plugins apart: release, system, processor. A plugin fits no other."""
    return f"{PACKAGE}-{VERSION}-{platform.system().lower()}-{platform.machine().lower()}"


def directories(cache: Path) -> list[Path]:
    """Where a plugin may lie, in the order of looking: this Python environment, beside the wheel it is for; the cache.

    The first serves all homes of one installation; the second is for environments that the user cannot write to.
    """
    places = [cache / "engine" / key()]
    if sys.prefix != sys.base_prefix:
        places.insert(0, Path(sys.prefix) / "share" / "mesh-llm" / "engine" / key())
    return places


def find(cache: Path) -> Plugin | None:
    """The plugin built earlier; None when there is none, or its bytes are not those that were tested."""
    for directory in directories(cache):
        if (plugin := _read(directory)) is not None:
            return plugin
    return None


def install(cache: Path, progress: Progress, archive: Path | None = None, force: bool = False) -> Plugin:
    """Build the plugin unless it is there. Blocking; two processes at once build one.

    Args:
        cache: the home's cache directory.
        progress: told of each step.
        archive: the source archive, where it was brought by hand; it must be the pinned one all the same.
        force: build again even if there is one.

    Raises:
        MeshError: `package_client_missing`, `plugin_download_failed`, `plugin_source_wrong`, `compiler_missing`,
            `plugin_compile_failed`, `plugin_self_test_failed`, `plugin_not_writable`.
    """
    sockets.provide(cache)
    found = None if force else find(cache)
    if found is not None:
        progress("done", f"The RPC plugin is at {found.path} (RPC {found.rpc_version}).")
        return found
    directory = _writable(directories(cache))
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        found = None if force else _read(directory)
        if found is None:
            found = _build(directory, progress, archive)
    progress("done", f"The RPC plugin is at {found.path} (RPC {found.rpc_version}).")
    return found


def _build(directory: Path, progress: Progress, archive: Path | None) -> Plugin:
    command = compiler.find_compiler()
    library = directory / _library_name()
    # In the same file system as its destination, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as name:
        work = Path(name)
        if archive is None:
            progress("download", f"Downloading the source of {PACKAGE} {VERSION} (38 MB).")
            archive = sdist.download(work)
        progress("verify", f"Checking {archive.name}.")
        sdist.check_digest(archive)
        progress("unpack", "Taking out the RPC backend.")
        ggml = sdist.unpack(archive, work)
        progress("compile", f"Compiling with {command[0]}; about ten seconds.")
        built = work / library.name
        compiler.compile_plugin(ggml, built, command)
        progress("self-test", "Loading it, and shaking hands.")
        rpc_version = self_test(built)
        manifest = Manifest(sha256=_digest(built), rpc_version=rpc_version, compiler=" ".join(command))
        built.replace(library)
    write_atomic(_manifest_path(directory), msgspec.json.encode(manifest), mode=0o644)
    return Plugin(path=library, rpc_version=rpc_version)


def worker_command(library: Path, spec: RpcWorkerSpec, policy: RpcPolicy, kind: str) -> Awaitable[Command]:
    """The command of an RPC server with this plugin. Raises MeshError `rpc_unconfined`."""
    argv, env = python_module("mesh_llm.engine.embedded.rpc_main", spec.to_json(), str(library))
    return policy.command(argv, env, spec, kind, python_directories(library.parent))


def self_test(library: Path) -> str:
    """Load the library in a process of its own, serve, and say HELLO; returns the protocol's version.

    Raises:
        MeshError: `plugin_self_test_failed`.
    """
    # What it lends is nobody's yet: also where it cannot be confined, it is tried.
    policy = RpcPolicy(cache=library.parent, unconfined=True)

    async def ask() -> Answered:
        spec = RpcWorkerSpec(devices=(CPU_DEVICE,), threads=1)
        async with answering(lambda spec: worker_command(library, spec, policy, CPU), spec) as answered:
            return answered

    answered = asyncio.run(ask())
    if not answered.version:
        raise _untrusted(answered.problem)
    return answered.version


def _untrusted(why: str) -> MeshError:
    return MeshError(
        code="plugin_self_test_failed",
        message=f"The RPC plugin was compiled but does not work: {why}.",
        hint="Try another compiler, as in `CXX=clang++ mesh-llm engine install`; a model that fits needs none.",
        status=503,
    )


def _read(directory: Path) -> Plugin | None:
    library = directory / _library_name()
    try:
        manifest = msgspec.json.decode(_manifest_path(directory).read_bytes(), type=Manifest)
        if _digest(library) != manifest.sha256:
            return None
    except (OSError, msgspec.MsgspecError):
        return None
    return Plugin(path=library, rpc_version=manifest.rpc_version)


def _writable(places: list[Path]) -> Path:
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK) and os.access(place.parent, os.W_OK):
            return place
    raise MeshError(
        code="plugin_not_writable",
        message=f"None of {', '.join(map(str, places))} can be written to.",
        hint="Set MESH_LLM_HOME to a directory of yours.",
        status=503,
    )


def _manifest_path(directory: Path) -> Path:
    return directory / "manifest.json"


def _library_name() -> str:
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"
    return f"libggml-rpc{suffix}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
