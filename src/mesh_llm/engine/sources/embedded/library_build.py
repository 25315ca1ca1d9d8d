"""How a library for the embedded engine is built from the pinned source and installed, and what is noted of failures.

The RPC plugin (`plugin.py`) and the library that reaches slots (`slot_library.py`) go this way.
"""

import errno
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import compiler
from mesh_llm.engine.installation import (
    Found,
    Part,
    digest,
    look,
    one_process,
    record_failure,
    record_part,
    writable_directory,
)
from mesh_llm.engine.sources.embedded.archive import (
    VERSION,
    Progress,
    no_room,
    provide_archive,
    require_room,
)


class Work(NamedTuple):
    """What the steps of one build get.

    Attributes:
        archive: the checked source archive.
        directory: an empty one, for what is unpacked.
        target: the library to write, on the disk of its destination.
        command: the compiler's.
        log: gets what the compiler prints.
        progress: called at each step.
    """

    archive: Path
    directory: Path
    target: Path
    command: tuple[str, ...]
    log: Path
    progress: Progress


class Installed(NamedTuple):
    """A library that may be loaded, and its file."""

    part: Part
    path: Path


@dataclass(frozen=True, kw_only=True)
class Library:
    """One library of the installation.

    Attributes:
        part: its name among the parts.
        title: for people, as in `the RPC plugin`.
        file: its name.
        log: the name of its build's log.
        room_bytes: what a build needs of the disk.
        places: directories where it may be built, best first.
        examine: what is known of it.
        make: compiles and tests it; returns its version for the manifest.
    """

    part: str
    title: str
    file: str
    log: str
    room_bytes: int
    places: Callable[[Path], Sequence[Path]]
    examine: Callable[[Path], Found]
    make: Callable[[Work], str]


def install(
    library: Library, cache: Path, progress: Progress, archive: Path | None = None, *, force: bool = False
) -> Installed:
    """Build a library unless it is there. Blocks. Two processes at once build one. A failure is remembered.

    Args:
        library: which one.
        cache: the home's cache directory.
        progress: called at each step.
        archive: the source archive, if the user has it; it must be the pinned one.
        force: build again even if there is one.

    Raises:
        MeshError: `compiler_missing`, `plugin_compile_failed`, `plugin_self_test_failed`, `plugin_not_writable`, and as
            `provide_archive`.
    """
    began = time.time()
    found = _installed(library.examine(cache))
    if found is not None and not force:
        return found
    directory = writable_directory(library.places(cache))

    def waits() -> None:
        progress("wait", f"Another mesh-llm on this machine builds {library.title}: waiting for it.")

    with one_process(FileLock(directory.with_name(f"{directory.name}.lock")), waits):
        found = _installed(library.examine(cache))
        if found is not None and (not force or found.part.built >= began):
            return found
        failure = look(library.part, VERSION, [directory]).failure
        if failure is not None and failure.at >= began:
            # The other one tried meanwhile, and failed.
            raise MeshError(code=failure.code, message=failure.message, hint=failure.hint, status=503)
        with failures_recorded(library, directory):
            return build(library, cache, directory, progress, archive)


def build(library: Library, cache: Path, directory: Path, progress: Progress, archive: Path | None = None) -> Installed:
    """Build into `directory`, and note it in its manifest. Only while holding the directory's lock.

    Raises:
        MeshError: as `install`.
        OSError: the directory cannot be written to.
    """
    command = compiler.find_compiler()
    for left in directory.glob(".build-*"):
        # Of a build that was killed.
        shutil.rmtree(left, ignore_errors=True)
    require_room(directory, library.room_bytes)
    source = provide_archive(cache, progress, archive)
    path = directory / library.file
    # On the same file system as the destination, so that the last step is a rename.
    with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as name:
        target = Path(name) / library.file
        work = Work(source, Path(name), target, command, directory / library.log, progress)
        version = library.make(work)
        part = Part(
            name=library.part,
            file=library.file,
            sha256=digest(target),
            version=version,
            how=f"compiled with {' '.join(command)}",
            log=library.log,
            built=time.time(),
        )
        target.replace(path)
    record_part(directory, VERSION, part)
    return Installed(part, path)


def _installed(found: Found) -> Installed | None:
    return Installed(found.part, found.path) if found.part is not None and found.path is not None else None


@contextmanager
def failures_recorded(library: Library, directory: Path) -> Generator[None]:
    """Notes in the directory's manifest why the block failed, and raises it as MeshError."""
    try:
        yield
    except OSError as error:
        failure = no_room(directory) if error.errno == errno.ENOSPC else _unwritten(library, directory, error)
        record_failure(directory, VERSION, library.part, failure)
        raise failure from error
    except MeshError as error:
        record_failure(directory, VERSION, library.part, error)
        raise


def _unwritten(library: Library, directory: Path, error: OSError) -> MeshError:
    title = library.title[:1].upper() + library.title[1:]
    return MeshError(
        code="plugin_not_writable",
        message=f"{title} could not be written to {directory}: {error.strerror or error}.",
        hint="Mend that, then run `mesh-llm engine install`.",
        status=503,
    )
