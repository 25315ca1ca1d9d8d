"""The README's "A minute of use": every command in it is run as it is typed there, on machines of their own.

`STEPS` has a step for each command. A command of the README without a step fails the test, and so does a step without
a command. Only what the README itself leaves open is filled in: the token, and the names NAME, M and KEY. The models
come from a hub on loopback, which has small ones under the names of the catalogue; the relay is a real one.
"""

import os
import re
import shlex
import signal
import sys
from collections.abc import Awaitable, Callable, Generator
from contextlib import AsyncExitStack
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from tests.netlab.fixtures import NetLabFactory
from tests.netlab.lab import NetLab
from tests.support.hub_server import HubServer
from tests.support.node import NodeOptions
from tests.support.process import Process
from tests.support.terminal import on_terminal

from mesh_llm.cli.agents import AGENTS

pytestmark = pytest.mark.timeout(300)

ROOT = Path(__file__).resolve().parents[2]
FIRST, SECOND, LAPTOP = range(3)
QWEN_7B = ("bartowski/Qwen2.5-7B-Instruct-GGUF", "Qwen2.5-7B-Instruct-Q4_K_M.gguf")
QWEN_32B = ("bartowski/Qwen_Qwen3-32B-GGUF", "Qwen_Qwen3-32B-Q4_K_M.gguf")
RELAY = "README_RELAY"

# What the README says.


def section() -> str:
    text = (ROOT / "README.md").read_text("utf-8")
    begin = text.index("\n## A minute of use\n")
    return text[begin : text.index("\n## ", begin + 1)]


def blocks() -> list[list[str]]:
    """The commands of each block of code, without their comments."""
    found = re.findall(r"^```sh\n(.*?)^```", section(), re.MULTILINE | re.DOTALL)
    return [[line for text in block.replace("\\\n", "").splitlines() if (line := command(text))] for block in found]


def command(line: str) -> str:
    return re.sub(r"\s{2,}#\s.*$", "", line).strip()


def mentioned() -> list[str]:
    """The commands in comments and sentences."""
    return list(dict.fromkeys(re.findall(r"`(mesh-llm [^`]+)`", section())))


# The machines.

