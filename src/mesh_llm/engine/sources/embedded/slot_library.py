"""The library that reaches the slots of the embedded llama-server from inside its process: built once, then loaded.

It also lets the server ask how many tokens to guess ahead (`guesses.h`), which it has no option for.

llama.cpp saves a slot only through an HTTP route that writes files, which stays off: it has a published vulnerability.
The server's own task for it can be posted from inside of its process, but only from C++. So a small library is compiled
against the headers of the pinned release (`slots.cpp`). Decision 17 says why this way.
"""

import ctypes
import os
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mesh_llm.core.performance.speculation import Guesses
from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import compiler
from mesh_llm.engine.installation import Found, build_directories, digest, look
from mesh_llm.engine.slots import Moved, Slot, SlotError
from mesh_llm.engine.sources.embedded import library_build, plugin
from mesh_llm.engine.sources.embedded.archive import VERSION, Progress, find_archive, run_to_end, unpack_headers
from mesh_llm.engine.sources.embedded.guessing import EngineGuesses
from mesh_llm.engine.sources.embedded.library_build import Library, Work
from mesh_llm.engine.spec import EnginePart, PartState

SLOTS = "slots"
"""The library's name among the installation's parts."""

LOG_NAME = "build-slots.log"

_SOURCE = Path(__file__).with_name("slots.cpp")
_INCLUDED = Path(__file__).with_name("guesses.h")
_HEADERS = ("common", "include", "ggml/include", "tools/server", "tools/mtmd")
_ROOM = 1 << 20
"""For an answer of the server, bytes: 256 slots need a third of it."""
_OLD_STRINGS = "_Z20fs_validate_filenameRKSsb"
"""A function of llama.cpp's common library, as it is called where the wheel was built with libstdc++'s old strings."""
_TEST_SECONDS = 60.0
_OUTCOMES = {-1: "the slot was busy for too long", -2: "the answer is too long", -3: "the engine failed"}


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
    code = f"from {__name__} import load; load(__import__('pathlib').Path({str(library)!r}))"
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
    from mesh_llm.engine.sources.embedded.ggml import library_path

    path = library_path()
    code = f"import ctypes; getattr(ctypes.CDLL({str(path)!r}), {_OLD_STRINGS!r})"
    return not run_to_end((sys.executable, "-c", code), _TEST_SECONDS)


def load(library: Path) -> Any:
    """Load the library beside the engine's. Raises GgmlError, OSError."""
    from mesh_llm.engine.sources.embedded.ggml import Ggml

    # The engine's symbols become global, and the library finds them.
    Ggml()
    found = ctypes.CDLL(str(library), mode=os.RTLD_NOW)
    text = (ctypes.c_char_p, ctypes.c_size_t)
    found.mesh_llm_slots_open.restype = ctypes.c_void_p
    found.mesh_llm_slots_open.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    found.mesh_llm_slots_list.argtypes = [ctypes.c_void_p, ctypes.c_double, *text]
    found.mesh_llm_slots_move.argtypes = [
        *(ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_double),
        *text,
    ]
    found.mesh_llm_guesses_install.restype = ctypes.c_int
    return found


class _Saved(msgspec.Struct):
    n_saved: int = 0
    n_written: int = 0
    n_restored: int = 0
    n_read: int = 0


class _Refused(msgspec.Struct):
    message: str = ""


class EngineSlots:
    """The slots of a server in this process; a SlotAccess. Any thread may call, one at a time."""

    def __init__(self, library: Any, server: Any, guesses: EngineGuesses | None = None) -> None:
        """Find the server's slots.

        Args:
            library: as of `load`.
            server: an xllamacpp.Server.
            guesses: decides how many tokens it guesses ahead; None where it guesses none, or is not asked.

        Raises:
            SlotError: its memory is not laid out as the library expects.
        """
        self._library = library
        self._server = server
        self._guesses = guesses
        # A Server holds nothing but a C++ shared pointer behind Python's own header.
        header = object.__basicsize__
        if type(server).__basicsize__ != header + 2 * ctypes.sizeof(ctypes.c_void_p):
            raise SlotError("the wheel's Server has another layout")
        inner = ctypes.c_void_p.from_address(id(server) + header).value
        self._context = self._library.mesh_llm_slots_open(inner, server.listening_address.encode())
        if not self._context:
            raise SlotError("the wheel's server has another layout than its source")
        self._answer = ctypes.create_string_buffer(_ROOM)

    def list(self, seconds: float) -> tuple[Slot, ...]:
        """All slots now."""
        code = self._library.mesh_llm_slots_list(self._context, seconds, self._answer, _ROOM)
        return msgspec.json.decode(self._checked(code), type=tuple[Slot, ...])

    def move(self, slot: int, path: str, seconds: float, *, save: bool) -> Moved:
        """Save a slot to a file, or restore it from one."""
        code = self._library.mesh_llm_slots_move(
            self._context, int(save), slot, path.encode(), seconds, self._answer, _ROOM
        )
        done = msgspec.json.decode(self._checked(code), type=_Saved)
        return Moved(tokens=done.n_saved or done.n_restored, size=done.n_written or done.n_read)

    def speculate(self, *, on: bool) -> None:
        """Guess tokens ahead from now on, or not."""
        self._deciding().on = on

    def guesses(self) -> Guesses:
        """What guesses gain."""
        return self._deciding().known

    def _deciding(self) -> EngineGuesses:
        if self._guesses is None:
            raise SlotError("this build of the engine cannot be switched")
        return self._guesses

    def _checked(self, code: int) -> bytes:
        if code < 0:
            raise SlotError(_OUTCOMES.get(code, f"status {code}"))
        if code:
            raise SlotError(msgspec.json.decode(self._answer.value, type=_Refused).message or "the engine refused it")
        return self._answer.value


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
