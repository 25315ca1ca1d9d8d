"""How each known agent is told to use the mesh: by environment, arguments and temporary files, never by its own files.

Names of variables, options and fields are those of each agent's public documentation in autumn 2026.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

_PROVIDER = "mesh-llm"
KEY_VARIABLE = "MESH_LLM_AGENT_KEY"
"""Where agents that want a variable's name find the API key."""
_MOST_OUTPUT = 8192


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that may be asked for. `context` 0: not known."""

    name: str
    context: int = 0
    vision: bool = False

    @property
    def output(self) -> int:
        """Longest answer that leaves room for a prompt."""
        return min(_MOST_OUTPUT, self.context // 4) if self.context else _MOST_OUTPUT


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """What an agent is to use. `base`: the API without `/v1`. `models`: warm ones, the chosen one first."""

    base: str
    key: str
    models: tuple[Model, ...]

    @property
    def model(self) -> Model:
        """The chosen one."""
        return self.models[0]

    @property
    def v1(self) -> str:
        """The base of the OpenAI-compatible API."""
        return f"{self.base}/v1"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start an agent.

    Attributes:
        env: variables to set.
        unset: variables that would lead elsewhere.
        arguments: before the user's own.
        default: in place of the user's arguments, where there are none.
        files: to be written into the temporary directory, by name.
    """

    env: Mapping[str, str]
    unset: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    default: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Agent:
    """An agent. `install` says how to get it; `launch` takes the mesh and the temporary directory."""

    name: str
    title: str
    executable: str
    install: str
    launch: Callable[[Mesh, Path], Launch]


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _goose(mesh: Mesh, _: Path) -> Launch:
    env = {
        "GOOSE_PROVIDER": "openai",
        "GOOSE_MODEL": mesh.model.name,
        "OPENAI_HOST": mesh.base,
        "OPENAI_BASE_PATH": "v1/chat/completions",
        "OPENAI_API_KEY": mesh.key,
    }
    if mesh.model.context:
        env["GOOSE_CONTEXT_LIMIT"] = str(mesh.model.context)
    return Launch(env=env, unset=("OPENAI_BASE_URL", "GOOSE_LEAD_MODEL", "GOOSE_PLANNER_MODEL"), default=("session",))


def _pi(mesh: Mesh, directory: Path) -> Launch:
    provider = {
        "name": "mesh-llm",
        "baseUrl": mesh.v1,
        "apiKey": f"${KEY_VARIABLE}",
        "api": "openai-completions",
        "models": [
            {
                "id": model.name,
                "name": model.name,
                "reasoning": False,
                "input": ["text", "image"] if model.vision else ["text"],
                "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
                "contextWindow": model.context or 32768,
                "maxTokens": model.output,
                "compat": {"supportsDeveloperRole": False, "maxTokensField": "max_tokens"},
            }
            for model in mesh.models
        ],
    }
    name = "mesh-llm.ts"
    extension = f"export default function (pi) {{\n  pi.registerProvider({_json(_PROVIDER)}, {_json(provider)});\n}}\n"
    return Launch(
        env={KEY_VARIABLE: mesh.key},
        arguments=("--extension", str(directory / name), "--provider", _PROVIDER, "--model", mesh.model.name),
        files={name: extension},
    )


def _opencode(mesh: Mesh, _: Path) -> Launch:
    models: dict[str, object] = {}
    for model in mesh.models:
        limit = {"context": model.context, "output": model.output} if model.context else None
        models[model.name] = {"name": model.name, **({"limit": limit} if limit else {})}
    chosen = f"{_PROVIDER}/{mesh.model.name}"
    config = {
        "provider": {
            _PROVIDER: {
                "npm": "@ai-sdk/openai-compatible",
                "name": "mesh-llm",
                "options": {"baseURL": mesh.v1, "apiKey": f"{{env:{KEY_VARIABLE}}}"},
                "models": models,
            }
        },
        "model": chosen,
        "small_model": chosen,
    }
    return Launch(env={"OPENCODE_CONFIG_CONTENT": _json(config), KEY_VARIABLE: mesh.key})


