"""What is built for the embedded engine on this machine: where it lies, and one manifest for all of its parts.

A part is a library that the engine loads: its RPC plugin, or an accelerator's. A directory with parts has one
`installation.json`, which names the engine that they fit, their digests, how they were made, and what could not be made
and why. It is checked before anything is loaded.
"""

import hashlib
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import msgspec
from filelock import FileLock, Timeout

import mesh_llm
from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.runtime.home import write_atomic

BUNDLED = Path(mesh_llm.__file__).parent / "engine" / "bundled"
"""What a wheel of mesh-llm carries. A checkout, and a wheel that was made without a compiler, have none."""

MANIFEST = "installation.json"

_FORMAT = 1
_SETTLED_NS = 2 * 10**9


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """One library.

    Attributes:
        name: `rpc`, `slots`, or the kind of an accelerator: `cuda`, `rocm`, `vulkan`.
        file: its name in the manifest's directory. A prebuilt engine is a directory.
        sha256: of its bytes when they passed the self-test, as of `digest`.
        version: of what it offers: the RPC protocol, as in `8.0.0`.
        how: how it was made, as in `compiled with g++`.
        log: the name of the build's log in the same directory; empty without one.
        built: seconds since the epoch.
        card: the GPU that it was built for and tested on; accelerators only.
        driver: of that GPU, as in `NVIDIA 580.95`.
        tested: what the self-test compared, in few words.
        set_aside: why it must not be loaded; empty if it may.
    """

    name: str
    file: str
    sha256: str
    version: str = ""
    how: str = ""
    log: str = ""
    built: float = 0.0
    card: str = ""
    driver: str = ""
    tested: str = ""
    set_aside: str = ""


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a part could not be made: `code`, `message` and `hint` as in MeshError; `at` in seconds since the epoch."""

    part: str
    code: str
    message: str
    hint: str = ""
    at: float = 0.0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One directory's parts.

    Attributes:
        engine: the version of the engine that they fit.
        system: as of `system()`.
        parts: at most one of each name, the last that was made at the end.
        failures: at most one for each name; a part that was made later has none.
        format: of this file.
    """

    engine: str
    system: str
    parts: tuple[Part, ...] = ()
    failures: tuple[Failure, ...] = ()
    format: int = _FORMAT

    def part(self, name: str) -> Part | None:
        """The part of this name."""
        return next((part for part in self.parts if part.name == name), None)

    def failure(self, name: str) -> Failure | None:
        """Why the part of this name could not be made."""
        return next((failure for failure in self.failures if failure.part == name), None)


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is known of a part.

    Attributes:
        part: the first that may be loaded; None if there is none.
        path: its file; None without a part.
        set_aside: for each one that may not be loaded, a sentence that says why.
        failure: why the last attempt to make it failed; None if it was not tried, or succeeded since.
    """

    part: Part | None = None
    path: Path | None = None
    set_aside: tuple[str, ...] = ()
    failure: Failure | None = None


def system() -> str:
    """The system and processor that a build fits, as in `linux-x86_64`."""
    return f"{platform.system().lower()}-{platform.machine().lower()}"


def build_directories(cache: Path, name: str = "") -> list[Path]:
    """Where builds may lie, in the order of searching: this Python environment, then the home's cache.

    The first serves all homes of one installation; the second is for environments that the user cannot write to.
    """
    places = [cache / "engine" / name]
    if sys.prefix != sys.base_prefix:
        places.insert(0, Path(sys.prefix) / "share" / "mesh-llm" / "engine" / name)
    return places


def writable_directory(places: Sequence[Path]) -> Path:
    """The first of these directories that can be written to, created if necessary.

    Its parent can be written to as well: a lock file may lie there.

    Raises:
        MeshError: `plugin_not_writable`.
    """
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


def look(name: str, engine: str, directories: Sequence[Path]) -> Found:
    """Find a part for this engine version, and check it. What does not match is set aside, with the reason."""
    set_aside: list[str] = []
    failures: list[Failure] = []
    for directory in directories:
        manifest = _read(directory)
        if manifest is None:
            continue
        if failure := manifest.failure(name):
            failures.append(failure)
        part = manifest.part(name)
        if part is None:
            continue
        path = directory / part.file
        why = _why_not(manifest, part, path, engine)
        if not why:
            return Found(part=part, path=path, set_aside=tuple(set_aside))
        set_aside.append(f"{path} is set aside: {why}.")
    return Found(set_aside=tuple(set_aside), failure=max(failures, key=lambda one: one.at, default=None))


def manifests(directories: Sequence[Path]) -> list[Manifest]:
    """The manifests of these directories, where there are any that can be read."""
    return [manifest for directory in directories if (manifest := _read(directory)) is not None]


def _why_not(manifest: Manifest, part: Part, path: Path, engine: str) -> str:
    if manifest.engine != engine:
        return f"it fits the engine {manifest.engine}, and this is {engine}"
    if manifest.system != system():
        return f"it was built for {manifest.system}, and this is {system()}"
    if part.set_aside:
        return part.set_aside.rstrip(".")
    try:
        damaged = digest(path) != part.sha256
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    return "its bytes are not those that were tested" if damaged else ""


def record_part(directory: Path, engine: str, part: Part) -> None:
    """Note a part that was made."""

    def change(known: Manifest) -> Manifest:
        parts = tuple(one for one in known.parts if one.name != part.name)
        failures = tuple(one for one in known.failures if one.part != part.name)
        return msgspec.structs.replace(known, parts=(*parts, part), failures=failures)

    _change(directory, engine, change)


def remove_part(directory: Path, name: str) -> bool:
    """Delete a part with its log, and what is noted of it. Raises OSError.

    Returns whether there was anything.
    """
    manifest = _read(directory)
    if manifest is None or (manifest.part(name) is None and manifest.failure(name) is None):
        return False
    part = manifest.part(name)
    for file in (part.file, part.log) if part is not None else ():
        if file:
            _delete(directory / file)

    def change(known: Manifest) -> Manifest:
        parts = tuple(one for one in known.parts if one.name != name)
        failures = tuple(one for one in known.failures if one.part != name)
        return msgspec.structs.replace(known, parts=parts, failures=failures)

    _change(directory, manifest.engine, change)
    return True


def record_failure(directory: Path, engine: str, part: str, error: MeshError) -> None:
    """Note why a part could not be made, if that can be written."""
    failure = Failure(part=part, code=error.code, message=error.message, hint=error.hint, at=time.time())

    def change(known: Manifest) -> Manifest:
        failures = tuple(one for one in known.failures if one.part != part)
        return msgspec.structs.replace(known, failures=(*failures, failure))

    try:
        _change(directory, engine, change)
    except OSError:
        # A full disk may be the very reason. The caller reports the failure itself.
        return


def digest(path: Path) -> str:
    """The SHA-256 of a file; of a directory, over the names and digests of all its files. Raises OSError.

    What has not changed for a while is read once by each process.
    """
    if not path.is_dir():
        return _file_digest(path)
    whole = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            whole.update(f"{file.relative_to(path).as_posix()}\0{_file_digest(file)}\n".encode())
    return whole.hexdigest()


def _file_digest(path: Path) -> str:
    about = path.stat()
    if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < _SETTLED_NS:
        # The clock of the file system is coarse: it could change again without another time.
        return _read_digest(path)
    return _known_digest(path, (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns))


@lru_cache(maxsize=256)
def _known_digest(path: Path, _: tuple[int, ...]) -> str:
    return _read_digest(path)


@contextmanager
def one_process(lock: FileLock, waits: Callable[[], None]) -> Generator[None]:
    """Hold a lock that other processes use too. Blocks; `waits` is called first if one of them holds it."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waits()
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _read_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _delete(path: Path) -> None:
    """Delete a file or a directory, if it is there. Raises OSError."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _change(directory: Path, engine: str, change: Callable[[Manifest], Manifest]) -> None:
    # Two parts may be made at once.
    with FileLock(directory.with_name(f"{directory.name}-manifest.lock")):
        known = _read(directory)
        if known is None or known.engine != engine or known.system != system():
            known = Manifest(engine=engine, system=system())
        text = msgspec.json.format(msgspec.json.encode(change(known)), indent=1)
        write_atomic(directory / MANIFEST, text + b"\n", mode=0o644)


def _read(directory: Path) -> Manifest | None:
    try:
        manifest = msgspec.json.decode((directory / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, *UNREADABLE):
        return None
    return manifest if manifest.format == _FORMAT else None
