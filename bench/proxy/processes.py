"""What stands between client and engine: how each is started, when it is ready, and what it uses."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

LITELLM_KEY = "sk-bench"
_READY_SECONDS = 120.0

_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 4096; }}
http {{
  access_log off;
  client_body_temp_path {directory}/body;
  proxy_temp_path {directory}/proxy;
  fastcgi_temp_path {directory}/f;
  uwsgi_temp_path {directory}/u;
  scgi_temp_path {directory}/s;
  client_max_body_size 64m;
  upstream engine {{ server {engine};{keepalive} }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{
      proxy_pass http://engine;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
"""

_LITELLM = """
model_list:
  - model_name: tiny
    litellm_params:
      model: openai/tiny
      api_base: http://{engine}/v1
      api_key: none
general_settings:
  master_key: {key}
litellm_settings:
  telemetry: false
"""


@dataclass(frozen=True)
class System:
    """One way to the engine. `pid` is the root of what is measured; None where there is nothing in between."""

    name: str
    port: int
    pid: int | None

    def cpu_seconds(self) -> float:
        """CPU time of all its processes so far, to the nanosecond (schedstat; proc(5))."""
        total = 0
        for process in self._family():
            for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
                total += int(path.read_text().split()[0])
        return total / 1e9

    def memory_bytes(self) -> int:
        """Resident memory of all its processes."""
        return sum(process.memory_info().rss for process in self._family())

    def _family(self) -> list[psutil.Process]:
        if self.pid is None:
            return []
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def running(argv: list[str], port: int, **environment: str) -> Generator[int]:
    """A process that listens on a port; gives its pid. It and what it started are ended afterwards."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, env={**os.environ, **environment}, process_group=0)
        try:
            deadline = time.monotonic() + _READY_SECONDS
            while not _listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(f"{argv[:4]} did not start:\n{log.read()[-4000:].decode(errors='replace')}")
                try:
                    process.wait(0.05)
                except subprocess.TimeoutExpired:
                    continue
            yield process.pid
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def systems(engine: str, nginx: str | None, litellm: Path | None, *, closes: bool = False) -> Generator[list[System]]:
    """All ways to an engine at `host:port`, running. Those that are not installed are left out.

    `closes`: the engine closes its connection after a stream, as llama-server does. nginx would answer 502 where it
    uses such a connection once more, so that it keeps none; and the bare relay is too bare for it, and left out.
    """
    engine_port = engine.rpartition(":")[2]
    with ExitStack() as stack:
        found = [System("direct", int(engine_port), None)]

        def add(name: str, argv: list[str], port: int, **environment: str) -> None:
            found.append(System(name, port, stack.enter_context(running(argv, port, **environment))))

        port = free_port()
        add("mesh-llm", [sys.executable, "-m", "bench.proxy.api_server", str(port), engine], port)
        if not closes:
            port = free_port()
            add("bare relay", [sys.executable, "-m", "bench.proxy.bare_relay", str(port), engine_port], port)
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if nginx is not None:
            port = free_port()
            keepalive = "" if closes else " keepalive 64;"
            path = directory / "nginx.conf"
            path.write_text(_NGINX.format(directory=directory, engine=engine, port=port, keepalive=keepalive))
            add("nginx", [nginx, "-p", str(directory), "-c", str(path)], port)
        if litellm is not None:
            port = free_port()
            path = directory / "litellm.yaml"
            path.write_text(_LITELLM.format(engine=engine, key=LITELLM_KEY))
            argv = [str(litellm), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
            quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_LOG": "ERROR", "NO_DOCS": "True"}
            add("litellm", [*argv, "--telemetry", "False"], port, **quiet)
        yield found
