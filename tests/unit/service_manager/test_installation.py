"""Installing, changing and removing a service, with programs that stand for `systemctl`, `loginctl` and `useradd`."""

import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.service_manager import installation, systemd
from mesh_llm.service_manager.control import Control
from mesh_llm.service_manager.installation import examine, install, remove
from mesh_llm.service_manager.launchd import Launchd
from mesh_llm.service_manager.systemd import Systemd, check_program, provide_user, stable_program

_STAND_IN = """#!/bin/sh
printf '%s\\n' "$*" >>"$0.calls"
case "$*" in
  *show*) cat "$0.state" 2>/dev/null ;;
  *" start "*|"start "*) [ -e "$0.refuses" ] && { echo "Job for mesh-llm.service failed." >&2; exit 1; } ;;
  print*) cat "$0.state" 2>/dev/null ;;
esac
exit 0
"""
RUNS = "ActiveState=active\nSubState=running\nStatusText=serves tiny\nMainPID=42\nNRestarts=1\nUnitFileState=enabled\n"
DEAD = "ActiveState=inactive\nSubState=dead\nUnitFileState=enabled\nResult=success\n"


class StandIn:
    """A program on PATH that records how it is called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text(_STAND_IN)
        path.chmod(0o755)

    def shows(self, state: str) -> None:
        Path(f"{self.path}.state").write_text(state)

    def refuses(self) -> None:
        Path(f"{self.path}.refuses").touch()

    def calls(self) -> list[str]:
        """The calls that change something, since the last time."""
        file = Path(f"{self.path}.calls")
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line for line in lines if " show " not in f" {line}"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    for name in ("XDG_CONFIG_HOME", "MESH_LLM_HOME", "MESH_LLM_MODELS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(installation, "stable_program", lambda: (str(executable(tmp_path / "mesh-llm")),))
    return tmp_path


def executable(path: Path) -> Path:
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def systemctl(place: Path) -> StandIn:
    program = StandIn(place / "bin" / "systemctl")
    program.shows(DEAD)
    return program


def test_a_user_service_is_written_enabled_and_started(place: Path, systemctl: StandIn) -> None:
    service = Systemd(system=False, root=place)
    done = install(service, ["--model", "tiny"])
    assert done.new
    assert done.running
    assert done.file == str(place / "user/.config/systemd/user/mesh-llm.service")
    assert systemctl.calls() == [
        "--user daemon-reload",
        "--user enable mesh-llm.service",
        "--user start mesh-llm.service",
    ]
    assert stat.S_IMODE(Path(done.file).stat().st_mode) == 0o644
    assert '"serve" "--model" "tiny"' in Path(done.file).read_text()
    assert "loginctl enable-linger" in done.at_boot


def test_lingering_is_seen(place: Path, systemctl: StandIn) -> None:
    import pwd

    (place / "var/lib/systemd/linger").mkdir(parents=True)
    (place / "var/lib/systemd/linger" / pwd.getpwuid(os.geteuid()).pw_name).touch()
    assert Systemd(system=False, root=place).at_boot().startswith("It starts with the machine")


def test_again_changes_nothing_and_keeps_what_was_chosen(
    place: Path, systemctl: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Systemd(system=False, root=place)
    monkeypatch.setenv("MESH_LLM_HOME", str(place / "elsewhere"))
    install(service, ["--model", "tiny"])
    monkeypatch.delenv("MESH_LLM_HOME")
    before = service.path.read_text()
    systemctl.shows(RUNS)
    systemctl.calls()
    done = install(service, [])
    assert (done.new, done.changes, done.restart) == (False, (), "")
    assert service.path.read_text() == before
    assert f"MESH_LLM_HOME={place}/elsewhere" in before
    assert "--user start mesh-llm.service" not in systemctl.calls(), "it runs already"


def test_what_changed_is_said_and_a_running_node_is_left_alone(place: Path, systemctl: StandIn) -> None:
    service = Systemd(system=False, root=place)
    install(service, ["--model", "tiny"])
    systemctl.shows(RUNS)
    systemctl.calls()
    done = install(service, ["--model", "small"])
    assert [line[0] for line in done.changes] == ["-", "+", "-", "+"]
    assert '"--model" "small"' in done.changes[1]
    assert done.restart == "systemctl --user restart mesh-llm"
    assert not [call for call in systemctl.calls() if "start" in call]


def test_a_start_that_fails_is_said_with_where_to_look(place: Path, systemctl: StandIn) -> None:
    systemctl.refuses()
    with pytest.raises(MeshError, match=r"Job for mesh-llm\.service failed") as failure:
        install(Systemd(system=False, root=place), [])
    assert failure.value.hint == "See: systemctl --user status mesh-llm"


def test_a_system_service_needs_root(place: Path, systemctl: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    service = Systemd(system=True, root=place)
    with pytest.raises(MeshError) as failure:
        install(service, [])
    assert failure.value.hint.startswith(f"sudo {place}/mesh-llm service install --system")
    assert systemctl.calls() == []
    assert not service.path.exists()


def test_a_system_service_gets_its_user(place: Path, systemctl: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    useradd = StandIn(place / "bin" / "useradd")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(installation, "check_program", list)
    done = install(Systemd(system=True, root=place), [])
    assert done.user == "mesh-llm"
    (call,) = useradd.calls()
    assert call.startswith("--system --user-group --home-dir /var/lib/mesh-llm --no-create-home --shell ")
    assert done.file == str(place / "etc/systemd/system/mesh-llm.service")
    assert "daemon-reload" in systemctl.calls()


def test_the_user_is_made_once(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    monkeypatch.setattr(pwd, "getpwnam", str)
    useradd = StandIn(place / "bin" / "useradd")
    assert not provide_user(Control("useradd"))
    assert useradd.calls() == []


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that every user may enter; pytest's own are closed."""
    with tempfile.TemporaryDirectory(prefix="mesh-llm-test-") as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def test_a_program_in_a_closed_home_cannot_be_a_system_service(
    open_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("prefix", "base_prefix", "executable"):
        monkeypatch.setattr(sys, name, "/usr")
    monkeypatch.setattr(systemd, "_HIDDEN", ())
    home = open_place / "alice"
    home.mkdir()
    program = executable(home / "mesh-llm")
    link = open_place / "mesh-llm"
    link.symlink_to(program)
    check_program((str(link),))
    home.chmod(0o700)
    for way in (program, link):
        with pytest.raises(MeshError, match=f"only its owner may enter {home}") as failure:
            check_program((str(way),))
        assert "/opt/mesh-llm" in failure.value.hint


@pytest.mark.parametrize("linked", [False, True])
def test_a_program_among_temporary_files_cannot_be_a_system_service(
    open_place: Path, monkeypatch: pytest.MonkeyPatch, *, linked: bool
) -> None:
    for name in ("prefix", "base_prefix", "executable"):
        monkeypatch.setattr(sys, name, "/usr")
    hidden = open_place / "tmp"
    hidden.mkdir()
    monkeypatch.setattr(systemd, "_HIDDEN", (hidden,))
    program = executable(hidden / "mesh-llm")
    if linked:
        link = open_place / "mesh-llm"
        link.symlink_to(program)
        program = link
    with pytest.raises(MeshError, match=f"it does not see what lies in {hidden}"):
        check_program((str(program),))


def test_a_unit_of_somebody_else_is_left_alone(place: Path, systemctl: StandIn) -> None:
    service = Systemd(system=False, root=place)
    service.path.parent.mkdir(parents=True)
    service.path.write_text("[Service]\nExecStart=/usr/local/bin/other\n")
    for act in (lambda: install(service, []), lambda: remove(service)):
        with pytest.raises(MeshError) as failure:
            act()
        assert failure.value.code == "service_foreign"
    assert "other" in service.path.read_text()
    assert systemctl.calls() == []


def test_removing_stops_and_deletes(place: Path, systemctl: StandIn) -> None:
    service = Systemd(system=False, root=place)
    assert not remove(service)
    install(service, [])
    systemctl.calls()
    assert remove(service)
    assert systemctl.calls() == [
        "--user disable --now mesh-llm.service",
        "--user daemon-reload",
        "--user reset-failed mesh-llm.service",
    ]
    assert not service.path.exists()


def test_without_systemd_the_message_says_so(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(place / "bin"))
    with pytest.raises(MeshError, match="There is no systemctl here"):
        install(Systemd(system=False, root=place), [])


def problems(service: Systemd) -> list[str]:
    return [one.text for one in examine(service).problems]


def test_a_service_that_is_well_has_no_problem(place: Path, systemctl: StandIn) -> None:
    service = Systemd(system=False, root=place)
    install(service, [])
    systemctl.shows(RUNS)
    status = examine(service)
    assert status.problems == ()
    assert (status.active, status.text, status.pid, status.restarts) == (True, "serves tiny", 42, 1)


def test_a_program_that_was_moved_or_removed_is_said(
    place: Path, systemctl: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Systemd(system=False, root=place)
    install(service, [])
    systemctl.shows(RUNS)
    (place / "mesh-llm").chmod(0o644)
    assert "cannot be run" in problems(service)[0]
    other = str(executable(place / "other"))
    (place / "mesh-llm").chmod(0o755)
    monkeypatch.setattr(installation, "stable_program", lambda: (other,))
    assert "another mesh-llm" in problems(service)[0]
    (place / "mesh-llm").unlink()
    assert "is not there any more" in problems(service)[0]


def test_an_old_unit_a_disabled_one_and_a_failed_one_are_said(place: Path, systemctl: StandIn) -> None:
    service = Systemd(system=False, root=place)
    install(service, [])
    systemctl.shows(RUNS.replace("enabled", "disabled"))
    assert "does not start by itself" in problems(service)[0]
    systemctl.shows("ActiveState=failed\nSubState=failed\nResult=exit-code\nUnitFileState=enabled\n")
    assert problems(service) == ["The service has failed: failed (failed): exit-code."]
    systemctl.shows(RUNS)
    service.path.write_text(service.path.read_text().replace("OOMPolicy=continue", "OOMPolicy=stop"))
    assert "is not what this version" in problems(service)[0]


def test_the_path_of_a_tool_is_the_link_that_updates_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = tmp_path / "tools" / "mesh-llm"
    (environment / "bin").mkdir(parents=True)
    executable(environment / "bin" / "mesh-llm")
    links = tmp_path / "bin"
    links.mkdir()
    (links / "mesh-llm").symlink_to(environment / "bin" / "mesh-llm")
    monkeypatch.setattr("sys.prefix", str(environment))
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.setenv("PATH", str(links))
    assert stable_program() == (str(links / "mesh-llm"),)
    monkeypatch.setenv("PATH", "/nowhere")
    assert stable_program() == (str(environment / "bin" / "mesh-llm"),)
    (environment / "bin" / "mesh-llm").unlink()
    assert stable_program()[1:] == ("-m", "mesh_llm")


def test_another_mesh_llm_on_the_path_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "other").mkdir()
    mine = executable(tmp_path / "bin" / "mesh-llm")
    executable(tmp_path / "other" / "mesh-llm")
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["pytest"])
    monkeypatch.setenv("PATH", str(tmp_path / "other"))
    assert stable_program() == (str(mine),)


