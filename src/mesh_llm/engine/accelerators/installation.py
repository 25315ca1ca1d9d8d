"""Gets an accelerator for this machine's GPU, tests it, and notes it in the manifest: for commands and the daemon."""

import errno
import getpass
import os
import shutil
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
from filelock import FileLock

from mesh_llm.core.types.errors import MeshError, size
from mesh_llm.engine.accelerators import build, prebuilt, recipe, selftest, toolbox, wheel_archive
from mesh_llm.engine.accelerators.build import Progress, Step
from mesh_llm.engine.accelerators.cards import Card, Vendor, find_cards, render_nodes_closed
from mesh_llm.engine.accelerators.index import UNREACHABLE, Index, Wheel
from mesh_llm.engine.accelerators.prebuilt import Agree
from mesh_llm.engine.accelerators.recipe import RECIPES, Examined
from mesh_llm.engine.installation import (
    Part,
    build_directories,
    digest,
    look,
    one_process,
    record_failure,
    record_part,
    remove_part,
    writable_directory,
)
from mesh_llm.engine.sources.embedded import backends, loading, plugin
from mesh_llm.engine.sources.embedded.archive import (
    VERSION,
    find_archive,
    no_room,
    provide_archive,
    require_room,
)
from mesh_llm.engine.sources.embedded.loading import CUDA, KINDS, ROCM, VULKAN
from mesh_llm.runtime.process import usable_cpus

AUTO, NONE = "auto", "none"

CHOICES = (AUTO, CUDA, ROCM, VULKAN, NONE)
"""What `--gpu` takes."""

