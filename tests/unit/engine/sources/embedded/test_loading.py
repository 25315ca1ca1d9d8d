"""What the engine's children load, and what they do without."""

import subprocess
import sys
from pathlib import Path

import pytest

from mesh_llm.engine.sources.embedded import loading

SLOW = {"asyncio", "structlog", "filelock", "psutil", "ssl", "tarfile", "rich", "numpy"}
"""What only the daemon needs. Together they take longer than all that a child needs, at each start of an engine."""


def test_plugins_are_told_from_the_other_arguments() -> None:
    assert loading.parse_load(["spec", "rpc.so", loading.LOAD, "/a.so"]) == (["spec", "rpc.so"], [Path("/a.so")])
    assert loading.parse_load([]) == ([], [])


@pytest.mark.parametrize("child", ["server_main", "rpc_main", "probe_main"])
def test_an_engine_starts_without_what_only_the_daemon_needs(child: str) -> None:
    code = f"import sys, mesh_llm.engine.sources.embedded.{child}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert SLOW & set(done.stdout.split()) == set()
