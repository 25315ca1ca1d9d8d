"""`mesh-llm run`: starts an installed coding agent on the mesh.

An agent is configured by environment, arguments and temporary files; the user's own configuration stays as it is.
Variables, options and fields are those of each agent's public documentation in autumn 2026.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
import msgspec

from mesh_llm.cli.client import DaemonClient, node_home, node_option
from mesh_llm.console.status import Status, StatusModel
from mesh_llm.core.routing.model_names import Ambiguous, NotFound, match
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import ModelName

_PROVIDER = "mesh-llm"
KEY_VARIABLE = "MESH_LLM_AGENT_KEY"
"""Holds the API key, for agents that are given the name of a variable."""
_MOST_OUTPUT = 8192


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model of the mesh. `context`: in tokens; 0 if it is not known."""

    name: str
    context: int = 0
    vision: bool = False

    @property
    def output(self) -> int:
        """Longest answer, in tokens, that leaves room for a prompt."""
        return min(_MOST_OUTPUT, self.context // 4) if self.context else _MOST_OUTPUT


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The API that an agent uses. `base`: its URL without `/v1`. `models`: the warm ones, the chosen one first."""

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
        unset: variables to remove, as they would lead elsewhere.
        arguments: put before the user's.
        default: arguments for a user who gives none.
        files: contents by name, to write into the temporary directory.
    """

    env: Mapping[str, str]
    unset: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    default: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Agent:
    """An agent. `install`: how to get it. `launch`: makes a Launch from the mesh and the temporary directory."""

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


_CLAUDE_CONTEXT = 200_000
"""What Claude Code supposes of a model that it does not know; it can be told less, but not more."""


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
        # Empty, not absent: otherwise a key that it remembers would be used.
        "ANTHROPIC_API_KEY": "",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        **dict.fromkeys(names, mesh.model.name),
    }
    if 0 < mesh.model.context < _CLAUDE_CONTEXT:
        env["CLAUDE_CODE_AUTO_COMPACT_WINDOW"] = str(mesh.model.context)
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


def _qwen(mesh: Mesh, directory: Path) -> Launch:
    env = {"OPENAI_BASE_URL": mesh.v1, "OPENAI_API_KEY": mesh.key, "OPENAI_MODEL": mesh.model.name}
    arguments, name = ("--auth-type", "openai"), "defaults.json"
    if not mesh.model.context:
        return Launch(env=env, arguments=arguments)
    # It guesses by the model's name otherwise. Defaults yield to the user's settings, and to an administrator's.
    env["QWEN_CODE_SYSTEM_DEFAULTS_PATH"] = str(directory / name)
    defaults = {"model": {"generationConfig": {"contextWindowSize": mesh.model.context}}}
    return Launch(env=env, arguments=arguments, files={name: _json(defaults)})


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


