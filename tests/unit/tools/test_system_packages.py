"""The installer of system packages, on a machine that consists of a few fake programs."""

import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools" / "system_packages.sh"


class Machine:
    """A PATH of its own, and a log of what was asked of apt-get."""

    def __init__(self, root: Path) -> None:
        self.policy = root / "policy-rc.d"
        self._log = root / "apt.log"
        self.root = root
        self._bin = root / "bin"
        self._bin.mkdir()

    def program(self, name: str, body: str = "") -> None:
        path = self._bin / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def apt_get(self, body: str = "") -> None:
        self.program("apt-get", f'echo "$@" >>{self._log}\n{body}')

    def run(self, *groups: str) -> subprocess.CompletedProcess[str]:
        bash = shutil.which("bash")
        assert bash is not None
        command = [bash, str(SCRIPT), *groups]
        environment = {"PATH": str(self._bin), "SYSTEM_PATH": "", "SERVICE_POLICY_FILE": str(self.policy)}
        environment["SYSTEM_ROOT"] = str(self.root)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    @property
    def apt_calls(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    machine = Machine(tmp_path)
    machine.program("id", "echo 0")
    return machine


def test_with_everything_there_no_package_manager_is_asked(machine: Machine) -> None:
    machine.apt_get()
    machine.program("clang++")
    done = machine.run()
    assert (done.returncode, done.stdout, done.stderr, machine.apt_calls) == (0, "", "", [])


def test_root_installs_what_is_missing_without_an_update_when_that_works(machine: Machine) -> None:
    machine.apt_get()
    done = machine.run("tests")
    assert done.returncode == 0
    assert "g++ (building the RPC plugin of the embedded engine)" in done.stdout
    assert machine.apt_calls == ["install --yes --quiet --quiet --no-install-recommends g++"]


def test_without_package_lists_they_are_fetched_first(machine: Machine, tmp_path: Path) -> None:
    updated = tmp_path / "updated"
    machine.apt_get(f'if [ "$1" = update ]; then : >{updated}; else [ -e {updated} ]; fi')
    assert machine.run().returncode == 0
    assert [call.split()[0] for call in machine.apt_calls] == ["install", "update", "install"]


def test_a_failing_installation_fails(machine: Machine) -> None:
    machine.apt_get("echo no such package >&2; exit 100")
    done = machine.run()
    assert done.returncode != 0
    assert "no such package" in done.stderr


def test_a_server_is_installed_without_being_started(machine: Machine) -> None:
    for tool in ("rm", "chmod"):
        machine.program(tool, f'PATH=/usr/bin:/bin exec {tool} "$@"')
    # apt-get would ask the policy now; its answer becomes the outcome.
    machine.apt_get(f"{machine.policy}; [ $? = 101 ]")
    done = machine.run("bench")
    assert done.returncode == 0, done.stderr
    assert [call.split()[-1] for call in machine.apt_calls] == ["nginx"]
    assert not machine.policy.exists(), "what was there before is there after"


def test_an_ordinary_user_is_told_the_command(machine: Machine) -> None:
    machine.apt_get()
    machine.program("id", "echo 1000")
    done = machine.run("tests", "browser")
    assert done.returncode == 1
    assert "sudo apt-get install g++ chromium" in done.stderr
    assert machine.apt_calls == []


def test_another_system_is_told_what_is_missing(machine: Machine) -> None:
    done = machine.run("tests")
    assert done.returncode == 1
    assert "missing: g++ (building the RPC plugin of the embedded engine)" in done.stderr


def test_files_are_looked_for_as_programs_are(machine: Machine) -> None:
    machine.apt_get()
    machine.program("glslc")
    for name in ("usr/lib/x86_64-linux-gnu/libvulkan.so.1", "usr/share/vulkan/icd.d/lvp_icd.x86_64.json"):
        path = machine.root / name
        assert machine.run("vulkan").returncode == 0
        assert machine.apt_calls.pop().endswith(("libvulkan1 mesa-vulkan-drivers", "mesa-vulkan-drivers"))
        path.parent.mkdir(parents=True)
        path.touch()
    before = len(machine.apt_calls)
    assert machine.run("vulkan").returncode == 0
    assert len(machine.apt_calls) == before


def test_an_unknown_group_is_refused_with_the_list(machine: Machine) -> None:
    done = machine.run("nonsense")
    assert done.returncode == 2
    assert "no group 'nonsense'; there are: tests vulkan bench browser" in done.stderr
