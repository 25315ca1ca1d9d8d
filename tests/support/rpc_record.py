"""A recorded connection of llama.cpp to a worker (protocol 8.0.0, a model of 6 layers): load, a prompt, some tokens."""

import lzma
from pathlib import Path

import msgspec

from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.wire.ggml_rpc.protocol import V8
from mesh_llm.wire.ggml_rpc.tensors import plain
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC, PUSH, REFERENCE, WAIT, Reference

_FILE = Path(__file__).parent.parent / "fuzz" / "rpc_small.msgpack.xz"
_ALLOCATED = -1
OWN = frozenset({ALLOC, REFERENCE, PUSH, WAIT})

Step = tuple[int, bytes]


def recorded() -> list[tuple[int, bytes | tuple[int, int, int]]]:
    """Requests as (command, payload), and (-1, (pointer, base, size)) where a buffer came to be."""
    return msgspec.msgpack.decode(
        lzma.decompress(_FILE.read_bytes()), type=list[tuple[int, bytes | tuple[int, int, int]]]
    )


def replay(firewall: Firewall, until: int | None = None) -> list[Step]:
    """Let a firewall see the recording up to a step; gives back the requests of ggml's own that it let pass."""
    passed: list[Step] = []
    for command, what in recorded()[:until]:
        if not isinstance(what, bytes):
            firewall.allocated(Buffer(*what))
            continue
        view = memoryview(what)
        if command == ALLOC:
            firewall.check_allocation(view)
        elif command == REFERENCE:
            reference = Reference.unpack(view)
            firewall.check_reference(reference, plain(reference.type, reference.shape, 0, 0).extent)
        else:
            firewall.check(command, view)
            passed.append((command, what))
    return passed


def recorded_firewall() -> Firewall:
    """A firewall that knows the buffers of the recording."""
    firewall = Firewall(V8, 1, 1 << 40)
    for _, what in recorded():
        if not isinstance(what, bytes):
            firewall.allocated(Buffer(*what))
    return firewall