def _claude(mesh: Mesh, _: Path) -> Launch:
    names = (
        "ANTHROPIC_MODEL",
        "ANTHROPIC_DEFAULT_OPUS_MODEL",
        "ANTHROPIC_DEFAULT_SONNET_MODEL",
        "ANTHROPIC_DEFAULT_HAIKU_MODEL",
        "CLAUDE_CODE_SUBAGENT_MODEL",
    )
    env = {
        "ANTHROPIC_BASE_URL": mesh.base,
        "ANTHROPIC_AUTH_TOKEN": mesh.key,
        # Empty, not absent: a key that it remembers would be used in its place.
        "ANTHROPIC_API_KEY": "",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        **dict.fromkeys(names, mesh.model.name),
    }
    return Launch(env=env, unset=("CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY"))


def _aider(mesh: Mesh, directory: Path) -> Launch:
    model, name = f"openai/{mesh.model.name}", "models.json"
    env = {
        "OPENAI_API_BASE": mesh.v1,
        "OPENAI_API_KEY": mesh.key,
        "AIDER_MODEL": model,
        "AIDER_WEAK_MODEL": model,
        "AIDER_EDITOR_MODEL": model,
        "AIDER_SHOW_MODEL_WARNINGS": "false",
        "AIDER_CHECK_UPDATE": "false",
    }
    unset = ("OPENAI_BASE_URL", "AIDER_OPENAI_API_BASE", "AIDER_OPENAI_API_KEY")
    if not mesh.model.context:
        return Launch(env=env, unset=unset)
    facts = {
        model: {
            "max_tokens": mesh.model.output,
            "max_input_tokens": mesh.model.context,
            "max_output_tokens": mesh.model.output,
            "input_cost_per_token": 0,
            "output_cost_per_token": 0,
            "litellm_provider": "openai",
            "mode": "chat",
            "supports_vision": mesh.model.vision,
        }
    }
    env["AIDER_MODEL_METADATA_FILE"] = str(directory / name)
    return Launch(env=env, unset=unset, files={name: _json(facts)})


def _codex(mesh: Mesh, _: Path) -> Launch:
    place = f"model_providers.{_PROVIDER}"
    settings = {
        "model_provider": _PROVIDER,
        f"{place}.name": "mesh-llm",
        f"{place}.base_url": mesh.v1,
        f"{place}.env_key": KEY_VARIABLE,
        f"{place}.wire_api": "responses",
        "model": mesh.model.name,
    }
    arguments = [word for name, value in settings.items() for word in ("-c", f"{name}={_json(value)}")]
    if mesh.model.context:
        arguments += ["-c", f"model_context_window={mesh.model.context}"]
    return Launch(env={KEY_VARIABLE: mesh.key}, arguments=tuple(arguments))


def _qwen(mesh: Mesh, _: Path) -> Launch:
    env = {"OPENAI_BASE_URL": mesh.v1, "OPENAI_API_KEY": mesh.key, "OPENAI_MODEL": mesh.model.name}
    return Launch(env=env, arguments=("--auth-type", "openai"))


AGENTS: Mapping[str, Agent] = {
    agent.name: agent
    for agent in (
        Agent(
            name="goose",
            title="goose",
            executable="goose",
            install="brew install block-goose-cli, or see https://github.com/aaif-goose/goose",
            launch=_goose,
        ),
        Agent(
            name="pi",
            title="pi",
            executable="pi",
            install="npm install -g --ignore-scripts @earendil-works/pi-coding-agent",
            launch=_pi,
        ),
        Agent(
            name="opencode",
            title="OpenCode",
            executable="opencode",
            install="npm install -g opencode-ai",
            launch=_opencode,
        ),
        Agent(
            name="claude",
            title="Claude Code",
            executable="claude",
            install="npm install -g @anthropic-ai/claude-code",
            launch=_claude,
        ),
        Agent(
            name="aider",
            title="aider",
            executable="aider",
            install="python -m pip install aider-install && aider-install",
            launch=_aider,
        ),
        Agent(name="codex", title="Codex", executable="codex", install="npm install -g @openai/codex", launch=_codex),
        Agent(
            name="qwen",
            title="Qwen Code",
            executable="qwen",
            install="npm install -g @qwen-code/qwen-code",
            launch=_qwen,
        ),
    )
}
