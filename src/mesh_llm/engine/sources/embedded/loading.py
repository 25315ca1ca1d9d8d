"""What the embedded engine's children load beside the wheel: an accelerator's plugin, or a whole prebuilt engine.

A child gets the path on its command line, and loads it before it lists devices, which then appear under their own
names, as in `Vulkan0`. Children import this: it needs nothing that takes long to import.
"""

import ctypes
import importlib
import sys
from pathlib import Path

from mesh_llm.engine.sources.embedded.ggml import PACKAGE

CUDA, ROCM, VULKAN = "cuda", "rocm", "vulkan"

KINDS = (CUDA, ROCM, VULKAN)
"""All kinds of accelerators, best first."""

LOAD = "--load"
"""Before each plugin, or the directory of a prebuilt engine, on a child's command line."""

_FILES = {CUDA: "libggml-cuda.so", ROCM: "libggml-hip.so", VULKAN: "libggml-vulkan.so"}


def library_name(kind: str) -> str:
    """The file name of a kind's plugin."""
    return _FILES[kind]


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
