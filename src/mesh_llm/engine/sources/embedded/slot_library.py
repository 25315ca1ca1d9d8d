"""The library that reaches the slots of the embedded llama-server from inside its process: built once, then loaded.

It also lets the server ask how many tokens to guess ahead (`guesses.h`), which it has no option for.

llama.cpp saves a slot only through an HTTP route that writes files, which stays off: it has a published vulnerability.
The server's own task for it can be posted from inside of its process, but only from C++. So a small library is compiled
against the headers of the pinned release (`slots.cpp`). Decision 17 says why this way.
"""

import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import compiler
from mesh_llm.engine.installation import Found, build_directories, digest, look
from mesh_llm.engine.sources.embedded import library_build, plugin
from mesh_llm.engine.sources.embedded.archive import VERSION, Progress, find_archive, run_to_end, unpack_headers
from mesh_llm.engine.sources.embedded.ggml import library_path
from mesh_llm.engine.sources.embedded.library_build import Library, Work
from mesh_llm.engine.sources.embedded.slot_access import load
from mesh_llm.engine.spec import EnginePart, PartState

SLOTS = "slots"
"""The library's name among the installation's parts."""

LOG_NAME = "build-slots.log"

_SOURCE = Path(__file__).with_name("slots.cpp")
_INCLUDED = Path(__file__).with_name("guesses.h")
_HEADERS = ("common", "include", "ggml/include", "tools/server", "tools/mtmd")
_OLD_STRINGS = "_Z20fs_validate_filenameRKSsb"
"""A function of llama.cpp's common library, as it is called where the wheel was built with libstdc++'s old strings."""
_TEST_SECONDS = 60.0


def supported() -> bool:
    """Whether this system has what saving slots needs: files in memory, and descriptors over sockets."""
    return sys.platform == "linux"


def revision() -> str:
    """Of the library's source, as the manifest notes it: one of an earlier source is built again."""
    return digest(_SOURCE)[:8] + digest(_INCLUDED)[:8]


def examine(cache: Path) -> Found:
    """What is known of the library. Reads it: blocks."""
    found = look(SLOTS, VERSION, plugin.directories(cache))
    if found.part is None or found.part.version == revision():
        return found
    why = f"{found.path} is set aside: it was built from an earlier source."
    return Found(set_aside=(*found.set_aside, why), failure=found.failure)


def find(cache: Path) -> Path | None:
    """The library that may be loaded; None if there is none. Reads it: blocks."""
    return examine(cache).path if supported() else None


def status(cache: Path) -> EnginePart:
    """The library for people. It is `missing`, so that a node builds it, only where this needs no download."""
    found = examine(cache)
    if found.part is not None:
        return EnginePart(
            name=SLOTS, state=PartState.READY, version=VERSION, path=str(found.path or ""), text=found.part.how
        )
    failure = found.failure
    text = " ".join((failure.message if failure is not None else "It is not built yet.", *found.set_aside))
    buildable = failure is None and find_archive(cache) is not None
    return EnginePart(
        name=SLOTS,
        state=PartState.MISSING if buildable else PartState.FAILED,
        text=f"Prompt caches do not survive a restart of the engine, and it guesses no tokens ahead by itself. {text}",
        hint="Run `mesh-llm engine install`.",
    )


def install(cache: Path, progress: Progress, archive: Path | None = None, *, force: bool = False) -> Path | None:
    """Build the library unless it is there; None where this system has no use for it. Blocks. Failures are remembered.

    Raises:
        MeshError: `compiler_missing`, `plugin_compile_failed`, `plugin_self_test_failed`, `plugin_not_writable`, and as
            `provide_archive`.
    """
    return library_build.install(LIBRARY, cache, progress, archive, force=force).path if supported() else None


def _places(cache: Path) -> list[Path]:
    return build_directories(cache, plugin.key())


def _make(work: Work) -> str:
    source = unpack_headers(work.archive, work.directory)
    compiling = f"Compiling what saves prompt caches with {Path(work.command[0]).name}; about five seconds."
    work.progress("compile", compiling)
    folders = [source / folder for folder in _HEADERS]
    definitions = ("_GLIBCXX_USE_CXX11_ABI=0",) if _has_old_strings() else ()
    compiler.compile_server_library(_SOURCE, work.target, work.command, folders, definitions, work.log)
    work.progress("self-test", "Loading it.")
    self_test(work.target)
    return revision()


def library_name() -> str:
    """The library's file name on this system."""
    return f"libmesh-llm-slots{sysconfig.get_config_var('SHLIB_SUFFIX') or '.so'}"


def self_test(library: Path) -> None:
    """Load it beside the engine, in a process of its own. Raises MeshError `plugin_self_test_failed`."""
    code = f"from {load.__module__} import load; load(__import__('pathlib').Path({str(library)!r}))"
    failure = run_to_end(
        (sys.executable, "-P", "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"), _TEST_SECONDS
    )
    if failure:
        raise MeshError(
            code="plugin_self_test_failed",
            message=f"What saves prompt caches was compiled but does not load: {failure}.",
            hint="Try another compiler, as in `CXX=clang++ mesh-llm engine install`. Models are served without it.",
            status=503,
        )


def _has_old_strings() -> bool:
    path = library_path()
    code = f"import ctypes; getattr(ctypes.CDLL({str(path)!r}), {_OLD_STRINGS!r})"
    return not run_to_end((sys.executable, "-c", code), _TEST_SECONDS)


def used(parts: Sequence[EnginePart]) -> bool:
    """Whether one of the engine's parts is this library, ready."""
    return any(part.name == SLOTS and part.state is PartState.READY for part in parts)


LIBRARY = Library(
    part=SLOTS,
    title="what saves prompt caches",
    file=library_name(),
    log=LOG_NAME,
    room_bytes=10 * 10**6,
    places=_places,
    examine=examine,
    make=_make,
)
