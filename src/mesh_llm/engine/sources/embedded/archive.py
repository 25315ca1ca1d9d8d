"""The engine's source archive: downloaded through a package client, checked, and kept for all that is built from it."""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.engine.installation import build_directories, writable_directory
from mesh_llm.engine.sources.embedded.ggml import PACKAGE

VERSION = "2026.10.11549"

SDIST_SHA256 = "c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b"
"""The source archive's digest, as in the registry and the lock file: nothing else is ever compiled or run."""

SDIST_NAME = f"{PACKAGE}-{VERSION}.tar.gz"

Progress = Callable[[str, str], None]
"""Called at each step: a stable name (`download`, `verify`, `unpack`, `compile`, `self-test`, `done`), a sentence."""

_DOWNLOAD_SECONDS = 900
_ROOM_BYTES = 150 * 10**6
"""For the archive, and the copy that the package client makes meanwhile."""
_SOURCE_HINT = (
    "Check the network and the package client's index settings, then run `mesh-llm engine install` again; or copy "
    f"{SDIST_NAME} to this machine and run `mesh-llm engine install --archive FILE`."
)


def find_archive(cache: Path) -> Path | None:
    """The archive that was downloaded earlier; None if there is none, or if it is damaged."""
    for directory in _directories(cache):
        path = directory / SDIST_NAME
        try:
            check_digest(path)
        except MeshError:
            continue
        return path
    return None


def provide_archive(cache: Path, progress: Progress, given: Path | None = None) -> Path:
    """The checked archive; it is downloaded unless it is there, and kept. Blocks.

    Args:
        cache: the home's cache directory.
        progress: called at each step.
        given: the archive, if the user has it; it must be the pinned one, and nothing else is looked for.

    Raises:
        MeshError: `package_client_missing`, `plugin_download_failed`, `plugin_source_wrong`, `plugin_not_writable`,
            `disk_full`.
    """
    if given is not None:
        progress("verify", f"Checking {given.name}.")
        check_digest(given)
        return given
    if (found := find_archive(cache)) is not None:
        return found
    directory = writable_directory(_directories(cache))
    require_room(directory, _ROOM_BYTES)
    progress("download", f"Downloading the source of {PACKAGE} {VERSION} (38 MB).")
    with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as name:
        fetched = download(Path(name))
        progress("verify", f"Checking {fetched.name}.")
        check_digest(fetched)
        fetched.replace(directory / SDIST_NAME)
    return directory / SDIST_NAME


def require_room(directory: Path, needed: int) -> None:
    """Raise MeshError `disk_full` unless the directory's disk has that much room."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise no_room(directory, f"{size(needed)} are needed, {size(free)} are free")


def no_room(directory: Path, why: str = os.strerror(errno.ENOSPC)) -> MeshError:
    """The error of a disk without room."""
    return MeshError(
        code="disk_full",
        message=f"The disk of {directory} has too little room: {why}.",
        hint="Free some room, then run `mesh-llm engine install`.",
        status=507,
    )


def _directories(cache: Path) -> list[Path]:
    return [place.parent / "source" for place in build_directories(cache)]


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
    arguments = (
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--no-deps",
        "--require-hashes",
        "--no-binary",
        PACKAGE,
    )
    failures: list[str] = []
    for client in clients:
        command = (*client, *arguments, "--dest", str(directory), "--requirement", str(wanted))
        failure = run_to_end(command, _DOWNLOAD_SECONDS)
        archive = directory / SDIST_NAME
        if not failure and archive.exists():
            return archive
        failures.append(failure or f"{Path(client[0]).name}: it left no {SDIST_NAME}")
    raise MeshError(
        code="plugin_download_failed",
        message=f"{SDIST_NAME} could not be downloaded. {'; '.join(failures)}",
        hint=_SOURCE_HINT,
        status=503,
    )


def run_to_end(command: tuple[str, ...], seconds: float, directory: Path | None = None) -> str:
    """Run a program to its end; returns why it failed, empty if it did not."""
    try:
        done = subprocess.run(
            command,
            cwd=directory,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    if done.returncode == 0:
        return ""
    last = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()][-3:]
    return f"{Path(command[0]).name}: {' '.join(last) or f'exit status {done.returncode}'}"


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
        extract(tar, directory, members)
    found = next(iter(directory.glob("**/ggml/src/ggml-rpc/ggml-rpc.cpp")), None)
    if found is None:
        raise MeshError(code="plugin_source_wrong", message=f"{archive.name} has no RPC backend.", hint=_SOURCE_HINT)
    return found.parents[2]


def unpack_headers(archive: Path, directory: Path) -> Path:
    """Extract llama.cpp's headers from a checked archive; returns llama.cpp's directory.

    Raises:
        MeshError: `plugin_source_wrong`, if they are not there.
    """
    with tarfile.open(archive) as tar:
        extract(
            tar, directory, [member for member in tar if member.name.endswith(".h") and "/llama.cpp/" in member.name]
        )
    found = next(iter(directory.glob("**/tools/server/server-context.h")), None)
    if found is None:
        raise MeshError(code="plugin_source_wrong", message=f"{archive.name} has no llama-server.", hint=_SOURCE_HINT)
    return found.parents[2]


def extract(tar: tarfile.TarFile, directory: Path, members: list[tarfile.TarInfo] | None = None) -> None:
    """Extract these members, or all, of a checked archive. Python before 3.11.4 knows no filter."""
    options: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
    tar.extractall(directory, members=members, **options)  # noqa: S202 - its digest was checked


def _is_needed(name: str) -> bool:
    if "/ggml/include/" in name or "/ggml/src/ggml-rpc/" in name:
        return True
    folder, _, file = name.rpartition("/")
    return folder.endswith("/ggml/src") and file.endswith(".h")
