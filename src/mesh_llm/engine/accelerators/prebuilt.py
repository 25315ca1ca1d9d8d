"""A prebuilt engine from an index of wheels: found, downloaded, checked, unpacked beside the plugins, and tested.

It is another build of the very release that mesh-llm pins, with an accelerator in it. It lies in a directory of its
own, which only the engine's children put in front of their module search path; this process never imports it. It is one
part of the installation, as a plugin is; its digest is over all its files.
"""

import asyncio
import hashlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import msgspec
from packaging.version import InvalidVersion, Version

from mesh_llm.core.types.errors import UNREADABLE, MeshError, size
from mesh_llm.engine.accelerators import selftest, toolbox
from mesh_llm.engine.accelerators.build import Progress, Step
from mesh_llm.engine.accelerators.cards import Card
from mesh_llm.engine.accelerators.index import (
    UNHASHED,
    Index,
    Wheel,
    choose,
    is_private,
    no_wheel,
    parse_html,
    parse_json,
    places,
    project_page,
)
from mesh_llm.engine.accelerators.recipe import RECIPES
from mesh_llm.engine.accelerators.wheel_archive import to_fetch, unpack, wrong
from mesh_llm.engine.installation import Part, digest
from mesh_llm.engine.process import python_module, run
from mesh_llm.engine.sources.embedded import plugin
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION, require_room
from mesh_llm.engine.sources.embedded.loading import LOAD
from mesh_llm.engine.sources.embedded.probe_main import EmbeddedProbe
from mesh_llm.engine.spec import DeviceKind
from mesh_llm.runtime.transfer.fetch import Job, fetch
from mesh_llm.runtime.transfer.progress import Meter
from mesh_llm.runtime.transfer.progress import Progress as Fetched

_UNPACKED = 3
"""A wheel's files are about so many times as large as the wheel."""
_CONNECTIONS = 4
_PROBE_SECONDS = 180.0
_TELL_SECONDS = 1.0

Agree = Callable[[Wheel], bool]
"""Asks the user whether to install a wheel for which no digest is known."""


def find(index: Index, kind: str, card: Card | None, agree: Agree | None = None) -> Wheel:
    """The wheel to install. Blocks, for seconds.

    Args:
        index: where to look.
        kind: of the accelerator.
        card: that must run it; None if nothing is known.
        agree: asked if no digest is known; None if nobody can be asked: such a wheel is refused.

    Raises:
        MeshError: `index_unreachable`, `index_unreadable`, `index_without_wheel`, `index_unhashed`.
    """
    # Imported only to fetch: it takes a tenth of a second.
    from mesh_llm.engine.accelerators.index_client import IndexClient

    asked = places(index, kind, card)
    if not asked:
        raise no_wheel(index.address or f"of {PACKAGE}'s publisher", f"has no folder for {kind} that this driver runs")
    refusals: list[MeshError] = []
    with IndexClient() as client:
        for place in asked:
            page = client.page(project_page(place))
            if page is None:
                continue
            text, is_json, address = page
            listed = parse_json(text, address) if is_json else parse_html(text, address)
            found = choose(listed, place, kind, card)
            if isinstance(found, Wheel):
                # What anybody on the way could have changed says nothing.
                sha256 = index.sha256 or (found.sha256 if is_private(place) else "")
                found = replace(found, sha256=sha256, size=found.size or client.size(found.url))
                if sha256 or (agree is not None and agree(found)):
                    return found
                raise _unhashed(found)
            refusals.append(found)
    # The last one is of the folder, if there is one for this accelerator.
    raise refusals[-1] if refusals else no_wheel(asked[0], f"has no page of {PACKAGE}")


def install(
    cache: Path, directory: Path, wheel: Wheel, card: Card | None, model: Path | None, progress: Progress
) -> Part:
    """Download, check, unpack and test a wheel; returns the part, which is not noted yet. Blocks, for minutes.

    A download that was interrupted goes on.

    Args:
        cache: the home's cache directory: there may lie the RPC plugin.
        directory: of the installation.
        wheel: as of `find`.
        card: that is here, for the manifest.
        model: a small one for the self-test; None tests operators only.
        progress: called at each step.

    Raises:
        MeshError: `index_*`, `download_failed`, `download_corrupt`, `wheel_wrong`, `disk_full`,
            `accelerator_download_failed`, `accelerator_no_device`, `accelerator_self_test_failed`.
        OSError: the disk failed.
    """
    kind = wheel.kind

    def say(name: str, text: str) -> None:
        progress(Step(kind=kind, name=name, text=text))

    archive = directory / wheel.filename
    if not _is_complete(wheel, archive):
        require_room(directory, (1 + _UNPACKED) * wheel.size)
        say("download", f"Downloading {wheel.filename} ({size(wheel.size)}) from {wheel.host}.")
        _download(wheel, archive, progress)
    sha256 = digest(archive)
    place = directory / f"wheel-{kind}-{sha256[:12]}"
    try:
        say("unpack", f"Checking and unpacking {wheel.filename}.")
        _unpack(archive, directory, place, say)
        tested = _tested(cache, place, wheel, model, say)
    except MeshError:
        archive.unlink(missing_ok=True)
        remove(place)
        raise
    archive.unlink(missing_ok=True)
    proof = "as was announced" if wheel.sha256 else "with nothing to compare it with"
    return Part(
        name=kind,
        file=place.name,
        sha256=digest(place),
        version=VERSION,
        how=f"prebuilt: {wheel.filename} ({wheel.flavour}) from {wheel.host}, SHA-256 {sha256}, {proof}",
        built=time.time(),
        card=card.name if card is not None else "",
        driver=card.driver if card is not None else "",
        tested=tested,
    )


