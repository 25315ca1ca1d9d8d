"""`mesh-llm service --system` under a real systemd: it installs, serves, ends and comes back as the unit says."""

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.daemon_support import chat
from tests.support.http import HttpClient
from tests.support.systemd_lab import SystemdLab, why_not

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_not()), reason=why_not()), pytest.mark.timeout(240)]

UNIT = "mesh-llm.service"
PROGRAM = str(Path(sys.prefix) / "bin" / "mesh-llm")
OPTIONS = ("--model", "tiny", "--no-relay", "--no-fetch", "--no-draft")


@pytest.fixture(scope="module")
def lab() -> Iterator[SystemdLab]:
    with tempfile.TemporaryDirectory(prefix="lab-") as directory:
        Path(directory).chmod(0o755)
        root = Path(directory) / "r"
        root.mkdir()
        with SystemdLab(root) as lab:
            yield lab


@pytest.fixture
def api() -> HttpClient:
    return HttpClient(9337)


def test_install_makes_a_user_and_a_node_that_serves(lab: SystemdLab) -> None:
    done = lab.run(PROGRAM, "service", "install", "--system", "--", *OPTIONS).stdout
    assert "Made the user mesh-llm" in done
    assert f"Installed /etc/systemd/system/{UNIT}" in done
    lab.until(UNIT, "StatusText", "serves tiny", 60.0)
    assert lab.show(UNIT, "ActiveState") == "active"
    status = lab.run(PROGRAM, "service", "status").stdout
    assert "of the machine: active (running)" in status
    assert "problem" not in status
    again = lab.run(PROGRAM, "service", "install", "--system").stdout
    assert f"/etc/systemd/system/{UNIT} is up to date." in again


def test_it_runs_as_its_own_user_with_its_state_and_without_rights(lab: SystemdLab) -> None:
    owner = lab.run("stat", "-c", "%U %a", "/var/lib/mesh-llm/key").stdout.strip()
    assert owner == "mesh-llm 600"
    facts = dict(
        line.split(":\t", 1) for line in Path(f"/proc/{lab.pid(UNIT)}/status").read_text().splitlines() if ":\t" in line
    )
    assert facts["Uid"].split()[0] == lab.run("id", "-u", "mesh-llm").stdout.strip() != "0"
    assert (facts["NoNewPrivs"], facts["Seccomp"]) == ("1", "2")
    assert int(facts["CapBnd"], 16) == 0


def test_the_journal_has_no_times_of_its_own_no_invite_and_priorities(lab: SystemdLab) -> None:
    journal = lab.journal(UNIT)
    lines = [line.removeprefix("MESSAGE=") for line in journal.splitlines() if line.startswith("MESSAGE=")]
    assert "ready" in lines
    assert not [line for line in lines if line[:4].isdigit() or "--join " in line or "Ctrl-C" in line], lines


def test_an_rpc_server_can_still_be_confined_there(lab: SystemdLab) -> None:
    status = json.loads(lab.run(PROGRAM, "status", "--json", MESH_LLM_HOME="/var/lib/mesh-llm").stdout)
    assert "confined by seccomp" in status["lending"]


def test_reload_reads_the_settings_again(lab: SystemdLab) -> None:
    lab.run("sh", "-c", "mkdir -p /etc/mesh-llm && echo 'use = \"50%\"' >/etc/mesh-llm/config.toml")
    lab.run("systemctl", "reload", UNIT)
    assert lab.show(UNIT, "ActiveState") == "active"
    assert "use" in lab.run("tail", "-n", "5", "/var/lib/mesh-llm/logs/daemon.log").stdout
    lab.run("rm", "/etc/mesh-llm/config.toml")


async def test_a_stop_lets_an_answer_end(lab: SystemdLab, api: HttpClient) -> None:
    body = chat(max_tokens=120, stream=True, ignore_eos=True) | {"model": "tiny"}
    async with api.stream("POST", "/v1/chat/completions", json=body) as answer:
        events = answer.events()
        await anext(events)
        stopping = asyncio.get_running_loop().run_in_executor(None, lab.run, "systemctl", "stop", UNIT)
        rest = [event async for event in events]
        assert rest[-1].data == "[DONE]"
        assert len(rest) > 100
        await stopping
    assert (lab.show(UNIT, "ActiveState"), lab.show(UNIT, "Result")) == ("inactive", "success")
    lab.run("systemctl", "start", UNIT)


async def test_a_node_that_hangs_or_dies_is_started_again(lab: SystemdLab, api: HttpClient) -> None:
    drop_in = "/etc/systemd/system/mesh-llm.service.d"
    quick = r"[Service]\nRestartSec=100ms\nWatchdogSec=4\nTimeoutAbortSec=1\n"
    lab.run("sh", "-c", f"mkdir -p {drop_in} && printf '{quick}' >{drop_in}/quick.conf")
    lab.run("systemctl", "daemon-reload")
    lab.run("systemctl", "restart", UNIT)
    os.kill(lab.pid(UNIT), signal.SIGSTOP)
    lab.until(UNIT, "NRestarts", "1", 60.0)
    lab.until(UNIT, "ActiveState", "active", 60.0)
    os.kill(lab.pid(UNIT), signal.SIGKILL)
    lab.until(UNIT, "NRestarts", "2", 60.0)
    lab.until(UNIT, "StatusText", "serves tiny", 60.0)
    (await api.post("/v1/chat/completions", chat() | {"model": "tiny"})).expect()
    assert "up to date" in lab.run(PROGRAM, "service", "install", "--system").stdout, "settings of one's own are kept"


def test_remove_stops_it_and_keeps_its_state(lab: SystemdLab) -> None:
    done = lab.run(PROGRAM, "service", "remove", "--system").stdout
    assert "Removed /etc/systemd/system/mesh-llm.service" in done
    assert lab.show(UNIT, "ActiveState") == "inactive"
    assert lab.run("test", "-f", "/var/lib/mesh-llm/key", check=False).returncode == 0
    assert lab.run(PROGRAM, "service", "status", check=False).returncode == 3
