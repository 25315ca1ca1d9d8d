"""The host's half of a split model: local sockets that stand for the workers' rpc-servers, for one engine.

Use: `endpoints = await host.start(targets)`, then start the engine with `rpc=endpoints`. When `ended()` returns, the
engine is of no more use: stop it, `close()`, and begin again with whoever is left.
"""

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.split.host.link import HostLink, WorkerError, WorkerTarget
from mesh_llm.split.host.pushes import EscapedError, Pushes
from mesh_llm.split.ports import Weights
from mesh_llm.split.stats import PairState, SplitStats
from mesh_llm.wire.ggml_rpc.tunnel import Filled, PeerState, ToHost, Undelivered, push_tag

_log = structlog.get_logger(__name__)

OPEN_SECONDS = 30.0
"""A worker starts its rpc-server in that time."""


@dataclass(frozen=True, slots=True)
class SplitEnd:
    """Why a split model's session is over.

    Attributes:
        error: for people.
        worker: number of the worker that is to blame; None where none is, or it is not known which.
        push_failed: direct transfers went wrong: the next session had better do without.
    """

    error: MeshError
    worker: int | None = None
    push_failed: bool = False


class SplitHost:
    """All workers of one engine."""

    def __init__(self, *, rpc: str, weights: Weights | None, push: bool = True) -> None:
        """Nothing is started yet.

        Args:
            rpc: the protocol version of this machine's engine, as in `8.0.0`.
            weights: the model's tensors on this disk; None sends everything.
            push: let workers send activations to each other.
        """
        self._rpc = rpc
        self._weights = weights
        self._push = push
        self._pushes = Pushes()
        self._links: list[HostLink] = []
        self._pairs: dict[tuple[int, int], PairState] = {}
        self._scope = TaskScope("split host", self._failed)
        self._end: asyncio.Future[SplitEnd] = asyncio.get_running_loop().create_future()
        self._numbers = itertools.count(1)

    async def start(
        self,
        targets: Sequence[WorkerTarget],
        peers: Mapping[str, str] | None = None,
        timeout: float = OPEN_SECONDS,
        sockets: Path | None = None,
    ) -> tuple[str, ...]:
        """Open a session with every worker, at once.

        Args:
            targets: in layer order.
            peers: the workers' own tunnel endpoints by the engine's, for engines with peer transfers of their own.
            timeout: seconds until every worker must have opened its session.
            sockets: a directory that nobody else can enter, for Unix sockets; None for ports on loopback.

        Returns:
            `unix:PATH`, or `host:port`, for the engine's `rpc`, in the same order.

        Raises:
            WorkerError: a worker cannot be used; its number is its place among the targets. Everything is closed then.
        """
        self._links = [HostLink(n, target, self._pushes, self._failed) for n, target in enumerate(targets)]
        opening = [link.open(self._rpc, self._weights, timeout) for link in self._links]
        results = await asyncio.gather(*opening, return_exceptions=True)
        for link, result in zip(self._links, results, strict=True):
            if isinstance(result, BaseException):
                await self.close()
                raise link.explain(result)
        for link in self._links:
            link.on_message = self._heard
        endpoints = [await link.listen(lambda: next(self._numbers), peers or {}, sockets) for link in self._links]
        if self._push:
            self._scope.spawn(self._introduce(), "introduce")
        return tuple(endpoints)

    async def ended(self) -> SplitEnd:
        """Wait until the session cannot go on."""
        return await asyncio.shield(self._end)

    def stats(self) -> SplitStats:
        """What was done so far."""
        return SplitStats({link.name: link.stats.copy() for link in self._links}, list(self._pairs.values()))

    @property
    def devices(self) -> tuple[int, ...]:
        """How many devices each worker lends, in the order of the targets."""
        return tuple(link.devices for link in self._links)

    @property
    def offered(self) -> dict[str, int]:
        """How many of the host's tensors each worker has."""
        return {link.name: link.offered for link in self._links}

    async def close(self) -> None:
        """End all sessions. Idempotent."""
        await self._scope.close()
        await asyncio.gather(*(link.close() for link in self._links))
        if not self._end.done():
            self._end.set_result(SplitEnd(MeshError(code="split_closed", message="The split was closed.", status=503)))

    async def _introduce(self) -> None:
        for source, target in itertools.permutations(self._links, 2):
            if target.address:
                try:
                    await source.try_peer(target)
                except ConnectionError as error:
                    self._failed(source.explain(error))
                    return

    async def _heard(self, link: HostLink, value: ToHost) -> None:
        match value:
            case PeerState(index, reachable, reason) if index < len(self._links):
                self._pushes.reachable(link.number, index, yes=reachable)
                target = self._links[index].name
                self._pairs[link.number, index] = PairState(link.name, target, reachable, reason)
                if not reachable:
                    _log.warning("workers cannot reach each other", source=link.name, target=target, reason=reason)
            case Undelivered(peer, _, _, _) if peer < len(self._links):
                if value.tag != push_tag(self._pushes.key(peer), value.counter, len(value.data)):
                    # Its receiver would refuse it, and seem to be the one that fails.
                    self._failed(link.misbehaved("gave back a tensor that it was not to send"))
                    return
                self._pushes.reachable(link.number, peer, yes=False)
                # Nothing more is read of this worker until it is passed on: a slow receiver fills no memory here.
                await self._rescue(self._links[peer], value)
            case Filled(count):
                link.stats.weight_bytes_filled = count
            case _:
                self._failed(link.misbehaved("said what only a host says"))

    async def _rescue(self, link: HostLink, value: Undelivered) -> None:
        try:
            await link.deliver(value)
        except ConnectionError as error:
            self._failed(link.explain(error))

    def _failed(self, error: BaseException) -> None:
        if self._end.done():
            return
        if not isinstance(error, MeshError):
            error = MeshError(
                code="split_push_escaped" if isinstance(error, EscapedError) else "split_failed",
                message=f"The split model's session had to end: {error or type(error).__name__}.",
                hint="It starts again by itself. If that repeats, please report it with the log.",
                status=503,
                retry_after=5.0,
            )
        worker = error.worker if isinstance(error, WorkerError) else None
        _log.warning("split session ended", code=error.code, reason=error.message)
        self._end.set_result(SplitEnd(error, worker, push_failed=error.code == "split_push_escaped"))
        # Cut the engine off at once: it must not go on with what it has.
        self._scope.spawn(self._cut(), "cut")

    async def _cut(self) -> None:
        await asyncio.gather(*(link.close() for link in self._links))
