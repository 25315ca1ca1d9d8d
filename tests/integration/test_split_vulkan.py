"""Two real nodes compute a model by Vulkan for a third one, and say what the processor says.

Vulkan's device is Mesa's software device here. It compiles its programs for some twenty seconds of a processor.
"""

from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.e2e.test_split import split_invite
from tests.integration.accelerator_fixtures import installed, llvmpipe
from tests.netlab.fixtures import NetLabFactory
from tests.support.fixtures import StartNode
from tests.support.http import HttpClient
from tests.support.node import NodeProcess
from tests.support.pool import chat, chat_body, content, until, warm
from tests.support.process import words_of

from mesh_llm.engine.confinement import launcher
from mesh_llm.engine.confinement.policy import is_confined

__all__ = ["llvmpipe"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not launcher.landlock_version(), reason="this kernel has no Landlock"),
]

SIZES = ("--parallel", "1", "--ctx-size", "512", "--no-draft")
WORDS = 8


async def test_two_nodes_with_the_plugin_say_what_the_processor_says(
    llvmpipe: Path, netlab: NetLabFactory, start_node: StartNode, tmp_path: Path
) -> None:
    lab = netlab(3, delay_ms=1)
    on_processor = (*SIZES, "--device", "cpu", "--split")
    host = await start_node("a", models=["tiny"], arguments=on_processor, lab=lab, host=0)
    expected = content(await chat(host, "tiny", tokens=WORDS))
    token = await split_invite(host)
    workers: list[NodeProcess] = []
    for number, name in enumerate("bc", 1):
        installed(tmp_path / name / "cache", llvmpipe)
        arguments = (*SIZES, "--device", "Vulkan0")
        workers.append(await start_node(name, join=[token], arguments=arguments, lab=lab, host=number, ready=False))
    await until(host, over_both, "split over both", 600.0)
    for worker in workers:
        status = await worker.status()
        assert any("llvmpipe" in device for device in status["devices"])
        (server,) = _rpc_servers(worker.process.pid)
        assert is_confined(server)
    for node in (host, *workers):
        # The first prompt compiles further programs.
        patient = HttpClient(node.api.port, lab=lab, host=node.options.host, timeout=600.0)
        said = content(await patient.post("/v1/chat/completions", chat_body("tiny", tokens=WORDS)))
        # Rounding decides only between words that are equally likely, which the first ones are not.
        assert said.split()[:4] == expected.split()[:4]


def over_both(status: dict[str, Any]) -> bool:
    split = status["split"]
    return split is not None and len(split["workers"]) == 2 and warm("tiny")(status)


def _rpc_servers(daemon: int) -> list[int]:
    children = psutil.Process(daemon).children(recursive=True)
    found = [child for child in children if "rpc_main" in " ".join(words_of(child))]
    # A launcher that confines it becomes it, or waits for it.
    return [child.pid for child in found if not any(other.ppid() == child.pid for other in found)]
