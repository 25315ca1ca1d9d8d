"""What a build needs and can have without a change of the system: kept beside the engine's source, for later builds.

From the package registry of Python, pinned by hash: cmake and ninja, SPIR-V's headers, CUDA's compiler and libraries.
Vulkan's headers are in no such package. Where Debian's or Ubuntu's apt is, it brings them from a newer release of the
same system, checked by the system's own keys, into directories of their own: it needs no rights, and installs nothing.
"""

import getpass
import hashlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.engine.installation import build_directories, writable_directory
from mesh_llm.engine.sources.embedded.archive import Progress, package_clients, require_room, run_to_end

TOOLS, SPIRV, CUDA, VULKAN = "tools", "spirv", "cuda", "vulkan"

_LOCKS = Path(__file__).parent / "locks"
_SECONDS = 3600
_KEYRINGS = Path("/usr/share/keyrings")
_DEBIAN_SOURCES = ("/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list")
_UBUNTU_SOURCES = ("/etc/apt/sources.list.d/ubuntu.sources", "/etc/apt/sources.list")


@dataclass(frozen=True, kw_only=True)
class Tool:
    """Something that can be fetched: for people, bytes to download, and bytes on disk."""

    title: str
    download: int
    room: int


TOOLS_BY_NAME = {
    TOOLS: Tool(title="cmake and ninja", download=33_000_000, room=100_000_000),
    SPIRV: Tool(title="SPIR-V's headers", download=1_000_000, room=10_000_000),
    CUDA: Tool(title="CUDA's compiler and libraries", download=620_000_000, room=1_700_000_000),
    VULKAN: Tool(title="Vulkan's headers", download=13_000_000, room=60_000_000),
}

_VULKAN_TITLE = TOOLS_BY_NAME[VULKAN].title


@dataclass(frozen=True, kw_only=True)
class _Release:
    """A release of a system whose Vulkan headers are new enough: its name, where the mirror is named, the keys."""

    suite: str
    component: str
    sources: tuple[str, ...]
    keyring: str


_RELEASES = {
    "debian": _Release(suite="trixie", component="main", sources=_DEBIAN_SOURCES, keyring="debian-archive-keyring.gpg"),
    "ubuntu": _Release(
        suite="noble", component="main universe", sources=_UBUNTU_SOURCES, keyring="ubuntu-archive-keyring.gpg"
    ),
}


def find(cache: Path, name: str) -> Path | None:
    """The directory of a tool that was fetched earlier; None if there is none."""
    return next((place for one in _directories(cache) if (place := one / _key(name)).is_dir()), None)


def can_fetch(name: str, os_release: Path = Path("/etc/os-release")) -> bool:
    """Whether `provide` can be tried here."""
    if name == VULKAN:
        return shutil.which("apt-get") is not None and shutil.which("dpkg") is not None and _mirror(os_release) != ""
    return bool(package_clients())


def provide(cache: Path, name: str, progress: Progress) -> Path:
    """The directory of a tool; it is fetched unless it is there. Blocks.

    Raises:
        MeshError: `accelerator_download_failed`, `plugin_not_writable`, `disk_full`.
    """
    found = find(cache, name)
    if found is not None:
        return found
    tool = TOOLS_BY_NAME[name]
    directory = writable_directory(_directories(cache))
    require_room(directory, tool.room)
    progress("download", f"Downloading {tool.title} ({size(tool.download)}).")
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as work:
        into = Path(work) / name
        into.mkdir()
        if name == VULKAN:
            _fetch_headers(Path(work), into)
        else:
            _fetch_packages(name, into)
        target = directory / _key(name)
        into.replace(target)
    return target


def remove_unused(cache: Path, name: str) -> None:
    """Delete a tool."""
    place = find(cache, name)
    if place is not None:
        shutil.rmtree(place, ignore_errors=True)


def _directories(cache: Path) -> list[Path]:
    return [place.parent / "toolbox" for place in build_directories(cache)]


def _key(name: str) -> str:
    """Changes with the pinned versions."""
    if name == VULKAN:
        return f"{name}-{'-'.join(release.suite for release in _RELEASES.values())}"
    return f"{name}-{hashlib.sha256((_LOCKS / f'{name}.txt').read_bytes()).hexdigest()[:12]}"


def _fetch_packages(name: str, into: Path) -> None:
    lock = str(_LOCKS / f"{name}.txt")
    failure = _packages(into, ("--no-deps", "--require-hashes", "--requirement", lock))
    if failure:
        raise _not_fetched(TOOLS_BY_NAME[name].title, failure)
    if name == CUDA:
        _complete_cuda(into / "nvidia" / "cu13")


