from pathlib import Path
from random import Random
from typing import Any

import pytest
from tests.support.core_values import GB, config, facts, member, node_id, serving
from tests.support.fake_peers import FakePeers

from mesh_llm.api.types import StatusRequests
from mesh_llm.console.calls import Management
from mesh_llm.console.schema import ModelAccepted
from mesh_llm.console.status import Status
from mesh_llm.core.config import OnDemandPolicy
from mesh_llm.core.node import Node
from mesh_llm.core.performance.prediction import Link
from mesh_llm.core.types.announcement import SplitOffer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import (
    AnyEvent,
    DropRequested,
    EngineReady,
    LoadRequested,
    Started,
    StopRequested,
    Tick,
)
from mesh_llm.core.types.ids import ModelName, NodeId, Term
from mesh_llm.core.types.model import Capacity, ModelStatus, Speed
from mesh_llm.daemon.console import DaemonManagement, ModelLibrary
from mesh_llm.daemon.link_meter import Measured
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.daemon.performance import offered_bytes
from mesh_llm.daemon.published_state import PublishedState, ignore_progress
from mesh_llm.daemon.status import DaemonInfo, StatusBuilder, StatusSources
from mesh_llm.models.library.library import FactsCache, Library, LocalModel
from mesh_llm.net.admission.records import InviteRecord
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.streams import Facts

INVITE = InviteRecord(id="i", scope="serve", created=1.0, expires=2.0, token="t")


class FakeInviter:
    def __init__(self) -> None:
        self.granted: list[tuple[NodeId, str, Scope]] = []
        self.revoked: list[NodeId] = []
        self.founded = True
        self.over: dict[NodeId, tuple[NodeId, ...]] = {}

    def create_invite(self, scope: str | None, lifetime_seconds: float, uses: int | None) -> InviteRecord:
        return INVITE

    def invites(self) -> list[InviteRecord]:
        return [INVITE]

    def revoke_invite(self, invite: str) -> InviteRecord:
        raise MeshError(code="invite_not_found", message=invite, status=404)

    @property
    def founder(self) -> bool:
        return self.founded

    def above(self, node: NodeId) -> tuple[NodeId, ...]:
        return self.over.get(node, ())

    def revoke_node(self, node: NodeId) -> tuple[NodeId, ...]:
        self.revoked.append(node)
        return (node, node_id(4))

    async def grant(self, node: NodeId, name: str, scope: Scope) -> None:
        self.granted.append((node, name, scope))


class World:
    def __init__(self, *models: str, memory: int = 8 * GB, rpc: str = "", **chosen: Any) -> None:
        self.events: list[AnyEvent] = []
        self.peers = FakePeers()
        self.inviter = FakeInviter()
        self.node = Node(config("m", **chosen), Random(1), self.peers)
        library = Library(
            models={ModelName(name): LocalModel(facts(name), (Path(f"/{name}.gguf"),)) for name in models}
        )
        self.registry = ModelRegistry(library, FactsCache())
        self.management: Management = DaemonManagement(
            self.node,
            self.registry,
            PublishedState(self.node.config.node, ignore_progress),
            self.inviter,
            post=self.events.append,
            status=self.status,
        )
        self.node.handle(
            Started(capacity=Capacity(memory_bytes=memory, rpc_version=rpc), on_disk=self.registry.facts()), 0.0
        )

    def status(self) -> Status:
        around = DaemonInfo(mesh_name="", api_port=1, api_base="http://127.0.0.1:1/v1", pid=2, home="/h")
        maker = StatusBuilder(
            self.node,
            around,
            StatusSources(
                invite=lambda: INVITE,
                requests=StatusRequests,
                uptime=lambda: 3.14159,
            ),
        )
        return maker.status()


async def test_loading_checks_and_posts() -> None:
    world = World("m", "other-model")
    assert await world.management.load("other") == ModelAccepted(model="other-model")
    assert world.events == [LoadRequested(model=ModelName("other-model"))]
    with pytest.raises(MeshError, match="No model called nothing"):
        await world.management.load("nothing")
    assert len(world.events) == 1


async def test_what_does_not_fit_beside_the_others_is_refused_with_the_sum() -> None:
    world = World("m", "other", memory=int(2.2 * GB))
    with pytest.raises(MeshError, match=r"other does not fit: need .* have") as refused:
        await world.management.load("other")
    first, _, rest = refused.value.hint.partition(". Then load it again. ")
    assert first == "To make room: mesh-llm unload m"
    assert rest.startswith("It could be shared with other nodes, but this node has no RPC plugin.")
    assert world.events == []


