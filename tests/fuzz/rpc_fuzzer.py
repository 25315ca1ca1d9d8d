"""Fuzzes a worker's RPC tunnel as long as wanted: `python -m tests.fuzz.rpc_fuzzer --minutes 60 [--seed N]`.

Streams are made from a recorded connection and from requests that no recording has (`rpc_made`): requests are swapped,
dropped, duplicated and spliced, and edge values are written over their fields and lengths. The worker's own parser and
firewall read the streams. `rpc_judge`, a second set of rules written from the protocol alone, checks what they let
pass. Every outcome except a refusal, and every exception of another kind, is a finding.
"""

import argparse
import random
import re
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from tests.fuzz.rpc_judge import FindingError, Judge
from tests.fuzz.rpc_made import BUFFERS, COMPUTATIONS, OFFERED, REQUESTS, Maker

from mesh_llm.split.firewall.memory import Buffer, RefusedError
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.split.worker.transfers import ForgedError, TransferInbox
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.ggml_rpc.activations import unpack as unpack_activations
from mesh_llm.wire.ggml_rpc.packing import PACKED, PACKED_SET, KeptHeads, PackedSet, unpack_data
from mesh_llm.wire.ggml_rpc.packing import decompress_graph as unpack_graph
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_HEAD, V8, Command, FrameError, Head, Request, RequestParser
from mesh_llm.wire.ggml_rpc.tensors import unpack
from mesh_llm.wire.ggml_rpc.tunnel import (
    ALLOC,
    KEY_BYTES,
    PACKED_GET,
    PUSH,
    REFERENCE,
    TAG_BYTES,
    WAIT,
    PackedGet,
    Push,
    Reference,
    Wait,
    decode_to_host,
    decode_to_worker,
    decode_tunnel_stream,
    push_tag,
)

_SMALL = tuple(entry for entry in REQUESTS if len(entry[1]) < 8192)
_GRAPHS = tuple(entry for entry in REQUESTS if entry[0] == Command.GRAPH_COMPUTE)
_EDGES = (
    *(0, 1, 2, 7, 8, 255, 256, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - 1),
    *(edge for pointer, base, size in BUFFERS for edge in (pointer, base, base - 1, base + size, base + size - 1)),
)
_WHOLE = 1 << 20
_VARIABLE = re.compile(r"""b'.*'|b".*"|0x[0-9a-f]+|[(0-9][0-9, )]*""")


@dataclass
class Tally:
    """The counts of a run.

    Attributes:
        kinds: why streams were refused, without the numbers in the reasons.
        let_pass, stopped: how often requests of each command were.
    """

    streams: int = 0
    requests: int = 0
    passed: int = 0
    refused: int = 0
    messages: int = 0
    transfers: int = 0
    kinds: Counter[str] = field(default_factory=Counter[str])
    let_pass: Counter[int] = field(default_factory=Counter[int])
    stopped: Counter[int] = field(default_factory=Counter[int])


