import msgspec

from mesh_llm.core.routing.ranking import ModelRoute, RoutingSnapshot, Target
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.routes import (
    RouteHost,
    RoutesRequest,
    RoutesUnchanged,
    RouteTable,
    decode_routes_reply,
    decode_routes_request,
    snapshot_of,
    table_of,
)

SERVER, OTHER, CLIENT, QUIET = (NodeId(digit * 64) for digit in "abcd")
NAME = ModelName("tiny")
SNAPSHOT = RoutingSnapshot(
    version=7,
    node=SERVER,
    default=NAME,
    models={
        NAME: ModelRoute(
            name=NAME,
            status=ModelStatus.WARM,
            targets=(
                Target(node=SERVER, local=True, address="127.0.0.1:5001", slots=4, context=2048, term=3),
                Target(node=OTHER, local=False, slots=2, context=1024, load=0.5, tokens_per_second=20.0, rtt_ms=9.0),
            ),
            context=1024,
            aliases=("tiny-q8",),
        )
    },
    alive=frozenset({OTHER, QUIET}),
)
HOSTS = (RouteHost(SERVER, ("10.0.0.1:4433",)), RouteHost(OTHER, (), "https://relay"))


def table() -> RouteTable:
    reply = decode_routes_reply(encode(table_of(SNAPSHOT, b"epoch123", HOSTS)))
    assert isinstance(reply, RouteTable)
    return reply


def test_no_loopback_address_leaves_the_node():
    encoded = encode(table_of(SNAPSHOT, b"epoch123", HOSTS))
    assert b"127.0.0.1" not in encoded
    assert b"5001" not in encoded


def test_client_sees_the_same_routes_as_remote_ones():
    snapshot = snapshot_of(table(), CLIENT, 42)
    route = snapshot.models[NAME]
    assert (snapshot.version, snapshot.node, snapshot.default) == (42, CLIENT, NAME)
    assert [(target.node, target.local, target.address) for target in route.targets] == [
        (SERVER, False, ""),
        (OTHER, False, ""),
    ]
    first, second = route.targets
    assert (first.slots, first.context, first.term) == (4, 2048, 3)
    assert (second.load, second.tokens_per_second) == (0.5, 20.0)
    # Also alive: the server, and nodes without a route.
    assert snapshot.alive == {SERVER, OTHER, QUIET}
    # The server's round trip to it says nothing about the client's.
    assert second.rtt_ms == 0.0
    assert (route.status, route.context, route.aliases) == (ModelStatus.WARM, 1024, ("tiny-q8",))


def test_the_table_holds_the_addresses_of_hosts():
    assert table().hosts == HOSTS


def test_request_and_unchanged_round_trip():
    request = RoutesRequest(b"epoch123", 7, 30.0)
    assert decode_routes_request(encode(request)) == request
    assert decode_routes_reply(encode(RoutesUnchanged(5.0))) == RoutesUnchanged(5.0)


def test_values_out_of_bounds_are_malformed():
    assert isinstance(decode_routes_request(encode(RoutesRequest(b"epoch123", 7, 61.0))), Malformed)
    assert isinstance(decode_routes_request(encode(RoutesRequest(b"too long an epoch", 7))), Malformed)
    assert isinstance(decode_routes_reply(encode(RouteTable(b"e", 1, hosts=(RouteHost("nonsense"),)))), Malformed)


def test_nobody_learns_whom_a_node_distrusts():
    judged = msgspec.structs.replace(SNAPSHOT, distrusted=frozenset({(NAME, OTHER)}))
    assert encode(table_of(judged, b"epoch123", HOSTS)) == encode(table_of(SNAPSHOT, b"epoch123", HOSTS))
