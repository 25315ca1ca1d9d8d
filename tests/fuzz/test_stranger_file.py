"""The file of what strangers used today: whatever is in it, the node starts, and what is read is within bounds."""

from pathlib import Path

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples

from mesh_llm.api.strangers import read_used
from mesh_llm.core.trust.strangers import MAX_COUNTED, MAX_TOKENS, StrangerLimits, StrangerQuotas, UsedToday

GOOD = msgspec.json.encode(UsedToday(day=20_000, nodes={"a" * 64: 5}, sources={"192.0.2.1": 5}, total=5))
CHANGES = st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), max_size=6)
VALUES = st.dictionaries(
    st.sampled_from(["day", "nodes", "sources", "total", "more"]),
    st.one_of(
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.none(),
        st.dictionaries(st.text(max_size=70), st.integers(), max_size=4),
    ),
)


def check(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "strangers.json"
    file.write_bytes(data)
    used = read_used(file)
    assert 0 <= used.total <= MAX_TOKENS
    assert all(0 <= tokens <= MAX_TOKENS for tokens in (*used.nodes.values(), *used.sources.values()))
    assert max(len(used.nodes), len(used.sources)) <= MAX_COUNTED
    quotas = StrangerQuotas(StrangerLimits(), used)
    quotas.begin("a" * 64, "192.0.2.1", 20_000)
    quotas.used("a" * 64, "192.0.2.1", 20_000, 1)
    assert msgspec.json.decode(msgspec.json.encode(quotas.today(20_000)), type=UsedToday).day == 20_000


@given(CHANGES, st.integers(0, len(GOOD)))
@examples(300)
def test_changed_and_cut_files(tmp_path_factory, changes: list[tuple[int, int]], end: int) -> None:
    data = bytearray(GOOD)
    for place, value in changes:
        data[place] = value
    check(tmp_path_factory.mktemp("file"), bytes(data[:end]))


@given(VALUES)
@examples(200)
def test_files_of_another_form(tmp_path_factory, values: dict[str, object]) -> None:
    check(tmp_path_factory.mktemp("file"), msgspec.json.encode(values))


def test_a_file_that_is_too_large_and_one_with_too_many_names(tmp_path: Path) -> None:
    check(tmp_path, b" " * (2 * 1024 * 1024))
    check(tmp_path, msgspec.json.encode({"day": 1, "nodes": {f"{number}": 1 for number in range(MAX_COUNTED + 1)}}))
