"""Unpacks a wheel of the engine into a directory of its own. Nothing of it runs here, and nothing is trusted.

Every file must be listed in the wheel's RECORD with its SHA-256. Names that lead out of the directory, links, other
packages than the engine's, and sizes beyond the bounds are refused before anything is written.
"""

import base64
import csv
import email.parser
import hashlib
import importlib.metadata
import io
import re
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION, require_room

CODE = "wheel_wrong"

MAX_FILES = 10_000
MAX_UNPACKED_BYTES = 20 << 30
_MAX_NOTES = 8 << 20
"""Of RECORD and METADATA."""
_PIECE = 1 << 20
_TOP = re.compile(rf"{PACKAGE}(?:\.libs|-[\w.+]{{1,64}}\.dist-info)?", re.ASCII)
_DIST_INFO = re.compile(rf"{PACKAGE}-[\w.+]{{1,64}}\.dist-info", re.ASCII)
_UNSIGNED = frozenset({"RECORD", "RECORD.jws", "RECORD.p7s"})
_BROKEN = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, struct.error),
    *(NotImplementedError, RuntimeError, ValueError, KeyError),
)
"""What the standard library raises for damaged or strange archives."""

_NVIDIA = "nvidia-"


def unpack(archive: Path, into: Path) -> tuple[str, ...]:
    """Unpack into an empty directory; returns the wheel's requirements, as in `nvidia-cublas-cu12>=12.8`.

    Raises:
        MeshError: `wheel_wrong`, `disk_full`.
        OSError: the disk failed.
    """
    try:
        with zipfile.ZipFile(archive) as wheel:
            members = _members(archive.name, wheel.infolist())
            require_room(into, sum(member.file_size for member in members.values()))
            notes = _notes_directory(archive.name, members)
            record = _record(archive.name, _read(archive.name, wheel, members, f"{notes}/RECORD"))
            for name, member in members.items():
                _extract(archive.name, wheel, member, into / name, record.get(name))
            requires = _requires(archive.name, _read(archive.name, wheel, members, f"{notes}/METADATA"))
    except _BROKEN as error:
        raise wrong(archive.name, f"the file is damaged ({error or type(error).__name__})") from error
    if not any((into / PACKAGE).glob(f"{PACKAGE}*.so")):
        raise wrong(archive.name, "it has no library of the engine")
    return requires


