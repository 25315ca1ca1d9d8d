"""Compiles llama.cpp's RPC plugin and our own small library on this machine, once."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mesh_llm.core.types.errors import MeshError

_COMPILERS = ("c++", "g++", "clang++")
_SOURCES = ("ggml-rpc.cpp", "transport.cpp")
_DEFINITIONS = ("GGML_BACKEND_DL", "GGML_BACKEND_SHARED", "GGML_BACKEND_BUILD", "GGML_SHARED", "NDEBUG")
_COMPILE_SECONDS = 900

_INSTALL = {
    "debian": "sudo apt install g++",
    "fedora": "sudo dnf install gcc-c++",
    "rhel": "sudo dnf install gcc-c++",
    "suse": "sudo zypper install gcc-c++",
    "arch": "sudo pacman -S gcc",
    "alpine": "sudo apk add g++",
}


def find_compiler() -> tuple[str, ...]:
    """The compiler's command: $CXX, or the first of c++, g++, clang++.

    Raises:
        MeshError: `compiler_missing`, with what was looked for and how to install one.
    """
    chosen = tuple(shlex.split(os.environ.get("CXX", "")))
    for command in (chosen,) if chosen else tuple((name,) for name in _COMPILERS):
        if program := shutil.which(command[0]):
            return (program, *command[1:])
    looked_for = f"$CXX is `{shlex.join(chosen)}`" if chosen else f"{', '.join(_COMPILERS)} are missing"
    raise MeshError(
        code="compiler_missing",
        message=f"There is no C++ compiler to build the RPC plugin with: {looked_for}.",
        hint=f"Install one: {install_command()}. Then run `mesh-llm engine install`.",
        status=503,
    )


def install_command(platform: str = sys.platform, os_release: Path = Path("/etc/os-release")) -> str:
    """How to install a compiler on this system."""
    if platform == "darwin":
        return "xcode-select --install"
    try:
        fields = dict(line.split("=", 1) for line in os_release.read_text().splitlines() if "=" in line)
    except OSError:
        fields = {}
    names = shlex.split(" ".join((fields.get("ID", ""), fields.get("ID_LIKE", "")))) if fields else []
    for name in " ".join(names).split():
        for family, command in _INSTALL.items():
            if family in name:
                return command
        if name == "ubuntu":
            return _INSTALL["debian"]
    return "g++ or clang++ from your system's packages"


def compile_plugin(ggml: Path, output: Path, compiler: tuple[str, ...], log: Path | None = None) -> None:
    """Compile ggml's RPC backend into a library that ggml loads. Takes about ten seconds.

    Args:
        ggml: the ggml directory of the source.
        output: the library to write.
        compiler: as of `find_compiler`.
        log: gets the command and all that the compiler prints.

    Raises:
        MeshError: `plugin_compile_failed`, with the compiler's last lines.
    """
    source = ggml / "src" / "ggml-rpc"
    arguments = (
        *("-std=c++17", "-O2", "-fPIC", "-w"),
        # ggml's symbols are in the wheel's library, which is loaded first: macOS needs an option for that.
        *(("-dynamiclib", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)),
        *(f"-D{name}" for name in _DEFINITIONS),
        *(f"-I{folder}" for folder in (ggml / "include", ggml / "src", source)),
        *(str(source / name) for name in _SOURCES),
    )
    _compile(compiler, arguments, output, "the RPC plugin", log)


def compile_server_library(
    source: Path,
    output: Path,
    compiler: tuple[str, ...],
    folders: Sequence[Path],
    definitions: Sequence[str],
    log: Path,
) -> None:
    """Compile a C++ file of ours against llama.cpp's headers. Its symbols are in the wheel's library, loaded first.

    Args:
        source: the file.
        output: the library to write.
        compiler: as of `find_compiler`.
        folders: where headers are.
        definitions: macros, as in `NAME=1`.
        log: gets the command and all that the compiler prints.

    Raises:
        MeshError: `plugin_compile_failed`, with the compiler's last lines.
    """
    arguments = (
        *("-std=c++17", "-O1", "-fPIC", "-w", "-shared"),
        *(f"-D{name}" for name in ("GGML_SHARED", "LLAMA_SHARED", "NDEBUG", *definitions)),
        *(f"-I{folder}" for folder in folders),
        str(source),
    )
    _compile(compiler, arguments, output, source.name, log)


def compile_c_library(source: Path, output: Path, compiler: tuple[str, ...]) -> None:
    """Compile a C file into a shared library. Raises MeshError `plugin_compile_failed`."""
    link = "-dynamiclib" if sys.platform == "darwin" else "-shared"
    _compile(compiler, ("-x", "c", link, "-fPIC", "-O2", "-w", str(source)), output, source.name)


def _compile(
    compiler: tuple[str, ...], arguments: Sequence[str], output: Path, what: str, log: Path | None = None
) -> None:
    command = (*compiler, *arguments, "-o", str(output))
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(compiler, what, str(error)) from error
    if log is not None:
        log.write_text(f"{shlex.join(command)}\n{done.stdout}{done.stderr}exit status {done.returncode}\n")
    if done.returncode != 0:
        lines = done.stderr.splitlines()[-15:] or [f"status {done.returncode}"]
        raise _failed(compiler, what, "\n".join(lines))


def _failed(compiler: tuple[str, ...], what: str, why: str) -> MeshError:
    return MeshError(
        code="plugin_compile_failed",
        message=f"{shlex.join(compiler)} could not compile {what}:\n{why}",
        hint="Try another compiler, as in `CXX=clang++ mesh-llm engine install`.",
        status=503,
    )