async def test_loading_says_what_makes_room() -> None:
    world = World("m", "other", memory=int(2.2 * GB), on_demand=OnDemandPolicy(scope="members"))
    accepted = await world.management.load("other")
    assert accepted.waiting == "to make room, m is unloaded first."
    assert world.events == [LoadRequested(model=ModelName("other"))]


async def test_loading_promises_nothing_that_waits_for_other_nodes() -> None:
    world = World("m", "other", "third", memory=int(2.2 * GB), rpc="8.0.0")
    other = SplitOffer(obstacle="scope", detail="serve", memory_bytes=3 * GB)
    world.peers.set(member(2, offer=other))
    world.node.handle(Tick(), 1.0)
    accepted = await world.management.load("other")
    assert accepted.waiting.startswith("waiting for more memory: it needs 1")
    assert accepted.waiting.endswith("mesh-llm invite grant node2 --scope split.")
    # With a node that may share, it does not wait.
    world.peers.set(
        member(2, offer=SplitOffer(memory_bytes=3 * GB, fetches=True), capacity=Capacity(rpc_version="8.0.0"))
    )
    world.node.handle(Tick(), 2.0)
    assert (await world.management.load("other")).waiting != accepted.waiting
    world.node.handle(LoadRequested(model=ModelName("other")), 3.0)
    with pytest.raises(MeshError, match="third does not fit") as refused:
        await world.management.load("third")
    assert refused.value.hint.endswith(
        "This node already waits to share other, and shares one model: mesh-llm drop other"
    )


async def test_dropping_names_what_is_served_here() -> None:
    world = World("m", "other")
    world.peers.set(member(2, serving("theirs")))
    world.node.handle(Tick(), 1.0)
    assert await world.management.drop("M", 7.0) == "m"
    assert world.events == [DropRequested(model=ModelName("m"), drain_seconds=7.0)]
    with pytest.raises(MeshError, match="no other node does") as refused:
        await world.management.drop("nobodys", 7.0)
    assert refused.value.hint == "Served here: m."


async def test_dropping_names_the_nodes_that_serve_it_and_what_to_type_there() -> None:
    world = World("m")
    world.peers.set(member(2, serving("theirs")))
    world.node.handle(Tick(), 1.0)
    with pytest.raises(MeshError, match=r"^This node does not serve theirs\. node2 does\.") as refused:
        await world.management.drop("Theirs", 7.0, rest=True)
    assert refused.value.hint == "Type on node2: mesh-llm unload theirs"
    world.peers.set(member(2, serving("theirs")), member(3, serving("theirs")))
    world.node.handle(Tick(), 2.0)
    with pytest.raises(MeshError, match=r"node2 and node3 do\.") as refused:
        await world.management.drop("theirs", 7.0)
    assert refused.value.hint == "Type on each of them: mesh-llm drop theirs"
    assert world.events == []


async def test_stopping_refuses_changes_from_then_on() -> None:
    world = World("m")
    await world.management.stop(5.0)
    assert world.events == [StopRequested(drain_seconds=5.0)]
    world.node.handle(world.events[0], 1.0)
    for change in (world.management.load("m"), world.management.drop("m", 1.0)):
        with pytest.raises(MeshError, match="stopping"):
            await change


async def test_invites_are_the_meshs() -> None:
    world = World("m")
    assert await world.management.create_invite("serve", 60.0, None) == INVITE
    assert world.management.invites() == [INVITE]
    with pytest.raises(MeshError):
        await world.management.revoke_invite("x")


async def test_the_status_tells_models_and_peers() -> None:
    world = World("m")
    ready = EngineReady(model=ModelName("m"), term=Term(1), address="127.0.0.1:9", context=2048, slots=4)
    world.node.handle(ready, 0.5)
    peers = (member(2, serving("m"), serving("n")), member(3, suspect=True, name=""))
    world.peers.set(*peers)
    world.node.handle(Tick(), 1.0)
    status = world.management.status()
    assert (status.ready, status.health, status.role, status.token, status.uptime_s) == (
        True,
        "ready",
        "serve",
        "t",
        3.1,
    )
    models = {model.name: model for model in status.models}
    assert (models["m"].hosts, models["m"].nodes, models["m"].slots, models["m"].here) == (
        ("node1", "node2"),
        2,
        8,
        True,
    )
    assert (models["n"].hosts, models["n"].here) == (("node2",), False)
    first, second = status.peers
    assert (first.node_id, first.state, first.serving, first.path) == (node_id(2), "alive", ("m", "n"), "direct")
    assert (second.state, second.role) == ("suspect", "standby")


