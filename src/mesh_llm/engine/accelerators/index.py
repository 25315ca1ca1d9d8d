"""Indexes of wheels: which of their files is a build of the pinned engine for an accelerator. No network is used here.

The engine's publisher keeps indexes of its own, one for each accelerator; the README inside of the installed package
names them. Any other index of the same protocol will do: a list of links in HTML (PEP 503), or JSON (PEP 691). Its
files say what they are by their names: the version, the Python and the system that they fit (PEP 427), and the
accelerator by a local version, as in `1.0+cu128`, or by the name of the index, as in `.../whl/cu128`.

What an index sends comes from outside: it is bounded, and nothing of it is taken that does not parse.
"""

import html
import importlib.metadata
import ipaddress
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import msgspec
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag, sys_tags
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename
from packaging.version import Version

from mesh_llm.core.types.errors import UNREADABLE, MeshError
from mesh_llm.engine.accelerators.cards import Card
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.sources.embedded.loading import CUDA, ROCM, VULKAN

VARIABLE = "MESH_LLM_ENGINE_INDEX"
NO_INDEX = "none"
UNREACHABLE = "index_unreachable"
UNHASHED = "index_unhashed"
"""Codes of an index that does not answer, and of a wheel for which nobody gives a digest."""

MAX_PAGE_BYTES = 16 << 20
MAX_WHEEL_BYTES = 6 << 30

