"""Whether RPC servers can be confined on this system, and how one is started.

A small C library of ours (rpc_sockets.c) is preloaded into every RPC server: it listens on a Unix socket and puts the
limits in force that `launcher` prepares. It is preloaded into RPC clients too: alone they connect only to TCP ports.
"""

import asyncio
import hashlib
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

import mesh_llm
from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.compiler import compile_c_library, find_compiler
from mesh_llm.engine.confinement import launcher
from mesh_llm.engine.installation import BUNDLED, build_directories, writable_directory
from mesh_llm.engine.process import Command, Readiness
from mesh_llm.engine.spec import LOOPBACK, RpcWorkerSpec
from mesh_llm.runtime.home import user_home
from mesh_llm.runtime.network import UNIX

_SOURCE = Path(__file__).with_name("rpc_sockets.c")
_LAUNCHER = Path(launcher.__file__)
_LDD_SECONDS = 10.0
NOT_CONFINED = "not confined"
"""`RpcPolicy.how` if RPC servers run without confinement, as the user asked."""

UNCONFINED = "rpc_unconfined"
"""The code of the refusal to start an RPC server that cannot be confined."""

_SECCOMP_FILTER = "Seccomp:\t2"

_KEPT_VARIABLES = (
    "PATH", "HOME", "LANG", "LC_", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_", "PYTHONHOME", "PYTHONPATH",
    "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_", "CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "ROCM_", "GPU_", "AMD_",
    "VK_", "GGML_VK_", "GGML_CUDA_", "MESA_", "GALLIVM_", "LP_", "ONEAPI_", "SYCL_", "ZE_", "MUSA_",
)  # fmt: skip
"""Beginnings of the variables that an RPC server inherits: paths, and settings of drivers and thread pools."""


_NO_FILES = {"MESA_SHADER_CACHE_DISABLE": "true", "__GL_SHADER_DISK_CACHE": "0", "CUDA_CACHE_DISABLE": "1"}
"""Drivers keep no compiled code on the disk, where they may not write."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What can be done here for one kind of RPC server.

    Attributes:
        how: as in `seccomp and Landlock`; empty if it cannot be confined.
        why_not: a sentence; empty if it can.
    """

    how: str = ""
    why_not: str = ""


def confinement(kind: str) -> Confinement:
    """What this system offers for an RPC server of that kind (`cpu`, `gpu`, `software`). Starts nothing."""
    if sys.platform == "darwin":
        return Confinement(how="a sandbox profile")
    if not launcher.has_seccomp():
        return Confinement(why_not="This system has no seccomp filters that mesh-llm can write.")
    landlock = launcher.landlock_version() > 0
    if kind != launcher.CPU and not landlock:
        return Confinement(
            why_not="A GPU's driver opens files while it works, and this kernel has no Landlock to limit them."
        )
    return Confinement(how="seccomp and Landlock" if landlock else "seccomp")


@dataclass(frozen=True, kw_only=True)
class RpcPolicy:
    """How this node starts RPC servers.

    Attributes:
        cache: the home's cache directory, where the preloaded library is kept.
        unconfined: `--lend-unconfined`: start them even if they cannot be confined.
    """

    cache: Path
    unconfined: bool = False

    def how(self, kind: str) -> str:
        """For people: how RPC servers of that kind are confined, or `not confined`."""
        return confinement(kind).how or NOT_CONFINED

    async def command(
        self, argv: tuple[str, ...], env: dict[str, str], spec: RpcWorkerSpec, kind: str, readable: tuple[str, ...]
    ) -> Command:
        """The command that runs the RPC server `argv`, confined.

        Args:
            argv: absolute path of the program, and its arguments, which make it listen on `spec.endpoint`.
            env: variables that it needs.
            spec: what it shall run.
            kind: `cpu`, `gpu` or `software`.
            readable: not for `cpu`: directories of the program and its libraries.

        Raises:
            MeshError: `rpc_unconfined`, if it cannot be confined and the user did not allow that.
        """
        found = confinement(kind)
        try:
            if spec.socket is None:
                raise _refused("There is no private directory for its socket.")
            if not found.how and not self.unconfined:
                raise _refused(found.why_not)
            library = await asyncio.to_thread(provide_library, self.cache)
        except MeshError as error:
            if not self.unconfined:
                raise error if error.code == UNCONFINED else _refused(error.message) from error
            return Command(argv=argv, env=env, readiness=Readiness.RPC, address=spec.endpoint, keeps=_KEPT_VARIABLES)
        options = ["--library", str(library), "--listen", str(spec.socket)]
        if found.how:
            options += ["--kind", kind]
            for directory in self._readable((*readable, str(library.parent))):
                options += ["--read", directory]
            for directory in self._closed():
                options += ["--keep", str(directory)]
        return Command(
            argv=(sys.executable, "-I", "-S", str(_LAUNCHER), *options, "--", *argv),
            env=env | (_NO_FILES if kind != launcher.CPU else {}),
            readiness=Readiness.RPC,
            address=f"unix:{spec.socket}",
            keeps=_KEPT_VARIABLES,
            confined=bool(found.how),
        )

    def _readable(self, directories: tuple[str, ...]) -> list[str]:
        """Without directories that hold the user's home or this node's."""
        closed = self._closed()
        found = [one for one in dict.fromkeys(directories) if not any(path.is_relative_to(one) for path in closed)]
        return [one for one in found if Path(one).is_absolute()]

    def _closed(self) -> tuple[Path, ...]:
        """The homes of the user and of this node, which hold secrets. They may lie in a directory such as /opt."""
        return user_home(), self.cache.parent.absolute()


