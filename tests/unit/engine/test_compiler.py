"""Finding a compiler, and what it says when it fails."""

from pathlib import Path

import pytest
from tests.unit.engine.fake_binaries import write_program

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.compiler import compile_plugin, find_compiler, install_command


def test_the_first_of_the_known_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    clang = write_program(tmp_path / "clang++", "")
    assert find_compiler() == (str(clang),)
    cxx = write_program(tmp_path / "c++", "")
    assert find_compiler() == (str(cxx),)


def test_the_users_choice_with_its_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "c++", "")
    mine = write_program(tmp_path / "my c++", "")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CXX", "'my c++' -m64")
    assert find_compiler() == (str(mine), "-m64")
    monkeypatch.setenv("CXX", "icpx")
    with pytest.raises(MeshError) as caught:
        find_compiler()
    assert "icpx" in caught.value.message


def test_no_compiler_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MeshError) as caught:
        find_compiler()
    assert caught.value.code == "compiler_missing"
    for name in ("c++", "g++", "clang++"):
        assert name in caught.value.message
    assert "mesh-llm engine install" in caught.value.hint


@pytest.mark.parametrize(
    ("release", "command"),
    [
        ("ID=debian\n", "sudo apt install g++"),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\n', "sudo apt install g++"),
        ("ID=ubuntu\n", "sudo apt install g++"),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', "sudo dnf install gcc-c++"),
        ("ID=arch\n", "sudo pacman -S gcc"),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', "sudo zypper install gcc-c++"),
        ("ID=plan9\n", "g++ or clang++ from your system's packages"),
    ],
)
def test_knows_the_systems_packages(tmp_path: Path, release: str, command: str) -> None:
    file = tmp_path / "os-release"
    file.write_text(release)
    assert install_command("linux", file) == command


def test_other_systems(tmp_path: Path) -> None:
    assert install_command("darwin") == "xcode-select --install"
    assert "your system" in install_command("linux", tmp_path / "missing")


def test_a_compilers_complaint_is_passed_on(tmp_path: Path) -> None:
    broken = write_program(tmp_path / "c++", "import sys; sys.exit('fatal error: string: No such file')")
    with pytest.raises(MeshError) as caught:
        compile_plugin(tmp_path, tmp_path / "out.so", (str(broken),))
    assert caught.value.code == "plugin_compile_failed"
    assert "fatal error: string" in caught.value.message
