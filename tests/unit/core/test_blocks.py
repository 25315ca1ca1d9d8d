from tests.support.core_values import node_id

from mesh_llm.core.routing.table import Blocks, Life
from mesh_llm.core.types.ids import Incarnation, ModelName

NODE, MODEL = node_id(7), ModelName("m")
FIRST, SECOND = Life(Incarnation(1), 1), Life(Incarnation(1), 2)


def test_a_failed_target_comes_back_after_a_while() -> None:
    blocks = Blocks(2.0, 30.0)
    blocks.add(NODE, MODEL, FIRST, 10.0)
    assert blocks.blocked(NODE, MODEL, FIRST, 11.9)
    assert blocks.deadline() == 12.0
    assert not blocks.due(11.0)
    assert blocks.due(12.0)
    assert not blocks.due(12.5)
    assert not blocks.blocked(NODE, MODEL, FIRST, 12.0)
    assert blocks.deadline() is None


def test_a_new_launch_is_not_blocked() -> None:
    blocks = Blocks(2.0, 30.0)
    blocks.add(NODE, MODEL, FIRST, 10.0)
    assert not blocks.blocked(NODE, MODEL, SECOND, 10.0)


def test_reports_of_one_failure_count_once_and_repeated_failures_double() -> None:
    blocks = Blocks(2.0, 7.0)
    blocks.add(NODE, MODEL, FIRST, 0.0)
    blocks.add(NODE, MODEL, FIRST, 1.0)
    assert blocks.deadline() == 2.0
    ends: list[float | None] = []
    for time in (10.0, 20.0, 30.0):
        blocks.add(NODE, MODEL, FIRST, time)
        ends.append(blocks.deadline())
        assert blocks.due(time + 7.0)
    assert ends == [14.0, 27.0, 37.0]


def test_it_is_forgotten() -> None:
    blocks = Blocks(2.0, 30.0)
    blocks.add(NODE, MODEL, FIRST, 0.0)
    assert blocks.due(200.0)
    blocks.add(NODE, MODEL, FIRST, 200.0)
    assert blocks.deadline() == 202.0
