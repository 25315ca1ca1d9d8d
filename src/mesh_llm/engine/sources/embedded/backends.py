"""Which accelerator's plugin the embedded engine's children load beside the wheel, and what is known of the others.

A child gets the plugin's path on its command line. It loads it before it lists devices, which then appear under their
own names, as in `Vulkan0`. Where two plugins show one card, models would be planned for it twice: so one is loaded, the
one that was installed last.
"""

import ctypes
import importlib
import sys
from pathlib import Path

import msgspec

from mesh_llm.engine.installation import Found, Part, look, manifests
from mesh_llm.engine.sources.embedded.archive import PACKAGE, VERSION
from mesh_llm.engine.sources.embedded.plugin import directories
from mesh_llm.engine.spec import EnginePart, PartState

CUDA, ROCM, VULKAN = "cuda", "rocm", "vulkan"

KINDS = (CUDA, ROCM, VULKAN)
"""All kinds of accelerators, best first."""

_PREBUILT = "-wheel"

LOAD = "--load"
"""Before each plugin, or the directory of a prebuilt engine, on a child's command line."""

_FILES = {CUDA: "libggml-cuda.so", ROCM: "libggml-hip.so", VULKAN: "libggml-vulkan.so"}


def library_name(kind: str) -> str:
    """The file name of a kind's plugin."""
    return _FILES[kind]


def prebuilt_name(kind: str) -> str:
    """Under which the failure of a kind's prebuilt engine is noted: a build of the same kind may work."""
    return f"{kind}{_PREBUILT}"


def chosen(cache: Path) -> Found | None:
    """The accelerator that children load; None if there is none that may be loaded. Reads the whole file: blocks."""
    for kind in _newest_first(cache):
        found = look(kind, VERSION, directories(cache))
        if found.part is not None:
            return found
    return None


def load_arguments(cache: Path) -> tuple[str, ...]:
    """What a child's command line needs to load it. Blocks."""
    found = chosen(cache)
    return () if found is None else (LOAD, str(found.path))


def parse_load(arguments: list[str]) -> tuple[list[str], list[Path]]:
    """Take the plugins out of a child's arguments: returns the other arguments, and the plugins."""
    others: list[str] = []
    plugins: list[Path] = []
    rest = iter(arguments)
    for one in rest:
        if one == LOAD:
            plugins += use(Path(next(rest)))
        else:
            others.append(one)
    return others, plugins


def use(path: Path) -> list[Path]:
    """Prepare this process, a child, for an accelerator; returns the plugins to load. Before the engine is loaded.

    The directory of a prebuilt engine (`accelerators/prebuilt.py`) comes before the installed wheel. The accelerator is
    in its library, or in plugins beside it.
    """
    if not path.is_dir():
        return [path]
    sys.path.insert(0, str(path))
    importlib.invalidate_caches()
    sys.dont_write_bytecode = True
    _load_libraries([*path.glob("nvidia/*/lib/*.so*"), *path.glob("nvidia/*/lib64/*.so*")])
    return sorted(file for name in _FILES.values() for file in path.glob(f"{PACKAGE}*/{name}"))


def _load_libraries(libraries: list[Path]) -> None:
    """Load NVIDIA's libraries that came as packages, in whatever order they need each other.

    Nothing else tells the loader where they lie. What cannot be loaded is named by the engine's own library, if it
    needs it.
    """
    while libraries:
        left: list[Path] = []
        for library in libraries:
            try:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            except OSError:
                left.append(library)
        if len(left) == len(libraries):
            return
        libraries = left


def parts(cache: Path) -> tuple[EnginePart, ...]:
    """Every accelerator that was built here, or could not be, for people. Blocks."""
    loaded = chosen(cache)
    known = _newest_first(cache)
    places = directories(cache)
    found: list[EnginePart] = []
    for kind in known:
        part = _part(kind, look(kind, VERSION, places), loaded)
        failure = look(prebuilt_name(kind), VERSION, places).failure
        if failure is not None:
            texts = (part.text, f"the prebuilt engine was not taken: {failure.message}")
            part = msgspec.structs.replace(part, text="; ".join(filter(None, texts)))
        found.append(part)
    return tuple(found)


def failed_test(cache: Path, kind: str) -> Part | None:
    """The plugin of this engine that failed its self-test, with the reason; None if there is none."""
    known = [manifest.part(kind) for manifest in manifests(directories(cache)) if manifest.engine == VERSION]
    return next((part for part in known if part is not None and part.set_aside), None)


def _newest_first(cache: Path) -> list[str]:
    """The kinds of which something is known; those that were made first, the last one at the beginning."""
    found: list[str] = []
    for manifest in manifests(directories(cache)):
        names = [part.name for part in reversed(manifest.parts)]
        names += [failure.part.removesuffix(_PREBUILT) for failure in manifest.failures]
        found += [name for name in names if name in KINDS]
    return list(dict.fromkeys(found))


def _part(kind: str, found: Found, loaded: Found | None) -> EnginePart:
    if found.part is not None and found.path is not None:
        active = loaded is not None and loaded.path == found.path
        about = [found.part.how, found.part.tested, "" if active else "not loaded: another one was installed later"]
        return EnginePart(
            name=kind,
            state=PartState.READY,
            version=VERSION,
            path=str(found.path),
            text="; ".join(filter(None, about)),
            log=str(found.path.with_name(found.part.log)) if found.part.log else "",
        )
    text = " ".join((found.failure.message if found.failure is not None else "", *found.set_aside)).strip()
    hint = found.failure.hint if found.failure is not None and found.failure.hint else ""
    retry = f"To try again: `mesh-llm engine install --gpu {kind} --force`."
    return EnginePart(name=kind, state=PartState.FAILED, text=text, hint=hint or retry)
