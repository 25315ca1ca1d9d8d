"""Bytes at the worker's door for as long as one likes: `python -m tests.fuzz.rpc_fuzzer --minutes 60 [--seed N]`.

Streams are made from a recorded connection by swapping, dropping, doubling and splicing requests, and by writing edge
values over their fields and lengths. They go through the worker's own parser and firewall. What these let pass is
judged by rules that are written here once more, from the protocol alone: no forbidden command, and no tensor with a
byte outside the buffers that are allocated. Anything but a refusal, and any exception of another kind, is a finding.
"""

import argparse
import random
import re
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.support.rpc_record import recorded

from mesh_llm.core.ggml_types import GGML_TYPES
from mesh_llm.split.buffers import Buffer, RefusedError
from mesh_llm.split.firewall import Firewall
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.ggml_rpc import V8, Command
from mesh_llm.wire.ggml_rpc_frames import FrameError, Head, Request, RequestParser
from mesh_llm.wire.ggml_rpc_packed import PACKED
from mesh_llm.wire.ggml_rpc_packed import pack as pack_graph
from mesh_llm.wire.ggml_rpc_packed import unpack as unpack_graph
from mesh_llm.wire.ggml_rpc_tensor import Tensor, plain, unpack
from mesh_llm.wire.ggml_rpc_tunnel import (
    ALLOC,
    PUSH,
    REFERENCE,
    WAIT,
    Push,
    Reference,
    Wait,
    decode_stream,
    decode_to_host,
    decode_to_worker,
)

STEPS = recorded()
BUFFERS = tuple(what for _, what in STEPS if not isinstance(what, bytes))
REQUESTS = tuple((command, what) for command, what in STEPS if isinstance(what, bytes))
_SMALL = tuple(entry for entry in REQUESTS if len(entry[1]) < 8192)
_GRAPHS = tuple(entry for entry in REQUESTS if entry[0] == Command.GRAPH_COMPUTE)
_EDGES = (
    *(0, 1, 2, 7, 8, 255, 256, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1),
    *(edge for pointer, base, size in BUFFERS for edge in (pointer, base, base - 1, base + size, base + size - 1)),
)
_NEVER = frozenset({
    Command.HELLO, Command.COMM_INIT, Command.COMM_ALLREDUCE, Command.COMM_FREE, Command.SET_TENSOR_HASH,
    Command.ALLOC_BUFFER, Command.BUFFER_GET_BASE,
})  # fmt: skip
# enum ggml_op of protocol 8: CUSTOM and the MAP_CUSTOM family hold addresses of code.
_CODE = frozenset(range(92, 96))
_WHOLE = 1 << 20
_VARIABLE = re.compile(r"""b'.*'|b".*"|0x[0-9a-f]+|[(0-9][0-9, )]*""")


class FindingError(AssertionError):
    """Something got through that must not."""


@dataclass
class Tally:
    """What was tried. `kinds` counts why streams were refused, without the numbers in the reasons."""

    streams: int = 0
    requests: int = 0
    passed: int = 0
    refused: int = 0
    messages: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])


