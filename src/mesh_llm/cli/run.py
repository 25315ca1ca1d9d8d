"""`mesh-llm run`: start an installed agent against the mesh, with nothing of the user's own configuration touched."""

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from mesh_llm.cli.agents import AGENTS, Agent, Launch, Mesh, Model
from mesh_llm.cli.client import DaemonClient
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import ModelName
from mesh_llm.core.naming import Ambiguous, NotFound, match
from mesh_llm.core.status import Status, StatusModel
from mesh_llm.runtime.home import Home

_NO_KEY = "none"
_ASK_SECONDS = 10.0
_LEAST_CONTEXT = 16_000
"""Tokens below which an agent is not likely to get far: their own instructions take 10,000 to 35,000 with `tiny`."""


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--model", "-m", metavar="NAME", help="Which model; by default this node's own, or the largest.")
@click.option("--show", is_flag=True, help="Only show how it would be started.")
@click.argument("agent", type=click.Choice(list(AGENTS)), metavar="|".join(AGENTS))
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def run(agent: str, arguments: tuple[str, ...], model: str | None, *, show: bool) -> None:
    """Start an agent against the mesh. What follows its name is its own.

    \b
      mesh-llm run claude
      mesh-llm run -m qwen aider -- --no-auto-commits
    """
    chosen = AGENTS[agent]
    program = shutil.which(chosen.executable)
    if program is None and not show:
        raise MeshError(
            code="agent_missing",
            message=f"{chosen.title} is not installed: there is no {chosen.executable} in PATH.",
            hint=f"Install it: {chosen.install}",
        )
    mesh = _mesh(DaemonClient(Home.default()).get("/api/status", Status), model)
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
    """What the agent is to use. Raises MeshError where no model answers, or the API wants a key."""
    warm = [model for model in status.models if model.status == "warm"]
    if not warm:
        raise MeshError(
            code="no_model_warm",
            message="No model of the mesh answers yet.",
            hint="See mesh-llm status; serve one with mesh-llm load NAME.",
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
    """What to say where the model has too little context; empty where it has enough, or that is not known."""
    if not 0 < model.context < _LEAST_CONTEXT:
        return ""
    return (
        f"{model.name} has {model.context:,} tokens of context, and {agent.title} alone tells it more than that as a "
        "rule: expect errors. Choose another with -m, or serve it with a larger --ctx-size, if it was trained for that."
    )


def _choose(warm: Sequence[StatusModel], asked: str | None) -> StatusModel:
    if asked is None:
        return max(warm, key=lambda model: (model.here, model.size_bytes))
    found = match(asked, {ModelName(model.name): () for model in warm})
    if isinstance(found, Ambiguous):
        names = ", ".join(found.choices)
        raise MeshError(
            code="model_ambiguous", message=f"{asked} could be {names}.", hint="Give one of these names.", status=400
        )
    if isinstance(found, NotFound):
        names = ", ".join(model.name for model in warm)
        raise MeshError(
            code="model_not_found", message=f"No model called {asked} answers.", hint=f"These do: {names}.", status=404
        )
    return next(model for model in warm if model.name == found)


def _check_key(api_base: str, key: str) -> None:
    """Ask for the models as the agent would: a key that is wanted is better missed now."""
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
            message="The node's API wants a key.",
            hint="Give one of its keys: MESH_LLM_API_KEY=KEY mesh-llm run ...",
            status=401,
        ) from error
    except OSError as error:
        raise MeshError(
            code="no_answer", message=f"The API at {api_base} does not answer: {error}.", hint="See mesh-llm status."
        ) from error


def _past_proxies(launch: Launch, base: str) -> Launch:
    """The launch with the node's own address among what is asked without a proxy.

    Agents honour HTTP_PROXY, and a proxy's 127.0.0.1 is another machine. Programs differ in which case they look at.
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
    """Run the agent in the foreground until it ends; its exit status as a shell tells it.

    Ctrl-C reaches both, and is the agent's; a signal to end that only this process gets is passed on.
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