_ARCHIVE_BYTES = 38_000_000
_LASTING = {wheel_archive.CODE, selftest.CODE}
"""Failures of a prebuilt engine that the same attempt would meet again."""
_BY_VENDOR = {Vendor.NVIDIA: (CUDA, VULKAN), Vendor.AMD: (ROCM, VULKAN), Vendor.INTEL: (VULKAN,)}
"""Kinds for a vendor's cards, best first."""


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What `install` would do.

    Attributes:
        kind: of the accelerator.
        card: for which it is built; None if none was found and the kind was asked for.
        examined: what was found by trials.
        download: bytes.
        seconds: that the build may take here.
        ready: it is installed already.
        better: why a better kind is not taken, with what to do; None if this is the best.
        wheel: a prebuilt engine, which is installed instead of a build; None to build.
        strict: with `wheel`: if it cannot be installed, nothing is built.
        refused: why no prebuilt engine is taken; None if there is one, or if no index was to be asked.
    """

    kind: str
    card: Card | None
    examined: Examined
    download: int
    seconds: int
    ready: bool = False
    better: MeshError | None = None
    wheel: Wheel | None = None
    strict: bool = False
    refused: MeshError | None = None

    @property
    def text(self) -> str:
        """A sentence for people, before they are asked."""
        title, card = RECIPES[self.kind].title, self.card.name if self.card is not None else "this machine"
        if self.wheel is not None:
            amount, host = size(self.wheel.size), self.wheel.host
            return f"A prebuilt engine with {title} for {card}: {self.wheel.filename}, {amount}, from {host}."
        return (
            f"The {title} plugin for {card}: {self.download / 1e6:.0f} MB to download, then about "
            f"{build.duration(self.seconds)} of compiling in the background."
        )


def offer(
    cache: Path,
    gpu: str = AUTO,
    *,
    force: bool = False,
    cards: Sequence[Card] | None = None,
    index: Index | None = None,
    agree: Agree | None = None,
) -> Offer:
    """Find out what to install. Asks the index, and compiles a few lines: blocks for seconds.

    A prebuilt engine is better than a build of the same kind.

    Args:
        cache: the home's cache directory.
        gpu: a kind, or `auto`: the best that can be built for the cards that are here.
        force: try also what failed its test earlier.
        cards: of this machine; None to look.
        index: for prebuilt engines; None asks none.
        agree: asks the user about a wheel without a digest; None if nobody can be asked.

    Raises:
        MeshError: `no_gpu`, `accelerator_needs` with the names of packages, `accelerator_set_aside`; of an index that
            the user has asked for, `index_*`.
    """
    here = find_cards() if cards is None else cards
    shelf = None if index is None else _Prebuilt(cache, index, agree, force=force)
    if gpu != AUTO:
        found = _offer(cache, gpu, _card_for(gpu, here), shelf, force=force)
        if isinstance(found, MeshError):
            raise found
        return found
    if not here:
        raise MeshError(
            code="no_gpu",
            message="This machine has no GPU that models could use.",
            hint="If it has one, install its driver. `mesh-llm engine install --gpu vulkan` builds the plugin anyway.",
            status=404,
        )
    first = min(here, key=lambda card: list(Vendor).index(card.vendor))
    failures: list[MeshError] = []
    for kind in _BY_VENDOR[first.vendor]:
        found = _offer(cache, kind, first, shelf, force=force)
        if isinstance(found, Offer):
            better = failures[0] if failures else None
            return replace(found, better=better)
        failures.append(found)
    raise failures[-1]


def _card_for(kind: str, cards: Sequence[Card]) -> Card | None:
    return next((card for card in cards if kind in _BY_VENDOR[card.vendor]), None)


def _offer(cache: Path, kind: str, card: Card | None, shelf: "_Prebuilt | None", *, force: bool) -> Offer | MeshError:
    known = look(kind, VERSION, plugin.directories(cache))
    if known.part is not None and not force:
        return Offer(kind=kind, card=card, examined=Examined(), download=0, seconds=0, ready=True)
    refused: MeshError | None = None
    if shelf is not None:
        found = shelf.find(kind, card)
        if isinstance(found, Wheel):
            return Offer(
                kind=kind,
                card=card,
                examined=Examined(),
                download=found.size,
                seconds=0,
                wheel=found,
                strict=shelf.strict,
            )
        if shelf.strict:
            return found
        refused = found
    build_offer = _build_offer(cache, kind, card, force=force)
    if isinstance(build_offer, Offer):
        return replace(build_offer, refused=refused)
    if refused is not None:
        message = f"{build_offer.message} Nor is a prebuilt engine taken: {refused.message}"
        return MeshError(code=build_offer.code, message=message, hint=build_offer.hint, status=build_offer.status)
    return build_offer


class _Prebuilt:
    """Looks for prebuilt engines of one kind after the other. An index that cannot be reached is asked once."""

    def __init__(self, cache: Path, index: Index, agree: Agree | None, *, force: bool) -> None:
        self.strict = index.strict
        self._cache = cache
        self._index = index
        self._agree = agree
        self._force = force
        self._unreachable: MeshError | None = None

    def find(self, kind: str, card: Card | None) -> Wheel | MeshError:
        """The wheel, or why there is none."""
        places = build_directories(self._cache, plugin.key())
        failed = look(backends.prebuilt_name(kind), VERSION, places).failure
        if failed is not None and failed.code in _LASTING and not self._force:
            hint = f"To try it again: `mesh-llm engine install --gpu {kind} --force`."
            return MeshError(code=failed.code, message=failed.message, hint=hint, status=503)
        if self._unreachable is not None:
            return self._unreachable
        try:
            return prebuilt.find(self._index, kind, card, self._agree)
        except MeshError as error:
            if error.code == UNREACHABLE:
                self._unreachable = error
            return error


def _build_offer(cache: Path, kind: str, card: Card | None, *, force: bool) -> Offer | MeshError:
    failed = backends.failed_test(cache, kind)
    if failed is not None and not force:
        return MeshError(
            code="accelerator_set_aside",
            message=failed.set_aside,
            hint=f"After an update of the driver, try again: `mesh-llm engine install --gpu {kind} --force`.",
            status=503,
        )
    examined = recipe.examine(kind, card, cache)
    if examined.missing:
        return recipe.needs(kind, examined)
    download = sum(toolbox.TOOLS_BY_NAME[name].download for name in examined.fetch)
    download += 0 if find_archive(cache) is not None else _ARCHIVE_BYTES
    seconds = 60 * RECIPES[kind].cpu_minutes // usable_cpus()
    return Offer(kind=kind, card=card, examined=examined, download=download, seconds=seconds)


def install(
    cache: Path,
    wanted: Offer,
    progress: Progress,
    *,
    model: Path | None = None,
    archive: Path | None = None,
    force: bool = False,
) -> Part:
    """Install what was offered, unless it is there. Blocks. A failure is noted. An interrupted build is kept.

    Args:
        cache: the home's cache directory.
        wanted: as of `offer`.
        progress: called at each step, and every few seconds while it compiles.
        model: a small one for the self-test; None tests operators only.
        archive: the engine's source archive, if the user has it.
        force: build again even if it is installed; after a failed test only test again.

    Raises:
        MeshError: `accelerator_needs`, `accelerator_build_failed`, `accelerator_self_test_failed`,
            `accelerator_no_device`, `accelerator_download_failed`, `plugin_not_writable`, `disk_full`, and as
            `provide_archive`.
        KeyboardInterrupt: it can be continued.
    """
    kind, began = wanted.kind, time.time()
    directory = writable_directory(build_directories(cache, plugin.key()))
    with _one_at_a_time(wanted, directory, progress):
        known = look(kind, VERSION, plugin.directories(cache))
        other = known.part is not None and known.part.built >= began
        if known.part is not None and known.path is not None and (other or not force):
            return _chosen(known.path.parent, known.part)
        if wanted.wheel is not None:
            try:
                return _install_wheel(cache, wanted, wanted.wheel, directory, progress, model)
            except MeshError as error:
                if wanted.strict:
                    raise
                wanted = _build_instead(cache, wanted, error, progress, force=force)
        failure = look(kind, VERSION, [directory]).failure
        if failure is not None and failure.at >= began:
            # Another process tried meanwhile, and failed.
            raise MeshError(code=failure.code, message=failure.message, hint=failure.hint, status=503)
        if known.part is not None and force:
            build.clean(_work(directory, kind))
        try:
            return _install(cache, wanted, directory, progress, model, archive)
        except MeshError as error:
            _note(directory, kind, error)
            raise
        except OSError as error:
            full = error.errno == errno.ENOSPC
            why = no_room(directory) if full else _unwritten(directory, error)
            _note(directory, kind, why)
            raise why from error


def _install_wheel(
    cache: Path, wanted: Offer, wheel: Wheel, directory: Path, progress: Progress, model: Path | None
) -> Part:
    try:
        part = prebuilt.install(cache, directory, wheel, wanted.card, model, progress)
        with _locked(directory):
            remove_part(directory, backends.prebuilt_name(wheel.kind))
            record_part(directory, VERSION, part)
    except MeshError as error:
        with _locked(directory):
            record_failure(directory, VERSION, backends.prebuilt_name(wheel.kind), error)
        raise
    except OSError as error:
        raise no_room(directory) if error.errno == errno.ENOSPC else _unwritten(directory, error) from error
    # A plugin of this kind that was built earlier.
    (directory / loading.library_name(wheel.kind)).unlink(missing_ok=True)
    prebuilt.clean(directory, wheel.kind, part.file)
    progress(Step(kind=wheel.kind, name="done", text=f"The prebuilt engine is ready: {part.tested}."))
    return part


def _build_instead(cache: Path, wanted: Offer, error: MeshError, progress: Progress, *, force: bool) -> Offer:
    """The offer of a build, after a prebuilt engine failed. Raises MeshError if there is none."""
    found = _build_offer(cache, wanted.kind, wanted.card, force=force)
    if isinstance(found, MeshError):
        message = f"{error.message} Nor can it be built: {found.message}"
        raise MeshError(code=error.code, message=message, hint=found.hint, status=error.status) from error
    text = f"{error.message} It is built here instead."
    progress(Step(kind=wanted.kind, name="build", text=text))
    return found


def _install(
    cache: Path, wanted: Offer, directory: Path, progress: Progress, model: Path | None, archive: Path | None
) -> Part:
    kind, steps = wanted.kind, RECIPES[wanted.kind]

    def say(name: str, text: str) -> None:
        progress(Step(kind=kind, name=name, text=text))

    if not build.is_interrupted(_work(directory, kind)):
        require_room(directory, steps.room)
    source = provide_archive(cache, say, archive)
    for name in wanted.examined.fetch:
        toolbox.provide(cache, name, say)
    examined = recipe.examine(kind, wanted.card, cache)
    if examined.missing:
        raise recipe.needs(kind, examined)
    log = directory / log_name(kind)
    work = _work(directory, kind)
    built = build.build(steps, examined, source, work, log, progress)
    part = Part(
        name=kind,
        file=loading.library_name(kind),
        sha256=digest(built),
        version=VERSION,
        how=", ".join(examined.notes),
        log=log.name,
        built=time.time(),
        card=wanted.card.name if wanted.card is not None else "",
        driver=wanted.card.driver if wanted.card is not None else "",
    )
    try:
        tested = selftest.self_test(built, model, lambda text: say("self-test", text))
    except MeshError as error:
        if error.code == selftest.CODE:
            _keep(built, directory, msgspec.structs.replace(part, set_aside=error.message))
        closed = render_nodes_closed() if error.code == selftest.NO_DEVICE else ()
        if closed:
            raise _not_open(error, closed) from error
        raise
    part = msgspec.structs.replace(part, tested=tested.text)
    _keep(built, directory, part)
    prebuilt.clean(directory, kind)
    build.clean(work)
    say("done", f"The {steps.title} plugin is ready: {tested.text}.")
    return part


def _keep(built: Path, directory: Path, part: Part) -> None:
    """Put the library into its place, and note it. Readers see the old file or the new one."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".new-", delete=False) as file:
        copy = Path(file.name)
    try:
        shutil.copyfile(built, copy)
        copy.chmod(0o755)
        copy.replace(directory / part.file)
    finally:
        copy.unlink(missing_ok=True)
    with _locked(directory):
        record_part(directory, VERSION, part)


