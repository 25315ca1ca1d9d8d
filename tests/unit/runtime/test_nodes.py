"""Who has a port that a node wants, and which ones it can have."""

import re
import socket
from pathlib import Path

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.nodes import explain_taken, free_port


def test_all_ports_that_are_taken_are_replaced_at_once(tmp_path: Path) -> None:
    error = MeshError(code="port_in_use", message="taken")
    with socket.create_server(("127.0.0.1", 0)) as console, socket.create_server(("127.0.0.1", 0)) as api:
        taken, other = console.getsockname()[1], api.getsockname()[1]
        found = explain_taken(error, Home(tmp_path), "127.0.0.1", taken, "--console", ("--port", other))
        assert found.message.startswith(f"Port {taken} is used by ")
        named = re.match(r"Take other ports: --console (\d+) --port (\d+), ", found.hint)
        assert named is not None, found.hint
        assert not {int(named[1]), int(named[2])} & {taken, other}
        free = free_port("127.0.0.1", max(taken, other))
        alone = explain_taken(error, Home(tmp_path), "127.0.0.1", taken, "--console", ("--port", free))
        assert alone.hint.startswith("Take another port: --console ")


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    error = MeshError(code="other", message="something else")
    assert explain_taken(error, Home(tmp_path), "127.0.0.1", 1, "--port") is error
