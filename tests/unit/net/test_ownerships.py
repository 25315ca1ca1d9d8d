"""Whose a node is: what others announce or pass on counts only where its owner signed it."""

from collections.abc import Callable

from msgspec.structs import replace
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.announcement import Announcement, Ownership, SignedAnnouncement
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, OwnerId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.net.admission.ownerships import OwnershipCheck
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.announcement import decode_announcement, encode_announcement
from mesh_llm.wire.mesh.owners import sign_ownership
from mesh_llm.wire.mesh.routes import RouteTable, decode_routes_reply, snapshot_of, table_of

PERSON, THIEF, HOST, WORKER, CLIENT = (ToyKey(name) for name in ("person", "thief", "host", "worker", "client"))
OWNER = OwnerId(PERSON.public.hex())
MADE = sign_ownership(OWNER, HOST.node_id, 100, 1000, PERSON.sign)
FORGED = sign_ownership(OWNER, WORKER.node_id, 100, 1000, THIEF.sign)


def counted() -> tuple[OwnershipCheck, list[bytes], Callable[[float], None]]:
    """A check, the keys for which it verified a signature, and what sets its clock."""
    asked: list[bytes] = []
    now = [500.0]

    def counting(key: bytes, payload: bytes, signature: bytes) -> bool:
        asked.append(key)
        return verify(key, payload, signature)

    def set_clock(value: float) -> None:
        now[0] = value

    return OwnershipCheck(counting, lambda: now[0]), asked, set_clock


def test_a_good_statement_is_verified_once_and_ends_all_the_same() -> None:
    check, asked, set_clock = counted()
    assert check.holds(MADE, HOST.node_id)
    assert check.holds(MADE, HOST.node_id)
    assert len(asked) == 1
    assert not check.holds(MADE, WORKER.node_id)
    assert not check.holds(replace(MADE, expires=2000), HOST.node_id)
    set_clock(1000.0)
    assert not check.holds(MADE, HOST.node_id)


def test_an_announcement_carries_it() -> None:
    announced = Announcement(
        mesh=MeshId("e" * 64), node=HOST.node_id, incarnation=Incarnation(1), sequence=1, ownership=MADE
    )
    assert decode_announcement(encode_announcement(announced)) == announced
    assert SignedAnnouncement(announcement=announced).announcement.ownership == MADE


def test_a_passive_node_gets_owners_and_workers_with_its_routes() -> None:
    target = Target(node=HOST.node_id, local=False, workers=(WORKER.node_id,))
    route = ModelRoute(name=ModelName("m"), status=ModelStatus.WARM, targets=(target,))
    owners: dict[str, Ownership] = {HOST.node_id: MADE, WORKER.node_id: FORGED}
    snapshot = RoutingSnapshot(version=1, node=CLIENT.node_id, models={route.name: route}, owners=owners)  # pyright: ignore[reportArgumentType]
    table = decode_routes_reply(encode(table_of(snapshot, b"e", ())))
    assert isinstance(table, RouteTable)
    read = snapshot_of(table, CLIENT.node_id, 7)
    assert read.models[route.name].targets[0].workers == (WORKER.node_id,)
    check, _, _ = counted()
    assert [node for node, one in read.owners.items() if check.holds(one, node)] == [HOST.node_id]
