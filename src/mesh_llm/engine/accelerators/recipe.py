"""What each kind of accelerator needs to be built, found by trial, and the names of the packages that bring it.

Versions of headers and compilers are not compared: a few lines are compiled. What the system lacks is taken from the
toolbox (`toolbox.py`) where that has it; what is missing then has names in the system's package manager.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine import compiler
from mesh_llm.engine.accelerators import toolbox
from mesh_llm.engine.accelerators.cards import Card, Vendor
from mesh_llm.engine.sources.embedded.loading import CUDA, ROCM, VULKAN

_GIB = 1 << 30
_TRIAL_SECONDS = 120
_LEAST_CMAKE = (3, 21)
_PACKAGED_CUDA = (13, 0)
"""Of the toolbox; the least that a driver must run."""
_PACKAGED_CUDA_LEAST = 75
"""The oldest compute capability that it compiles for."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one kind is built.

    Attributes:
        kind: as in `loading.KINDS`.
        title: for people.
        target: of ggml's build.
        option: that switches it on.
        cpu_minutes: of one processor, as measured or, for CUDA and ROCm, estimated from the number of files.
        room: bytes on disk while it is built.
        job_bytes: memory of one compiler.
    """

    kind: str
    title: str
    target: str
    option: str
    cpu_minutes: int
    room: int
    job_bytes: int


RECIPES = {
    VULKAN: Recipe(
        kind=VULKAN,
        title="Vulkan",
        target="ggml-vulkan",
        option="GGML_VULKAN",
        cpu_minutes=5,
        room=_GIB,
        job_bytes=1 * _GIB,
    ),
    CUDA: Recipe(
        kind=CUDA,
        title="CUDA",
        target="ggml-cuda",
        option="GGML_CUDA",
        cpu_minutes=60,
        room=3 * _GIB,
        job_bytes=2 * _GIB,
    ),
    ROCM: Recipe(
        kind=ROCM,
        title="ROCm",
        target="ggml-hip",
        option="GGML_HIP",
        cpu_minutes=60,
        room=3 * _GIB,
        job_bytes=2 * _GIB,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Examined:
    """The result of the trials for one kind on this machine.

    Attributes:
        cmake: the program; empty if it is to be fetched.
        options: for cmake.
        fetch: names of tools that the toolbox must fetch first.
        missing: what only the system can bring: keys of `PACKAGES`.
        notes: about what was found, for people.
        refusals: what compilers said that are here and cannot be used.
        environment: variables of the build.
    """

    cmake: str = ""
    options: tuple[str, ...] = ()
    fetch: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    refusals: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Package:
    """Something that only the system can bring: what it is, and its packages by manager. Managers may lack it."""

    what: str
    apt: str = ""
    dnf: str = ""
    pacman: str = ""
    zypper: str = ""


PACKAGES = {
    "compiler": Package(what="a C++ compiler", apt="g++", dnf="gcc-c++", pacman="gcc", zypper="gcc-c++"),
    "cmake": Package(what="cmake 3.21 or newer", apt="cmake", dnf="cmake", pacman="cmake", zypper="cmake"),
    "make": Package(what="ninja or make", apt="ninja-build", dnf="ninja-build", pacman="ninja", zypper="ninja"),
    "glslc": Package(
        what="glslc, the compiler of Vulkan's shaders", apt="glslc", dnf="glslc", pacman="shaderc", zypper="shaderc"
    ),
    "vulkan-headers": Package(
        what="Vulkan's C++ headers, 1.3.272 or newer",
        apt="libvulkan-dev",
        dnf="vulkan-headers",
        pacman="vulkan-headers",
        zypper="vulkan-headers",
    ),
    "vulkan-loader": Package(
        what="Vulkan's loader", apt="libvulkan1", dnf="vulkan-loader", pacman="vulkan-icd-loader", zypper="libvulkan1"
    ),
    "spirv-headers": Package(
        what="SPIR-V's headers",
        apt="spirv-headers",
        dnf="spirv-headers-devel",
        pacman="spirv-headers",
        zypper="spirv-headers",
    ),
    "nvcc": Package(what="nvcc and cuBLAS, which compile for the card", apt="nvidia-cuda-toolkit", pacman="cuda"),
    "hipcc": Package(
        what="hipcc 6.1 or newer with hipBLAS and rocBLAS",
        apt="hipcc libhipblas-dev librocblas-dev",
        dnf="rocm-hip-devel hipblas-devel rocblas-devel",
        pacman="rocm-hip-sdk",
    ),
}

_MANAGERS = (("apt-get", "apt", "sudo apt install"), ("dnf", "dnf", "sudo dnf install"),
             ("pacman", "pacman", "sudo pacman -S"), ("zypper", "zypper", "sudo zypper install"))  # fmt: skip


def needs(kind: str, examined: Examined, which: Callable[[str], str | None] = shutil.which) -> MeshError:
    """The error of a build that lacks something of the system, with the command that installs it."""
    wanted = [PACKAGES[name] for name in examined.missing]
    what = ", ".join(package.what for package in wanted)
    hint = ""
    for program, manager, command in _MANAGERS:
        names = [str(getattr(package, manager)) for package in wanted]
        if which(program) and all(names):
            hint = f"{command} {' '.join(names)}"
            break
        if which(program):
            lacking = ", ".join(package.what for package, name in zip(wanted, names, strict=True) if not name)
            hint = f"Install {lacking} from the maker of the card"
            if any(names):
                hint += f", and: {command} {' '.join(filter(None, names))}"
            break
    if not hint:
        hint = "Install it from your system's packages"
    return MeshError(
        code="accelerator_needs",
        message=" ".join(
            (f"The {RECIPES[kind].title} plugin cannot be built yet. Missing: {what}.", *examined.refusals)
        ),
        hint=f"{hint}. Then run `mesh-llm engine install`.",
        status=503,
    )


def examine(kind: str, card: Card | None, cache: Path) -> Examined:
    """Try what a build of this kind needs. Blocks for a second or two. `card`: for which it is to compile."""
    with tempfile.TemporaryDirectory(prefix="mesh-llm-trial-") as name:
        trial = _Trial(cache, Path(name))
        trial.compiler_and_cmake()
        if kind == VULKAN:
            trial.vulkan()
        elif kind == CUDA:
            trial.cuda(card)
        else:
            trial.rocm(card)
        return trial.result()


class _Trial:
    """Collects what was found."""

    def __init__(self, cache: Path, work: Path) -> None:
        self._cache = cache
        self._work = work
        self._compiler: tuple[str, ...] = ()
        self._cmake = ""
        self._options: list[str] = []
        self._fetch: list[str] = []
        self._missing: list[str] = []
        self._notes: list[str] = []
        self._refusals: list[str] = []
        self._environment: dict[str, str] = {}

    def result(self) -> Examined:
        return Examined(
            cmake=self._cmake,
            options=tuple(self._options),
            fetch=tuple(dict.fromkeys(self._fetch)),
            missing=tuple(dict.fromkeys(self._missing)),
            notes=tuple(self._notes),
            refusals=tuple(self._refusals),
            environment=self._environment,
        )

    def compiler_and_cmake(self) -> None:
        try:
            self._compiler = compiler.find_compiler()
        except MeshError:
            self._missing.append("compiler")
        else:
            if len(self._compiler) == 1:
                # One with arguments comes from $CXX, which cmake reads itself.
                self._options.append(f"-DCMAKE_CXX_COMPILER={self._compiler[0]}")
            self._notes.append(f"compiled with {Path(self._compiler[0]).name}")
        tools = toolbox.find(self._cache, toolbox.TOOLS)
        system = shutil.which("cmake")
        ninja = shutil.which("ninja") or shutil.which("ninja-build")
        if system is not None and _version(system) >= _LEAST_CMAKE and (ninja or shutil.which("make")):
            self._cmake = system
        elif tools is not None:
            self._cmake, ninja = str(tools / "cmake" / "data" / "bin" / "cmake"), str(tools / "bin" / "ninja")
        elif toolbox.can_fetch(toolbox.TOOLS):
            self._fetch.append(toolbox.TOOLS)
        else:
            self._missing += ["cmake", "make"]
        if ninja:
            self._options += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        else:
            self._options += ["-G", "Unix Makefiles"]

    def vulkan(self) -> None:
        glslc = shutil.which("glslc")
        if glslc is None or not self._shader(glslc, ""):
            self._missing.append("glslc")
        else:
            self._options.append(f"-DVulkan_GLSLC_EXECUTABLE={glslc}")
            if not self._shader(glslc, "#extension GL_KHR_cooperative_matrix : require\n"):
                self._notes.append("glslc is old: prompts are slower than they could be")
        if self._compiler:
            self._vulkan_headers()
            self._vulkan_loader()
            spirv = self._headers(toolbox.SPIRV, "spirv-headers", _SPIRV_PROBE, "cmeel.prefix/include")
            if spirv is not None:
                self._options.append(f"-DSPIRV_HEADERS={spirv}")

    def _vulkan_headers(self) -> None:
        used = self._headers(toolbox.VULKAN, "vulkan-headers", _VULKAN_PROBE, "include")
        if used is not None:
            self._options.append(f"-DVulkan_INCLUDE_DIR={used}")

    def _headers(self, tool: str, package: str, probe: str, inside: str) -> Path | None:
        """The system's headers if they will do; else the toolbox's, whose directory is returned."""
        if self._compiles(probe):
            return None
        fetched = toolbox.find(self._cache, tool)
        if fetched is not None and self._compiles(probe, f"-I{fetched / inside}"):
            self._notes.append(f"with {toolbox.TOOLS_BY_NAME[tool].title} that were fetched")
            return fetched / inside
        if fetched is None and toolbox.can_fetch(tool):
            self._fetch.append(tool)
        else:
            self._missing.append(package)
        return None

    def _vulkan_loader(self) -> None:
        for name in ("libvulkan.so", "libvulkan.so.1"):
            done = _run((*self._compiler, f"-print-file-name={name}"))
            path = Path(done.strip()) if done is not None else Path()
            if path.is_absolute() and path.exists():
                self._options.append(f"-DVulkan_LIBRARY={path.resolve()}")
                return
        self._missing.append("vulkan-loader")

    def cuda(self, card: Card | None) -> None:
        architecture = card.architecture if card is not None and card.vendor is Vendor.NVIDIA else ""
        self._options += [f"-DCMAKE_CUDA_ARCHITECTURES={architecture}-real", "-DGGML_CUDA_NCCL=OFF"]
        newest = card.cuda if card is not None else (0, 0)
        for root in _cuda_roots():
            if self._cuda_compiles(root, architecture, newest[0]):
                self._notes.append(f"with nvcc of {root}")
                return
        fetched = toolbox.find(self._cache, toolbox.CUDA)
        if fetched is not None and self._cuda_compiles(fetched / "nvidia" / "cu13", architecture, newest[0]):
            self._notes.append("with CUDA's compiler from its packages")
            return
        capable = architecture.isdigit() and int(architecture) >= _PACKAGED_CUDA_LEAST and newest >= _PACKAGED_CUDA
        if fetched is None and capable and self._compiler and toolbox.can_fetch(toolbox.CUDA):
            self._fetch.append(toolbox.CUDA)
        else:
            self._missing.append("nvcc")

    def _cuda_compiles(self, root: Path, architecture: str, newest: int) -> bool:
        """Compile and link for this card, with a CUDA that its driver runs. Adds the options if that works."""
        nvcc = root / "bin" / "nvcc"
        if not nvcc.is_file() or not architecture:
            return False
        source = self._work / "probe.cu"
        source.write_text(_CUDA_PROBE)
        command = (str(nvcc), f"-arch=sm_{architecture}", f"-DNEWEST={newest or 99}", str(source))
        if not self._accepts((*command, "-lcublas", "-lcudart", "-o", str(self._work / "probe"))):
            return False
        self._options += [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCUDAToolkit_ROOT={root}"]
        if not any((root / place).exists() for place in ("lib64/stubs/libcuda.so", "lib/stubs/libcuda.so")):
            # The driver's library, which programs of the toolkit are linked with, is only there by another name.
            self._options.append("-DGGML_CUDA_NO_VMM=ON")
        return True

    def rocm(self, card: Card | None) -> None:
        hipcc = shutil.which("hipcc") or next(
            (str(path) for path in (Path("/opt/rocm/bin/hipcc"),) if path.exists()), ""
        )
        architecture = card.architecture if card is not None and card.vendor is Vendor.AMD else ""
        source = self._work / "probe.hip.cpp"
        source.write_text(_ROCM_PROBE)
        works = hipcc and architecture.startswith("gfx")
        command = (hipcc, "-fsyntax-only", f"--offload-arch={architecture}", str(source))
        if not works or not self._accepts(command):
            self._missing.append("hipcc")
            return
        config = Path(hipcc).with_name("hipconfig")
        root, clang = ((_run((str(config), option)) or "").strip() for option in ("-R", "-l"))
        self._options.append(f"-DGPU_TARGETS={architecture}")
        if clang:
            self._options.append(f"-DCMAKE_HIP_COMPILER={clang}/clang++")
        if root:
            self._environment |= {"ROCM_PATH": root, "HIP_PATH": root}
        self._notes.append(f"with {hipcc}")

    def _accepts(self, command: tuple[str, ...]) -> bool:
        """Run a compiler of a card's maker. What it says against the trial is kept."""
        done = _ended(command)
        if done is None or done.returncode == 0:
            return done is not None
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
        self._refusals.append(f"{command[0]} says: {errors[0].strip() if errors else f'status {done.returncode}'}")
        return False

    def _shader(self, glslc: str, extension: str) -> bool:
        source = self._work / "probe.comp"
        source.write_text(f"#version 460\n{extension}layout(local_size_x = 1) in;\nvoid main() {{}}\n")
        return _run((glslc, "--target-env=vulkan1.3", str(source), "-o", str(self._work / "probe.spv"))) is not None

    def _compiles(self, source: str, *options: str) -> bool:
        path = self._work / "probe.cpp"
        path.write_text(source)
        return _run((*self._compiler, "-std=c++17", "-fsyntax-only", *options, str(path))) is not None


