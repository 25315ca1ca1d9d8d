"""mesh-llm's API with one engine behind it: `python -m bench.proxy.api_server PORT ENGINE_ADDRESS`.

The same server that the daemon runs, with everything it does: checks, routes, metrics, books of every request.
"""

import asyncio
import sys

import uvloop

from mesh_llm.api.server import ApiServer
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.runtime.process import freeze_heap

NODE = NodeId("a" * 64)
NAME = ModelName("tiny")


class Routes:
    """One model, on this node."""

    def __init__(self, address: str) -> None:
        target = Target(node=NODE, local=True, address=address, slots=256)
        model = ModelRoute(name=NAME, status=ModelStatus.WARM, targets=(target,))
        self.current = RoutingSnapshot(version=1, node=NODE, default=NAME, models={NAME: model})

    async def newer(self, version: int) -> None:  # noqa: ARG002 - the protocol's signature
        """Never: they do not change."""
        await asyncio.Event().wait()

    async def settled(self) -> None:
        """At once: there are no others."""


async def main() -> None:
    """Serve until killed."""
    traffic = TrafficMeter(lambda _: None)
    server = ApiServer(ApiConfig(port=int(sys.argv[1])), Routes(sys.argv[2]), traffic)
    await server.start()
    freeze_heap()  # as the daemon does
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
