"""A mesh-llm node as a process, here or on a lab's host, with a home of its own.

    node = await NodeProcess.start(tmp_path / "a", models=["tiny"], lab=lab, host=0)
    answer = await node.api.post("/v1/chat/completions", {...})
    other = await NodeProcess.start(tmp_path / "b", join=[await node.invite()], lab=lab, host=1)

The fixture `nodes` of `tests.support.fixtures` closes them at the end of the test.
"""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.netlab.lab import NetLab
from tests.support.http import HttpClient
from tests.support.process import Process

_SOURCE = Path(__file__).resolve().parents[2] / "src"
_API_PORT, _CONSOLE_PORT = 9337, 3131


@dataclass(frozen=True)
class NodeOptions:
    """How to start a node; what is not said is left to the program.

    Attributes:
        home: MESH_LLM_HOME; made if missing.
        models: `--model`, each.
        join: `--join`, each a token.
        client: `--client`.
        arguments: more command-line words.
        env: more variables.
        models_dir: what `~/.models` is for this node; by default an empty directory in its home.
        lab: the lab to start it in; without one it gets free ports in this process's namespace.
        host: the number of the lab's host.
        shell: a shell command that prepares the node's surroundings and starts it by `"$@"`, as in
            `ulimit -n 64; exec "$@"` or `exec "$@" >/dev/full`.
        python: the interpreter of another environment, with the mesh-llm that is installed there.
        guest: for a client or an ephemeral node, its number among those that share its home.
    """

    home: Path
    models: Sequence[str | Path] = ()
    join: Sequence[str] = ()
    client: bool = False
    arguments: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    models_dir: Path | None = None
    lab: NetLab | None = None
    host: int = 0
    shell: str = ""
    python: Path = Path(sys.executable)
    guest: int = 1

    def argv(self) -> list[str]:
        """The command line."""
        ports = (0, 0) if self.lab is None else (_API_PORT, _CONSOLE_PORT)
        words: list[str] = [str(self.python), "-m", "mesh_llm"]
        words += ["--port", str(ports[0]), "--console", str(ports[1])]
        words += _each("--model", self.models)
        words += _each("--join", self.join)
        if self.client:
            words.append("--client")
        words += self.arguments
        return ["/bin/bash", "-c", self.shell, "node", *words] if self.shell else words

    def environment(self) -> dict[str, str]:
        """The whole environment: this process's, without what would configure the node behind the test's back."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("MESH_LLM_")}
        source = str(_SOURCE) if self.python == Path(sys.executable) else ""
        python_path = os.pathsep.join(filter(None, [source, inherited.get("PYTHONPATH")]))
        return {
            **inherited,
            "PYTHONPATH": python_path,
            "PYTHONUNBUFFERED": "1",
            "MESH_LLM_HOME": str(self.home),
            "MESH_LLM_MODELS": str(self.models_dir or self.home / "models"),
            "MESH_LLM_RELAY": "off",
            # What this machine's other programs keep is none of a test's business.
            "HF_HOME": str(self.home / "hugging-face"),
            "OLLAMA_MODELS": str(self.home / "ollama"),
            **self.env,
        }


class NodeProcess:
    """One running node. Its clients reach it through the loopback of its own host, as its user would."""

    def __init__(self, options: NodeOptions, process: Process) -> None:
        self.options = options
        self.process = process

    @classmethod
    async def start(cls, home: Path, *, ready: bool = True, timeout: float = 120.0, **options: Any) -> "NodeProcess":
        """Start a node (see `NodeOptions`) and wait until it says that it is ready, unless `ready` is False.

        Raises AssertionError with its output when it ends or `timeout` seconds pass before.
        """
        chosen = NodeOptions(home, **options)
        node = cls(chosen, await _launch(chosen))
        if ready:
            try:
                await node.ready(timeout)
            except BaseException:
                await node.close()
                raise
        return node

    async def ready(self, timeout: float = 120.0) -> None:
        """Wait for the line that says so."""
        await self.process.line(r"^ready$", timeout)

    @property
    def home(self) -> Path:
        """Its home as it sees it itself: it may have mounts of its own."""
        home = self.options.home
        return Path(f"/proc/{self.process.pid}/root", *home.parts[1:]) if self.options.shell else home

    @property
    def place(self) -> Path:
        """Where its log, its token and its record are: its home, or for a client the first guest's place in it."""
        guest = self.options.client or self.options.env.get("MESH_LLM_EPHEMERAL_KEY")
        return self.home / "guests" / str(self.options.guest) if guest else self.home

    def log(self) -> str:
        """What it has written to its log."""
        return (self.place / "logs" / "daemon.log").read_text()

    async def answering(self, timeout: float = 120.0) -> None:
        """Wait until a model answers, for nodes that cannot say so on their output."""
        async with asyncio.timeout(timeout):
            while True:
                with contextlib.suppress(OSError, AssertionError, ValueError):
                    if (await self.api.get("/health")).status == 200:
                        return
                await asyncio.sleep(0.05)

    @property
    def api(self) -> HttpClient:
        """A client of the OpenAI-compatible API."""
        return self._client(self._holder()["api_port"])

    @property
    def console(self) -> HttpClient:
        """A client of the management API, with the control token that changes need."""
        return self._client(
            self._holder()["console_port"], {"x-mesh-llm-token": (self.place / "control-token").read_text()}
        )

    async def status(self) -> dict[str, Any]:
        """What the node says of itself: `GET /api/status`."""
        return (await self.console.get("/api/status")).expect().json()

    async def invite(self) -> str:
        """A token with which others join its mesh."""
        token = (await self.status())["token"]
        assert token, "the node has no invite to give"
        return token

    async def cli(self, *arguments: str, timeout: float = 60.0) -> tuple[int, str]:
        """Run a verb of the command line against this node: exit status and output."""
        options = self.options
        argv = [str(options.python), "-m", "mesh_llm", *arguments]
        env = {**options.environment(), "MESH_LLM_HOME": str(self.home)}
        command = await Process.start(argv, lab=options.lab, host=options.host, env=env)
        async with command:
            status = await command.ended(timeout)
            return status, command.text

    async def stop(self, timeout: float = 30.0) -> int:
        """SIGTERM, as a service manager sends it; asserts that nothing is left, and gives the exit status."""
        self.process.signal(signal.SIGTERM)
        status = await self.process.ended(timeout)
        await self.process.gone()
        return status

    async def kill(self) -> None:
        """kill -9 of the daemon; what it started must end by itself, which `process.gone()` asserts."""
        await self.process.kill()

    async def crash(self) -> None:
        """kill -9 of the daemon and of all that it started, at once: a power cut."""
        await self.process.close()

    def freeze(self) -> None:
        """SIGSTOP to the daemon and all that it started."""
        self.process.freeze()

    def thaw(self) -> None:
        """SIGCONT."""
        self.process.thaw()

    async def restart(self, *, ready: bool = True, timeout: float = 120.0) -> None:
        """End what is left of it and start it anew, with the same options and home; `process` is the new one."""
        await self.close()
        self.process = await _launch(self.options)
        if ready:
            await self.ready(timeout)

    async def close(self) -> None:
        """End it in whatever way works. Doing it twice is allowed."""
        await self.process.close()

    def _holder(self) -> dict[str, Any]:
        """What the daemon writes down for its own command line."""
        return json.loads((self.place / "daemon.json").read_text())

    def _client(self, port: int, headers: Mapping[str, str] | None = None) -> HttpClient:
        return HttpClient(port, lab=self.options.lab, host=self.options.host, headers=headers)


async def _launch(options: NodeOptions) -> Process:
    (options.home / "models").mkdir(parents=True, exist_ok=True)
    return await Process.start(
        options.argv(),
        lab=options.lab,
        host=options.host,
        env=options.environment(),
        cwd=options.home,
        name=f"node {options.home.name}",
    )


def _each(option: str, values: Iterable[str | Path]) -> list[str]:
    return [word for value in values for word in (option, str(value))]