def _members(archive: str, infos: Sequence[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The files by name. Raises MeshError."""
    if len(infos) > MAX_FILES:
        raise wrong(archive, f"it has {len(infos)} files")
    found: dict[str, zipfile.ZipInfo] = {}
    total = 0
    for info in infos:
        name = info.filename
        path = PurePosixPath(name)
        parts = name.rstrip("/").split("/")
        strange = any(part in {"", ".", ".."} for part in parts) or any(letter in name for letter in "\\:\0\n")
        if strange or path.is_absolute() or len(name) > 400 or name.rstrip("/") != str(path):
            raise wrong(archive, f"it has a file called {name[:80]!r}")
        kind = info.external_attr >> 16
        if kind and not (stat.S_ISREG(kind) or stat.S_ISDIR(kind) or stat.S_IFMT(kind) == 0):
            raise wrong(archive, f"{name[:80]!r} is not a plain file")
        if not _TOP.fullmatch(parts[0]):
            raise wrong(archive, f"it has {parts[0][:80]!r}, which is not the engine's")
        if info.is_dir():
            continue
        # The other ways are no wheel's, and their readers' errors look like those of a disk.
        if info.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
            raise wrong(archive, f"{name[:80]!r} is compressed as wheels are not")
        # zipfile would seek there, and the system's error looks like one of a disk.
        if info.header_offset < 0:
            raise wrong(archive, f"{name[:80]!r} would begin before the file does")
        if name in found or len(parts) < 2:
            raise wrong(archive, f"it has {name[:80]!r} twice, or in a wrong place")
        total += info.file_size
        if total > MAX_UNPACKED_BYTES:
            raise wrong(archive, f"it would be larger than {size(MAX_UNPACKED_BYTES)}")
        found[name] = info
    return found


def _notes_directory(archive: str, members: Mapping[str, zipfile.ZipInfo]) -> str:
    found = {name.split("/")[0] for name in members if _DIST_INFO.fullmatch(name.split("/")[0])}
    if len(found) != 1:
        raise wrong(archive, "it does not say what it contains")
    return found.pop()


def _read(archive: str, wheel: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], name: str) -> str:
    member = members.get(name)
    if member is None or member.file_size > _MAX_NOTES:
        raise wrong(archive, f"it has no {name}")
    with wheel.open(member) as file:
        return file.read(_MAX_NOTES).decode(errors="replace")


def _record(archive: str, text: str) -> dict[str, tuple[bytes, int]]:
    """Digest and size of each file that RECORD lists with a SHA-256."""
    found: dict[str, tuple[bytes, int]] = {}
    try:
        for row in csv.reader(io.StringIO(text)):
            if len(row) == 3 and row[1].startswith("sha256="):
                digest = base64.urlsafe_b64decode(row[1].removeprefix("sha256=") + "==")
                found[row[0]] = (digest, int(row[2]))
    except (csv.Error, ValueError) as error:
        raise wrong(archive, f"its RECORD cannot be read ({error})") from error
    return found


def _extract(
    archive: str, wheel: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path, recorded: tuple[bytes, int] | None
) -> None:
    if recorded is None and path.name not in _UNSIGNED:
        raise wrong(archive, f"{member.filename} is not in its RECORD")
    path.parent.mkdir(parents=True, exist_ok=True)
    digest, count = hashlib.sha256(), 0
    with wheel.open(member) as source, path.open("xb") as target:
        while piece := source.read(_PIECE):
            count += len(piece)
            if count > member.file_size:
                break
            digest.update(piece)
            target.write(piece)
    if count != member.file_size:
        raise wrong(archive, f"{member.filename} is not as large as it says")
    path.chmod(0o755 if ".so" in path.suffixes else 0o644)
    if recorded is not None and (digest.digest(), count) != recorded:
        raise wrong(archive, f"{member.filename} is not what its RECORD says")


def _requires(archive: str, metadata: str) -> tuple[str, ...]:
    """What the wheel requires, if it is the pinned release. Raises MeshError."""
    notes = email.parser.Parser().parsestr(metadata, headersonly=True)
    name, version = str(notes.get("Name", "")), str(notes.get("Version", ""))
    try:
        same = canonicalize_name(name) == canonicalize_name(PACKAGE)
        same = same and Version(version).public == Version(VERSION).public
    except InvalidVersion:
        same = False
    if not same:
        raise wrong(archive, f"it contains {name[:40]} {version[:40]}, and {PACKAGE} {VERSION} is needed")
    return tuple(str(one) for one in notes.get_all("Requires-Dist", ()))


def to_fetch(archive: str, requires: Sequence[str]) -> tuple[str, ...]:
    """Of a wheel's requirements, NVIDIA's libraries: they are to be fetched. All others must be installed.

    Raises:
        MeshError: `wheel_wrong`, with what is missing.
    """
    found: list[str] = []
    missing: list[str] = []
    for text in requires:
        try:
            one = Requirement(text)
        except InvalidRequirement as error:
            raise wrong(archive, f"its requirement {text[:80]!r} cannot be read") from error
        if one.marker is not None and not one.marker.evaluate({"extra": ""}):
            continue
        if one.url is None and canonicalize_name(one.name).startswith(_NVIDIA):
            found.append(f"{one.name}{one.specifier}")
        elif not _installed(one):
            missing.append(f"{one.name}{one.specifier}")
    if missing:
        raise wrong(archive, f"it needs {', '.join(missing)}, which is not installed beside mesh-llm")
    return tuple(found)


def _installed(one: Requirement) -> bool:
    try:
        return one.specifier.contains(importlib.metadata.version(one.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


def wrong(archive: str, why: str) -> MeshError:
    """The wheel is not used."""
    return MeshError(
        code=CODE,
        message=f"{archive} is not used: {why}.",
        hint="Name another index (`--index URL`), or do without: `mesh-llm engine install --index none`.",
        status=502,
    )
