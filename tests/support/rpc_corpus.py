"""Recorded RPC traffic of every architecture that the pinned engine builds; made again by `make rpc-corpus`.

`tests/data/rpc/ARCHITECTURE.xz` holds the recordings of one architecture. A recording is what one worker's firewall
sees of one connection, in order. Ids, buffers, addresses and graph uids are numbered afresh, so that the same engine
gives the same bytes again. Weights and other float inputs are left out: a step says how many bytes there were. Data of
index tensors (I32, I64) is kept, because the firewall reads it.
"""

import lzma
from array import array
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from _pytest.mark import ParameterSet

from mesh_llm.split.firewall.memory import Buffer
from mesh_llm.split.firewall.requests import Firewall
from mesh_llm.wire.ggml_rpc.protocol import SET_TENSOR_2D_HEAD, SET_TENSOR_HEAD, TENSOR_BYTES, Command, parse_version
from mesh_llm.wire.ggml_rpc.tunnel import ALLOC

FOLDER = Path(__file__).parent.parent / "data" / "rpc"
INDEX = FOLDER / "index.json"
ALLOCATED = -1
"""A step that is no request: a buffer came to be. Its payload is three u64: pointer, first address, bytes."""

LIMIT = 1 << 40
DEVICES = 1
_HEADS: dict[int, int] = {Command.SET_TENSOR: SET_TENSOR_HEAD, Command.SET_TENSOR_2D: SET_TENSOR_2D_HEAD}


class Step(NamedTuple):
    """One request, or that a buffer came to be.

    Attributes:
        command: as in wire.ggml_rpc.protocol.Command, the tunnel's ALLOC, or ALLOCATED.
        payload: all of the payload, but for tensor data that was left out at its end.
        left_out: bytes of tensor data that were left out.
    """

    command: int
    payload: bytes
    left_out: int = 0

    @property
    def buffer(self) -> Buffer:
        """The buffer that came to be; only where the command is ALLOCATED."""
        return Buffer(*(int.from_bytes(self.payload[at : at + 8], "little") for at in (0, 8, 16)))

    def whole(self) -> bytes:
        """The payload with zeros for the data that was left out."""
        return self.payload + bytes(self.left_out)


class Recording(NamedTuple):
    """What one worker saw of one connection.

    Attributes:
        architecture: as in GGUF's `general.architecture`.
        name: what was done and how, as in `least/f16` or `q4_k/worker-1`.
        rpc: version of the protocol.
        steps: in the order in which they came.
    """

    architecture: str
    name: str
    rpc: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return f"{self.architecture}:{self.name}"


class Index(msgspec.Struct, frozen=True, kw_only=True):
    """What the corpus covers.

    Attributes:
        engine: release of the wheel that was recorded.
        recorded: architectures that have a file.
        not_recorded: the others that the engine names, with the reason.
        in_part: what could not be recorded of a recorded architecture, with the reason; `ARCHITECTURE:NAME` is the key.
    """

    engine: str
    recorded: tuple[str, ...]
    not_recorded: dict[str, str]
    in_part: dict[str, str]


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    name: str
    rpc: str
    steps: list[tuple[int, bytes, int]]


def index() -> Index:
    """What is recorded, and why the rest is not."""
    return msgspec.json.decode(INDEX.read_bytes(), type=Index)


FEW = ("llama", "mamba", "qwen3moe", "rwkv7")
"""Architectures of different kinds, for `make test-fast`."""


def each_architecture() -> list[ParameterSet]:
    """All architectures as parameters of a test; all but a few are marked slow."""
    return [pytest.param(name, marks=[] if name in FEW else pytest.mark.slow) for name in architectures()]


def architectures() -> tuple[str, ...]:
    """Those that have a file, in order."""
    return tuple(sorted(path.name.removesuffix(".xz") for path in FOLDER.glob("*.xz")))


@lru_cache(maxsize=4)
def recordings(architecture: str) -> tuple[Recording, ...]:
    """All recordings of one architecture."""
    return load(FOLDER / f"{architecture}.xz")


