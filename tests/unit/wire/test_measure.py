"""What travels on MEASURE streams, and the speed in announcements."""

from hypothesis import given
from hypothesis import strategies as st
from tests.support.core_values import node_id

from mesh_llm.core.types.ids import NodeId
from mesh_llm.core.types.model import Rates, Speed
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.mesh.announcement import SPEED
from mesh_llm.wire.mesh.streams import MAX_ROUND_TRIPS, Facts, decode_facts, encode_facts

rates = st.builds(Rates, **{name: st.integers(0, 2000).map(lambda n: n * 10**6) for name in ("f16", "q8", "q4")})
speeds = st.builds(
    Speed,
    cores=st.integers(0, 512),
    cached=rates,
    one=rates,
    full=rates,
    step_ns=st.integers(0, 10**6),
    full_step_ns=st.integers(0, 10**6),
)


@given(speeds)
def test_a_speed_comes_out_as_it_went_in(speed: Speed) -> None:
    assert SPEED.read(SPEED.write(speed)) == speed


@given(
    speeds,
    st.dictionaries(st.integers(1, 99).map(node_id), st.floats(0, 1000), max_size=80),
    st.integers(0, 2**50),
    st.booleans(),
)
def test_facts_come_out_as_they_went_in(speed: Speed, trips: dict[NodeId, float], free: int, takes: bool) -> None:
    facts = decode_facts(encode_facts(Facts(speed=speed, round_trips=trips, free_bytes=free, takes=takes)))
    assert isinstance(facts, Facts)
    assert (facts.speed, facts.free_bytes, facts.takes) == (speed, free, takes)
    assert facts.round_trips.items() <= trips.items()
    assert len(facts.round_trips) == min(len(trips), MAX_ROUND_TRIPS)


@given(st.binary(max_size=300), st.sampled_from([b"", b"\x93", b"\x93\x96", b"\x92\x96\x02\x93"]))
def test_any_bytes_are_facts_or_malformed(data: bytes, head: bytes) -> None:
    decoded = decode_facts(head + data)
    assert isinstance(decoded, Facts | Malformed)
