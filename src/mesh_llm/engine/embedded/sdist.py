"""Gets the pinned source archive through whichever package client is there, and takes out what the plugin needs."""

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from mesh_llm.core.errors import MeshError
from mesh_llm.engine.embedded.release import PACKAGE, SDIST_NAME, SDIST_SHA256, VERSION

_DOWNLOAD_SECONDS = 900
_SOURCE_HINT = (
    "Check the network and the package client's index settings, then run `mesh-llm engine install` again; or bring "
    f"{SDIST_NAME} here by hand and run `mesh-llm engine install --archive FILE`."
)


def package_clients() -> list[tuple[str, ...]]:
    """Commands that understand pip's arguments, best first. An environment made by uv has no pip of its own."""
    clients: list[tuple[str, ...]] = []
    if importlib.util.find_spec("pip") is not None:
        clients.append((sys.executable, "-m", "pip"))
    if uv := shutil.which("uv"):
        clients.append((uv, "tool", "run", "--python", sys.executable, "pip"))
    clients.extend((pip,) for name in ("pip3", "pip") if (pip := shutil.which(name)))
    return clients


def download(directory: Path) -> Path:
    """Fetch the pinned archive into `directory`.

    The client checks the digest before it runs anything out of the archive (it asks the archive for its metadata).

    Raises:
        MeshError: `package_client_missing`, `plugin_download_failed`.
    """
    clients = package_clients()
    if not clients:
        raise MeshError(
            code="package_client_missing",
            message="The RPC plugin's source is downloaded once through pip or uv, and neither is here.",
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
    """Raises MeshError `plugin_source_wrong` unless it is byte for byte the pinned archive."""
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
            message=f"{archive.name} is not the archive that this version was made for (sha256 {digest}).",
            hint=_SOURCE_HINT,
        )


def unpack(archive: Path, directory: Path) -> Path:
    """Take ggml's headers and its RPC backend out of a checked archive; returns the ggml directory.

    Raises:
        MeshError: `plugin_source_wrong`, when they are not where they should be.
    """
    with tarfile.open(archive) as tar:
        members = [member for member in tar if _is_needed(member.name)]
        tar.extractall(directory, members=members, filter="data")
    found = next(iter(directory.glob("**/ggml/src/ggml-rpc/ggml-rpc.cpp")), None)
    if found is None:
        raise MeshError(code="plugin_source_wrong", message=f"{archive.name} holds no RPC backend.", hint=_SOURCE_HINT)
    return found.parents[2]


def _is_needed(name: str) -> bool:
    if "/ggml/include/" in name or "/ggml/src/ggml-rpc/" in name:
        return True
    folder, _, file = name.rpartition("/")
    return folder.endswith("/ggml/src") and file.endswith(".h")
