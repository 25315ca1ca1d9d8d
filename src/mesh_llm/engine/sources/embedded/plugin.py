"""The RPC backend as a plugin for the wheel: downloaded, checked, compiled and tested once, then found again.

The wheel has no RPC. The plugin is compiled from the source archive of the very release that this version of mesh-llm
pins, which any package client can download.
"""

import asyncio
import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
from filelock import FileLock

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import compiler
from mesh_llm.engine.compiler import build_directories, writable_directory
from mesh_llm.engine.confinement.launcher import CPU
from mesh_llm.engine.confinement.policy import RpcPolicy, provide_library, python_directories
from mesh_llm.engine.probe import RpcProbe, started_rpc_server
from mesh_llm.engine.process import Command, python_module
from mesh_llm.engine.spec import CPU_DEVICE, RpcWorkerSpec
from mesh_llm.runtime.home import write_atomic

PACKAGE = "xllamacpp"
VERSION = "2026.10.11549"

SDIST_SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
"""The source archive's digest, as in the registry and the lock file: nothing else is ever compiled or run."""

SDIST_NAME = f"{PACKAGE}-{VERSION}.tar.gz"

RPC_VERSION = "8.0.0"
"""The ggml RPC protocol that this release speaks."""

Progress = Callable[[str, str], None]
"""Called at each step: a stable name (`download`, `verify`, `unpack`, `compile`, `self-test`, `done`), a sentence."""


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A file beside a plugin: its digest, the compiler, and the result of its self-test."""

    sha256: str
    rpc_version: str
    compiler: str


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """A plugin whose bytes are those that passed the self-test."""

    path: Path
    rpc_version: str


def key() -> str:
    """Identifies what a plugin fits: release, system, processor."""
    return f"{PACKAGE}-{VERSION}-{platform.system().lower()}-{platform.machine().lower()}"


def directories(cache: Path) -> list[Path]:
    """Where a plugin may lie, in the order of searching."""
    return build_directories(cache, key())


def find(cache: Path) -> Plugin | None:
    """The plugin that was built earlier; None if there is none, or if its bytes are not those that were tested."""
    for directory in directories(cache):
        if (plugin := _read(directory)) is not None:
            return plugin
    return None


def install(cache: Path, progress: Progress, archive: Path | None = None, force: bool = False) -> Plugin:
    """Build the plugin unless it is there. Blocks. Two processes at once build one.

    Args:
        cache: the home's cache directory.
        progress: called at each step.
        archive: the source archive, if the user has it; it must be the pinned one.
        force: build again even if there is one.

    Raises:
        MeshError: `package_client_missing`, `plugin_download_failed`, `plugin_source_wrong`, `compiler_missing`,
            `plugin_compile_failed`, `plugin_self_test_failed`, `plugin_not_writable`.
    """
    provide_library(cache)
    found = None if force else find(cache)
    if found is not None:
        progress("done", f"The RPC plugin is at {found.path} (RPC {found.rpc_version}).")
        return found
    directory = writable_directory(directories(cache))
    with FileLock(directory.with_name(f"{directory.name}.lock")):
        found = None if force else _read(directory)
        if found is None:
            found = _build(directory, progress, archive)
    progress("done", f"The RPC plugin is at {found.path} (RPC {found.rpc_version}).")
    return found


def _build(directory: Path, progress: Progress, archive: Path | None) -> Plugin:
    command = compiler.find_compiler()
    library = directory / _library_name()
    # On the same file system as the destination, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as name:
        work = Path(name)
        if archive is None:
            progress("download", f"Downloading the source of {PACKAGE} {VERSION} (38 MB).")
            archive = download(work)
        progress("verify", f"Checking {archive.name}.")
        check_digest(archive)
        progress("unpack", "Extracting the RPC backend.")
        ggml = unpack(archive, work)
        progress("compile", f"Compiling with {command[0]}; about ten seconds.")
        built = work / library.name
        compiler.compile_plugin(ggml, built, command)
        progress("self-test", "Loading it and testing it.")
        rpc_version = self_test(built)
        manifest = Manifest(sha256=_digest(built), rpc_version=rpc_version, compiler=" ".join(command))
        built.replace(library)
    write_atomic(_manifest_path(directory), msgspec.json.encode(manifest), mode=0o644)
    return Plugin(path=library, rpc_version=rpc_version)


def worker_command(library: Path, spec: RpcWorkerSpec, policy: RpcPolicy, kind: str) -> Awaitable[Command]:
    """The command of an RPC server with this plugin. Raises MeshError `rpc_unconfined`."""
    argv, env = python_module("mesh_llm.engine.sources.embedded.rpc_main", spec.to_json(), str(library))
    return policy.command(argv, env, spec, kind, python_directories(library.parent))


def _read(directory: Path) -> Plugin | None:
    library = directory / _library_name()
    try:
        manifest = msgspec.json.decode(_manifest_path(directory).read_bytes(), type=Manifest)
        if _digest(library) != manifest.sha256:
            return None
    except (OSError, msgspec.MsgspecError):
        return None
    return Plugin(path=library, rpc_version=manifest.rpc_version)


def _manifest_path(directory: Path) -> Path:
    return directory / "manifest.json"


def _library_name() -> str:
    suffix = sysconfig.get_config_var("SHLIB_SUFFIX") or ".so"
    return f"libggml-rpc{suffix}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The steps of a build

_DOWNLOAD_SECONDS = 900
_SOURCE_HINT = (
    "Check the network and the package client's index settings, then run `mesh-llm engine install` again; or copy "
    f"{SDIST_NAME} to this machine and run `mesh-llm engine install --archive FILE`."
)


def package_clients() -> list[tuple[str, ...]]:
    """Commands that take pip's arguments, best first. An environment made by uv has no pip."""
    clients: list[tuple[str, ...]] = []
    if importlib.util.find_spec("pip") is not None:
        clients.append((sys.executable, "-m", "pip"))
    if uv := shutil.which("uv"):
        clients.append((uv, "tool", "run", "--python", sys.executable, "pip"))
    clients.extend((pip,) for name in ("pip3", "pip") if (pip := shutil.which(name)))
    return clients


