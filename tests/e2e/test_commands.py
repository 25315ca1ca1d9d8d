"""The command line as a user has it: one node with the built-in model, and every verb asked of it."""

import json
import re
import sys
from pathlib import Path

import psutil
import pytest
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import chat, content
from tests.support.terminal import on_terminal

_KEY = {"MESH_LLM_API_KEY": "poppy"}


@pytest.fixture
async def node(start_node: StartNode) -> NodeProcess:
    return await start_node("a", models=["tiny"], arguments=["--name", "desk"])


async def test_the_start_says_what_to_do_next(node: NodeProcess) -> None:
    await node.process.line("^Ctrl-C stops this node")
    text = node.process.text
    assert "curl http://127.0.0.1:" in text
    assert "export OPENAI_BASE_URL=http://127.0.0.1:" in text
    assert "mesh-llm --join mesh2" in text
    assert "\x1b" not in text
    assert "tiny" in content(await chat(node, "tiny", tokens=60, text="Who are you?")).lower()


async def test_status_for_people_and_machines(node: NodeProcess) -> None:
    code, text = await node.cli("status")
    assert code == 0
    assert "desk: serve, ready" in text
    assert "tiny" in text
    code, text = await node.cli("status", "--json")
    assert code == 0
    status = json.loads(text)
    assert status["ready"] is True
    assert status["split"] is None
    assert status["models"][0]["name"] == "tiny"
    assert status["models"][0]["context"] > 0
    listed = (await node.api.get("/v1/models")).expect().json()["data"]
    assert listed[0]["context_length"] == status["models"][0]["context"]
    props = (await node.api.get("/props")).expect().json()
    assert props["default_generation_settings"]["n_ctx"] == status["models"][0]["context"]


async def test_logs_of_the_node_and_its_engine(node: NodeProcess) -> None:
    code, text = await node.cli("logs", "--list")
    assert code == 0
    names = text.split()
    assert "daemon" in names
    engine = next(name for name in names if name.startswith("engine"))
    code, text = await node.cli("logs", engine, "-n", "5")
    assert code == 0
    assert 0 < len(text.splitlines()) <= 5
    code, text = await node.cli("logs", "nothing")
    assert code == 1
    assert "daemon" in text
    argv = [sys.executable, "-m", "mesh_llm", "logs", "-f"]
    async with on_terminal(argv, env=node.options.environment()) as terminal:
        await terminal.until("starting")
        (await node.console.post("/api/invites", {"scope": "client", "lifetime_seconds": 60})).expect(201)
        shown = terminal.mark()
        terminal.type("\x03")
        assert await terminal.ended() == 0
        assert terminal.text[shown:].replace("^C", "").strip() == ""


async def test_stop_waits_for_the_end(node: NodeProcess) -> None:
    code, text = await node.cli("stop")
    assert code == 0, text
    assert await node.process.ended(5) == 0
    await node.process.gone()
    for verb in ("status", "stop", "load tiny", "invite list"):
        code, text = await node.cli(*verb.split())
        assert code == 3
        assert "No node is running" in text
    code, text = await node.cli("logs")
    assert code == 0
    assert "finished" in text


async def test_invites_are_made_listed_and_revoked(node: NodeProcess) -> None:
    code, text = await node.cli("invite", "create", "--scope", "client", "--expires", "2h", "--uses", "3", "--json")
    assert code == 0, text
    made = json.loads(text)
    assert made["token"].startswith("mesh2")
    assert (made["scope"], made["uses_left"]) == ("client", 3)
    code, text = await node.cli("invite", "list")
    assert any(line.startswith(made["id"]) and "client" in line for line in text.splitlines())
    code, text = await node.cli("invite", "revoke", made["id"])
    assert code == 0, text
    code, text = await node.cli("invite", "list", "--json")
    assert next(one for one in json.loads(text)["invites"] if one["id"] == made["id"])["revoked"] is True
    code, text = await node.cli("invite", "revoke", "nonsense")
    assert code == 1
    assert "error:" in text


