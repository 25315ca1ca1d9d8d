"""Whether RPC servers can be confined here, what to do where they cannot, and how one is started."""

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import mesh_llm
from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.confinement import launcher, library
from mesh_llm.engine.process import Command, Readiness
from mesh_llm.engine.spec import RpcWorkerSpec
from mesh_llm.runtime.home import user_home

_LAUNCHER = Path(launcher.__file__)
_LDD_SECONDS = 10.0
NOT_CONFINED = "not confined"
"""What `RpcPolicy.how` says where RPC servers run without confinement, as the user asked."""

UNCONFINED = "rpc_unconfined"
"""The code of the refusal to start an RPC server that cannot be confined."""

_SECCOMP_FILTER = "Seccomp:\t2"

_KEPT = (
    "PATH", "HOME", "LANG", "LC_", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "LD_PRELOAD", "DYLD_", "PYTHONHOME", "PYTHONPATH",
    "OMP_", "GOMP_", "KMP_", "OPENBLAS_", "MKL_", "CUDA_", "NVIDIA_", "HIP_", "HSA_", "ROCR_", "ROCM_", "GPU_", "AMD_",
    "VK_", "MESA_", "ONEAPI_", "SYCL_", "ZE_", "MUSA_",
)  # fmt: skip
"""Variables that an RPC server sees, by their beginning: where things are, and what drivers and thread pools take."""


@dataclass(frozen=True, kw_only=True)
class Confinement:
    """What can be done here for one kind of RPC server.

    Attributes:
        how: as in `seccomp and Landlock`; empty where it cannot be confined.
        why_not: a sentence; empty where it can.
    """

    how: str = ""
    why_not: str = ""


def confinement(kind: str) -> Confinement:
    """What this system offers for an RPC server of that kind (`cpu`, `gpu`). Starts nothing."""
    if sys.platform == "darwin":
        return Confinement(how="a sandbox profile")
    if not launcher.has_seccomp():
        return Confinement(why_not="This system has no seccomp filters that mesh-llm knows how to write.")
    landlock = launcher.landlock_version() > 0
    if kind == launcher.GPU and not landlock:
        return Confinement(
            why_not="A GPU's driver opens files while it works, and this kernel has no Landlock to say which."
        )
    return Confinement(how="seccomp and Landlock" if landlock else "seccomp")


@dataclass(frozen=True, kw_only=True)
class RpcPolicy:
    """How this node starts RPC servers.

    Attributes:
        cache: the home's cache directory, where the preloaded library is kept.
        unconfined: `--lend-unconfined`: start them also where they cannot be confined.
    """

    cache: Path
    unconfined: bool = False

    def how(self, kind: str) -> str:
        """For people: how RPC servers of that kind are confined; `not confined` where they are not."""
        return confinement(kind).how or NOT_CONFINED

    async def command(
        self, argv: tuple[str, ...], env: dict[str, str], spec: RpcWorkerSpec, kind: str, readable: tuple[str, ...]
    ) -> Command:
        """The command that runs the RPC server `argv`, confined.

        Args:
            argv: absolute path of the program, and its arguments; it is told to listen on `spec.endpoint`.
            env: variables that it needs.
            spec: what is asked of it.
            kind: `cpu` or `gpu`.
            readable: for `gpu`: directories of the program and its libraries.

        Raises:
            MeshError: `rpc_unconfined`, where it cannot be confined and the user did not ask for that.
        """
        found = confinement(kind)
        try:
            if spec.socket is None:
                raise _refused("There is no private directory for its socket.")
            if not found.how and not self.unconfined:
                raise _refused(found.why_not)
            preloaded = await asyncio.to_thread(library.provide, self.cache)
        except MeshError as error:
            if not self.unconfined:
                raise error if error.code == UNCONFINED else _refused(error.message) from error
            return Command(argv=argv, env=env, readiness=Readiness.RPC, address=spec.endpoint, keeps=_KEPT)
        options = ["--library", str(preloaded), "--listen", str(spec.socket)]
        if found.how:
            options += ["--kind", kind]
            for directory in self._harmless((*readable, str(preloaded.parent))):
                options += ["--read", directory]
            for directory in self._kept():
                options += ["--keep", str(directory)]
        return Command(
            argv=(sys.executable, "-I", "-S", str(_LAUNCHER), *options, "--", *argv),
            env=env,
            readiness=Readiness.RPC,
            address=f"unix:{spec.socket}",
            keeps=_KEPT,
            confined=bool(found.how),
        )

    def _harmless(self, directories: tuple[str, ...]) -> list[str]:
        """Without those that hold the user's home or this node's: a program in them has to bring its own place."""
        kept = self._kept()
        found = [one for one in dict.fromkeys(directories) if not any(path.is_relative_to(one) for path in kept)]
        return [one for one in found if Path(one).is_absolute()]

    def _kept(self) -> tuple[Path, ...]:
        """Where the user's secrets and this node's are, which may be in a place of the system, as in /opt."""
        return user_home(), self.cache.parent.absolute()


def described(how: str) -> str:
    """What `RpcPolicy.how` says, as part of a sentence."""
    return how if how == NOT_CONFINED else f"confined by {how}"


def is_confined(pid: int) -> bool:
    """Whether the kernel has a filter for that process; on macOS, where that cannot be asked, True.

    A library that was not preloaded, as into a static program, confines nothing. Where `/proc` hides processes
    (hidepid), it shows this user's own except those that are not dumpable, which a process makes itself right before
    it sets the filter.
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
    """What a program of this Python reads: the interpreter, its packages, this package, and `more`."""
    own = Path(mesh_llm.__file__).parents[1]
    path = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    places = (sys.prefix, sys.base_prefix, str(Path(sys.executable).resolve().parents[1]), str(own), *path)
    return tuple(dict.fromkeys(place for place in (*places, *map(str, more)) if place))


def program_directories(program: Path) -> tuple[str, ...]:
    """What a user's program reads: its own directory, and those of the libraries that it is linked with. Blocking."""
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


def _refused(why: str) -> MeshError:
    return MeshError(
        code=UNCONFINED,
        message=f"Memory is not lent for split models: the RPC server cannot be confined. {why}",
        hint="`mesh-llm --lend-unconfined` lends it all the same, to meshes whose members you trust with this machine.",
        status=503,
    )
