"""A child process to run, and how to know that it is ready."""

import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import mesh_llm

_NOT_INHERITED = ("LLAMA_", "GGML_", "MESH_LLM_", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables of the parent that would change an engine's behaviour unseen (`LLAMA_ARG_HOST`), or are secrets."""

_SECRET = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|API_?KEY|ACCESS_KEY|PRIVATE_KEY|CREDENTIALS)(?:_|$)"
)
"""Names of variables that are secrets of others: no engine needs them."""

# `listening on http://127.0.0.1:8080`; before 2025: `HTTP server is listening, hostname: 127.0.0.1, port: 8080, ...`
_LISTENING = re.compile(rb"listening(?: on (?:http://)?|, hostname: )127\.0\.0\.1(?::|, port: )(\d{1,5})\b")


class Readiness(StrEnum):
    """What tells that a child can be used."""

    HTTP = "http"
    RPC = "rpc"


@dataclass(frozen=True, kw_only=True)
class Command:
    """A child process to run.

    Attributes:
        argv: program and arguments.
        env: variables added to what is inherited.
        readiness: HTTP: `/health` says 200. RPC: the HELLO handshake is answered.
        address: `host:port` or `unix:PATH`; empty where the child says it in its output.
        embeddings: whether it was told to answer /v1/embeddings.
        key: what an HTTP server demands as `Authorization: Bearer`; empty for nothing.
        key_file: where it reads that key while it starts; None for no key.
        keeps: beginnings of the names of variables that it inherits; empty for all that are no secrets.
        confined: it must be under a system call filter by the time it answers.
        stuck_seconds: how long the task queue of an HTTP server may give no answer; 0: it is not watched.
        reference: an RPC server that computes on the processor with the pinned release's own kernels.
    """

    argv: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict[str, str])
    readiness: Readiness = Readiness.HTTP
    address: str = ""
    embeddings: bool = False
    key: str = field(default="", repr=False)
    key_file: Path | None = None
    keeps: tuple[str, ...] = ()
    confined: bool = False
    stuck_seconds: float = 0.0
    reference: bool = False


def child_environment(command: Command, parent: Mapping[str, str] | None = None) -> dict[str, str]:
    """The whole environment for a child: the parent's (default: this process's) less what it must not see."""
    inherited = os.environ if parent is None else parent
    kept = {name: value for name, value in inherited.items() if _may_pass(name, command.keeps)}
    # A backtrace makes llama.cpp start gdb on itself, which hangs a dying server.
    return kept | {"GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"} | command.env


def _may_pass(name: str, keeps: tuple[str, ...]) -> bool:
    if name.startswith(_NOT_INHERITED) or _SECRET.search(name.upper()):
        return False
    return not keeps or name.startswith(keeps)


def python_module(module: str, *arguments: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The argv and environment that run a module of this very package, wherever it was imported from."""
    root = str(Path(mesh_llm.__file__).parents[1])
    inherited = os.environ.get("PYTHONPATH", "")
    path = os.pathsep.join(part for part in (root, inherited) if part)
    return (sys.executable, "-P", "-m", module, *arguments), {"PYTHONPATH": path}


def listening_port(line: bytes) -> int | None:
    """The port that a llama-server names in a line of its output; None in any other line."""
    match = _LISTENING.search(line)
    return int(match[1]) if match else None