_VULKAN_PROBE = """
#include <vulkan/vulkan_core.h>
#if !__has_include(<vulkan/vulkan.hpp>)
#error "no C++ headers"
#endif
VkLayerSettingsCreateInfoEXT settings;
"""
_SPIRV_PROBE = "#include <spirv/unified1/spirv.hpp>\nunsigned probe = spv::OpCodeMask;\n"
_CUDA_PROBE = """
#include <cublas_v2.h>
static_assert(__CUDACC_VER_MAJOR__ <= NEWEST, "newer than the driver");
__global__ void probe(int * data) { *data = 1; }
int main() { cublasHandle_t handle; return cublasCreate(&handle); }
"""
_ROCM_PROBE = """
#include <hip/hip_runtime.h>
#include <hipblas/hipblas.h>
#include <rocblas/rocblas.h>
static_assert(HIP_VERSION_MAJOR * 100 + HIP_VERSION_MINOR >= 601, "too old");
__global__ void probe(int * data) { *data = 1; }
"""


def _cuda_roots() -> list[Path]:
    nvcc = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME", ""), os.environ.get("CUDA_PATH", "")]
    found = [Path(name) for name in named if name]
    if nvcc is not None:
        found.append(Path(nvcc).resolve().parents[1])
    return list(dict.fromkeys([*found, Path("/usr/local/cuda"), Path("/opt/cuda")]))


def _version(cmake: str) -> tuple[int, ...]:
    match = re.search(r"version (\d+)\.(\d+)", _run((cmake, "--version")) or "")
    return tuple(map(int, match.groups())) if match else (0,)


def _run(command: tuple[str, ...]) -> str | None:
    """What a program printed; None if it failed."""
    done = _ended(command)
    return done.stdout if done is not None and done.returncode == 0 else None


def _ended(command: tuple[str, ...]) -> "subprocess.CompletedProcess[str] | None":
    """A program that ran to its end; None if it did not."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_SECONDS,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
