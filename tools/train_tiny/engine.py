"""A llama-server out of the xllamacpp wheel, as a child process: what the models are measured with.

Child: `python -m tools.train_tiny.engine MODEL [DRAFT] [DRAFT_MAX]`. It listens on a free loopback port, writes its
address as the first line of its output, and ends when its input is closed.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

_READY_SECONDS = 120
# The engine's own default (`speculative.draft.n_max`).
DRAFT_MAX = 3

Body = dict[str, Any]


@dataclass(frozen=True)
class Engine:
    """A running llama-server."""

    address: str

    def get(self, path: str) -> str:
        """The answer to a GET."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Body) -> Body:
        """The JSON answer to a POST."""
        return cast("Body", json.loads(self._ask("POST", path, body)))

    def stream(self, path: str, body: Body) -> list[Body]:
        """The events of a streamed answer, all of them; the closing mark is checked, and left out."""
        lines = [
            line.removeprefix("data: ")
            for line in self._ask("POST", path, {**body, "stream": True}).splitlines()
            if line.startswith("data: ")
        ]
        if lines[-1] != "[DONE]":
            raise ValueError(f"the stream ended in {lines[-1]}")
        return [cast("Body", json.loads(line)) for line in lines[:-1]]

    def chat(self, *turns: str, system: str | None = None, **options: object) -> str:
        """The answer to a conversation that begins and ends with the user's turns, at temperature 0."""
        messages = [
            {"role": "user" if place % 2 == 0 else "assistant", "content": turn} for place, turn in enumerate(turns)
        ]
        if system is not None:
            messages.insert(0, {"role": "system", "content": system})
        body: Body = {"messages": messages, "temperature": 0, "max_tokens": 1024, **options}
        return cast("str", self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"])

    def _ask(self, method: str, path: str, body: Body | None) -> str:
        parts = urlsplit(self.address)
        connection = http.client.HTTPConnection(parts.hostname or "127.0.0.1", parts.port, timeout=_READY_SECONDS)
        try:
            connection.request(
                method, path, None if body is None else json.dumps(body), {"Content-Type": "application/json"}
            )
            answer = connection.getresponse()
            text = answer.read().decode()
            if answer.status != http.client.OK:
                raise ValueError(f"{method} {path}: {answer.status} {text}")
            return text
        finally:
            connection.close()


@contextlib.contextmanager
def running(model: Path, draft: Path | None = None, draft_max: int = DRAFT_MAX) -> Iterator[Engine]:
    """Starts a llama-server with the model, and ends it again."""
    command = [sys.executable, "-m", __spec__.name, str(model), *([str(draft), str(draft_max)] if draft else [])]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(
        command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            address = next(
                (line.split(maxsplit=1)[1].strip() for line in child.stdout if line.startswith("LISTENING ")), ""
            )
            if not address:
                raise RuntimeError(f"the engine ended with {child.wait()} before it was ready")
            yield Engine(address)
        finally:
            child.stdin.close()
            child.stdout.close()
            try:
                child.wait(10)
            except subprocess.TimeoutExpired:
                child.kill()


def serve(model: str, draft: str = "", draft_max: str = str(DRAFT_MAX)) -> None:
    """The child: serves until its input is closed."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 4096
    params.n_parallel = 1
    params.fit_params = False
    params.endpoint_metrics = True
    if draft:
        params.speculative.draft.mparams.path = draft
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.n_max = int(draft_max)
    server = xllamacpp.Server(params)
    print(f"LISTENING {server.listening_address}", flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:])
