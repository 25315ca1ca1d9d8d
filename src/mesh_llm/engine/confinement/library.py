"""The library that is preloaded into RPC servers and their clients (rpc_sockets.c): compiled once, in a second."""

import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

from filelock import FileLock

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.compiler import find_compiler
from mesh_llm.engine.confinement import launcher
from mesh_llm.runtime.network import UNIX

_SOURCE = Path(__file__).with_name("rpc_sockets.c")
_SECONDS = 120


def find(cache: Path) -> Path | None:
    """The library of this very source, compiled earlier."""
    return next((path for place in _places(cache) if (path := place / _name()).is_file()), None)


def provide(cache: Path) -> Path:
    """The library, compiled now where it is not there. Blocking; two processes at once compile one.

    Raises:
        MeshError: `compiler_missing`, `plugin_compile_failed`, `plugin_not_writable`.
    """
    found = find(cache)
    if found is not None:
        return found
    command = find_compiler()
    directory = _writable(_places(cache))
    target = directory / _name()
    with FileLock(directory / ".rpc-sockets.lock"):
        if not target.is_file():
            with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as work:
                built = Path(work) / target.name
                _compile(command, built)
                built.replace(target)
    return target


def _compile(command: tuple[str, ...], output: Path) -> None:
    link = "-dynamiclib" if sys.platform == "darwin" else "-shared"
    arguments = (*command, "-x", "c", link, "-fPIC", "-O2", "-w", str(_SOURCE), "-o", str(output))
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", timeout=_SECONDS, check=False
        )
        why = "" if done.returncode == 0 else "\n".join(done.stderr.splitlines()[-5:]) or f"status {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        why = str(error)
    if why:
        raise MeshError(
            code="plugin_compile_failed",
            message=f"{command[0]} could not compile {_SOURCE.name}:\n{why}",
            hint="Try another compiler, as in `CXX=clang++ mesh-llm engine install`.",
            status=503,
        )


def client_environment(endpoints: tuple[str, ...], library: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """How an RPC client, which knows `host:port` only, reaches `unix:PATH`: endpoints for it, and its environment."""
    named: list[str] = []
    paths: list[str] = []
    for number, endpoint in enumerate(endpoints, start=1):
        path = unix_path(endpoint)
        if path is None:
            named.append(endpoint)
        else:
            named.append(f"127.0.0.1:{number}")
            paths.append(f"{number}={path}")
    if not paths:
        return endpoints, {}
    return tuple(named), {launcher.PRELOAD: preloaded(library), launcher.CONNECT: "\n".join(paths)}


def preloaded(library: Path) -> str:
    """The library before those that the user preloads."""
    before = os.environ.get(launcher.PRELOAD, "")
    return f"{library}:{before}" if before else str(library)


def unix_path(address: str) -> str | None:
    """The path in `unix:PATH`; None for any other address."""
    return address.removeprefix(UNIX) if address.startswith(UNIX) else None


def _places(cache: Path) -> list[Path]:
    """As of the plugin: this Python environment, which serves all homes; the home's cache."""
    places = [cache / "engine"]
    if sys.prefix != sys.base_prefix:
        places.insert(0, Path(sys.prefix) / "share" / "mesh-llm" / "engine")
    return places


def _writable(places: list[Path]) -> Path:
    for place in places:
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(place, os.W_OK):
            return place
    raise MeshError(
        code="plugin_not_writable",
        message=f"None of {', '.join(map(str, places))} can be written to.",
        hint="Set MESH_LLM_HOME to a directory of yours.",
        status=503,
    )


def _name() -> str:
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    return f"rpc-sockets-{platform.system().lower()}-{platform.machine().lower()}-{digest}.so"