def _not_open(error: MeshError, closed: Sequence[Path]) -> MeshError:
    """No GPU was found, and device files are closed to this user."""
    return MeshError(
        code=error.code,
        message=f"{error.message} This user cannot open {', '.join(map(str, closed))}.",
        hint=f"sudo usermod -aG render,video {getpass.getuser()}, then log in again.",
        status=error.status,
    )


def _chosen(directory: Path, part: Part) -> Part:
    """Make it the one that children load."""
    if os.access(directory, os.W_OK):
        with _locked(directory):
            record_part(directory, VERSION, part)
    return part


def remove(cache: Path, kind: str) -> bool:
    """Delete an accelerator's plugin, its log, and what is left of builds; returns whether there was anything.

    Raises:
        MeshError: `plugin_not_writable`.
    """
    found = False
    for directory in build_directories(cache, plugin.key()):
        if not directory.is_dir():
            continue
        try:
            with _locked(directory):
                found = remove_part(directory, kind) or found
                remove_part(directory, backends.prebuilt_name(kind))
        except OSError as error:
            raise _unwritten(directory, error) from error
        work = _work(directory, kind)
        found = work.exists() or found
        build.clean(work)
        prebuilt.clean(directory, kind)
    return found


def interrupted(cache: Path) -> str | None:
    """The kind of a build that was started and not finished; None if there is none."""
    places = [place for place in build_directories(cache, plugin.key()) if place.is_dir()]
    return next((kind for kind in KINDS for place in places if build.is_interrupted(_work(place, kind))), None)


