"""A node that writes down what reaches it: what others open to it, and what it sends on to its engines.

    stranger = await start_node("stranger", shell=wiretap.shell(file), env=wiretap.ENV)
    for heard in wiretap.read(file): ...

This file is also the program that such a node runs. It is the node's own code, with a listener where streams of other
nodes begin, and where bytes leave for an engine or an RPC server of this machine.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[2]
ENV = {"PYTHONPATH": os.pathsep.join([str(_ROOT / "src"), str(_ROOT)])}
"""What the node needs to find this file."""


class Heard(NamedTuple):
    """One thing that reached a node.

    Attributes:
        kind: `stream` that another node opened, `engine` or `rpc` for bytes to one of this machine.
        what: the stream's type; the bytes to an engine, as Latin-1; the number of bytes to an RPC server.
        node: who opened the stream.
    """

    kind: str
    what: str
    node: str = ""


def shell(file: Path) -> str:
    """The shell command of a node that writes what it hears into a file."""
    return f'python=$1; shift 3; exec "$python" -m tests.support.wiretap {file} "$@"'


def read(file: Path) -> list[Heard]:
    """All that was heard so far, in order. A line without its end is still being written."""
    return [Heard(*json.loads(line)) for line in file.read_text().split("\n")[:-1]]


def streams(heard: list[Heard]) -> set[tuple[str, str]]:
    """The types of streams that carry requests, answers, activations or caches, and who opened them."""
    carry = {"HTTP", "RPC", "PUSH", "PROMPT_CACHE"}
    return {(one.what, one.node) for one in heard if one.kind == "stream" and one.what in carry}


def to_rpc_servers(heard: list[Heard]) -> int:
    """How many bytes went to RPC servers. A node asks its own for its memory now and then: some ten bytes."""
    return sum(int(one.what) for one in heard if one.kind == "rpc")


def to_engines(heard: list[Heard]) -> str:
    """All bytes that went to engines, as Latin-1."""
    return "".join(one.what for one in heard if one.kind == "engine")


def _listen(file: Path) -> None:
    from mesh_llm.api.engine_stream import EngineStream
    from mesh_llm.net.quic.connection import StreamDispatcher
    from mesh_llm.split.worker.rpc_client import RpcClient
    from mesh_llm.wire.mesh.frames import known_type

    out = file.open("a", buffering=1)

    def note(*heard: str) -> None:
        out.write(json.dumps(heard) + "\n")

    header, engine, rpc = StreamDispatcher._read_header, EngineStream.write, RpcClient.write

    async def read_header(self: Any, stream: Any, peer: Any) -> Any:
        found = await header(self, stream, peer)
        if found is not None:
            kind = known_type(found.type)
            note("stream", kind.name if kind is not None else str(found.type), peer.node)
        return found

    async def to_engine(self: Any, data: bytes) -> None:
        note("engine", bytes(data).decode("latin-1"))
        await engine(self, data)

    async def to_rpc(self: Any, data: bytes) -> None:
        note("rpc", str(len(data)))
        await rpc(self, data)

    StreamDispatcher._read_header = read_header
    EngineStream.write = to_engine
    RpcClient.write = to_rpc


if __name__ == "__main__":
    from mesh_llm.cli.main import main

    _listen(Path(sys.argv.pop(1)))
    main()