def load(path: Path) -> tuple[Recording, ...]:
    """All recordings of one file."""
    architecture = path.name.removesuffix(".xz")
    stored = msgspec.msgpack.decode(lzma.decompress(path.read_bytes()), type=list[_Stored])
    return tuple(Recording(architecture, one.name, one.rpc, tuple(_rows(one.steps))) for one in stored)


def every_recording() -> Iterator[Recording]:
    """The whole corpus, one architecture after the other."""
    for architecture in architectures():
        yield from recordings(architecture)


def save(architecture: str, made: list[Recording], folder: Path = FOLDER) -> int:
    """Write one architecture's file; gives back its bytes."""
    stored = [_Stored(one.name, one.rpc, list(_columns(one.steps))) for one in made]
    data = lzma.compress(msgspec.msgpack.encode(stored), preset=9 | lzma.PRESET_EXTREME)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{architecture}.xz").write_bytes(data)
    return len(data)


def new_firewall(recording: Recording, *, reference_kernels: bool = False) -> Firewall:
    """A firewall as the worker's session makes it for one connection."""
    return Firewall(parse_version(recording.rpc), DEVICES, LIMIT, reference_kernels=reference_kernels)


def show(firewall: Firewall, step: Step) -> None:
    """Let a firewall see one step, as a worker's connection would. Raises RefusedError, FrameError."""
    if step.command == ALLOCATED:
        firewall.allocated(step.buffer)
        return
    size = len(step.payload) + step.left_out
    bounds = firewall.bounds(step.command)
    assert bounds is not None, f"command {step.command} is refused by its number"
    assert bounds.least <= size <= bounds.most, f"command {step.command} is refused by its {size} bytes"
    payload = memoryview(step.payload)
    if step.command == ALLOC:
        firewall.check_allocation(payload)
    elif step.left_out and step.command == Command.SET_TENSOR:
        firewall.check_set(payload, None, step.left_out)
    elif step.left_out:
        firewall.check_set_2d(payload, step.left_out)
    else:
        firewall.check(step.command, payload)


# A graph's tensors are stored number by number, then their names: so they take less when compressed.

_WORDS = TENSOR_BYTES // 4
_NAME = slice(228, 292)
_NUMBERS = tuple(word for word in range(_WORDS) if not _NAME.start <= 4 * word < _NAME.stop)


def _columns(steps: tuple[Step, ...]) -> Iterator[tuple[int, bytes, int]]:
    for command, payload, left_out in steps:
        if command == Command.GRAPH_COMPUTE:
            at = _tensors_at(payload)
            words = memoryview(payload[at:]).cast("I")
            numbers = b"".join(words[word::_WORDS].tobytes() for word in _NUMBERS)
            starts = range(at, len(payload), TENSOR_BYTES)
            names = b"".join(
                payload[start + _NAME.start : start + _NAME.stop].rstrip(b"\0") + b"\0" for start in starts
            )
            yield command, payload[:at] + numbers + names, left_out
        else:
            yield command, payload, left_out


def _rows(steps: list[tuple[int, bytes, int]]) -> Iterator[Step]:
    for command, payload, left_out in steps:
        if command != Command.GRAPH_COMPUTE:
            yield Step(command, payload, left_out)
            continue
        at = _tensors_at(payload)
        count = int.from_bytes(payload[at - 4 : at], "little")
        names_at = at + 4 * count * len(_NUMBERS)
        numbers = memoryview(payload[at:names_at]).cast("I")
        words = array("I", bytes(count * TENSOR_BYTES))
        for column, word in enumerate(_NUMBERS):
            words[word::_WORDS] = array("I", numbers[column * count : (column + 1) * count])
        rows = bytearray(words.tobytes())
        for number, name in enumerate(payload[names_at:].split(b"\0")[:-1]):
            start = number * TENSOR_BYTES + _NAME.start
            rows[start : start + len(name)] = name
        yield Step(command, payload[:at] + bytes(rows), left_out)


def _tensors_at(payload: bytes) -> int:
    """Where a graph's tensors begin (protocol 8)."""
    return 12 + 4 + 8 * int.from_bytes(payload[12:16], "little") + 4
