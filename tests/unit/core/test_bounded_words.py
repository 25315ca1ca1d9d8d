"""What peers say may change without end: nothing that is kept of it grows with that."""

from random import Random

import msgspec
from tests.support.core_values import config, facts, member, node_id, serving

from mesh_llm.core.node import Node
from mesh_llm.core.placement.controller import Fetches
from mesh_llm.core.placement.standby import Losses
from mesh_llm.core.routing.table import RoutingTable
from mesh_llm.core.types.announcement import Announcement, Publicity, only_load_differs, without_load
from mesh_llm.core.types.events import FetchEnded, PeerConnected
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import ModelStatus

CHANGES = 3000
BOUND = 600


def test_names_on_a_peers_disk_are_forgotten():
    table = RoutingTable(config(epoch=1_700_000_000.0))
    kept = facts("kept")

    def rebuild(number: int) -> None:
        peer = member(1, on_disk=(facts(f"m{number}"), kept))
        table.rebuild(
            own=(),
            addresses={},
            members=(peer,),
            round_trips={},
            on_disk={},
            wanted=(),
            accepting=True,
            now=float(number),
        )

    rebuild(0)
    created = table.snapshot.models[ModelName("kept")].created
    for number in range(1, CHANGES):
        rebuild(number)
    assert len(table._created) < BOUND
    assert table.snapshot.models[ModelName("kept")].created == created


def test_models_that_a_peer_says_it_lost_are_forgotten():
    losses = Losses()
    for number in range(CHANGES):
        name = f"m{number}"
        losses.observe((member(1, serving(name)),), 0.0)
        losses.observe((member(1, serving(name, ModelStatus.FAILED)),), 0.0)
    assert len(losses.lost) < BOUND
    assert ModelName(f"m{CHANGES - 1}") in losses.lost


def test_models_that_could_not_be_fetched_are_forgotten():
    fetches = Fetches()
    for number in range(CHANGES):
        one = facts(f"m{number}")
        fetches._current = one
        fetches.ended(FetchEnded(model=one.name, problem="no"), ())
    assert len(fetches.failed) < BOUND
    assert ModelName(f"m{CHANGES - 1}") in fetches.failed


def test_round_trips_of_peers_that_came_and_went_are_forgotten():
    node = Node(config(), Random(1))
    for number in range(1, 6000):
        node.handle(PeerConnected(node=node_id(number + 1), rtt_ms=1.0, relayed=False), number / 1000)
    trips = node._others.round_trips
    assert len(trips) <= 4096
    assert node_id(6000) in trips


def test_only_load_is_load():
    word = member(1, serving("m")).announcement
    load = {"demand": {"m": 2.0}, "clients": 7, "sequence": 99}
    busy = (msgspec.structs.replace(word.serving[0], in_flight=3, tokens_per_second=9.0),)
    assert only_load_differs(word, msgspec.structs.replace(word, serving=busy, **load))
    # The wish to be listed is no load: others wait for it.
    assert not only_load_differs(word, msgspec.structs.replace(word, publicity=Publicity(name="lab")))
    other = (msgspec.structs.replace(word.serving[0], embeddings=False),)
    assert not only_load_differs(word, msgspec.structs.replace(word, serving=other))
    untouched = set(Announcement.__struct_fields__) - {"serving", "demand", "clients"}
    changed = without_load(msgspec.structs.replace(word, name="other", publicity=Publicity(name="lab")))
    assert {name for name in untouched if getattr(changed, name) != getattr(without_load(word), name)} == {
        "name",
        "publicity",
    }
