"""`mesh-llm run` with stand-ins in place of the agents: they write down how they were started, and ask the mesh."""

import json
import stat
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.process import Process
from tests.support.terminal import on_terminal

from mesh_llm.cli.agents import AGENTS, KEY_VARIABLE

STAND_IN = """#!{python}
import json, os, pathlib, sys
record = {{"argv": sys.argv[1:], "env": dict(os.environ), "files": {{}}}}
named = [*sys.argv[1:], os.environ.get("AIDER_MODEL_METADATA_FILE", "")]
for word in named:
    if word.startswith("/") and pathlib.Path(word).is_file():
        record["files"][word] = pathlib.Path(word).read_text()
pathlib.Path({record!r}).write_text(json.dumps(record))
if "--wait" in sys.argv:
    try:
        print("waiting", flush=True)
        input()
    except KeyboardInterrupt:
        print("the agent saw Ctrl-C", flush=True)
        sys.exit(7)
sys.exit(5 if "--fail" in sys.argv else 0)
"""


class Agents:
    """A directory of stand-ins, first in PATH."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._record = directory / "record.json"
        directory.mkdir()
        for agent in AGENTS.values():
            program = directory / agent.executable
            program.write_text(STAND_IN.format(python=sys.executable, record=str(self._record)))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)

    def environment(self, node: NodeProcess, **more: str) -> dict[str, str]:
        return {**node.options.environment(), "PATH": f"{self.directory}:/usr/bin:/bin", **more}

    async def run(self, node: NodeProcess, *words: str, **more: str) -> tuple[int, str]:
        argv = [sys.executable, "-m", "mesh_llm", "run", *words]
        async with await Process.start(argv, env=self.environment(node, **more)) as command:
            return await command.ended(60), command.text

    def record(self) -> dict[str, Any]:
        return json.loads(self._record.read_text())


@pytest.fixture
def agents(tmp_path: Path) -> Agents:
    return Agents(tmp_path / "agents")


def ask(url: str, headers: dict[str, str], body: dict[str, Any]) -> dict[str, Any]:
    """What an agent would ask."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"content-type": "application/json", **headers}, method="POST"
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.loads(answer.read())


HELLO = [{"role": "user", "content": "Hello"}]


async def test_every_agent_reaches_the_mesh_by_what_it_is_given(start_node: StartNode, agents: Agents) -> None:
    node = await start_node("a", models=["tiny"])
    for name in AGENTS:
        status, text = await agents.run(node, name, "--", "--flag", "word")
        assert status == 0, text
        assert "tokens of context" in text, "tiny has too little for any agent"
        seen = agents.record()
        assert seen["argv"][-2:] == ["--flag", "word"]
        env = seen["env"]
        if name == "claude":
            bearer = {"authorization": f"Bearer {env['ANTHROPIC_AUTH_TOKEN']}"}
            body = {"model": env["ANTHROPIC_MODEL"], "max_tokens": 4, "messages": HELLO}
            assert ask(f"{env['ANTHROPIC_BASE_URL']}/v1/messages", bearer, body)["model"] == "tiny"
            continue
        base, model, key = openai_settings(name, seen)
        body = {"model": model, "max_tokens": 4, "messages": HELLO}
        answer = ask(f"{base}/chat/completions", {"authorization": f"Bearer {key}"}, body)
        assert answer["model"] == "tiny"
        assert not left(seen)


def left(seen: dict[str, Any]) -> list[str]:
    """Temporary files that are still there."""
    return [file for file in seen["files"] if Path(file).exists()]


def openai_settings(name: str, seen: dict[str, Any]) -> tuple[str, str, str]:
    """Base, model and key as the agent reads them."""
    env, argv = seen["env"], seen["argv"]
    if name == "goose":
        return f"{env['OPENAI_HOST']}/v1", env["GOOSE_MODEL"], env["OPENAI_API_KEY"]
    if name == "aider":
        return env["OPENAI_API_BASE"], env["AIDER_MODEL"].removeprefix("openai/"), env["OPENAI_API_KEY"]
    if name == "qwen":
        return env["OPENAI_BASE_URL"], env["OPENAI_MODEL"], env["OPENAI_API_KEY"]
    if name == "opencode":
        config = json.loads(env["OPENCODE_CONFIG_CONTENT"])
        base = config["provider"]["mesh-llm"]["options"]["baseURL"]
        return base, config["model"].removeprefix("mesh-llm/"), env[KEY_VARIABLE]
    if name == "codex":
        settings = dict(word.split("=", 1) for word in argv if "=" in word)
        return (
            json.loads(settings["model_providers.mesh-llm.base_url"]),
            json.loads(settings["model"]),
            env[KEY_VARIABLE],
        )
    (extension,) = seen["files"].values()
    config = json.loads(extension.partition('registerProvider("mesh-llm", ')[2].rpartition(");")[0])
    return config["baseUrl"], config["models"][0]["id"], env[KEY_VARIABLE]


async def test_status_keys_and_what_is_missing(start_node: StartNode, agents: Agents, tmp_path: Path) -> None:
    node = await start_node("a", models=["tiny"], env={"MESH_LLM_API_KEY": "sesame"})
    status, text = await agents.run(node, "aider", MESH_LLM_API_KEY="")
    assert (status, "needs a key" in text, "MESH_LLM_API_KEY" in text) == (1, True, True)
    status, text = await agents.run(node, "aider", "--fail")
    assert status == 5, text
    assert agents.record()["env"]["OPENAI_API_KEY"] == "sesame"
    # An agent that honours a proxy must not send it what is meant for this machine.
    given = {"HTTP_PROXY": "http://10.0.0.9:3128", "no_proxy": "intranet.example, ::1"}
    status, text = await agents.run(node, "aider", **given)
    env = agents.record()["env"]
    assert (status, env["NO_PROXY"]) == (0, "intranet.example,::1,127.0.0.1,localhost"), text
    assert env["no_proxy"] == env["NO_PROXY"]
    status, text = await agents.run(node, "-m", "nothing", "aider")
    assert (status, "Warm models: tiny" in text) == (1, True)
    status, text = await agents.run(node, "--show", "claude", "-p", "hi")
    assert status == 0
    assert "export ANTHROPIC_BASE_URL=http://127.0.0.1:" in text
    assert text.rstrip().endswith("claude -p hi")
    (agents.directory / "goose").unlink()
    status, text = await agents.run(node, "goose")
    assert (status, "goose is not installed" in text, "Install it: " in text) == (1, True, True)


async def test_ctrl_c_is_the_agents(start_node: StartNode, agents: Agents) -> None:
    node = await start_node("a", models=["tiny"])
    argv = [sys.executable, "-m", "mesh_llm", "run", "pi", "--wait"]
    async with on_terminal(argv, env=agents.environment(node)) as terminal:
        await terminal.until("waiting")
        terminal.type("\x03")
        await terminal.until("the agent saw Ctrl-C")
        assert await terminal.ended() == 7