def download(directory: Path) -> Path:
    """Download the pinned archive into `directory`.

    The client checks the digest before it runs code from the archive, which it does to read the metadata.

    Raises:
        MeshError: `package_client_missing`, `plugin_download_failed`.
    """
    clients = package_clients()
    if not clients:
        raise MeshError(
            code="package_client_missing",
            message="The RPC plugin's source is downloaded once with pip or uv, and neither is installed.",
            hint="Install pip (`python3 -m ensurepip`) or uv, then run `mesh-llm engine install` again.",
            status=503,
        )
    wanted = directory / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SDIST_SHA256}\n")
    arguments = ("download", "--quiet", "--no-input", "--no-deps", "--require-hashes", "--no-binary", PACKAGE)
    failures: list[str] = []
    for client in clients:
        try:
            done = subprocess.run(
                (*client, *arguments, "--dest", str(directory), "--requirement", str(wanted)),
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_DOWNLOAD_SECONDS,
                stdin=subprocess.DEVNULL,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            failures.append(f"{client[0]}: {error}")
            continue
        archive = directory / SDIST_NAME
        if done.returncode == 0 and archive.exists():
            return archive
        last = [line for line in done.stderr.splitlines() if line.strip()][-3:]
        failures.append(f"{Path(client[0]).name}: {' '.join(last) or f'exit status {done.returncode}'}")
    raise MeshError(
        code="plugin_download_failed",
        message=f"{SDIST_NAME} could not be downloaded. {'; '.join(failures)}",
        hint=_SOURCE_HINT,
        status=503,
    )


def check_digest(archive: Path) -> None:
    """The file is the pinned archive, byte for byte. Raises MeshError `plugin_source_wrong` if not."""
    try:
        with archive.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise MeshError(
            code="plugin_source_wrong", message=f"{archive} cannot be read: {error.strerror}.", hint=_SOURCE_HINT
        ) from error
    if digest != SDIST_SHA256:
        raise MeshError(
            code="plugin_source_wrong",
            message=f"{archive.name} is not the archive that this version needs (sha256 {digest}).",
            hint=_SOURCE_HINT,
        )


def unpack(archive: Path, directory: Path) -> Path:
    """Extract ggml's headers and its RPC backend from a checked archive; returns the ggml directory.

    Raises:
        MeshError: `plugin_source_wrong`, if they are not there.
    """
    with tarfile.open(archive) as tar:
        members = [member for member in tar if _is_needed(member.name)]
        tar.extractall(directory, members=members, filter="data")
    found = next(iter(directory.glob("**/ggml/src/ggml-rpc/ggml-rpc.cpp")), None)
    if found is None:
        raise MeshError(code="plugin_source_wrong", message=f"{archive.name} has no RPC backend.", hint=_SOURCE_HINT)
    return found.parents[2]


def _is_needed(name: str) -> bool:
    if "/ggml/include/" in name or "/ggml/src/ggml-rpc/" in name:
        return True
    folder, _, file = name.rpartition("/")
    return folder.endswith("/ggml/src") and file.endswith(".h")


def self_test(library: Path) -> str:
    """Load the library in a process of its own, serve, and send HELLO; returns the protocol's version.

    Raises:
        MeshError: `plugin_self_test_failed`.
    """
    # No other machine can reach it, so it is tested even if it cannot be confined.
    policy = RpcPolicy(cache=library.parent, unconfined=True)

    async def ask() -> RpcProbe:
        spec = RpcWorkerSpec(devices=(CPU_DEVICE,), threads=1)
        async with started_rpc_server(lambda spec: worker_command(library, spec, policy, CPU), spec) as server:
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