@pytest.fixture
def launchctl(place: Path) -> StandIn:
    return StandIn(place / "bin" / "launchctl")


def launch_agent(place: Path) -> Launchd:
    return Launchd(home=place / "user")


def test_on_a_mac_a_launch_agent_is_loaded(place: Path, launchctl: StandIn) -> None:
    import plistlib

    service = launch_agent(place)
    words: Sequence[str] = ["--model", "tiny"]
    done = install(service, words)
    domain = f"gui/{os.getuid()}"
    assert launchctl.calls() == [
        f"bootout {domain}/mesh-llm",
        f"bootstrap {domain} {service.path}",
        f"enable {domain}/mesh-llm",
        f"print {domain}/mesh-llm",
        f"kickstart {domain}/mesh-llm",
    ]
    content = plistlib.loads(service.path.read_bytes())
    assert content["ProgramArguments"] == [str(place / "mesh-llm"), "serve", "--model", "tiny"]
    assert content["KeepAlive"] == {"SuccessfulExit": False}
    assert done.at_boot.startswith("It starts when you log in")
    assert Path(content["StandardOutPath"]).parent.is_dir()
    Path(f"{launchctl.path}.state").write_text("\tstate = running\n\tpid = 77\n")
    status = examine(service)
    assert (status.pid, status.active, status.problems) == (77, True, ())
    assert install(service, []).changes == ()
    assert remove(service)
    assert not service.path.exists()