async def test_a_grant_goes_to_the_member_that_is_meant() -> None:
    world = World("m")
    world.peers.set(member(2, name="desk"), member(3, name="lap"), member(4, name="lap"))
    world.node.handle(Tick(), 1.0)
    for word in ("desk", "DESK", node_id(2)):
        granted = await world.management.grant(word, "split")
        assert (granted.node_id, granted.name, granted.scope) == (node_id(2), "desk", "split")
        assert world.inviter.granted == [(node_id(2), "desk", Scope.SPLIT)]
        world.inviter.granted.clear()
    with pytest.raises(MeshError, match=r"fits several nodes: lap .*, lap ") as refused:
        await world.management.grant("lap", "serve")
    assert (refused.value.code, refused.value.status) == ("node_ambiguous", 409)
    with pytest.raises(MeshError, match="No member of the mesh is called 'shelf'") as refused:
        await world.management.grant("shelf", "serve")
    assert "desk, lap" in refused.value.hint
    with pytest.raises(MeshError, match="is this node itself"):
        await world.management.grant(world.node.config.name, "serve")
    assert world.inviter.granted == []


async def test_a_member_is_cut_off_by_whoever_it_rests_on_and_others_hear_who_that_is() -> None:
    world = World("m")
    world.peers.set(member(2, name="desk"), member(3, name="lap"), member(4, name="lap"), member(5, name="alice"))
    world.node.handle(Tick(), 1.0)
    revoke, inviter = world.management.revoke_member, world.inviter
    cut = await revoke("Desk")
    assert (cut.node_id, cut.name, cut.final) == (node_id(2), "desk", True)
    assert [one.startswith("lap (") for one in cut.others] == [True]
    # The founder need not see the node any more.
    away = "0123456789" + "ab" * 27
    assert (await revoke(away.upper())).name == "0123456789"
    assert inviter.revoked == [node_id(2), away]
    inviter.revoked.clear()
    with pytest.raises(MeshError, match=r"fits several nodes: lap .*, lap ") as refused:
        await revoke("lap")
    assert refused.value.code == "node_ambiguous"
    for word in (world.node.config.name, world.node.config.node):
        with pytest.raises(MeshError, match="is this node itself"):
            await revoke(word)
    # Another member only cuts off what rests on it.
    inviter.founded = False
    inviter.over = {node_id(2): (node_id(5), node_id(9)), node_id(3): (node_id(5), world.node.config.node)}
    for call in (revoke("desk"), world.management.grant("desk", "serve")):
        with pytest.raises(MeshError, match="desk was not invited or admitted by it") as refused:
            await call
        assert (refused.value.code, refused.value.status) == ("not_yours", 403)
        assert refused.value.hint == f"Type it on alice, which founded the mesh, or the node {node_id(9)[:10]}."
    with pytest.raises(MeshError, match="alice founded the mesh: no other node can cut it off"):
        await revoke("alice")
    assert inviter.revoked == inviter.granted == []
    assert not (await revoke(node_id(3))).final


async def test_memory_of_a_node_that_may_not_share_is_not_counted() -> None:
    world = World("m", "other", memory=int(2.2 * GB), rpc="8.0.0")
    library = ModelLibrary(world.node, world.registry, world.management.status)

    def where() -> str:
        return next(one.fit.where for one in library.library().disk if one.name == "other")

    able = Capacity(memory_bytes=int(1.2 * GB), rpc_version="8.0.0")
    offer = SplitOffer(memory_bytes=int(1.2 * GB))
    world.peers.set(member(2, offer=offer, capacity=able, on_disk=(facts("other"),)))
    world.node.handle(Tick(), 1.0)
    assert where() == "mesh"
    barred = SplitOffer(obstacle="scope", memory_bytes=int(1.2 * GB))
    world.peers.set(member(2, offer=barred, capacity=able, on_disk=(facts("other"),)))
    world.node.handle(Tick(), 2.0)
    assert where() == "no"


def test_a_plan_counts_what_another_node_offers_and_not_what_waits_there() -> None:
    cold = serving("big", ModelStatus.COLD, reason="waiting for more memory")
    link = Link(one_way_seconds=0.001, bytes_per_second=1e8)
    measured = Measured(link, Facts(speed=Speed(), round_trips={}, free_bytes=11 * GB), 0.0)
    assert offered_bytes(facts("big", 20.0), member(2, cold), measured) == 11 * GB
    runs = serving("big", ModelStatus.WARM, context=2048, slots=1)
    assert offered_bytes(facts("big", 20.0), member(2, runs), measured) > 31 * GB
