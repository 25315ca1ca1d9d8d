"""The unit: its text, read back, and judged by systemd's own programs."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.service_manager.unit import Chosen, Unit, installed_choice, installed_program

PROGRAM = ("/opt/mesh llm/bin/mesh-llm",)
WORDS = st.text(st.characters(blacklist_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1)
analyze = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze here")


def unit(**fields: object) -> Unit:
    return Unit(**{"system": True, "program": PROGRAM, **fields})  # pyright: ignore[reportArgumentType]


@given(program=WORDS, options=st.lists(WORDS).map(tuple), home=WORDS)
def test_what_was_chosen_can_be_read_back(program: str, options: tuple[str, ...], home: str) -> None:
    chosen = Chosen(options=options, home=home)
    text = unit(system=False, program=(program,), chosen=chosen).text()
    assert installed_choice(text) == chosen
    assert installed_program(text) == program


def test_a_command_is_not_expanded() -> None:
    text = unit(chosen=Chosen(options=("--name", '50% of $HOME \\ "x"'))).text()
    assert '"serve" "--name" "50%% of $$HOME \\\\ \\"x\\""' in text


def test_a_line_break_in_an_option_adds_no_line() -> None:
    chosen = Chosen(options=("--name", "a\nExecStartPre=+/bin/false"), home="/a\nUser=root", models="/m\nGroup=root")
    text = Unit(system=False, program=("/bin/mesh-llm",), chosen=chosen).text()
    assert not any(line.startswith(("ExecStartPre", "User=", "Group=")) for line in text.splitlines())


def test_a_system_service_has_its_own_user_and_state() -> None:
    text = unit(groups=("render",), chosen=Chosen(home="/elsewhere", models="/srv/models")).text()
    for line in (
        "User=mesh-llm",
        "SupplementaryGroups=render",
        "StateDirectory=mesh-llm",
        'Environment="MESH_LLM_HOME=/var/lib/mesh-llm"',
        'Environment="MESH_LLM_MODELS=/srv/models"',
        'ReadWritePaths="-/srv/models"',
        "WantedBy=multi-user.target",
    ):
        assert line in text.splitlines()


def test_a_group_that_does_not_exist_is_not_named() -> None:
    assert "SupplementaryGroups" not in unit().text()


def test_an_nvidia_card_gets_its_device_files() -> None:
    assert 'ExecStartPre=-+"/usr/bin/nvidia-modprobe" -c 0 -u' in unit(modprobe="/usr/bin/nvidia-modprobe").text()
    own = unit(system=False, modprobe="/usr/bin/nvidia-modprobe").text()
    assert "\nNoNewPrivileges" not in own, "it starts a program that is setuid root"
    assert "\nSystemCallFilter" not in own, "which implies NoNewPrivileges in a unit of a user"


def test_devices_of_gpus_and_compiled_code_are_allowed() -> None:
    for system in (True, False):
        keys = {line.partition("=")[0] for line in unit(system=system).text().splitlines() if line[:1] != "#"}
        # ProtectClock implies a DeviceAllow, and with that a list of devices in which no GPU is.
        assert not keys & {"PrivateDevices", "DeviceAllow", "DevicePolicy", "ProtectClock", "MemoryDenyWriteExecute"}


@analyze
@pytest.mark.parametrize("system", [True, False])
def test_systemd_understands_every_line(system: bool, tmp_path: Path) -> None:
    groups = ("video",) if system else ()
    text = unit(system=system, program=("/bin/true",), groups=groups, chosen=Chosen(models="/srv/m")).text()
    file = tmp_path / "mesh-llm.service"
    file.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *([] if system else ["--user"]), str(file)],
        env={"PATH": "/usr/bin:/bin", "XDG_RUNTIME_DIR": str(tmp_path), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "mesh-llm.service" not in done.stderr, done.stderr


@analyze
def test_systemd_calls_the_exposure_of_a_system_service_ok(tmp_path: Path) -> None:
    file = tmp_path / "mesh-llm.service"
    file.write_text(unit(program=("/bin/true",), groups=("video", "render")).text())
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", str(file)],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"exposure level for mesh-llm.service: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) < 3.0, "10 is no confinement at all"
