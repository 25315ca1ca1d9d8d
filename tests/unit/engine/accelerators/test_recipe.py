"""What a build needs, found by trial with programs that stand for compilers."""

from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import recipe, toolbox
from mesh_llm.engine.accelerators.cards import Card, Vendor
from mesh_llm.engine.accelerators.recipe import Examined
from mesh_llm.engine.sources.embedded.loading import CUDA, ROCM, VULKAN

NVIDIA = Card(vendor=Vendor.NVIDIA, name="RTX 4090", architecture="89", driver="NVIDIA 580", cuda=(13, 0))
AMD = Card(vendor=Vendor.AMD, name="RX 7900", architecture="gfx1100", driver="amdgpu")


class System:
    """The programs on PATH, and what the toolbox can fetch."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bin = root / "bin"
        self.bin.mkdir()
        self.fetched: dict[str, Path] = {}
        self.fetchable = {toolbox.TOOLS, toolbox.VULKAN, toolbox.SPIRV, toolbox.CUDA}
        self._loader = root / "libvulkan.so.1"
        self._loader.write_bytes(b"")
        monkeypatch.setenv("PATH", f"{self.bin}:/bin:/usr/bin")
        monkeypatch.setenv("CXX", str(self.bin / "c++"))
        for name in ("CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(recipe.shutil, "which", self.which)
        monkeypatch.setattr(recipe, "_cuda_roots", lambda: [self.bin.parent])
        monkeypatch.setattr(toolbox, "find", self._find)
        monkeypatch.setattr(toolbox, "can_fetch", self.fetchable.__contains__)
        self.program("cmake", "echo cmake version 3.25.1")
        self.program("ninja", "true")
        self.program("glslc", "true")
        self.compiler("true")

    def _find(self, _: Path, name: str) -> Path | None:
        return self.fetched.get(name)

    def which(self, name: str) -> str | None:
        path = self.bin / Path(name).name
        return str(path) if path.exists() else None

    def program(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def compiler(self, script: str) -> None:
        """`script` sees the arguments and compiles; the loader is found."""
        loader = f'case "$*" in *print-file-name=libvulkan.so.1*) echo {self._loader}; exit 0;;'
        self.program("c++", f"{loader} *print-file-name*) echo libvulkan.so; exit 0;; esac\n{script}")


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> System:
    return System(tmp_path, monkeypatch)


LACKS = 'for last; do :; done; if grep -q {word} "$last"; then case "$*" in {but}) ;; *) exit 1;; esac; fi'


def test_where_everything_is_there_nothing_is_fetched(system: System, tmp_path: Path) -> None:
    found = recipe.examine(VULKAN, None, tmp_path)
    assert (found.missing, found.fetch) == ((), ())
    assert found.cmake == str(system.bin / "cmake")
    assert f"-DVulkan_LIBRARY={tmp_path / 'libvulkan.so.1'}" in found.options
    assert "Ninja" in found.options


def test_old_vulkan_headers_are_told_by_a_trial_and_replaced(system: System, tmp_path: Path) -> None:
    system.compiler(LACKS.format(word="LayerSettings", but="*newer/include*"))
    assert recipe.examine(VULKAN, None, tmp_path).fetch == (toolbox.VULKAN,)
    system.fetched[toolbox.VULKAN] = tmp_path / "newer"
    found = recipe.examine(VULKAN, None, tmp_path)
    assert (found.missing, found.fetch) == ((), ())
    assert f"-DVulkan_INCLUDE_DIR={tmp_path / 'newer' / 'include'}" in found.options


def test_headers_that_nothing_can_fetch_are_missing(system: System, tmp_path: Path) -> None:
    system.compiler(LACKS.format(word="LayerSettings", but="*newer/include*"))
    system.fetchable.clear()
    assert recipe.examine(VULKAN, None, tmp_path).missing == ("vulkan-headers",)


def test_an_old_glslc_works_and_is_told(system: System, tmp_path: Path) -> None:
    system.program("glslc", LACKS.format(word="cooperative", but="nothing"))
    # The source is not glslc's last argument.
    system.program("glslc", 'if grep -q cooperative "$2"; then exit 1; fi')
    found = recipe.examine(VULKAN, None, tmp_path)
    assert found.missing == ()
    assert any("glslc is old" in note for note in found.notes)


def test_without_glslc_it_cannot_be_built(system: System, tmp_path: Path) -> None:
    (system.bin / "glslc").unlink()
    assert recipe.examine(VULKAN, None, tmp_path).missing == ("glslc",)


@pytest.mark.parametrize("version", ["", "3.10"])
def test_a_missing_or_old_cmake_is_fetched(system: System, tmp_path: Path, version: str) -> None:
    system.program("cmake", f"echo cmake version {version}")
    if not version:
        (system.bin / "cmake").unlink()
    assert recipe.examine(VULKAN, None, tmp_path).fetch == (toolbox.TOOLS,)
    system.fetched[toolbox.TOOLS] = tmp_path / "tools"
    found = recipe.examine(VULKAN, None, tmp_path)
    assert found.cmake == str(tmp_path / "tools" / "cmake" / "data" / "bin" / "cmake")
    assert f"-DCMAKE_MAKE_PROGRAM={tmp_path / 'tools' / 'bin' / 'ninja'}" in found.options


def test_cuda_is_compiled_for_the_present_card(system: System, tmp_path: Path) -> None:
    system.program("nvcc", "true")
    found = recipe.examine(CUDA, NVIDIA, tmp_path)
    assert (found.missing, found.fetch) == ((), ())
    assert "-DCMAKE_CUDA_ARCHITECTURES=89-real" in found.options
    assert f"-DCMAKE_CUDA_COMPILER={system.bin / 'nvcc'}" in found.options


def test_a_cuda_that_the_driver_does_not_run_is_not_used(system: System, tmp_path: Path) -> None:
    system.program("nvcc", 'case "$*" in *NEWEST=12*) echo "probe.cu: error: newer than the driver" >&2; exit 1;; esac')
    old = Card(vendor=Vendor.NVIDIA, name="old driver", architecture="89", driver="NVIDIA 550", cuda=(12, 4))
    found = recipe.examine(CUDA, old, tmp_path)
    assert found.missing == ("nvcc",)
    assert f"{system.bin / 'nvcc'} says: probe.cu: error: newer than the driver" in recipe.needs(CUDA, found).message


def test_a_compiler_with_arguments_is_left_to_cmake(
    system: System, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system.program("ccache", 'exec "$@"')
    monkeypatch.setenv("CXX", f"ccache {system.bin / 'c++'}")
    found = recipe.examine(VULKAN, None, tmp_path)
    assert found.missing == ()
    assert not [option for option in found.options if "CMAKE_CXX_COMPILER" in option]


def test_without_nvcc_the_packages_are_fetched(system: System, tmp_path: Path) -> None:
    assert recipe.examine(CUDA, NVIDIA, tmp_path).fetch == (toolbox.CUDA,)
    ancient = Card(vendor=Vendor.NVIDIA, name="Pascal", architecture="61", driver="NVIDIA 580", cuda=(13, 0))
    assert recipe.examine(CUDA, ancient, tmp_path).missing == ("nvcc",)


def test_rocm_is_compiled_for_the_present_card(system: System, tmp_path: Path) -> None:
    assert recipe.examine(ROCM, AMD, tmp_path).missing == ("hipcc",)
    system.program("hipcc", 'case "$*" in *offload-arch=gfx1100*) exit 0;; esac; exit 1')
    system.program("hipconfig", 'test "$1" = -R && echo /opt/rocm || echo /opt/rocm/llvm/bin')
    found = recipe.examine(ROCM, AMD, tmp_path)
    assert found.missing == ()
    assert "-DGPU_TARGETS=gfx1100" in found.options
    assert "-DCMAKE_HIP_COMPILER=/opt/rocm/llvm/bin/clang++" in found.options
    assert found.environment["ROCM_PATH"] == "/opt/rocm"


@pytest.mark.parametrize(
    ("manager", "command"),
    [
        ("apt-get", "sudo apt install glslc spirv-headers."),
        ("dnf", "sudo dnf install glslc spirv-headers-devel."),
        ("pacman", "sudo pacman -S shaderc spirv-headers."),
        ("zypper", "sudo zypper install shaderc spirv-headers."),
        ("apk", "Install it from your system's packages."),
    ],
)
def test_what_is_missing_has_the_names_of_the_systems_packages(manager: str, command: str) -> None:
    error = recipe.needs(
        VULKAN, Examined(missing=("glslc", "spirv-headers")), lambda name: name if name == manager else None
    )
    assert isinstance(error, MeshError)
    assert "glslc, the compiler of Vulkan's shaders, SPIR-V's headers" in error.message
    assert error.hint.startswith(command)


def test_a_package_that_a_manager_lacks_comes_from_the_cards_maker() -> None:
    error = recipe.needs(ROCM, Examined(missing=("compiler", "hipcc")), lambda name: name if name == "zypper" else None)
    assert "from the maker of the card, and: sudo zypper install gcc-c++" in error.hint
