"""Starting nodes, with a stand-in for the program that keeps its manners: lines, files and ports."""

import signal
import sys
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.node import NodeOptions
from tests.support.process import EndedEarlyError

STAND_IN = """
import http.server, json, os, pathlib, signal, subprocess, sys

home = pathlib.Path(os.environ["MESH_LLM_HOME"])
if "stop" in sys.argv:
    print("asked to stop")
    sys.exit(4)
if "broken" in sys.argv:
    sys.exit("error: no such model")

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        assert self.headers["x-mesh-llm-token"] == "secret"
        body = json.dumps({"token": "invite", "argv": sys.argv[1:]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass

console = http.server.HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--console") + 1])), Handler)
(home / "daemon.json").write_text(json.dumps({"api_port": 1, "console_port": console.server_port}))
(home / "control-token").write_text("secret")
engine = subprocess.Popen(["sleep", "1000"], start_new_session=True)
def end(*_):
    if "careless" not in sys.argv:
        engine.kill()
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("almost ready\\nready", flush=True)
console.serve_forever()
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> dict[str, str]:
    package = tmp_path / "stand-in" / "mesh_llm"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(STAND_IN)
    return {"PYTHONPATH": str(package.parent)}


def test_the_command_line_says_what_was_asked_for(tmp_path: Path) -> None:
    options = NodeOptions(
        tmp_path, models=["tiny", tmp_path / "b.gguf"], join=["t"], client=True, arguments=["--split"]
    )
    assert options.argv()[1:] == [
        *["-m", "mesh_llm", "--port", "0", "--console", "0", "--model", "tiny", "--model", f"{tmp_path}/b.gguf"],
        *["--join", "t", "--client", "--split"],
    ]


def test_the_environment_has_nothing_of_the_users_own_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_LLM_API_KEY", "users-own")
    environment = NodeOptions(tmp_path, env={"MESH_LLM_EXTRA": "1"}).environment()
    assert {name: value for name, value in environment.items() if name.startswith("MESH_LLM_")} == {
        "MESH_LLM_HOME": str(tmp_path),
        "MESH_LLM_MODELS": str(tmp_path / "models"),
        "MESH_LLM_RELAY": "off",
        "MESH_LLM_EXTRA": "1",
    }


async def test_a_node_starts_answers_and_stops(start_node: StartNode, stand_in: dict[str, str]) -> None:
    node = await start_node("a", models=["tiny"], env=stand_in)
    assert (await node.status())["argv"] == ["--port", "0", "--console", "0", "--model", "tiny"]
    assert await node.invite() == "invite"
    assert node.api.port == 1
    assert await node.cli("stop") == (4, "asked to stop\n")
    assert await node.stop() == 0


async def test_a_node_on_a_labs_host_has_the_usual_ports(
    start_node: StartNode, stand_in: dict[str, str], netlab: NetLabFactory
) -> None:
    lab = netlab(2)
    one = await start_node("one", env=stand_in, lab=lab, host=0)
    other = await start_node("other", env=stand_in, lab=lab, host=1)
    assert one.console.port == other.console.port == 3131
    assert (await other.status())["argv"] == ["--port", "9337", "--console", "3131"]
    assert len(lab.processes(0)) == len(lab.processes(1)) == 2


async def test_a_node_that_ends_instead_shows_why(start_node: StartNode, stand_in: dict[str, str]) -> None:
    with pytest.raises(EndedEarlyError, match=r"node a ended with 1 .*\n.*error: no such model"):
        await start_node("a", arguments=["broken"], env=stand_in)


async def test_what_a_stopped_node_leaves_is_a_failure(start_node: StartNode, stand_in: dict[str, str]) -> None:
    node = await start_node("a", arguments=["careless"], env=stand_in)
    node.process.signal(signal.SIGTERM)
    assert await node.process.ended() == 0
    with pytest.raises(AssertionError, match=r"node a left running: sleep 1000"):
        await node.process.gone(timeout=0.1)


async def test_a_killed_node_starts_again_with_the_same_options(
    start_node: StartNode, stand_in: dict[str, str]
) -> None:
    node = await start_node("a", models=["tiny"], env=stand_in)
    await node.kill()
    assert node.process.status == -signal.SIGKILL
    first = node.process
    await node.restart()
    assert node.process.pid != first.pid
    assert (await node.status())["argv"][-1] == "tiny"
    await node.crash()
    await node.process.gone(timeout=0.1)


def test_the_interpreter_is_this_one(tmp_path: Path) -> None:
    assert NodeOptions(tmp_path).argv()[0] == sys.executable
