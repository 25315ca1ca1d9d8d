"""Accelerators for tests: a GPU that is the processor under another name, and Mesa's software device for Vulkan."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mesh_llm.engine.compiler import find_compiler
from mesh_llm.engine.installation import Part, digest, record_part
from mesh_llm.engine.sources.embedded import loading, plugin
from mesh_llm.engine.sources.embedded.archive import SDIST_NAME, VERSION, unpack

_SOURCE = Path(__file__).parents[1] / "support" / "stand_in_gpu.cpp"
_ARCHIVE = Path(sys.prefix) / "share" / "mesh-llm" / "source" / SDIST_NAME

VULKAN_PLUGIN = Path(sys.prefix) / "share" / "mesh-llm" / "tests" / f"{VERSION}-{loading.library_name(loading.VULKAN)}"
"""Where `make setup-dev` puts it (tools/build_vulkan.py): no node of this environment loads it by itself."""

NO_FAULT, CRASH_AT_LOAD, CRASH_AT_OPERATOR, HANG, WRONG_OPERATOR, WRONG_MODEL, LITTLE_MEMORY = range(7)
TWO_DEVICES, LEAST_MEMORY = 7, 8

StandIn = Callable[[int], Path]


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """The stand-in's library, by its fault."""
    directory = tmp_path_factory.mktemp("stand-in")
    ggml = unpack(_ARCHIVE, directory)

    def compiled(fault: int) -> Path:
        library = directory / f"libggml-stand-in-{fault}.so"
        if not library.exists():
            command = (
                *find_compiler(),
                *("-std=c++17", "-O1", "-fPIC", "-w", "-shared", f"-DFAULT={fault}"),
                *(f"-D{name}" for name in ("GGML_BACKEND_DL", "GGML_BACKEND_SHARED", "GGML_BACKEND_BUILD")),
                *(f"-I{place}" for place in (ggml / "include", ggml / "src")),
                *(str(_SOURCE), "-o", str(library)),
            )
            subprocess.run(command, check=True)
        return library

    return compiled


@pytest.fixture
def llvmpipe(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The Vulkan plugin, and Mesa's software device, which ggml shows only when it is named."""
    if not VULKAN_PLUGIN.exists():
        pytest.skip("the Vulkan plugin for tests is not built: make setup-dev")
    monkeypatch.setenv("GGML_VK_VISIBLE_DEVICES", "0")
    # It compiles hundreds of programs and computes little with each: what optimising them takes is never won back.
    monkeypatch.setenv("GALLIVM_PERF", "nopt")
    return VULKAN_PLUGIN


def installed(cache: Path, library: Path, kind: str = loading.VULKAN) -> Path:
    """Install a library as the accelerator of a home; returns its path there."""
    directory = cache / "engine" / plugin.key()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / loading.library_name(kind)
    if path.exists():
        path.unlink()
    os.link(library, path)
    record_part(directory, VERSION, Part(name=kind, file=path.name, sha256=digest(path)))
    return path