def described(how: str) -> str:
    """`RpcPolicy.how` as part of a sentence."""
    return how if how == NOT_CONFINED else f"confined by {how}"


def is_confined(pid: int) -> bool:
    """Whether the kernel filters that process's calls. On macOS, which cannot be asked, True.

    A static program does not preload the library, and then nothing confines it. Where `/proc` hides processes
    (hidepid), it still shows this user's own unless they are not dumpable; a process becomes that right before it sets
    the filter.
    """
    if not sys.platform.startswith("linux"):
        return True
    try:
        return _SECCOMP_FILTER in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return _is_hidden(pid)


def _is_hidden(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return Path("/proc/self/status").exists()


def python_directories(*more: Path) -> tuple[str, ...]:
    """Directories that a program of this Python reads: the interpreter, its packages, this package, and `more`.

    Packages may also lie elsewhere, as those of `pip install --user`, and what a .pth file names.
    """
    own = Path(mesh_llm.__file__).parents[1]
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    packages = [place for place in sys.path if Path(place).name in {"site-packages", "dist-packages"}]
    places = (sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1]), str(own), *path, *packages)
    return tuple(dict.fromkeys(place for place in (*places, *map(str, more)) if place))


def program_directories(program: Path) -> tuple[str, ...]:
    """Directories that a user's program reads: its own, and those of the libraries it is linked with. Blocks."""
    real = program.resolve()
    places = [str(program.parent), str(real.parent), str(real.parent.parent / "lib")]
    places += [part for part in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if part]
    try:
        done = subprocess.run(
            ("ldd", program), capture_output=True, text=True, errors="replace", timeout=_LDD_SECONDS, check=False
        )
        linked = done.stdout.splitlines()
    except (OSError, subprocess.TimeoutExpired):
        linked = []
    for line in linked:
        target = line.partition("=>")[2].split(" (")[0].strip()
        if target.startswith("/"):
            places += [str(Path(target).parent), str(Path(target).resolve().parent)]
    return tuple(dict.fromkeys(places))


_NOT_LENT = "Memory is not lent for split models: the RPC server cannot be confined."
_LEND_ANYWAY = "`mesh-llm --lend-unconfined` lends it anyway. Use it only if you trust all members of the mesh."


def _refused(why: str) -> MeshError:
    return MeshError(
        code=UNCONFINED,
        message=f"{_NOT_LENT} {why}",
        hint=_LEND_ANYWAY,
        status=503,
    )


def why_refused(refusal: str) -> str:
    """The reason in the text of an error `rpc_unconfined`, without what all these errors say."""
    return refusal.removeprefix(_NOT_LENT).removesuffix(_LEND_ANYWAY).strip()


def find_library(cache: Path) -> Path | None:
    """The preloaded library, if the present source of it was compiled earlier, or came with mesh-llm's wheel."""
    places = (*build_directories(cache), BUNDLED)
    return next((path for place in places if (path := place / _library_name()).is_file()), None)


def provide_library(cache: Path) -> Path:
    """The preloaded library; compiles it in about a second if it is not there. Blocks.

    Raises:
        MeshError: `compiler_missing`, `plugin_compile_failed`, `plugin_not_writable`.
    """
    found = find_library(cache)
    if found is not None:
        return found
    find_compiler()
    return compile_library(writable_directory(build_directories(cache)))


def compile_library(directory: Path) -> Path:
    """Compile the preloaded library into `directory`, unless it is there. Blocks. Raises MeshError."""
    target = directory / _library_name()
    # Two processes at once compile one.
    with FileLock(directory / ".rpc-sockets.lock"):
        if not target.is_file():
            with tempfile.TemporaryDirectory(prefix=".build-", dir=directory) as work:
                built = Path(work) / target.name
                compile_c_library(_SOURCE, built, find_compiler())
                built.replace(target)
    return target


def client_environment(endpoints: tuple[str, ...], cache: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """How an RPC client, which knows only `host:port`, connects to `unix:PATH`: its endpoints and environment. Blocks.

    Raises:
        MeshError: as `provide_library`.
    """
    if not any(endpoint.startswith(UNIX) for endpoint in endpoints):
        return endpoints, {}
    named: list[str] = []
    paths: list[str] = []
    for number, endpoint in enumerate(endpoints, start=1):
        if endpoint.startswith(UNIX):
            named.append(f"{LOOPBACK}:{number}")
            paths.append(f"{number}={endpoint.removeprefix(UNIX)}")
        else:
            named.append(endpoint)
    # Before the libraries that the user preloads.
    before = os.environ.get(launcher.PRELOAD, "")
    library = provide_library(cache)
    preload = f"{library}:{before}" if before else str(library)
    return tuple(named), {launcher.PRELOAD: preload, launcher.CONNECT: "\n".join(paths)}


def _library_name() -> str:
    digest = hashlib.sha256(_SOURCE.read_bytes()).hexdigest()[:12]
    return f"rpc-sockets-{platform.system().lower()}-{platform.machine().lower()}-{digest}.so"