class Fuzzer:
    """One seed gives one sequence of streams."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tally = Tally()
        self._chance = random.Random(seed)

    def run(self, seconds: float) -> Tally:
        """Try streams for so long. Raises FindingError, or whatever the code under test raises."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(20):
                self.one_stream()
                self.one_message()
        return self.tally

    def one_stream(self) -> None:
        """One connection."""
        self.tally.streams += 1
        data = self._stream()
        firewall = Firewall(V8, 1, 1 << 40)
        for buffer in BUFFERS:
            firewall.allocated(Buffer(*buffer))
        judge = Judge()
        parser = RequestParser(firewall.bounds, _WHOLE)
        position = 0
        try:
            while position < len(data):
                size = self._chance.choice((1, 9, 300, 5000, 1 << 20))
                for piece in parser.feed(data[position : position + size]):
                    if isinstance(piece, Request | Head):
                        self.tally.requests += 1
                        self._meet(firewall, judge, piece)
                position += size
        except (RefusedError, FrameError) as refused:
            self.tally.refused += 1
            self.tally.kinds[_VARIABLE.sub("", str(refused))] += 1

    def _meet(self, firewall: Firewall, judge: "Judge", piece: Request | Head) -> None:
        """What WorkerConnection does with a request, and then the judge's word on it."""
        command, payload = piece.command, piece.payload
        if isinstance(piece, Head):
            if command == Command.SET_TENSOR:
                firewall.check_set(payload, None, piece.size)
            else:
                firewall.check_set_2d(payload, piece.size)
            judge.judge(command, payload, piece.size)
        elif command == ALLOC:
            firewall.check_allocation(payload)
        elif command == REFERENCE:
            reference = Reference.unpack(payload)
            kind = GGML_TYPES.get(reference.type)
            size = plain(reference.type, reference.shape, 0, 0).extent if kind is not None else 0
            judge.tensor(firewall.check_reference(reference, size))
        elif command == PUSH:
            push = Push.unpack(payload)
            firewall.check_push(push.get)
            judge.judge(Command.GET_TENSOR, push.get, 0)
        elif command == PACKED:
            graph = memoryview(unpack_graph(payload))
            firewall.check(Command.GRAPH_COMPUTE, graph)
            judge.judge(Command.GRAPH_COMPUTE, graph, 0)
        elif command == WAIT:
            wait = Wait.unpack(payload)
            firewall.check_wait(wait.tensor, wait.offset, wait.size)
            judge.region(unpack(wait.tensor), wait.offset, wait.size)
        else:
            firewall.check(command, payload)
            judge.judge(command, payload, 0)
        self.tally.passed += 1

    def _stream(self) -> bytes:
        chance = self._chance
        if chance.random() < 0.15:
            at = chance.randrange(len(REQUESTS))
            chosen = [REQUESTS[(at + n) % len(REQUESTS)] for n in range(chance.randint(1, 6))]
        else:
            pool = _GRAPHS if chance.random() < 0.25 else _SMALL
            chosen = [chance.choice(pool) for _ in range(chance.randint(1, 5))]
        out = bytearray()
        for command, payload in chosen:
            changed = bytearray(payload)
            if chance.random() < 0.8:
                self._spoil(changed)
            number = command if chance.random() < 0.95 else chance.randrange(256)
            if command == Command.GRAPH_COMPUTE and chance.random() < 0.3:
                number, changed = PACKED, bytearray(pack_graph(bytes(changed)))
                if chance.random() < 0.5:
                    self._spoil(changed)
            length = len(changed) if chance.random() < 0.97 else chance.choice(_EDGES)
            out += struct.pack("<BQ", number, length) + changed
        if chance.random() < 0.1:
            del out[chance.randrange(len(out)) :]
        return bytes(out)

    def _spoil(self, payload: bytearray) -> None:
        chance = self._chance
        for _ in range(chance.randint(1, 4)):
            if len(payload) < 8:
                return
            at = chance.randrange(len(payload) - 7)
            match chance.randrange(7):
                case 0:
                    payload[at] ^= 1 << chance.randrange(8)
                case 1:
                    struct.pack_into("<I", payload, at, chance.choice(_EDGES) & 0xFFFFFFFF)
                case 2:
                    struct.pack_into("<I", payload, at & ~3, chance.randrange(130))
                case 3 | 4:
                    struct.pack_into("<Q", payload, at & ~3, chance.choice(_EDGES))
                case 5:
                    other = chance.choice(_SMALL)[1]
                    if len(other) >= 8:
                        begin = chance.randrange(len(other) - 7)
                        piece = other[begin : begin + min(300, len(payload) - at)]
                        payload[at : at + len(piece)] = piece
                case _:
                    (value,) = struct.unpack_from("<Q", payload, at & ~3)
                    struct.pack_into("<Q", payload, at & ~3, (value + chance.choice((-8, -1, 1, 4, 4096))) % (1 << 64))

    def one_message(self) -> None:
        """One value of the control stream: whatever the bytes, a value or a word on what is wrong."""
        self.tally.messages += 1
        data = self._chance.randbytes(self._chance.choice((0, 1, 8, 40, 200)))
        head = bytes((0x90 | self._chance.randrange(6), self._chance.randrange(8)))
        for decode in (decode_stream, decode_to_worker, decode_to_host):
            value = decode(head + data)
            if isinstance(value, Malformed) and not value.reason:
                raise FindingError("a message is refused without a reason")


