"""A connection that ended badly: made small, done again elsewhere, written down."""

import lzma
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
from tests.oracle.connection import ALLOCATED, LIMIT, Step
from tests.oracle.runner import Ending, Runner, RunnerDiedError

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.wire.ggml_rpc.protocol import MAX_SOURCES, TENSOR_BYTES, V8, Command, FrameError
from mesh_llm.wire.ggml_rpc.tensors import Graph, Tensor, operator_name, pack_graph, parse_graph, unpack

_U64 = struct.Struct("<Q")
_BY_POINTER = frozenset({Command.FREE_BUFFER, Command.BUFFER_CLEAR})
_TENSORS_AT = {
    Command.SET_TENSOR: (0,),
    Command.GET_TENSOR: (0,),
    Command.SET_TENSOR_2D: (0,),
    Command.GET_TENSOR_2D: (0,),
    Command.MEMSET_TENSOR: (0,),
    Command.INIT_TENSOR: (0,),
    Command.COPY_TENSOR: (0, TENSOR_BYTES),
    Command.GET_ALLOC_SIZE: tuple(4 + i * TENSOR_BYTES for i in range(1 + MAX_SOURCES)),
}
"""Where the tensors of a request are that has a fixed number of them."""


class Story(msgspec.Struct, frozen=True):
    """What is kept of a finding: the requests, how many threads computed, the kernels, and what was seen."""

    summary: str
    variant: str
    threads: int
    steps: list[Step]

    def save(self, path: Path) -> None:
        """Write it."""
        path.write_bytes(lzma.compress(msgspec.msgpack.encode(self)))

    @staticmethod
    def load(path: Path) -> "Story":
        """Read what `save` wrote."""
        return msgspec.msgpack.decode(lzma.decompress(path.read_bytes()), type=Story)


@dataclass(frozen=True, slots=True)
class Replayed:
    """What became of a story this time.

    Attributes:
        refused: what the firewall said, where it refused a request: nothing after that was sent.
        died: the sanitizer's word, where there was one.
        ending: how the connection ended otherwise.
    """

    refused: str | None = None
    died: RunnerDiedError | None = None
    ending: Ending | None = None


def replay(runner: Runner, steps: Sequence[Step], threads: int, *, judged: bool = True) -> Replayed:
    """Do it all again, over a fresh firewall; `judged` False leaves that out."""
    firewall = Firewall(V8, 1, LIMIT)
    moves: list[tuple[Buffer, Buffer]] = []
    refused: str | None = None
    try:
        runner.begin(threads)
        for command, what in steps:
            if not isinstance(what, bytes):
                (made,) = runner.allocate([what[2]])
                firewall.allocated(made)
                moves.append((Buffer(*what), made))
                continue
            payload = moved(command, what, moves)
            if judged:
                try:
                    firewall.check(command, memoryview(payload))
                except (RefusedError, FrameError) as error:
                    refused = str(error)
                    break
            runner.ask(command, payload)
        return Replayed(refused=refused, ending=runner.end())
    except RunnerDiedError as died:
        return Replayed(refused=refused, died=died)


def moved(command: int, payload: bytes, moves: Sequence[tuple[Buffer, Buffer]]) -> bytes:
    """The same request where the buffers are others: pairs of a buffer then, and now."""
    # A later buffer may have had the address of one that was freed.
    pointers = {then.pointer: now for then, now in moves}
    bases = {then.pointer: then.base for then, _ in moves}

    def tensor(old: Tensor) -> Tensor:
        now = pointers.get(old.buffer)
        if now is None:
            return old
        return old._replace(buffer=now.pointer, data=old.data - bases[old.buffer] + now.base)

    if command in _BY_POINTER:
        now = pointers.get(_U64.unpack_from(payload)[0])
        return payload if now is None else _U64.pack(now.pointer) + payload[8:]
    if command == Command.GRAPH_COMPUTE:
        graph = parse_graph(payload, V8)
        return pack_graph(_with(graph, tuple(tensor(t) for t in graph.tensors)), V8)
    out = bytearray(payload)
    for at in _TENSORS_AT.get(Command(command), ()):
        out[at : at + TENSOR_BYTES] = tensor(unpack(payload, at)).pack()
    return bytes(out)


def _with(graph: Graph, tensors: tuple[Tensor, ...]) -> Graph:
    return Graph(graph.device, graph.uid, graph.nodes, tensors)


def smaller(variant: str, steps: list[Step], threads: int, summary: str) -> list[Step]:
    """As few of the steps as still end the same way, accepted by a fresh firewall. Takes seconds."""

    def same(tried: list[Step]) -> bool:
        with Runner(variant, silent=20.0) as runner:
            died = replay(runner, tried, threads).died
        return died is not None and died.summary == summary

    if not same(steps):
        return steps
    size = len(steps) // 2
    while size:
        at = 0
        while at < len(steps):
            tried = steps[:at] + steps[at + size :]
            if tried and same(tried):
                steps = tried
            else:
                at += size
        size //= 2
    return steps


def described(story: Story, report: str) -> str:
    """For people: what was sent, and what the sanitizer said."""
    lines = [f"# {story.summary}", "", f"Kernels: {story.variant}; threads: {story.threads}.", "", "## Requests", ""]
    buffers: dict[int, tuple[str, int, int]] = {}

    def tensor(t: Tensor) -> str:
        name, base, size = buffers.get(t.buffer, (hex(t.buffer), 0, 0))
        kind = GGML_TYPES.get(t.type)
        where = f"{name}+{t.data - base} of {size}" if t.buffer else "nowhere"
        return f"{kind.name if kind else t.type} shape {t.shape} strides {t.strides} at {where}"

    for command, what in story.steps:
        if command == ALLOCATED and not isinstance(what, bytes):
            buffers[what[0]] = (f"b{len(buffers)}", what[1], what[2])
            continue
        if not isinstance(what, bytes):
            continue
        name = Command(command).name
        if command == Command.GRAPH_COMPUTE:
            graph = parse_graph(what, V8)
            lines.append(f"- {name} uid {graph.uid}, nodes {graph.nodes}")
            for t in graph.tensors:
                sources = list(t.sources)
                while sources and not sources[-1]:
                    sources.pop()
                params = list(t.params)
                while params and not params[-1]:
                    params.pop()
                lines.append(
                    f"    - {t.id}: {operator_name(t.op)} of {sources}, {tensor(t)}, params {params}, flags {t.flags}, "
                    f"uses {t.uses}, view of {t.view_source}"
                )
        elif command in _BY_POINTER:
            pointer = _U64.unpack_from(what)[0]
            lines.append(f"- {name} {buffers.get(pointer, (hex(pointer),))[0]}")
        elif at := _TENSORS_AT.get(Command(command), ()):
            lines.append(f"- {name} {tensor(unpack(what, at[0]))}, rest {what[at[0] + TENSOR_BYTES :][:64].hex()}")
        else:
            lines.append(f"- {name} {what.hex()}")
    return "\n".join([*lines, "", "## Report", "", "```", report[:6000].strip(), "```", ""])
