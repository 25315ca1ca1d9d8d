"""A mesh of nodes in memory that give models to each other, for tests of taking: some lie, some die, some are slow."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.support.bulk_pipe import BulkPipe

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.ports import BulkStream, TransportSilentError
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.p2p.assembler import ChooseDestination, in_directory
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.models.p2p.downloader import ModelDownload
from mesh_llm.models.p2p.seeder import RateLimit, SeededModel, Seeder
from mesh_llm.models.p2p.swarm import SeederError
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.runtime.transfer.progress import Progress
from mesh_llm.wire.mesh.streams import ModelParameters

Spoil = Callable[[BulkPipe], BulkStream]


def fingerprint_of(*paths: Path) -> str:
    """As a node announces it."""
    return read_facts([read_header(path) for path in paths], "m").fingerprint


def content(path: Path) -> bytes:
    """All of a file."""
    return path.read_bytes()


def put(path: Path, data: bytes, at: int | None = None) -> None:
    """Write a file, or into one."""
    if at is None:
        path.write_bytes(data)
        return
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def real(path: Path) -> Path:
    """Where a link leads."""
    return path.resolve()


class Spoiled(BulkPipe):
    """The giver's end of a stream that spoils what is sent: places are bytes from the stream's beginning."""

    def __init__(self, pipe: BulkPipe, *, flip_at: int = -1, die_at: int = -1) -> None:
        super().__init__(pipe._coming, pipe._going)  # pyright: ignore[reportPrivateUsage]
        self._flip_at = flip_at
        self._die_at = die_at
        self._sent = 0

    async def write(self, data: bytes) -> None:
        begin, self._sent = self._sent, self._sent + len(data)
        if 0 <= self._die_at < self._sent:
            self.abort()
            raise ConnectionResetError("the node died")
        if begin <= self._flip_at < self._sent:
            at = self._flip_at - begin
            data = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
        await super().write(data)


class Silent(BulkPipe):
    """The taker's end of a stream that its transport never brings to the giver, which answers on another one."""

    @classmethod
    def over(cls, pipe: BulkPipe) -> Self:
        """This stream is lost."""
        return cls(pipe._coming, pipe._going)  # pyright: ignore[reportPrivateUsage]

    async def read_exact(self, size: int) -> bytes:
        raise TransportSilentError(f"{size} bytes do not come by TCP")


@dataclass
class Node:
    """One that gives. `spoil` wraps its end of each stream; so many streams are `silent` on their transport."""

    giver: Seeder
    spoil: Spoil | None = None
    opened: int = 0
    silent: int = 0


@dataclass
class Mesh:
    """All nodes, and one that takes: use as an async context manager."""

    root: Path
    nodes: dict[NodeId, Node] = field(default_factory=dict[NodeId, Node])
    failures: dict[NodeId, SeederError] = field(default_factory=dict[NodeId, SeederError])
    progress: list[Progress] = field(default_factory=list[Progress])
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def add(
        self,
        number: int,
        *paths: Path,
        name: str = "m",
        projector: Path | None = None,
        fingerprint: str | None = None,
        spoil: Spoil | None = None,
        rate: float | None = None,
    ) -> NodeId:
        """A node that has the model at `paths`."""
        node = NodeId(f"{number:064x}")
        told = fingerprint_of(*paths) if fingerprint is None else fingerprint

        def find(asked: str, asked_fingerprint: str) -> SeededModel | None:
            return SeededModel(paths, projector) if (asked, asked_fingerprint) == (name, told) else None

        store = ChunkDigestStore(self.root / f"lists-{number}")
        self.nodes[node] = Node(Seeder(find, store, RateLimit(rate)), spoil)
        return node

    async def open(self, node: NodeId, parameters: bytes) -> BulkStream:
        """seed.OpenModel."""
        there = self.nodes.get(node)
        if there is None:
            raise ConnectionRefusedError("nobody is there")
        there.opened += 1
        here, other = BulkPipe.pair()
        if there.opened <= there.silent:
            return Silent.over(here)
        end = there.spoil(other) if there.spoil is not None else other
        self._scope.spawn(self._serve(there.giver, end, node, parameters), "serve")
        return here

    async def take(
        self,
        *paths: Path,
        place: ChooseDestination | None = None,
        nodes: list[NodeId] | None = None,
        fingerprint: str | None = None,
        sha256: tuple[bytes, ...] = (),
        most_bytes: int | None = None,
        name: str = "m",
        prepare: Callable[[ModelDownload], Awaitable[None]] | None = None,
    ) -> tuple[tuple[Path, ...], ModelDownload]:
        """Take the model that `paths` are, from everybody or `nodes`."""
        taking = ModelDownload(
            asked=ModelParameters(name, fingerprint_of(*paths) if fingerprint is None else fingerprint),
            place=place or in_directory(name, self.root / "taken"),
            open_model=self.open,
            store=ChunkDigestStore(self.root / "lists"),
            on_progress=self._progressed,
            failed=self.failures.__setitem__,
            sha256=sha256,
            most_bytes=most_bytes,
            silence=5.0,
        )
        if prepare is not None:
            await prepare(taking)
        async with asyncio.timeout(60):
            return await taking.run(nodes if nodes is not None else list(self.nodes)), taking

    async def __aenter__(self) -> Self:
        self._scope = TaskScope("mesh")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.close()
        for node in self.nodes.values():
            await node.giver.close()

    def _progressed(self, progress: Progress) -> None:
        self.progress.append(progress)
        if progress.done_bytes:
            self.arrived.set()

    async def _serve(self, giver: Seeder, end: BulkStream, node: NodeId, parameters: bytes) -> None:
        try:
            await giver.serve(end, node, parameters)
        except ConnectionError:
            return
        finally:
            end.abort()