async def test_two_daemons_of_one_home_are_refused(node: NodeProcess) -> None:
    code, text = await node.cli("--model", "tiny", "--port", "0", "--console", "0")
    assert code == 1
    assert "is held by the daemon with pid" in text
    assert "MESH_LLM_HOME=DIR" in text
    assert content(await chat(node, "tiny"))


async def test_a_taken_port_is_said(node: NodeProcess, start_node: StartNode) -> None:
    port = str(node.api.port)
    other = await start_node("b", ready=False, models=["tiny"], arguments=["--port", port])
    assert await other.process.ended(30) == 1
    assert (
        f"Port {port} is used by a node of yours with the home {node.home} (pid {node.process.pid})."
        in other.process.text
    )
    assert f"Take another port: --port {int(port) + 1}" in other.process.text


async def test_two_ports_that_are_one_are_said(start_node: StartNode) -> None:
    node = await start_node("a", ready=False, arguments=["--port", "5123", "--console", "5123"])
    assert await node.process.ended(30) == 1
    assert "--port and --console are both 5123." in node.process.text
    assert "another program" not in node.process.text


async def test_secrets_on_the_command_line_are_warned_of(start_node: StartNode, tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("sesame\n")
    node = await start_node("a", models=["tiny"], arguments=["--api-key", "open", "--api-key-file", str(file)])
    assert f"can read the secrets in {file}.\n  Type: chmod 600 {file}" in node.process.text
    file.chmod(0o600)
    assert "can read --api-key in the list of processes" in node.process.text
    quiet = await start_node("b", models=["tiny"], arguments=["--api-key-file", str(file)], env=_KEY)
    assert "other users" not in quiet.process.text
    for key in ("sesame", "poppy"):
        (await quiet.api.get("/v1/models", headers={"x-api-key": key})).expect()
    for process in psutil.Process(quiet.process.pid).children(recursive=True):
        assert "poppy" not in " ".join([*process.cmdline(), *process.environ().values()])


async def test_what_cannot_be_served_is_refused_with_the_reason(start_node: StartNode, tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("this is no model")
    for model, words in (
        (str(tmp_path / "none.gguf"), "none.gguf"),
        (str(tmp_path / "text.gguf"), "GGUF"),
        ("no-such-model", "no-such-model"),
    ):
        node = await start_node("c", ready=False, models=[model])
        assert await node.process.ended(30) == 1
        assert words in node.process.text
        assert "Traceback" not in node.process.text
        await node.close()


async def test_a_model_that_does_not_fit_waits_and_says_the_sum(start_node: StartNode) -> None:
    node = await start_node("d", ready=False, models=["tiny"], arguments=["--max-vram", "0.001"])
    await node.process.line(r"it needs \d+\.\d MB .*offers 1\.0 MB", 30)
    await node.process.line(r"^mesh: ", 30)
    answer = await chat(node, "tiny")
    assert answer.status == 503
    assert re.search(r"it needs \d+\.\d MB .*offers 1\.0 MB", answer.json()["error"]["message"])
    health = await node.api.get("/health")
    assert health.status == 503
    assert await node.stop() == 0


async def test_doctor_finds_the_engine(node: NodeProcess) -> None:
    code, text = await node.cli("doctor", "--json")
    findings = json.loads(text)["findings"]
    assert code == 0, text
    assert any(one["topic"] == "engine" and one["verdict"] == "ok" for one in findings)
    assert any(one["topic"] == "ports" and "a node runs here" in one["text"] for one in findings)


async def test_a_journal_replays(start_node: StartNode, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    node = await start_node("e", models=["tiny"], arguments=["--journal", str(journal)])
    assert content(await chat(node, "tiny"))
    assert await node.stop() == 0
    code, text = await node.cli("simulate", "--replay", str(journal))
    assert code == 0, text
    assert text.endswith("events: the same decisions.\n")
