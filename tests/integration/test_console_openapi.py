"""A real node answers as `openapi.json` says, whatever it is sent: schemathesis makes up the requests."""

import asyncio
import re
import sys
from pathlib import Path

import pytest
from tests.support.fixtures import StartNode
from tests.support.process import Process

from mesh_llm.console.openapi import FILE

_CONFIG = """
# A made-up name may be the beginning of several models, which is refused as 400 with the choices.
[[operations]]
include-operation-id = ["download", "load", "drop", "plan"]
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 404, 409, 429]
"""
_NOT_ASKED = ("events", "stop")
"""The one never ends, the other ends the node; tests of their own are about them."""

PATIENCE = "100"
"""Seconds."""


@pytest.mark.timeout(600)
async def test_a_node_answers_as_described(start_node: StartNode, tmp_path: Path) -> None:
    node = await start_node("a", models=["tiny"], env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    token = (node.options.home / "control-token").read_text()
    config = tmp_path / "schemathesis.toml"
    config.write_text(_CONFIG)
    argv = [
        str(Path(sys.executable).with_name("schemathesis")),
        *("--config-file", str(config)),
        "run",
        str(FILE),
        *("--url", node.console.url),
        *("--header", f"x-mesh-llm-token: {token}"),
        *("--phases", "examples,coverage,fuzzing"),
        *("--max-examples", "10"),
        *("--seed", "7"),
        # A node on a busy machine may take longer than the ten seconds that it is given unasked.
        *("--request-timeout", PATIENCE),
        *("--max-response-time", PATIENCE),
        *("--checks", "all"),
        *("--suppress-health-check", "all"),
        "--no-shrink",
        *(word for name in _NOT_ASKED for word in ("--exclude-operation-id", name)),
    ]
    # It keeps what it has learned where it runs.
    async with await Process.start(argv, cwd=tmp_path, name="schemathesis") as command:
        status = await command.ended(500.0)
        assert status == 0, command.text
        generated = re.search(r"(\d+) generated", command.text)
        assert generated is not None, command.text
        assert int(generated[1]) > 500
    assert (await node.status())["ready"]
    async with asyncio.timeout(60):
        assert (await node.stop(50.0)) == 0