_NO_KEY = "none"
_ASK_SECONDS = 10.0
_LEAST_CONTEXT = 16_000
"""With fewer tokens an agent is likely to fail: its own instructions take 10,000 to 35,000 (measured with `tiny`)."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "--model", "-m", metavar="NAME", help="Use this model.  [default: the largest on this node, or else in the mesh]"
)
@click.option("--show", is_flag=True, help="Print the command and its environment, and start nothing.")
@click.argument("agent", type=click.Choice(list(AGENTS)), metavar="|".join(AGENTS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@node_option
def run(agent: str, arguments: tuple[str, ...], model: str | None, *, show: bool) -> None:
    """Start a coding agent on the mesh. Arguments after its name are passed to it.

    \b
      mesh-llm run claude
      mesh-llm run -m qwen aider -- --no-auto-commits
    """
    chosen = AGENTS[agent]
    program = shutil.which(chosen.executable)
    if program is None and not show:
        raise MeshError(
            code="agent_missing",
            message=f"{chosen.title} is not installed: {chosen.executable} is not in PATH.",
            hint=f"Install it: {chosen.install}",
        )
    mesh = _mesh(DaemonClient(node_home()).get("/api/status", Status), model)
    words = arguments[1:] if arguments[:1] == ("--",) else arguments
    with tempfile.TemporaryDirectory(prefix="mesh-llm-") as directory:
        launch = _past_proxies(chosen.launch(mesh, Path(directory)), mesh.base)
        argv = [program or chosen.executable, *launch.arguments, *(words or launch.default)]
        if show:
            _show(chosen, launch, argv)
            return
        for name, content in launch.files.items():
            (Path(directory) / name).write_text(content, encoding="utf-8")
        if advice := _too_short(chosen, mesh.model):
            click.echo(advice, err=True)
        status = _start(argv, _environment(launch))
    sys.exit(status)


def _mesh(status: Status, asked: str | None) -> Mesh:
    """The API that the agent uses. Raises MeshError if no model is warm, or the API needs a key."""
    warm = [model for model in status.models if model.status == "warm"]
    if not warm:
        raise MeshError(
            code="no_model_warm",
            message="No model of the mesh is warm yet.",
            hint="See mesh-llm status. Serve one: mesh-llm load NAME",
            status=503,
        )
    chosen = _choose(warm, asked)
    base = status.api_base.removesuffix("/v1")
    key = os.environ.get("MESH_LLM_API_KEY", "") or _NO_KEY
    _check_key(status.api_base, key)
    others = [model for model in warm if model is not chosen]
    models = tuple(Model(name=one.name, context=one.context, vision=one.vision) for one in [chosen, *others])
    return Mesh(base=base, key=key, models=models)


def _too_short(agent: Agent, model: Model) -> str:
    """A warning if the model has too little context; empty if it has enough, or its context is not known."""
    if not 0 < model.context < _LEAST_CONTEXT:
        return ""
    return (
        f"warning: {model.name} has {model.context:,} tokens of context, and the instructions of {agent.title} usually "
        "need more: expect errors.\n  Choose another model with -m, or serve this one with a larger --ctx-size, if it "
        "was trained for that."
    )


def _choose(warm: Sequence[StatusModel], asked: str | None) -> StatusModel:
    if asked is None:
        return max(warm, key=lambda model: (model.here, model.size_bytes))
    found = match(asked, {ModelName(model.name): () for model in warm})
    if isinstance(found, Ambiguous):
        names = ", ".join(found.choices)
        raise MeshError(
            code="model_ambiguous", message=f"{asked} could be {names}.", hint="Use one of these names.", status=400
        )
    if isinstance(found, NotFound):
        names = ", ".join(model.name for model in warm)
        raise MeshError(
            code="model_not_found",
            message=f"No model called {asked} is warm.",
            hint=f"Warm models: {names}.",
            status=404,
        )
    return next(model for model in warm if model.name == found)


def _check_key(api_base: str, key: str) -> None:
    """List the models as the agent would, to find a missing key before it starts."""
    request = urllib.request.Request(f"{api_base}/models", headers={"authorization": f"Bearer {key}"})  # noqa: S310 - the node's own word
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ASK_SECONDS):
            return
    except urllib.error.HTTPError as error:
        if error.code != 401:
            return
        raise MeshError(
            code="api_key_required",
            message="The API of the node needs a key.",
            hint="Set one of its keys: MESH_LLM_API_KEY=KEY mesh-llm run ...",
            status=401,
        ) from error
    except OSError as error:
        raise MeshError(
            code="no_answer", message=f"The API at {api_base} does not answer: {error}.", hint="See mesh-llm status."
        ) from error


def _past_proxies(launch: Launch, base: str) -> Launch:
    """The launch with the node's address excluded from proxies.

    Agents honour HTTP_PROXY, and 127.0.0.1 means another machine to a proxy. Programs differ in the case they read.
    """
    given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    own = [urllib.parse.urlsplit(base).hostname or "", "127.0.0.1", "localhost", "::1"]
    listed = ",".join(dict.fromkeys([*hosts, *filter(None, own)]))
    return replace(launch, env={**launch.env, "NO_PROXY": listed, "no_proxy": listed})


def _environment(launch: Launch) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in launch.unset}
    return {**kept, **launch.env}


def _show(agent: Agent, launch: Launch, argv: Sequence[str]) -> None:
    for name in launch.unset:
        click.echo(f"unset {name}")
    for name, value in launch.env.items():
        click.echo(f"export {name}={shlex.quote(value)}")
    for name, content in launch.files.items():
        click.echo(f"# {name}, in a temporary directory:\n#   {content.strip()}")
    click.echo(shlex.join([agent.executable, *argv[1:]]))


def _start(argv: Sequence[str], env: dict[str, str]) -> int:
    """Run the agent in the foreground until it ends; its exit status as a shell reports it.

    Ctrl-C reaches both processes, and is left to the agent. SIGTERM reaches this process only, and is passed on.
    """
    with subprocess.Popen(argv, env=env) as process:

        def leave_to_agent(_number: int, _frame: object) -> None:
            pass

        def pass_on(number: int, _frame: object) -> None:
            process.send_signal(number)

        signal.signal(signal.SIGINT, leave_to_agent)
        signal.signal(signal.SIGTERM, pass_on)
        status = process.wait()
    return status if status >= 0 else 128 - status