class Fuzzer:
    """One seed gives one sequence of streams."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.tally = Tally()
        self._chance = random.Random(seed)
        self._maker = Maker(self._chance)

    def run(self, seconds: float) -> Tally:
        """Send streams for this time. Raises FindingError, or what the code under test raises."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for _ in range(20):
                self.one_stream()
                self.one_message()
                self.one_transfer()
        return self.tally

    def one_stream(self) -> None:
        """One connection."""
        self.tally.streams += 1
        self._maker.begin()
        data = self._stream()
        firewall = Firewall(V8, 1, 1 << 40)
        for buffer in BUFFERS:
            firewall.allocated(Buffer(*buffer))
        judge, heads = Judge(), KeptHeads()
        parser = RequestParser(firewall.bounds, _WHOLE)
        position = 0
        try:
            while position < len(data):
                size = self._chance.choice((1, 9, 300, 5000, 1 << 20))
                for piece in parser.feed(data[position : position + size]):
                    if isinstance(piece, Request | Head):
                        self.tally.requests += 1
                        self.tally.stopped[piece.command] += 1
                        self._meet(firewall, judge, heads, piece)
                        self.tally.stopped[piece.command] -= 1
                        self.tally.let_pass[piece.command] += 1
                        self.tally.passed += 1
                position += size
        except (RefusedError, FrameError) as refused:
            self.tally.refused += 1
            self.tally.kinds[_VARIABLE.sub("", str(refused))] += 1

    def _meet(self, firewall: Firewall, judge: "Judge", heads: KeptHeads, piece: Request | Head) -> None:
        """Process a request as WorkerTunnel does, then let the judge check it."""
        command, payload = piece.command, piece.payload
        if isinstance(piece, Head):
            if command == Command.SET_TENSOR:
                firewall.check_set(payload, None, piece.size)
            else:
                firewall.check_set_2d(payload, piece.size)
            judge.judge(command, payload, piece.size)
        elif command == ALLOC:
            firewall.check_allocation(payload)
            judge.device(payload)
        elif command == REFERENCE:
            reference = Reference.unpack(payload)
            size = OFFERED.get(reference.number)
            if size is None:
                raise RefusedError("a reference to content that was not offered")
            judge.written(firewall.check_reference(reference, size), 0, size)
        elif command == PUSH:
            push = Push.unpack(payload)
            firewall.check_push(push.get)
            firewall.check_rounded(push.get, push.wanted)
            judge.judge(Command.GET_TENSOR, push.get, 0)
        elif command == PACKED_GET:
            asked = PackedGet.unpack(payload)
            firewall.check_push(asked.get)
            firewall.check_rounded(asked.get, asked.wanted)
            judge.judge(Command.GET_TENSOR, asked.get, 0)
        elif command == PACKED:
            graph = memoryview(unpack_graph(payload))
            firewall.check(Command.GRAPH_COMPUTE, graph)
            judge.judge(Command.GRAPH_COMPUTE, graph, 0)
        elif command == PACKED_SET:
            packed = PackedSet.unpack(payload)
            head = heads.head(packed)
            firewall.check_rounded(memoryview(head), packed.kind)
            rounded = (unpack_activations(packed.kind, packed.data, packed.size),) if not packed.compressed else ()
            whole = memoryview(b"".join((head, *(rounded or unpack_data(packed.data, packed.size)))))
            firewall.check(Command.SET_TENSOR, whole)
            judge.judge(Command.SET_TENSOR, whole, 0)
        elif command == WAIT:
            wait = Wait.unpack(payload)
            looked_at = firewall.check_wait(wait.tensor, wait.offset, wait.size)
            data = self._maker.inbox.get(wait.counter)
            if data is None or len(data) != wait.size:
                raise RefusedError("a transfer that was not made, or not like this")
            if looked_at:
                firewall.received(wait.tensor, wait.offset, data)
            judge.written(unpack(wait.tensor), wait.offset, data)
        else:
            firewall.check(command, payload)
            judge.judge(command, payload, 0)

    def _stream(self) -> bytes:
        chance = self._chance
        kind = chance.random()
        if kind < 0.15:
            at = chance.randrange(len(REQUESTS))
            chosen = [REQUESTS[(at + n) % len(REQUESTS)] for n in range(chance.randint(1, 6))]
        elif kind < 0.35:
            chosen = list(chance.choice(COMPUTATIONS))
            if chance.random() < 0.3:
                chosen.insert(chance.randrange(len(chosen)), self._maker.any())
            if chance.random() < 0.3:
                at = chance.randrange(len(chosen))
                chosen[at] = chosen[at][0], self._other_data(*chosen[at])
        else:
            chosen = [self._one() for _ in range(chance.randint(1, 5))]
        damage = chance.choice((0.05, 0.8)) if kind < 0.35 else 0.8
        out = bytearray()
        for recorded_command, recorded_payload in chosen:
            command, payload = recorded_command, recorded_payload
            if chance.random() < 0.3:
                command, payload = self._maker.tunnelled(command, payload)
            changed = bytearray(payload)
            if chance.random() < damage:
                self._spoil(changed)
            number = command if chance.random() < 0.97 else chance.randrange(256)
            length = len(changed) if chance.random() < 0.97 else chance.choice(_EDGES)
            out += struct.pack("<BQ", number, length) + changed
        if chance.random() < 0.1:
            del out[chance.randrange(len(out)) :]
        return bytes(out)

    def _one(self) -> tuple[int, bytes]:
        kind = self._chance.random()
        if kind < 0.25:
            return self._maker.any()
        return self._chance.choice(_GRAPHS if kind < 0.45 else _SMALL)

    def _other_data(self, command: int, payload: bytes) -> bytes:
        """The same tensor set to other numbers, also to rows that do not exist."""
        if command != Command.SET_TENSOR or len(payload) < SET_TENSOR_HEAD + 8:
            return payload
        changed = bytearray(payload)
        at = SET_TENSOR_HEAD + 8 * self._chance.randrange((len(payload) - SET_TENSOR_HEAD) // 8)
        value = self._chance.choice((*range(16), 255, 256, 257, *_EDGES))
        struct.pack_into("<Q", changed, at, value)
        return bytes(changed)

    def _spoil(self, payload: bytearray) -> None:
        chance = self._chance
        for _ in range(chance.randint(1, 4)):
            if len(payload) < 8:
                # A request of this length holds only a device's number.
                payload[:4] = struct.pack("<I", chance.choice(_EDGES) & 0xFFFFFFFF)[: len(payload)]
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
        """Read one value of the control stream: the result is a value or Malformed."""
        self.tally.messages += 1
        data = self._chance.randbytes(self._chance.choice((0, 1, 8, 40, 200)))
        head = bytes((0x90 | self._chance.randrange(6), self._chance.randrange(8)))
        for decode in (decode_tunnel_stream, decode_to_worker, decode_to_host):
            value = decode(head + data)
            if isinstance(value, Malformed) and not value.reason:
                raise FindingError("a message is refused without a reason")

    def one_transfer(self) -> None:
        """Transfers of another worker to one session: each allowed transfer is accepted once, and no other."""
        chance = self._chance
        key = chance.randbytes(KEY_BYTES)
        inbox = TransferInbox(key)
        allowed = {counter: chance.choice((0, 4, 512)) for counter in range(1, 9)}
        taken: set[int] = set()
        for _ in range(12):
            self.tally.transfers += 1
            counter = chance.choice((*allowed, 0, 9, (1 << 64) - 1))
            size = allowed.get(counter, 4) if chance.random() < 0.8 else chance.choice((0, 4, 512, 1 << 63))
            tag = bytearray(
                push_tag(key if chance.random() < 0.9 else bytes(KEY_BYTES), counter, allowed.get(counter, 0))
            )
            if chance.random() < 0.2:
                tag[chance.randrange(TAG_BYTES)] ^= 1 << chance.randrange(8)
            sound = bytes(tag) == push_tag(key, counter, size)
            try:
                inbox.check(counter, bytes(tag), size)
            except ForgedError:
                if sound and counter > max(taken, default=0) and allowed.get(counter) == size:
                    raise FindingError(f"transfer {counter}, which was allowed, is refused") from None
                continue
            if not sound or counter in taken:
                raise FindingError(f"transfer {counter} of {size} bytes came in")
            if size <= 512:
                inbox.put(counter, bytes(size))
                taken.add(counter)


def main() -> int:
    """Run for the given minutes, and print the counts."""
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
            f"{tally.refused:,} streams refused for {len(tally.kinds)} reasons, {tally.messages:,} messages, "
            f"{tally.transfers:,} transfers",
            flush=True,
        )
    for kind, count in fuzzer.tally.kinds.most_common():
        print(f"{count:12,}  {kind}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