_MAX_FILES = 50_000
_MAX_NAME = 255
_MAX_ADDRESS = 4096
_MAX_NAMED = 16
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)
_NAMED_INDEX = re.compile(rf"\b{PACKAGE}\b[^\n]*--(?:extra-)?index-url[ =](https://[^\s\"'`<>]{{1,500}})")
_MAX_TAG = 8192
_LINK = re.compile(rf"<a\b([^<>]{{0,{_MAX_TAG}}})>", re.IGNORECASE)
_BASE = re.compile(rf"<base\b([^<>]{{0,{_MAX_TAG}}})>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"""([a-z][a-z-]{0,40})(?:\s{0,9}=\s{0,9}("[^"]*"|'[^']*'|[^\s"'>]+))?""", re.IGNORECASE)
_FILENAME = re.compile(r"[A-Za-z0-9][\w.+!-]*\.whl", re.ASCII)
"""What a file name may be made of: it becomes one here."""
_FLAVOUR = re.compile(r"(cu|cuda|rocm|hip|vulkan)[-._]?(\d{1,4}(?:[-._]\d{1,4}){0,3})?", re.ASCII | re.IGNORECASE)
_KINDS = {"cu": CUDA, "cuda": CUDA, "rocm": ROCM, "hip": ROCM, "vulkan": VULKAN}
_CUDA_13_LEAST = 75
"""The oldest architecture for which CUDA 13 compiles."""


@dataclass(frozen=True, kw_only=True)
class Index:
    """Where to look for prebuilt engines.

    Attributes:
        address: of the user's index; empty for those of the publisher.
        sha256: of the wheel, if the user knows it: stands above what the index says.
        strict: the user asked for this index just now: without a wheel from it nothing is installed.
    """

    address: str = ""
    sha256: str = ""
    strict: bool = False


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """Which accelerator a wheel is built for: its kind, the version of CUDA or ROCm, and how the index calls it."""

    kind: str
    version: tuple[int, ...]
    name: str


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A file of an index: the SHA-256 and size where the index gives them; empty and 0 otherwise."""

    filename: str
    url: str
    sha256: str = ""
    size: int = 0


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A wheel that fits.

    Attributes:
        kind: of the accelerator.
        flavour: as in `cu128`.
        filename: its name.
        url: where it is.
        index: the address of the index that lists it.
        sha256: what it must be; empty if nobody says.
        size: bytes; 0 if it is not known yet.
    """

    kind: str
    flavour: str
    filename: str
    url: str
    index: str
    sha256: str = ""
    size: int = 0

    @property
    def host(self) -> str:
        """Where it comes from, for people."""
        return urlsplit(self.url).netloc


# Where to look


def configured(option: str | None = None, sha256: str = "", environ: Mapping[str, str] = os.environ) -> Index | None:
    """The index to ask: as the user names it, or as MESH_LLM_ENGINE_INDEX does, or the publisher's; None for `none`.

    Raises:
        MeshError: `index_address`.
    """
    if sha256 and not _SHA256.fullmatch(sha256.lower()):
        raise MeshError(
            code="index_address",
            message=f"{sha256} is no SHA-256: that has 64 hexadecimal digits.",
            hint="sha256sum FILE prints it.",
        )
    address = (option if option is not None else environ.get(VARIABLE, "")).strip()
    if address.lower() == NO_INDEX:
        return None
    if address:
        _check_address(address)
    return Index(address=address.rstrip("/"), sha256=sha256.lower(), strict=option is not None)


def _check_address(address: str) -> None:
    try:
        parts = urlsplit(address)
        good = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or len(address) > _MAX_ADDRESS or any(ord(letter) <= 32 for letter in address):
        raise MeshError(
            code="index_address",
            message=f"{address[:80]} is no address of an index.",
            hint=f"It begins with https://, as in `--index https://HOST/whl`. `--index {NO_INDEX}` asks no index.",
        )


def is_private(address: str) -> bool:
    """Nobody on the way can change what this address answers: HTTPS, or this very machine."""
    parts = urlsplit(address)
    if parts.scheme == "https" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def publisher_indexes(metadata: str | None = None) -> tuple[str, ...]:
    """The addresses of indexes that the installed package's own README names for accelerators."""
    if metadata is None:
        try:
            metadata = importlib.metadata.distribution(PACKAGE).read_text("METADATA")
        except importlib.metadata.PackageNotFoundError:
            metadata = None
    found = [match.rstrip("/.,)") for match in _NAMED_INDEX.findall(metadata or "")]
    return tuple(dict.fromkeys(one for one in found if flavour_of_index(one) is not None))[:_MAX_NAMED]


def places(index: Index, kind: str, card: Card | None, named: Sequence[str] | None = None) -> tuple[str, ...]:
    """The indexes to ask for wheels of this kind, best first: newer CUDA and ROCm before older, if the driver runs it.

    `named`: as of `publisher_indexes`. A user's index may hold several accelerators: beside itself, its folders are
    asked that are called as the publisher's.
    """
    publisher = publisher_indexes() if named is None else tuple(named)
    if not index.address:
        candidates = list(publisher)
    elif flavour_of_index(index.address) is not None:
        candidates = [index.address]
    else:
        names = (*(one.rpartition("/")[2] for one in publisher), kind)
        candidates = [f"{index.address}/{name}" for name in dict.fromkeys(names)]
    fitting: list[tuple[tuple[int, ...], str]] = []
    for address in candidates:
        flavour = flavour_of_index(address)
        if flavour is not None and flavour.kind == kind and runs(flavour, card):
            fitting.append((flavour.version, address))
    found = [address for _, address in sorted(fitting, key=lambda one: one[0], reverse=True)]
    if index.address and flavour_of_index(index.address) is None:
        found.insert(0, index.address)
    return tuple(found)


def project_page(address: str) -> str:
    """The page of the engine's package in an index."""
    return f"{address}/{canonicalize_name(PACKAGE)}/"


def flavour_of_index(address: str) -> Flavour | None:
    """What the last part of an index's address says; None if it names no accelerator."""
    return parse_flavour(urlsplit(address).path.rstrip("/").rpartition("/")[2])


def parse_flavour(text: str) -> Flavour | None:
    """As in `cu128`, `rocm-6.4.1`, `vulkan`; None for anything else."""
    match = _FLAVOUR.fullmatch(text)
    if match is None:
        return None
    name, digits = match[1].lower(), match[2] or ""
    version = tuple(int(part) for part in re.split(r"[-._]", digits)) if digits else ()
    if name == "cu" and len(version) == 1 and version[0] >= 10:
        # cu128 is CUDA 12.8.
        version = divmod(version[0], 10)
    return Flavour(kind=_KINDS[name], version=version, name=text)


def runs(flavour: Flavour, card: Card | None) -> bool:
    """Whether the card and its driver can run this; True if nothing is known against it."""
    if flavour.kind != CUDA or card is None or not flavour.version:
        return True
    if card.cuda > (0, 0) and flavour.version[:2] > card.cuda:
        return False
    old = card.architecture.isdigit() and int(card.architecture) < _CUDA_13_LEAST
    return not (old and flavour.version[0] >= 13)


# What an index says


def parse_html(page: bytes, address: str) -> list[Listed]:
    """The files that a page of links names (PEP 503), without those that were withdrawn. Raises MeshError.

    The time grows with the page and no faster, whatever it contains.
    """
    text = _without_comments(page.decode(errors="replace"))
    base = _BASE.search(text)
    base_address = _joined(address, _attributes(base[1]).get("href", "") if base is not None else "")
    found: list[Listed] = []
    seen = 0
    for link in _LINK.finditer(text):
        seen += 1
        if seen > _MAX_FILES:
            break
        attributes = _attributes(link[1])
        if "data-yanked" in attributes:
            continue
        plain, fragment = _split(_joined(base_address, attributes.get("href", "")))
        name, _, digest = fragment.partition("=")
        one = _listed(
            unquote(plain.rpartition("/")[2]),
            plain,
            digest if name == "sha256" else "",
            0,
            attributes.get("data-requires-python", ""),
        )
        if one is not None:
            found.append(one)
    if not seen:
        raise _unreadable(address, "it is a page without links")
    return found


def _without_comments(text: str) -> str:
    kept: list[str] = []
    at = 0
    while (begin := text.find("<!--", at)) >= 0:
        kept.append(text[at:begin])
        end = text.find("-->", begin)
        if end < 0:
            return "".join(kept)
        at = end + 3
    return "".join([*kept, text[at:]])


def _attributes(tag: str) -> dict[str, str]:
    """Of a tag, by name; empty for one without a value."""
    return {
        match[1].lower(): html.unescape((match[2] or "").strip("\"'")) for match in _ATTRIBUTE.finditer(tag[:_MAX_TAG])
    }


class _Meta(msgspec.Struct, frozen=True, rename="kebab"):
    api_version: str = ""


class _File(msgspec.Struct, frozen=True, rename="kebab"):
    filename: str
    url: str
    hashes: dict[str, str] = {}
    size: int = 0
    yanked: bool | str = False
    requires_python: str | None = None


class _Page(msgspec.Struct, frozen=True):
    files: list[_File]
    meta: _Meta = _Meta()


def parse_json(page: bytes, address: str) -> list[Listed]:
    """The files that a JSON page names (PEP 691), without those that were withdrawn. Raises MeshError."""
    try:
        decoded = msgspec.json.decode(page, type=_Page)
    except UNREADABLE as error:
        raise _unreadable(address, f"its JSON cannot be read ({error})") from error
    if not decoded.meta.api_version.startswith("1."):
        raise _unreadable(address, f"it speaks version {decoded.meta.api_version[:20] or '?'} of the protocol, not 1.x")
    found = [
        _listed(file.filename, _joined(address, file.url), file.hashes.get("sha256", ""), file.size,
                file.requires_python or "")
        for file in decoded.files[:_MAX_FILES]
        if file.yanked is False
    ]  # fmt: skip
    return [one for one in found if one is not None]


def _listed(filename: str, url: str, sha256: str, size: int, python: str) -> Listed | None:
    """A file as listed; None for what cannot be meant: another kind of file or address, or another Python."""
    if not _FILENAME.fullmatch(filename) or len(filename) > _MAX_NAME or len(url) > _MAX_ADDRESS:
        return None
    try:
        _check_address(url)
    except MeshError:
        return None
    if python:
        try:
            if not SpecifierSet(python).contains(platform.python_version()):
                return None
        except InvalidSpecifier:
            return None
    digest = sha256.lower() if _SHA256.fullmatch(sha256.lower()) else ""
    return Listed(filename=filename, url=url, sha256=digest, size=size if 0 < size <= MAX_WHEEL_BYTES else 0)


def _joined(base: str, address: str) -> str:
    try:
        return urljoin(base, address.strip())
    except ValueError:
        return ""


def _split(address: str) -> tuple[str, str]:
    try:
        plain, fragment = urldefrag(address)
    except ValueError:
        return "", ""
    return plain, fragment


# Which of the files it is


def choose(
    files: Iterable[Listed], address: str, kind: str, card: Card | None, tags: Sequence[Tag] | None = None
) -> Wheel | MeshError:
    """The file that fits best this machine, the pinned version and the accelerator; or why there is none.

    Args:
        files: of one index.
        address: of that index: its name may say which accelerator it is for.
        kind: of the accelerator.
        card: for which it must run.
        tags: what this Python can install, best first; None to find out.
    """
    ranks = {tag: place for place, tag in enumerate(sys_tags() if tags is None else tags)}
    wanted, here = Version(VERSION), flavour_of_index(address)
    best: tuple[tuple[object, ...], Listed, Flavour] | None = None
    seen_version = seen_kind = seen_driver = False
    for file in files:
        try:
            name, version, build, file_tags = parse_wheel_filename(file.filename)
        except InvalidWheelFilename:
            continue
        if name != canonicalize_name(PACKAGE) or version.public != wanted.public:
            continue
        seen_version = True
        flavour = parse_flavour(version.local) if version.local is not None else here
        if flavour is None or flavour.kind != kind:
            continue
        seen_kind = True
        if not runs(flavour, card):
            continue
        seen_driver = True
        rank = min((ranks[tag] for tag in file_tags if tag in ranks), default=None)
        if rank is None:
            continue
        key = (flavour.version, -rank, build, file.filename)
        if best is None or key > best[0]:
            best = (key, file, flavour)
    if best is not None:
        _, file, flavour = best
        return Wheel(
            kind=kind,
            flavour=flavour.name,
            filename=file.filename,
            url=file.url,
            index=address,
            sha256=file.sha256,
            size=file.size,
        )
    return _without(address, kind, seen_version, seen_kind, seen_driver)


def _without(address: str, kind: str, version: bool, of_kind: bool, driver: bool) -> MeshError:
    if not version:
        why = f"has no wheel of {PACKAGE} {VERSION}, which this version of mesh-llm needs"
    elif not of_kind:
        why = f"has {PACKAGE} {VERSION}, but no build for {kind}"
    elif not driver:
        why = f"has builds for {kind}, but for a newer driver or another card"
    else:
        why = f"has builds for {kind}, but none for this system and this Python"
    return no_wheel(address, why)


def no_wheel(address: str, why: str) -> MeshError:
    """The index has nothing that fits."""
    return MeshError(
        code="index_without_wheel",
        message=f"The index {address} {why}.",
        hint=f"Name another index (`--index URL`), or do without: `mesh-llm engine install --index {NO_INDEX}`.",
        status=404,
    )


def _unreadable(address: str, why: str) -> MeshError:
    return MeshError(
        code="index_unreadable",
        message=f"{address} is no index of wheels: {why}.",
        hint=f"Check the address; `--index {NO_INDEX}` does without an index.",
        status=502,
    )
