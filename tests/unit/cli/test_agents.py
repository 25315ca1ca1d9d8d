"""What each agent is told: where the mesh is, which model, which key; and nothing of it in the user's own files."""

import json
import shlex
from pathlib import Path

import pytest

from mesh_llm.cli.agents import AGENTS, KEY_VARIABLE, Launch, Mesh, Model

HOSTILE = 'evil "name" $(x) `y` ${z} \\ {env:HOME}'
MESH = Mesh(
    base="http://127.0.0.1:9337",
    key="secret",
    models=(Model(name="qwen-8b", context=32768, vision=True), Model(name="tiny", context=4096), Model(name=HOSTILE)),
)
DIRECTORY = Path("/temporary")


def launch(name: str, mesh: Mesh = MESH) -> Launch:
    return AGENTS[name].launch(mesh, DIRECTORY)


@pytest.mark.parametrize("name", list(AGENTS))
def test_every_agent_gets_address_model_and_key_and_no_file_but_a_temporary_one(name: str) -> None:
    found = launch(name)
    told = json.dumps([dict(found.env), found.arguments, dict(found.files)])
    assert "127.0.0.1:9337" in told
    assert "qwen-8b" in told
    assert "secret" in "".join(found.env.values())
    # Arguments are seen by everybody on the machine, files outlive a crash.
    assert "secret" not in "".join([*found.arguments, *found.files.values()])
    assert all("/" not in file for file in found.files)
    assert AGENTS[name].install


@pytest.mark.parametrize("name", list(AGENTS))
def test_what_is_not_known_of_a_model_is_left_out(name: str) -> None:
    found = launch(name, Mesh(base="http://localhost:1", key="k", models=(Model(name="m"),)))
    assert "null" not in json.dumps(dict(found.files) | dict(found.env))


def test_goose() -> None:
    env = launch("goose").env
    assert env["OPENAI_HOST"] == "http://127.0.0.1:9337"
    assert (env["GOOSE_PROVIDER"], env["GOOSE_MODEL"], env["GOOSE_CONTEXT_LIMIT"]) == ("openai", "qwen-8b", "32768")
    assert launch("goose").default == ("session",)


def test_opencode() -> None:
    config = json.loads(launch("opencode").env["OPENCODE_CONFIG_CONTENT"])
    provider = config["provider"]["mesh-llm"]
    assert config["model"] == config["small_model"] == "mesh-llm/qwen-8b"
    assert provider["options"] == {"baseURL": "http://127.0.0.1:9337/v1", "apiKey": f"{{env:{KEY_VARIABLE}}}"}
    assert list(provider["models"]) == ["qwen-8b", "tiny", HOSTILE]
    assert provider["models"]["qwen-8b"]["limit"] == {"context": 32768, "output": 8192}
    assert "limit" not in provider["models"][HOSTILE]


def test_claude() -> None:
    env = launch("claude").env
    assert env["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9337"
    assert (env["ANTHROPIC_AUTH_TOKEN"], env["ANTHROPIC_API_KEY"]) == ("secret", "")
    models = {value for name, value in env.items() if name.endswith("_MODEL")}
    assert models == {"qwen-8b"}
    assert env["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] == "32768"


@pytest.mark.parametrize("context", [0, 262144])
def test_claude_is_not_told_a_context_that_is_unknown_or_more_than_it_supposes(context: int) -> None:
    mesh = Mesh(base="http://127.0.0.1:9337", key="secret", models=(Model(name="qwen-8b", context=context),))
    assert "CLAUDE_CODE_AUTO_COMPACT_WINDOW" not in AGENTS["claude"].launch(mesh, Path("/temporary")).env


def test_qwen() -> None:
    found = launch("qwen")
    assert found.env["QWEN_CODE_SYSTEM_DEFAULTS_PATH"] == "/temporary/defaults.json"
    defaults = json.loads(found.files["defaults.json"])
    assert defaults["model"]["generationConfig"]["contextWindowSize"] == 32768


@pytest.mark.parametrize("name", list(AGENTS))
def test_every_agent_is_told_the_models_context(name: str) -> None:
    found = launch(name)
    assert "32768" in json.dumps([dict(found.env), found.arguments, dict(found.files)])


def test_pi() -> None:
    found = launch("pi")
    assert found.arguments[:2] == ("--extension", "/temporary/mesh-llm.ts")
    assert found.arguments[2:] == ("--provider", "mesh-llm", "--model", "qwen-8b")
    extension = found.files["mesh-llm.ts"]
    config = json.loads(extension.partition('registerProvider("mesh-llm", ')[2].rpartition(");")[0])
    assert [model["id"] for model in config["models"]] == ["qwen-8b", "tiny", HOSTILE]
    assert config["models"][0]["input"] == ["text", "image"]
    assert (config["apiKey"], config["baseUrl"]) == (f"${KEY_VARIABLE}", "http://127.0.0.1:9337/v1")


def test_aider() -> None:
    found = launch("aider")
    assert found.env["AIDER_MODEL"] == "openai/qwen-8b"
    assert found.env["AIDER_MODEL_METADATA_FILE"] == "/temporary/models.json"
    assert json.loads(found.files["models.json"])["openai/qwen-8b"]["max_input_tokens"] == 32768


def test_codex() -> None:
    settings = [word for word in launch("codex").arguments if word != "-c"]
    assert 'model_providers.mesh-llm.base_url="http://127.0.0.1:9337/v1"' in settings
    assert 'model="qwen-8b"' in settings
    assert f'model_providers.mesh-llm.env_key="{KEY_VARIABLE}"' in settings
    hostile = launch("codex", Mesh(base="http://h:1", key="k", models=(Model(name=HOSTILE),))).arguments
    (model,) = [word for word in hostile if word.startswith("model=")]
    assert json.loads(model.removeprefix("model=")) == HOSTILE
    assert shlex.split(shlex.join(hostile)) == list(hostile)