def remove(place: Path) -> None:
    """Delete an unpacked wheel."""
    shutil.rmtree(place, ignore_errors=True)


def _is_complete(wheel: Wheel, archive: Path) -> bool:
    """Whether an earlier attempt, which was interrupted later on, has downloaded it. Without a digest nobody knows."""
    return bool(wheel.sha256) and archive.is_file() and digest(archive) == wheel.sha256


def _download(wheel: Wheel, archive: Path, progress: Progress) -> None:
    from mesh_llm.engine.accelerators.index_client import IndexClient

    name = wheel.sha256 or hashlib.sha256(f"{wheel.url} {wheel.size}".encode()).hexdigest()
    job = Job(
        name=wheel.filename,
        size=wheel.size,
        sha256=wheel.sha256,
        digest=name,
        prefix=b"PK\x03\x04",
        kind=("a wheel", "Name another index (`--index URL`), or do without: `mesh-llm engine install --index none`."),
        mirror="name another index",
    )
    meter, told = Meter(), 0.0

    def show(fetched: Fetched) -> None:
        nonlocal told
        text, now = meter.text(fetched), time.monotonic()
        if now - told >= _TELL_SECONDS:
            told = now
            percent = int(100 * fetched.done_bytes / max(1, fetched.total_bytes))
            progress(Step(kind=wheel.kind, name="download", text=f"{wheel.filename}: {text}.", percent=percent))

    with IndexClient() as client:
        fetch(
            job,
            archive.with_name(f".{wheel.kind}-{name[:16]}.partial"),
            archive,
            lambda begin, end: client.part(wheel.url, wheel.size, begin, end),
            show,
            threading.Event(),
            _CONNECTIONS,
        )


def _unpack(archive: Path, directory: Path, place: Path, say: Callable[[str, str], None]) -> None:
    """Unpack beside the place, and move there what is complete."""
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=directory) as work:
        into = Path(work) / "wheel"
        into.mkdir()
        needed = to_fetch(archive.name, unpack(archive, into))
        if needed:
            say("download", f"Downloading {', '.join(needed)} with the package client.")
            toolbox.add_libraries(needed, into)
        remove(place)
        into.replace(place)


def _tested(cache: Path, place: Path, wheel: Wheel, model: Path | None, say: Callable[[str, str], None]) -> str:
    """Load it in processes of its own, and compute; returns what was tested. Raises MeshError."""
    say("self-test", "Loading it, with the RPC plugin.")
    argv, env = python_module("mesh_llm.engine.sources.embedded.probe_main", LOAD, str(place))
    done = asyncio.run(run(argv, env, _PROBE_SECONDS))
    try:
        probe = msgspec.json.decode(done.stdout, type=EmbeddedProbe)
        version = Version(probe.version).public
    except (InvalidVersion, *UNREADABLE):
        raise wrong(wheel.filename, f"it does not start here: {done.last_lines() or 'no answer'}") from None
    if version != Version(VERSION).public:
        raise wrong(wheel.filename, f"it is {PACKAGE} {version}, and {VERSION} is needed")
    if all(device.kind in {DeviceKind.CPU, DeviceKind.ACCELERATOR} for device in probe.devices):
        raise MeshError(
            code=selftest.NO_DEVICE,
            message=f"{wheel.filename} works, and finds no GPU that it can use with {RECIPES[wheel.kind].title}.",
            hint="Install the card's driver, and let this user open it: `mesh-llm doctor` tells more.",
            status=503,
        )
    rpc = plugin.find(cache)
    spoken = ""
    if rpc is not None:
        try:
            spoken = plugin.self_test(rpc.path, (LOAD, str(place)))
        except MeshError as error:
            raise wrong(wheel.filename, f"the RPC plugin does not work with it: {error.message}") from error
        if spoken != rpc.rpc_version:
            raise wrong(wheel.filename, f"it speaks RPC {spoken}, and this version of mesh-llm {rpc.rpc_version}")
    passed = selftest.self_test(place, model, lambda text: say("self-test", text))
    return f"{passed.text}, {f'RPC {spoken}' if spoken else 'without the RPC plugin, which is not built'}"


def clean(directory: Path, kind: str, keep: str = "") -> None:
    """Delete what is left of downloads and of wheels other than the one called `keep`. Raises nothing."""
    with suppress(OSError):
        for left in [*directory.glob(f".{kind}-*.partial*"), *directory.glob(f"{PACKAGE}-*.whl")]:
            left.unlink(missing_ok=True)
        for left in directory.glob(f"wheel-{kind}-*"):
            if left.name != keep:
                remove(left)


def _unhashed(wheel: Wheel) -> MeshError:
    return MeshError(
        code=UNHASHED,
        message=f"The index {wheel.index} gives no SHA-256 for {wheel.filename} that could be trusted.",
        hint=f"If you know it: `mesh-llm engine install --gpu {wheel.kind} --sha256 HEX`. On a terminal you are asked "
        "whether to install it without.",
        status=403,
    )
