"""Two nodes of a mesh without an engine of their own: `python -m bench.mesh.http_roles ROLE ...`.

serve ENGINE PORT     API on PORT, whose model `tiny` is at the address ENGINE; prints its invite and id
ask PORT TOKEN WAY    API on PORT, whose `tiny` is at the node that made the invite, over `quic` or `tls`; prints ready

Door and mesh are the daemon's, joined as the daemon joins them; what is left out is everything beside the request.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable

from bench.mesh.nodes import make_node

from mesh_llm.api.server import ApiServer
from mesh_llm.api.types import ApiConfig
from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.process import freeze_heap
from mesh_llm.wire.mesh.invites import Invite, parse_invite

NAME = ModelName("tiny")
SLOTS = 64


class OneRoute:
    """Satisfies core.types.ports.Routes: one model, at one place."""

    def __init__(self, node: NodeId, target: Target) -> None:
        model = ModelRoute(name=NAME, status=ModelStatus.WARM, targets=(target,))
        self.current = RoutingSnapshot(version=1, node=node, default=NAME, models={NAME: model})

    async def newer(self, version: int) -> None:  # noqa: ARG002 - the protocol's signature
        """Never: they do not change."""
        await asyncio.Event().wait()

    async def settled(self) -> None:
        """At once: there are no others."""


def _door(node: MeshNet, port: str, target: Target) -> ApiServer:
    traffic = TrafficMeter(lambda _: None)
    server = ApiServer(ApiConfig(port=int(port)), OneRoute(node.node_id, target), traffic)
    server.use_mesh(node.open_http)
    return server


async def serve(engine: str, port: str) -> None:
    """The node with the engine."""
    node = make_node()
    door = _door(node, port, Target(node=node.node_id, local=True, address=engine, slots=SLOTS))
    await door.start()
    node.serve_http(door.serve_peer)
    await node.start()
    freeze_heap()
    print("token", node.create_invite("client", 3600.0, None).token, flush=True)
    await asyncio.Event().wait()


async def ask(port: str, token: str, way: str) -> None:
    """The node that has nothing but a way there."""
    invite = parse_invite(token)
    assert isinstance(invite, Invite)
    node = make_node(token, tls=way == "tls")
    door = _door(node, port, Target(node=NodeId(invite.issuer), local=False, slots=SLOTS))
    await node.start()
    (await node.joiner.join()).raise_for_user()
    await door.start()
    freeze_heap()
    print("ready", flush=True)
    await asyncio.Event().wait()


ROLES: dict[str, Callable[..., Awaitable[None]]] = {"serve": serve, "ask": ask}


async def run(role: str, *arguments: str) -> None:
    """Be what the command line says."""
    await ROLES[role](*arguments)


if __name__ == "__main__":
    import uvloop

    uvloop.run(run(*sys.argv[1:]))
    sys.stdout.flush()
    os._exit(0)