def log_name(kind: str) -> str:
    """The file name of a build's log."""
    return f"build-{kind}.log"


def _work(directory: Path, kind: str) -> Path:
    return directory / f"work-{kind}"


def _note(directory: Path, kind: str, error: MeshError) -> None:
    if error.code == selftest.CODE:
        # Noted with the part that failed.
        return
    with _locked(directory):
        record_failure(directory, VERSION, kind, error)


def _locked(directory: Path) -> FileLock:
    return FileLock(directory.with_name(f"{directory.name}.lock"))


@contextmanager
def _one_at_a_time(wanted: Offer, directory: Path, progress: Progress) -> Generator[None]:
    """Builds take all processors and much memory: one at a time for all homes and environments of this user."""

    def waits() -> None:
        text = "Another mesh-llm on this machine builds a plugin: waiting for it."
        progress(Step(kind=wanted.kind, name="wait", text=text))

    with one_process(FileLock(_user_directory(directory) / "accelerator-build.lock"), waits):
        yield


def _user_directory(other: Path) -> Path:
    """This user's cache directory, where no other user can make or hold a file; `other` where it cannot be had."""
    place = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mesh-llm"
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return other.parent
    return place if os.access(place, os.W_OK) else other.parent


def _unwritten(directory: Path, error: OSError) -> MeshError:
    return MeshError(
        code="plugin_not_writable",
        message=f"The plugin could not be written to {directory}: {error.strerror or error}.",
        hint="Mend that, then run `mesh-llm engine install`.",
        status=503,
    )
