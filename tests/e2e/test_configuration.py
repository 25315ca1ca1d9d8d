"""A node that is started with a configuration file alone; the file is edited, and read again by signal and command."""

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

from tests.support.node import NodeProcess

FIRST = """# my node
model = "tiny"
name = "desk"
parallel = 1

[models.tiny]  # the little one
ctx-size = 512
temperature = 0.0
system-prompt = "Be brief."

[aliases]
"gpt-4o-mini" = "tiny"
"""


def write(node_home: Path, text: str) -> Path:
    node_home.mkdir(parents=True, exist_ok=True)
    path = node_home / "config.toml"
    path.write_text(text)
    path.chmod(0o600)
    return path


def content(path: Path) -> str:
    return path.read_text()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


async def notice(node: NodeProcess, code: str, after: int = 0) -> dict[str, Any]:
    """The next notice of this kind."""
    found: list[dict[str, Any]] = []
    try:
        async with asyncio.timeout(60):
            while True:
                found = (await node.console.get(f"/api/notices?after={after}")).expect().json()
                if match := [one for one in found if one["code"] == code]:
                    return match[0]
                await asyncio.sleep(0.05)
    except TimeoutError:
        said = [(one["code"], one["text"]) for one in found]
        raise AssertionError(f"a minute passed without {code}; there are {said}") from None


async def context(node: NodeProcess, wanted: int) -> None:
    """Wait until the engine that answers has this context."""
    async with asyncio.timeout(90):
        while True:
            listed = (await node.api.get("/v1/models")).expect().json()["data"]
            if listed and (listed[0]["status"], listed[0]["context_length"]) == ("warm", wanted):
                return
            await asyncio.sleep(0.05)


async def test_a_file_configures_a_node_and_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "a", FIRST)
    node = await NodeProcess.start(tmp_path / "a")
    try:
        await _as_configured(node)
        await _edited_and_reloaded_by_signal(node, path)
        await _a_bad_file_changes_nothing(node, path)
        await _reloaded_by_command(node, path)
        await _written_by_the_console(node, path)
        assert await node.stop() == 0
    finally:
        await node.close()


async def _as_configured(node: NodeProcess) -> None:
    await context(node, 512)
    status = await node.status()
    assert (status["name"], status["models"][0]["slots"]) == ("desk", 1)
    asked = {"model": "gpt-4o-mini", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    answer = (await node.api.post("/v1/chat/completions", asked)).expect()
    assert answer.headers["x-mesh-llm-model"] == "tiny"
    assert answer.headers["x-mesh-llm-asked-model"] == "gpt-4o-mini"
    # The system prompt came in at this node, since the request has none.
    own = {**asked, "messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]}
    other = (await node.api.post("/v1/chat/completions", own)).expect()
    assert answer.json()["usage"]["prompt_tokens"] > other.json()["usage"]["prompt_tokens"]
    props = (await node.api.get("/props")).expect().json()
    assert props["default_generation_settings"]["params"]["temperature"] == 0.0
    code, text = await node.cli("config", "show", "--json", "--set")
    assert code == 0
    shown = json.loads(text)
    assert [(one["key"], one["value"]) for one in shown["options"]] == [
        ("model", '"tiny"'), ("parallel", "1"), ("name", '"desk"'),
    ]  # fmt: skip
    assert shown["options"][1]["place"].endswith("config.toml:4")
    code, text = await node.cli("models", "show", "tiny")
    assert code == 0
    assert "ctx-size = 512" in text


async def _edited_and_reloaded_by_signal(node: NodeProcess, path: Path) -> None:
    write(path.parent, FIRST.replace("512", "1024").replace("parallel = 1", "parallel = 2\nmax-rtt = 40"))
    node.process.signal(signal.SIGHUP)
    said = await notice(node, "config_reloaded")
    assert "In effect now: parallel, models.tiny." in said["text"]
    assert "At the next start of the node: max-rtt." in said["text"]
    await context(node, 1024)
    assert "configuration read" in node.log()


async def _a_bad_file_changes_nothing(node: NodeProcess, path: Path) -> None:
    write(path.parent, FIRST.replace("ctx-size", "ctxsize"))
    code, text = await node.cli("config", "reload")
    assert code != 0
    assert "config.toml:7: ctxsize is no setting of a model" in text
    assert "Did you mean ctx-size?" in text
    node.process.signal(signal.SIGHUP)
    said = await notice(node, "config_refused")
    assert "config.toml:7" in said["text"]
    await context(node, 1024)


async def _reloaded_by_command(node: NodeProcess, path: Path) -> None:
    text = FIRST.replace("512", "1024").replace("parallel = 1", "parallel = 2").replace("gpt-4o-mini", "claude-*")
    write(path.parent, text)
    code, text = await node.cli("config", "reload")
    assert code == 0
    assert "In effect now: aliases." in text
    assert "max-rtt" not in text
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    (await node.api.post("/v1/chat/completions", {**asked, "model": "claude-opus-4-8[1m]"})).expect()
    (await node.api.post("/v1/chat/completions", {**asked, "model": "gpt-4o-mini"})).expect(404)


async def _written_by_the_console(node: NodeProcess, path: Path) -> None:
    changes = {"ctx-size": 256, "temperature": None, "pin": True, "engine-args": ["--no-warmup"]}
    answer = await node.console.post("/api/model-settings", {"model": "tiny", "settings": changes})
    assert "models.tiny" in answer.expect().json()["applied"]
    await context(node, 256)
    text = content(path)
    assert "[models.tiny]  # the little one" in text
    assert text.startswith("# my node\n")
    assert "temperature" not in text
    assert mode(path) == 0o600
    shown = (await node.console.get("/api/model-settings?model=tiny")).expect().json()["settings"]
    assert shown == {
        "ctx-size": 256, "pin": True, "engine-args": ["--no-warmup"], "system-prompt": "Be brief.",
    }  # fmt: skip
    bad = {"model": "tiny", "settings": {"engine-args": ["--host", "0.0.0.0"]}}
    refused = (await node.console.post("/api/model-settings", bad)).expect(409)
    assert "--host is refused" in refused.json()["error"]["message"]
    assert content(path) == text
