"""`mesh-llm service` as it is typed: what is refused, and what is printed."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mesh_llm.cli import service
from mesh_llm.core.types.errors import MeshError
from mesh_llm.service_manager import installation
from mesh_llm.service_manager.control import Problem, ServiceStatus
from mesh_llm.service_manager.installation import Installed
from mesh_llm.service_manager.systemd import Systemd


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MESH_LLM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    return tmp_path


def typed(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(service.service, words)
    if isinstance(result.exception, MeshError):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--join", "TOKEN"], "--join does not belong there"),
        (["--api-key", "secret"], "--api-key does not belong there"),
        (["--models-dir", "models"], "would not find models"),
        (["--model", "./a.gguf"], r"would not find ./a.gguf"),
        (["--api-key", "@keys"], None),
    ],
)
def test_options_that_cannot_work_in_a_service_are_refused(options: list[str], says: str | None) -> None:
    if says is None:
        with pytest.raises(MeshError, match="systemctl"):
            typed("install", "--", *options)
        return
    with pytest.raises(MeshError, match=says) as failure:
        typed("install", "--", *options)
    assert failure.value.hint


def test_an_option_that_does_not_exist_is_wrong_usage() -> None:
    code, output = typed("install", "--", "--modle", "tiny")
    assert code == 2
    assert "--modle" in output


def test_what_was_done_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installation, "manager", Systemd)
    given: list[tuple[object, ...]] = []
    done = Installed(
        file="/u", changes=("-Restart=no", "+Restart=on-failure"), restart="systemctl restart x", running=True
    )

    def install(manager: Systemd, options: tuple[str, ...], *, start: bool) -> Installed:
        given.append((manager.system, options, start))
        return done

    monkeypatch.setattr(installation, "install", install)
    code, output = typed("install", "--system", "--no-start", "--", "--model", "tiny")
    assert (code, given) == (0, [(True, ("--model", "tiny"), False)])
    assert output.splitlines()[:3] == ["Changed /u:", "  - Restart=no", "  + Restart=on-failure"]
    assert "systemctl restart x" in output
    assert json.loads(typed("install", "--json")[1])["changes"] == list(done.changes)


def test_the_status_shows_each_service_and_its_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    code, output = typed("status")
    assert code == 3
    assert "No service is installed" in output
    shown = ServiceStatus(
        scope="system", file="/u", installed=True, active=True, state="active (running)", text="serves tiny", pid=7,
        restarts=2, program="/opt/mesh-llm", problems=(Problem(text="It is old.", hint="Type this."),),
    )  # fmt: skip
    monkeypatch.setattr(installation, "managers", lambda: [Systemd(system=True)])

    def examine(_: Systemd) -> ServiceStatus:
        return shown

    monkeypatch.setattr(installation, "examine", examine)
    code, output = typed("status")
    assert code == 0
    for part in (
        "of the machine: active (running), pid 7, restarted 2 times",
        "serves tiny",
        "It is old.",
        "Type this.",
    ):
        assert part in output
    assert json.loads(typed("status", "--json")[1])["services"][0]["pid"] == 7


def test_removing_nothing_says_so() -> None:
    assert typed("remove")[1] == "No service is installed.\n"