class Judge:
    """The rules once more, from the protocol alone; shares no check with the firewall."""

    def __init__(self) -> None:
        self._buffers = {pointer: (base, base + size) for pointer, base, size in BUFFERS}

    def judge(self, command: int, payload: memoryview, streamed: int) -> None:
        """A request that was let pass; `streamed`: bytes of data that follow it."""
        if command in _NEVER or command > Command.COMM_FREE:
            raise FindingError(f"command {command} passed")
        match command:
            case Command.SET_TENSOR:
                (offset,) = struct.unpack_from("<Q", payload, 297)
                self.region(unpack(payload), offset, streamed or len(payload) - 305)
            case Command.GET_TENSOR | Command.MEMSET_TENSOR:
                self.region(unpack(payload), *struct.unpack_from("<QQ", payload, 296))
            case Command.SET_TENSOR_2D | Command.GET_TENSOR_2D:
                offset, size, copies, stride = struct.unpack_from("<QQQQ", payload, 296)
                self.region(unpack(payload), offset, max(0, copies - 1) * stride + size)
            case Command.COPY_TENSOR:
                self.tensor(unpack(payload))
                self.tensor(unpack(payload, 296))
            case Command.INIT_TENSOR:
                self.tensor(unpack(payload))
            case Command.FREE_BUFFER:
                if self._buffers.pop(struct.unpack("<Q", payload)[0], None) is None:
                    raise FindingError("a buffer is freed that is not there")
            case Command.BUFFER_CLEAR:
                if struct.unpack_from("<Q", payload)[0] not in self._buffers:
                    raise FindingError("a buffer is cleared that is not there")
            case Command.GRAPH_COMPUTE:
                self._graph(payload)
            case _:
                pass

    def _graph(self, payload: memoryview) -> None:
        (nodes,) = struct.unpack_from("<I", payload, 12)
        start = 16 + 8 * nodes
        (count,) = struct.unpack_from("<I", payload, start)
        for index in range(count):
            tensor = unpack(payload, start + 4 + 296 * index)
            if tensor.op in _CODE:
                raise FindingError(f"operator {tensor.op} passed")
            if tensor.buffer or tensor.data:
                self.tensor(tensor)

    def tensor(self, tensor: Tensor) -> None:
        """A tensor that the rpc-server will touch."""
        self.region(tensor, 0, self._extent(tensor))

    def region(self, tensor: Tensor, offset: int, size: int) -> None:
        """A part of a tensor that will be read or written."""
        begin, end = self._buffers.get(tensor.buffer, (0, -1))
        whole = self._extent(tensor)
        if not begin <= tensor.data <= tensor.data + whole <= end:
            raise FindingError(f"a tensor outside of all buffers passed: {tensor}")
        if offset + size > whole:
            raise FindingError(f"{size} bytes at {offset} of {whole} passed")

    @staticmethod
    def _extent(tensor: Tensor) -> int:
        """ggml_nbytes."""
        kind = GGML_TYPES[tensor.type]
        if 0 in tensor.shape:
            return 0
        first = kind.bytes if kind.block == 1 else tensor.shape[0] * tensor.strides[0] // kind.block
        from_dimension = 0 if kind.block == 1 else 1
        return first + sum((tensor.shape[i] - 1) * tensor.strides[i] for i in range(from_dimension, 4))


def main() -> int:
    """Run for so many minutes, and say what was tried."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=None, help="to repeat a run")
    arguments = parser.parse_args()
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    fuzzer = Fuzzer(seed)
    for minute in range(max(1, round(arguments.minutes))):
        tally = fuzzer.run(60.0 if arguments.minutes >= 1 else 60.0 * arguments.minutes)
        print(
            f"{minute + 1:3} min: {tally.streams:,} streams, {tally.requests:,} requests, {tally.passed:,} let pass, "
            f"{tally.refused:,} streams refused for {len(tally.kinds)} reasons, {tally.messages:,} messages",
            flush=True,
        )
    for kind, count in fuzzer.tally.kinds.most_common():
        print(f"{count:12,}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
