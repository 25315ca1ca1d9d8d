"""What a daemon needs to share models with others: digests of weights, tunnels as host, sessions as worker."""

import asyncio
from collections.abc import Callable
from pathlib import Path

from mesh_llm.core.effects import Lend
from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent
from mesh_llm.core.ids import NodeId
from mesh_llm.daemon.lent_weights import LentWeights
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.split_host import SplitHosting
from mesh_llm.daemon.split_progress import Tell
from mesh_llm.daemon.split_worker import SplitLender
from mesh_llm.daemon.weights import WeightShelf
from mesh_llm.engine.confinement import library
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.kept_shelf import KeptShelf, kept_directory
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.split.ports import Pace


class SharingRooms:
    """Made before the mesh is started; closed before its endpoint is."""

    def __init__(
        self,
        net: MeshNet,
        machine: Machine,
        supervisor: Supervisor,
        home: Home,
        post: Callable[[AnyEvent], None],
        name: Callable[[NodeId], str],
        tokens: Callable[[str], int],
        tell: Tell,
        pace: Pace,
        *,
        keeps: bool,
    ) -> None:
        """`name`: of a node, for people; `tokens`: how many a model generated here; `tell`: how loading goes on.

        `pace`: of what is given to others; `keeps`: keep what hosts send of models that are not here.
        """
        self._weights = WeightShelf(home.cache / "digests")
        kept = KeptShelf(kept_directory(home.cache)) if keeps else None
        self.hosting = SplitHosting(
            net, self._weights, post, name, tokens, tell, pace, lambda: _sockets(supervisor, home.cache)
        )
        self._lender = SplitLender(
            net,
            machine.source,
            machine.devices,
            supervisor,
            machine.shelf,
            LentWeights(self._weights, kept, tell),
            name,
            tell,
        )
        if machine.source is not None:
            self._lender.register()

    def lend(self, effect: Lend) -> None:
        """The core's Lend."""
        self._lender.lend(effect)

    async def close(self) -> None:
        """End what is lent, and the reading of files."""
        await self.hosting.stop()
        await self._lender.close()
        await self._weights.close()


async def _sockets(supervisor: Supervisor, cache: Path) -> Path | None:
    """Where the tunnels' Unix sockets are; None where an engine could not be made to connect to them."""
    try:
        await asyncio.to_thread(library.provide, cache)
    except MeshError:
        return None
    return supervisor.private()
