"""What passive nodes cost the node they ask: `python -m bench.mesh.clients [--clients 50] [--json FILE]`.

A serving node, and so many clients with an endpoint and a connection each (in one process, which costs the server the
same as many). Prints the server's memory with none, with all of them following its routes, and after they left.
Needs root.
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

from bench.mesh.nodes import make_node
from tests.netlab.lab import NetLab

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.events import AnyEvent, RoutesLearned
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.net.mesh import MeshNet

MODELS = 20
WARM_UP = 10
"""Clients that come and go before anything is measured, so that allocators have their first pages."""


async def host() -> None:
    """The node that is asked: has some routes, and says its invite."""
    node = make_node()
    await node.start()
    target = Target(node=node.node_id, local=True, address="127.0.0.1:1")
    names = [ModelName(f"model-{number}") for number in range(MODELS)]
    routes = {name: ModelRoute(name=name, status=ModelStatus.WARM, targets=(target,)) for name in names}
    node.routes_server.update(RoutingSnapshot(version=1, node=node.node_id, models=routes))
    print("token", node.create_invite("client", 3600.0, None).token, flush=True)
    await asyncio.Event().wait()


async def clients(token: str, count: str) -> None:
    """So many clients, until standard input says something."""
    nodes: list[MeshNet] = []
    for _ in range(int(count)):
        learned = asyncio.Event()

        def on_event(event: AnyEvent, learned: asyncio.Event = learned) -> None:
            if isinstance(event, RoutesLearned):
                learned.set()

        node = make_node(token, client=True, on_event=on_event)
        await node.start()
        await learned.wait()
        nodes.append(node)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    await asyncio.gather(*(node.close() for node in nodes))
    print("gone", flush=True)


def memory_kib(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise RuntimeError(f"no memory of {pid}")


def say(process: "subprocess.Popen[str]", word: str) -> str:
    """The next line of a process that begins with a word."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.strip()
    raise RuntimeError(f"it never said {word}")


def measure(count: int) -> dict[str, float]:
    """The server's memory before, with, and after its clients."""
    command = [sys.executable, "-m", "bench.mesh.clients"]
    with NetLab(1) as lab:
        server = lab.popen(0, [*command, "--role", "host"], stdout=subprocess.PIPE, text=True)
        token = say(server, "token").split()[1]

        def crowd(number: int) -> "subprocess.Popen[str]":
            argv = [*command, "--role", "clients", token, str(number)]
            process = lab.popen(0, argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            say(process, "ready")
            return process

        def dismiss(process: "subprocess.Popen[str]") -> None:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            say(process, "gone")

        dismiss(crowd(WARM_UP))
        before = memory_kib(server.pid)
        process = crowd(count)
        during = memory_kib(server.pid)
        dismiss(process)
        after = memory_kib(server.pid)
    return {
        "clients": count,
        "server_before_kib": before,
        "server_with_clients_kib": during,
        "server_after_kib": after,
        "per_client_kib": (during - before) / count,
    }


def main() -> None:
    """Entry point, of the measurement and of its processes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    parser.add_argument("--role", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role:
        role, *arguments = options.role
        asyncio.run(host() if role == "host" else clients(*arguments))
        sys.stdout.flush()
        os._exit(0)
    numbers = measure(options.clients)
    print("\n".join(f"{name:28}{value:12.1f}" for name, value in numbers.items()))
    print(json.dumps(numbers))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(numbers, indent=2) + "\n")


if __name__ == "__main__":
    main()