def add_libraries(requirements: Sequence[str], into: Path) -> None:
    """Put NVIDIA's libraries beside a prebuilt engine, with the package client. Blocks.

    A prebuilt engine names versions and no digests; the client compares with those of its own index.

    Raises:
        MeshError: `accelerator_download_failed`.
    """
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=into.parent) as work:
        failure = _packages(Path(work), requirements)
        found = sorted(Path(work).iterdir())
        strange = [place.name for place in found if not place.name.startswith("nvidia")]
        if not failure and strange:
            failure = f"they bring {', '.join(strange)}, which is not NVIDIA's"
        if failure:
            raise _not_fetched(", ".join(requirements), failure)
        for place in found:
            place.replace(into / place.name)


def _packages(into: Path, wanted: Sequence[str]) -> str:
    """Install packages into a directory; returns why that failed, empty if it did not."""
    arguments = (
        *("install", "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1"),
        *("--only-binary", ":all:", "--no-compile", "--target", str(into), *wanted),
    )
    failures: list[str] = []
    for client in package_clients():
        failure = run_to_end((*client, *arguments), _SECONDS)
        if not failure:
            return ""
        failures.append(failure)
    return "; ".join(failures) or "neither pip nor uv is installed"


def _complete_cuda(root: Path) -> None:
    """Give the libraries the names that linkers look for; packages carry only those that programs load."""
    for library in (root / "lib").glob("lib*.so.*"):
        plain = library.with_name(f"{library.name.split('.so.')[0]}.so")
        if not plain.exists():
            plain.symlink_to(library.name)
    (root / "lib64").symlink_to("lib")


def _mirror(os_release: Path = Path("/etc/os-release")) -> str:
    """The first mirror of this system; empty if it is not known, as on a system that is neither Debian nor Ubuntu."""
    release = _release(os_release)
    if release is None or not (_KEYRINGS / release.keyring).is_file():
        return ""
    for name in release.sources:
        try:
            lines = Path(name).read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            words = line.split()
            if words[:1] == ["URIs:"] or words[:1] == ["deb"]:
                found = next((word for word in words[1:] if word.startswith(("http://", "https://", "mirror+"))), "")
                if found:
                    return found
    return ""


def _release(os_release: Path) -> _Release | None:
    try:
        fields = dict(line.split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    except OSError:
        return None
    return _RELEASES.get(fields.get("ID", "").strip('"'))


def _fetch_headers(work: Path, into: Path) -> None:
    """Vulkan's headers by apt, with sources, lists and state of its own."""
    release = _release(Path("/etc/os-release"))
    mirror = _mirror()
    if release is None or not mirror:
        raise _not_fetched(_VULKAN_TITLE, "this system's mirror of packages is not known")
    state = work / "apt"
    for place in (state / "lists" / "partial", state / "archives" / "partial", state / "state"):
        place.mkdir(parents=True)
    sources = state / "sources.list"
    keyring = _KEYRINGS / release.keyring
    sources.write_text(f"deb [signed-by={keyring}] {mirror} {release.suite} {release.component}\n")
    options: list[str] = []
    for name, value in (
        ("Dir::Etc::SourceList", sources),
        ("Dir::Etc::SourceParts", "/dev/null"),
        ("Dir::State", state / "state"),
        ("Dir::State::Lists", state / "lists"),
        ("Dir::State::status", "/dev/null"),
        ("Dir::Cache", state),
        # Not apt's own user, who may not write to our directories.
        ("APT::Sandbox::User", getpass.getuser()),
        ("Acquire::Languages", "none"),
    ):
        options += ["-o", f"{name}={value}"]
    for command in (("update",), ("download", "libvulkan-dev")):
        failure = run_to_end(("apt-get", "--quiet", "--quiet", *options, *command), _SECONDS, state)
        if failure:
            raise _not_fetched(_VULKAN_TITLE, failure)
    package = next(iter(sorted(state.glob("libvulkan-dev_*.deb"))), None)
    if package is None:
        raise _not_fetched(_VULKAN_TITLE, f"{release.suite} has no libvulkan-dev")
    unpacked = state / "unpacked"
    if failure := run_to_end(("dpkg-deb", "--extract", str(package), str(unpacked)), _SECONDS):
        raise _not_fetched(_VULKAN_TITLE, failure)
    (unpacked / "usr" / "include").replace(into / "include")


def _not_fetched(title: str, why: str) -> MeshError:
    return MeshError(
        code="accelerator_download_failed",
        message=f"{title} could not be downloaded. {why}",
        hint="Check the network and the package client's settings, then run `mesh-llm engine install` again.",
        status=503,
    )
