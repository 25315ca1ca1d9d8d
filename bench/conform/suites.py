"""The clients that are tried, each with its pinned libraries in an environment of its own."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
_CLIENTS, _LOCKS = HERE / "clients", HERE / "locks"
_VERSION = re.compile(r"^([A-Za-z0-9._-]+)==(\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Suite:
    """One client.

    Attributes:
        name: as on the command line, and in the table.
        program: of the cases, in `clients`.
        lock: of a Python environment, in `locks`; a folder there for a JavaScript one; empty: what the system has.
        packages: whose versions are shown.
        engine: the engine alone speaks this client's API as well.
        agent: the name by which `mesh-llm run` starts it; empty: it is a library.
        large: gigabytes to install: only where it is named.
    """

    name: str
    program: str
    lock: str
    packages: tuple[str, ...] = ()
    engine: bool = True
    agent: str = ""
    large: bool = False


def _agent(name: str, agent: str, package: str, lock: str = "agents") -> Suite:
    return Suite(name, "agent_cases.py", lock, (package,), agent=agent, large=True)


ALL = (
    Suite("openai, Python", "openai_python.py", "vendors.txt", ("openai",)),
    Suite("anthropic, Python", "anthropic_python.py", "vendors.txt", ("anthropic",)),
    Suite("openai, npm", "openai_npm.mjs", "npm", ("openai",)),
    Suite("@anthropic-ai/sdk, npm", "anthropic_npm.mjs", "npm", ("@anthropic-ai/sdk",)),
    Suite("ai (Vercel), npm", "ai_npm.mjs", "npm", ("ai", "@ai-sdk/openai")),
    Suite("java.net.http, JDK", "Jdk.java", ""),
    Suite("openai-agents", "openai_agents_cases.py", "openai_agents.txt", ("openai-agents",)),
    Suite("LangChain", "langchain_cases.py", "langchain.txt", ("langchain", "langchain-openai", "langchain-anthropic")),
    Suite("LangChain, Ollama", "langchain_ollama_cases.py", "langchain.txt", ("langchain-ollama",), engine=False),
    Suite(
        "LlamaIndex", "llama_index_cases.py", "llama_index.txt", ("llama-index-core", "llama-index-llms-openai-like")
    ),
    Suite("Pydantic-AI", "pydantic_ai_cases.py", "pydantic_ai.txt", ("pydantic-ai-slim",)),
    Suite("Instructor", "instructor_cases.py", "instructor.txt", ("instructor",)),
    Suite("LiteLLM", "litellm_cases.py", "litellm.txt", ("litellm",)),
    Suite("ollama, Python", "ollama_python.py", "ollama.txt", ("ollama",), engine=False),
    Suite("ollama, npm", "ollama_npm.mjs", "npm", ("ollama",), engine=False),
    Suite("aiperf", "aiperf_cases.py", "aiperf.txt", ("aiperf",)),
    Suite("guidellm", "guidellm_cases.py", "guidellm.txt", ("guidellm",), large=True),
    _agent("aider", "aider", "aider-chat", "aider.txt"),
    _agent("Claude Code", "claude", "@anthropic-ai/claude-code"),
    _agent("Codex", "codex", "@openai/codex"),
    _agent("OpenCode", "opencode", "opencode-ai"),
    _agent("pi", "pi", "@earendil-works/pi-coding-agent"),
    _agent("Qwen Code", "qwen", "@qwen-code/qwen-code"),
)


class MissingProgramError(Exception):
    """A program that a suite needs is not on this machine."""


def prepare(suite: Suite) -> None:
    """Install a suite's libraries, with the network, unless that was done before.

    Raises:
        MissingProgramError: what installs or runs them is missing.
        subprocess.CalledProcessError: the installation failed.
    """
    _program("node" if _is_npm(suite) else "java" if not suite.lock else sys.executable)
    home = _home(suite)
    done = home / "complete"
    if not suite.lock or done.exists():
        return
    print(f"Installing {suite.lock} into {home} ...", file=sys.stderr, flush=True)
    home.mkdir(parents=True, exist_ok=True)
    if _is_npm(suite):
        for name in ("package.json", "package-lock.json", ".npmrc"):
            shutil.copy(_LOCKS / suite.lock / name, home / name)
        # `npm ci` refuses a lock without the parts for other systems that a registry does not have.
        subprocess.run([_program("npm"), "install", "--no-save", "--silent"], cwd=home, check=True)
    else:
        uv = _program(str(Path(sys.executable).with_name("uv")))
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(home)], check=True)
        install = [uv, "pip", "install", "--quiet", "--python", str(home / "bin" / "python")]
        subprocess.run([*install, "--require-hashes", "-r", str(_LOCKS / suite.lock)], check=True)
    done.touch()


def versions(suite: Suite) -> str:
    """The pinned versions of a suite's packages, as in `openai 3.57.0`."""
    if not suite.lock:
        told = subprocess.run([_program("java"), "--version"], capture_output=True, text=True, check=True).stdout
        return " ".join(told.split()[:2])
    if _is_npm(suite):
        packages = json.loads((_LOCKS / suite.lock / "package-lock.json").read_text())["packages"]
        found = {name.removeprefix("node_modules/"): entry.get("version", "") for name, entry in packages.items()}
    else:
        found = dict(_VERSION.findall((_LOCKS / suite.lock).read_text()))
    return ", ".join(f"{name} {found[name]}" for name in suite.packages)


def command(suite: Suite) -> tuple[list[str], Path]:
    """How its cases are run, and where."""
    home = _home(suite)
    if suite.agent:
        # The program needs what `mesh-llm run` does with an agent; the agent itself is in its own environment.
        programs = home / "node_modules" / ".bin" if _is_npm(suite) else home / "bin"
        return [sys.executable, str(_CLIENTS / suite.program), suite.agent, str(programs)], HERE
    if _is_npm(suite):
        # A module finds its packages beside itself.
        for path in _CLIENTS.glob("*.mjs"):
            shutil.copy(path, home / path.name)
        return [_program("node"), suite.program], home
    if not suite.lock:
        return [_program("java"), str(_CLIENTS / suite.program)], HERE
    return [str(home / "bin" / "python"), str(_CLIENTS / suite.program)], HERE


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a suite's program: nothing of this one that configures a client."""
    inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    return {**inherited, **given, "PYTHONDONTWRITEBYTECODE": "1"}


def _home(suite: Suite) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    lock = _LOCKS / suite.lock
    contents = (lock / "package-lock.json" if _is_npm(suite) else lock).read_bytes() if suite.lock else b""
    return cache / "mesh-llm-bench" / f"conform-{suite.lock or 'system'}-{hashlib.sha256(contents).hexdigest()[:12]}"


def _is_npm(suite: Suite) -> bool:
    return bool(suite.lock) and (_LOCKS / suite.lock).is_dir()


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise MissingProgramError(f"{name} is not installed")
    return found
