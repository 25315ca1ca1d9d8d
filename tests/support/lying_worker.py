"""A node that lends memory to split models, and lies: about what its layers give, or about its memory.

    liar = await start_node("liar", shell=lying_worker.shell("numbers"), env=wiretap.ENV)

This file is also the program that such a node runs. It is the node's own code with the real rpc-server.

- `numbers`: what leaves it for the host or for another worker is rounded to two bits of its fraction, about as coarse
  as weights of three bits make it. A host cannot tell that from the sizes, types or times of what it gets.
- `memory`: it announces memory as an honest node does, and gives none.
"""

import sys
from typing import Any

_LEAST = 256
"""Smaller answers are no activations."""


def shell(lie: str) -> str:
    """The shell command of a node that lies about `numbers` or `memory`."""
    return f'python=$1; shift 3; exec "$python" -m tests.support.lying_worker {lie} "$@"'


def coarse(data: bytes) -> bytes:
    """Numbers of 32 bits, rounded to two bits of their fractions."""
    import numpy as np

    bits = np.frombuffer(data, dtype=np.uint32)
    return ((bits + np.uint32(1 << 20)) & np.uint32(0xFFE00000)).tobytes()


def _lie_about_memory() -> None:
    from mesh_llm.split.firewall.memory import Buffers

    def fits(self: Buffers, size: int) -> bool:
        return False

    Buffers.fits = fits


def _lie_about_numbers() -> None:
    from mesh_llm.split.worker.rpc_client import RpcClient
    from mesh_llm.wire.ggml_rpc.protocol import REPLY_HEADER

    honest = RpcClient.answer

    async def answer(self: Any, size: int) -> bytes:
        data = await honest(self, size)
        return coarse(data) if size >= _LEAST and size % 4 == 0 else data

    async def pass_answer(self: Any, size: int, target: Any, *, header: bool = True) -> None:
        data = await self.answer(size)
        await target.write((REPLY_HEADER.pack(size) if header else b"") + data)

    RpcClient.answer = answer
    RpcClient.pass_answer = pass_answer


if __name__ == "__main__":
    from mesh_llm.cli.main import main

    {"numbers": _lie_about_numbers, "memory": _lie_about_memory}[sys.argv.pop(1)]()
    main()
