"""Finds a C++ compiler and makes the RPC plugin with it."""

import os
import shlex
import shutil
import subprocess
import sys
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
        MeshError: `compiler_missing`, naming what was looked for and how to get one.
    """
    chosen = tuple(shlex.split(os.environ.get("CXX", "")))
    for command in (chosen,) if chosen else tuple((name,) for name in _COMPILERS):
        if program := shutil.which(command[0]):
            return (program, *command[1:])
    looked_for = f"$CXX is `{shlex.join(chosen)}`" if chosen else f"looked for {', '.join(_COMPILERS)}"
    raise MeshError(
        code="compiler_missing",
        message=f"The RPC plugin is compiled once on this machine, and there is no C++ compiler ({looked_for}).",
        hint=f"Install one: {install_command()}. Then run `mesh-llm engine install` again.",
        status=503,
    )


def install_command(platform: str = sys.platform, os_release: Path = Path("/etc/os-release")) -> str:
    """How a compiler is had on this system."""
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


def compile_plugin(ggml: Path, output: Path, compiler: tuple[str, ...]) -> None:
    """Compile ggml's RPC backend into a library that ggml loads. About ten seconds.

    Args:
        ggml: the ggml directory of the source.
        output: the library to write.
        compiler: as of `find_compiler`.

    Raises:
        MeshError: `plugin_compile_failed`, with the compiler's last lines.
    """
    source = ggml / "src" / "ggml-rpc"
    # ggml's symbols are in the wheel's library, which is loaded first: macOS has to be told that they come later.
    link = ("-dynamiclib", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)
    command = (
        *compiler,
        *("-std=c++17", "-O2", "-fPIC", "-w", *link),
        *(f"-D{name}" for name in _DEFINITIONS),
        *(f"-I{folder}" for folder in (ggml / "include", ggml / "src", source)),
        *(str(source / name) for name in _SOURCES),
        *("-o", str(output)),
    )
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(compiler, str(error)) from error
    if done.returncode != 0:
        raise _failed(compiler, "\n".join(done.stderr.splitlines()[-15:]))


def _failed(compiler: tuple[str, ...], why: str) -> MeshError:
    return MeshError(
        code="plugin_compile_failed",
        message=f"{shlex.join(compiler)} could not compile the RPC plugin:\n{why}",
        hint="Try another compiler, as in `CXX=clang++ mesh-llm engine install`.",
        status=503,
    )
