"""Meets the nodes that say they have a model, and finds out which of them speak of the very same files."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from mesh_llm.core.ids import NodeId
from mesh_llm.models.neighbours.seed import OpenModel, Seed, SeedError
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.model_stream import ModelAsked, Offer

_GRACE_SECONDS = 0.5
_MOST_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class _Offered:
    seed: Seed
    offer: Offer


class Meeting:
    """Asks all of them at once; who answers late may still join in. Use as an async context manager."""

    def __init__(
        self,
        asked: ModelAsked,
        nodes: Sequence[NodeId],
        open_model: OpenModel,
        sha256: Sequence[bytes],
        silence: float,
        failed: Callable[[NodeId, SeedError], None],
    ) -> None:
        """`sha256`: of the parts, where the publisher's word is known; who offers other content is refused."""
        self._asked = asked
        self._nodes = tuple(dict.fromkeys(nodes))
        self._open_model = open_model
        self._sha256 = tuple(sha256)
        self._silence = silence
        self._failed = failed
        self._scope = TaskScope("meeting")
        self._places = asyncio.Semaphore(_MOST_AT_ONCE)
        self._offered: dict[NodeId, _Offered] = {}
        self._used: set[NodeId] = set()
        self._pending = len(self._nodes)
        self._news = asyncio.Event()
        self._preparing: Callable[[int, int], None] = lambda _done, _total: None
        self._reasons: list[str] = []

    @property
    def pending(self) -> bool:
        """Whether somebody may still make an offer."""
        return self._pending > 0

    @property
    def why(self) -> str:
        """Why nobody is left, as a clause."""
        return self._reasons[-1] if self._reasons else "no other node has it"

    async def agree(self, on_preparing: Callable[[int, int], None]) -> Offer | None:
        """Wait for offers, and choose the one that most make; None where nobody is left to make any."""
        self._preparing = on_preparing
        while not self._offered and self._pending:
            await self.news(None)
        if self._pending:
            loop = asyncio.get_running_loop()
            end = loop.time() + _GRACE_SECONDS
            while self._pending and (left := end - loop.time()) > 0:
                await self.news(left)
        votes: dict[Offer, int] = {}
        for offered in self._offered.values():
            votes[offered.offer] = votes.get(offered.offer, 0) + 1
        return max(votes, key=lambda offer: votes[offer], default=None)

    def join(self, offer: Offer) -> list[Seed]:
        """The seeds that make this offer and were not given out yet."""
        found = [one.seed for node, one in self._offered.items() if one.offer == offer and node not in self._used]
        self._used.update(seed.node for seed in found)
        return found

    def leave(self, node: NodeId, failure: SeedError) -> None:
        """A seed gives nothing more."""
        self._offered.pop(node, None)
        self._note(node, failure)

    def distrust(self, offer: Offer, reason: str) -> None:
        """All who make this offer are wrong."""
        for node in [node for node, one in self._offered.items() if one.offer == offer]:
            self._offered.pop(node).seed.close()
            self._note(node, SeedError(reason, liar=True))

    def dismiss(self, offer: Offer) -> None:
        """Nobody who makes this offer is of use any more."""
        for node in [node for node, one in self._offered.items() if one.offer == offer]:
            self._offered.pop(node).seed.close()

    async def news(self, seconds: float | None) -> None:
        """Wait until an offer came or was refused, at most so long."""
        self._news.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._news.wait()
        except TimeoutError:
            return

    async def __aenter__(self) -> Self:
        for node in self._nodes:
            self._scope.spawn(self._meet(node), node[:10])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._scope.close()
        for offered in self._offered.values():
            offered.seed.close()

    async def _meet(self, node: NodeId) -> None:
        seed: Seed | None = None
        try:
            async with self._places:
                seed = await Seed.open(node, self._asked, self._open_model, self._silence)
                offer = await seed.offer(self._prepared)
            self._check(offer)
            self._offered[node] = _Offered(seed, offer)
            seed = None
        except SeedError as failure:
            self._note(node, failure)
        finally:
            if seed is not None:
                seed.close()
            self._pending -= 1
            self._news.set()

    def _prepared(self, done: int, total: int) -> None:
        self._preparing(done, total)

    def _check(self, offer: Offer) -> None:
        parts = tuple(file.sha256 for file in offer.files if not file.projector)
        if not self._sha256:
            return
        if len(parts) != len(self._sha256) or any(
            known and known != told for known, told in zip(self._sha256, parts, strict=True)
        ):
            raise SeedError("what it offers is not what was published")

    def _note(self, node: NodeId, failure: SeedError) -> None:
        self._reasons.append(failure.reason)
        self._failed(node, failure)