COMMAND = """#!{python}
import os
import mesh_llm.discovery.nostr as nostr
# The public relays are out of reach here: this is the one that they are.
nostr.DEFAULT_RELAYS = (os.environ["README_RELAY"],) if "README_RELAY" in os.environ else nostr.DEFAULT_RELAYS
from mesh_llm.cli.main import main
main()
"""
AGENT = """#!{python}
import json, os, urllib.request
body = {{"model": os.environ["ANTHROPIC_MODEL"], "max_tokens": 8, "messages": [{{"role": "user", "content": "Hello"}}]}}
headers = {{"content-type": "application/json", "authorization": "Bearer " + os.environ["ANTHROPIC_AUTH_TOKEN"]}}
url = os.environ["ANTHROPIC_BASE_URL"] + "/v1/messages"
with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
    print("claude was answered by", json.loads(answer.read())["model"])
"""
RELAY_PROGRAM = """
import asyncio, sys
from tests.support.nostr_relays import TestRelay
async def main():
    relay = await TestRelay.start(sys.argv[1])
    print("relay", relay.url, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


class Machines:
    """Hosts of a lab on which lines are typed, and what was started there."""

    def __init__(self, lab: NetLab, directory: Path) -> None:
        self.lab = lab
        self.directory = directory
        self.env: dict[str, str] = {}
        self.token = ""
        self.nodes: dict[int, Process] = {}
        self.stack = AsyncExitStack()
        self._running: list[Process] = []
        programs = directory / "bin"
        programs.mkdir()
        for name, text in (("mesh-llm", COMMAND), ("claude", AGENT)):
            (programs / name).write_text(text.format(python=sys.executable))
            (programs / name).chmod(0o755)

    def home(self, host: int) -> Path:
        home = self.directory / f"machine-{host}"
        (home / "models").mkdir(parents=True, exist_ok=True)
        return home

    def environment(self, host: int) -> dict[str, str]:
        """As the user of this machine has it."""
        env = NodeOptions(self.home(host)).environment() | self.env
        env["PATH"] = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        env["PYTHONPATH"] = f"{env['PYTHONPATH']}:{ROOT}"
        return env

    async def type(self, host: int, line: str, *, given: str | None = None) -> Process:
        """Type a line at a machine, with a line of standard input if one is given."""
        typed = f"{line} <<< {shlex.quote(given)}" if given is not None else line
        env, shell = self.environment(host), ["/bin/bash", "-c", typed]
        process = await Process.start(shell, lab=self.lab, host=host, env=env, cwd=self.home(host), name=line[:60])
        self._running.append(process)
        return process

    async def done(self, host: int, line: str, *, given: str | None = None, status: int = 0) -> str:
        """Type a line that ends by itself; its output."""
        process = await self.type(host, line, given=given)
        assert await process.ended(90) == status, f"{line}\n{process.text}"
        return process.text

    async def node(self, host: int, line: str) -> Process:
        """Type a line that starts a node, and wait until it is ready."""
        self.nodes[host] = await self.type(host, line)
        await self.nodes[host].line("^ready$", 90)
        return self.nodes[host]

    async def close(self) -> None:
        await self.stack.aclose()
        for process in self._running:
            await process.close()
            print(f"--- {process.name}: {process.status}\n{process.text}")


Step = Callable[[Machines, str], Awaitable[None]]
STEPS: dict[str, Step] = {}


def runs(line: str) -> Callable[[Step], Step]:
    """The step that runs this command of the README."""

    def register(step: Step) -> Step:
        STEPS[line] = step
        return step

    return register


# With a token.


@runs("mesh-llm --model qwen2.5-7b")
async def on_the_first_machine(machines: Machines, line: str) -> None:
    node = await machines.node(FIRST, line)
    assert "fetched and checked" in node.text
    invite = await node.line(r"--join (mesh2\S+)")
    machines.token = invite[1]


@runs("mesh-llm --join mesh2k5bE… --model other.gguf")
async def on_the_second(machines: Machines, line: str) -> None:
    await machines.node(SECOND, line.replace("mesh2k5bE…", machines.token))


@runs("mesh-llm --client --join mesh2k5bE…")
async def on_a_laptop_that_serves_nothing(machines: Machines, line: str) -> None:
    await machines.node(LAPTOP, line.replace("mesh2k5bE…", machines.token))


@runs(
    "curl http://localhost:9337/v1/chat/completions -H 'content-type: application/json'   "
    '-d \'{"model": "qwen", "messages": [{"role": "user", "content": "Hello"}]}\''
)
async def any_node_any_model(machines: Machines, line: str) -> None:
    for host in (FIRST, SECOND, LAPTOP):
        for model, full in (("qwen", "Qwen2.5-7B-Instruct-Q4_K_M"), ("other", "other")):
            text = await machines.done(host, line.replace('"qwen"', f'"{model}", "max_tokens": 4'))
            assert f'"model":"{full}"' in text.replace(": ", ":"), text


@runs("export OPENAI_BASE_URL=http://localhost:9337/v1 OPENAI_API_KEY=none")
async def for_openai_clients(machines: Machines, line: str) -> None:
    code = (
        "import openai; answer = openai.OpenAI().chat.completions.create(model='qwen', max_tokens=4, "
        "messages=[{'role': 'user', 'content': 'Hello'}]); print('from', answer.model)"
    )
    assert "from Qwen2.5-7B" in await machines.done(LAPTOP, f"{line}; {sys.executable} -c {shlex.quote(code)}")


@runs("export ANTHROPIC_BASE_URL=http://localhost:9337 ANTHROPIC_API_KEY=none")
async def for_anthropic_clients(machines: Machines, line: str) -> None:
    code = (
        "import anthropic; answer = anthropic.Anthropic().messages.create(model='qwen', max_tokens=4, "
        "messages=[{'role': 'user', 'content': 'Hello'}]); print('from', answer.model)"
    )
    assert "from Qwen2.5-7B" in await machines.done(LAPTOP, f"{line}; {sys.executable} -c {shlex.quote(code)}")


@runs("mesh-llm status --watch")
async def the_mesh_as_it_changes(machines: Machines, line: str) -> None:
    watch = await machines.type(SECOND, line)
    await watch.line("other .*warm", 30)
    seen = len(watch.lines)
    await machines.done(SECOND, "mesh-llm drop other")
    await watch.line("other", 30, after=seen)
    await machines.done(SECOND, "mesh-llm load other")
    watch.signal(signal.SIGINT)
    assert await watch.ended() == 0


@runs("mesh-llm chat qwen")
async def talk_to_a_model(machines: Machines, line: str) -> None:
    assert (await machines.done(LAPTOP, f"{line} -n 8", given="Hello")).strip()


@runs("mesh-llm run claude")
async def an_agent_that_uses_the_mesh(machines: Machines, line: str) -> None:
    text = await machines.done(FIRST, line)
    assert "claude was answered by Qwen2.5-7B-Instruct-Q4_K_M" in text


@runs("mesh-llm plan llama-3.3-70b")
async def would_it_fit_where_and_how_fast(machines: Machines, line: str) -> None:
    text = await machines.done(FIRST, line)
    assert "Llama-3.3-70B-Instruct-Q4_K_M" in text
    assert re.search(r"does not fit: (it needs|need) \d|tokens/s", text), text
    assert "tokens/s" in await machines.done(FIRST, "mesh-llm plan qwen2.5-7b"), "how fast, where it fits"


@runs("mesh-llm download qwen3-32b")
async def download_a_model(machines: Machines, line: str) -> None:
    assert "Qwen_Qwen3-32B-Q4_K_M: " in await machines.done(FIRST, line)
    assert "llama-3.3-70b" in await machines.done(FIRST, "mesh-llm download"), "without a name: the catalogue"


@runs("mesh-llm load NAME; mesh-llm drop NAME")
async def load_and_drop(machines: Machines, line: str) -> None:
    name = "Qwen_Qwen3-32B-Q4_K_M"
    load, drop = line.replace("NAME", name).split("; ")
    assert f"Loading {name}" in await machines.done(FIRST, load)
    await machines.nodes[FIRST].line(f"{name} is ready", 60)
    assert f"Dropping {name}" in await machines.done(FIRST, drop)


@runs("mesh-llm invite create --scope client --expires 12h")
async def an_invite(machines: Machines, line: str) -> None:
    assert re.fullmatch(r"mesh2\S+\n?", await machines.done(FIRST, line))
    assert "client  expires in 1" in await machines.done(FIRST, "mesh-llm invite list")


@runs("mesh-llm doctor")
async def find_faults(machines: Machines, line: str) -> None:
    text = await machines.done(FIRST, line)
    assert "a node runs here" in text
    assert "FAIL" not in text


# Without a token.


@runs("mesh-llm --model tiny --lan")
async def announce_on_this_network(machines: Machines, line: str) -> None:
    await machines.node(FIRST, line)


@runs("mesh-llm --lan")
async def join_on_this_network(machines: Machines, line: str) -> None:
    asking = machines.nodes[SECOND] = await machines.type(SECOND, line)
    await asking.line("was asked", 60)


@runs("mesh-llm approve")
async def approve(machines: Machines, line: str) -> None:
    text = await machines.done(FIRST, line)
    key = re.search(r"^ *([a-z0-9]{4}-[a-z0-9]{4}-[a-z0-9]{4}) ", text, re.MULTILINE)
    assert key is not None, text
    assert "Approved" in await machines.done(FIRST, f"{line} {key[1]}")
    await machines.nodes[SECOND].line("^ready$", 60)
    for node in machines.nodes.values():
        node.signal(signal.SIGTERM)
        await node.ended()


@runs('mesh-llm --model M --publish --mesh-name "Sydney Lab"')
async def list_the_mesh_for_strangers(machines: Machines, line: str) -> None:
    relay = await machines.type(FIRST, f"{sys.executable} -c {shlex.quote(RELAY_PROGRAM)} {machines.lab.addr(FIRST)}")
    machines.env[RELAY] = (await relay.line(r"^relay (\S+)", 30))[1]
    argv = machines.lab.command(FIRST, ["/bin/bash", "-c", line.replace(" M ", " tiny ")])
    terminal = await machines.stack.enter_async_context(
        on_terminal(argv, env=machines.environment(FIRST), cwd=machines.home(FIRST))
    )
    await terminal.until("List this mesh")
    terminal.type("y\r")
    await terminal.until("Ctrl-C stops this node")
    watch = await machines.type(FIRST, "mesh-llm status --watch")
    await watch.line("listing +listed", 60)


@runs("mesh-llm discover")
async def lists_them(machines: Machines, line: str) -> None:
    assert "Sydney Lab" in await machines.done(LAPTOP, line)


@runs("mesh-llm --client --auto")
async def find_the_best_listed_mesh(machines: Machines, line: str) -> None:
    node = await machines.node(LAPTOP, line)
    assert "joining Sydney Lab" in node.text


@runs("mesh-llm console")
async def a_link_that_works_once(machines: Machines, line: str) -> None:
    text = await machines.done(FIRST, line)
    link = re.search(r"http://127\.0\.0\.1:3131/\S+", text)
    assert link is not None, text
    page = await machines.done(FIRST, f"curl -s {link[0].partition('#')[0]}")
    assert "<title>mesh-llm" in page


# The tests.


@pytest.fixture
def hub(netlab: NetLabFactory, random_model: Callable[[str], Path]) -> Generator[tuple[NetLab, HubServer]]:
    """Three machines, and on the first a hub that has small models under the names of the catalogue."""
    lab = netlab(3)
    server = lab.call(FIRST, HubServer)
    for repository, file in (QWEN_7B, QWEN_32B):
        server.add(repository, file, random_model("small").read_bytes())
    with server:
        yield lab, server


async def follow(machines: Machines, commands: list[str]) -> None:
    try:
        for line in commands:
            step = STEPS.get(line)
            assert step is not None, f"the README says `{line}`, and no step of this test runs it"
            await step(machines, line)
    finally:
        await machines.close()


def test_every_command_of_the_readme_has_a_step_and_every_step_a_command() -> None:
    said = {*(line for block in blocks() for line in block), *mentioned()}
    assert said == set(STEPS)
    agents = re.search(r"an agent that uses the mesh; also ([a-z, ]+)$", section(), re.MULTILINE)
    assert agents is not None
    assert {"claude", *agents[1].split(", ")} == set(AGENTS)
    (script,) = [point for point in entry_points(group="console_scripts") if point.name == "mesh-llm"]
    assert script.value == "mesh_llm.__main__:main", "what make setup leaves in .venv/bin"


async def test_with_a_token(hub: tuple[NetLab, HubServer], random_model: Callable[[str], Path], tmp_path: Path) -> None:
    lab, server = hub
    machines = Machines(lab, tmp_path)
    machines.env["HF_ENDPOINT"] = server.endpoint
    (machines.home(SECOND) / "other.gguf").write_bytes(random_model("small").read_bytes())
    await follow(machines, blocks()[0])


async def test_without_a_token_and_what_the_sentences_say(netlab: NetLabFactory, tmp_path: Path) -> None:
    machines = Machines(netlab(3), tmp_path)
    machines.env["MESH_LLM_LISTING_PERIOD"] = "4"
    lan, publish, auto = blocks()[1]
    await follow(
        machines, [lan, "mesh-llm --lan", "mesh-llm approve", publish, "mesh-llm discover", auto, "mesh-llm console"]
    )
