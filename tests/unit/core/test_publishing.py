from tests.support.core_values import MESH, node_id, serving

from mesh_llm.core.announcement_builder import Publisher
from mesh_llm.core.config import Timings
from mesh_llm.core.types.announcement import Announcement, Serving
from mesh_llm.core.types.ids import Incarnation
from mesh_llm.core.types.model import ModelStatus


def word(*servings: Serving, demand: dict[str, float] | None = None) -> Announcement:
    return Announcement(
        mesh=MESH, node=node_id(1), incarnation=Incarnation(1), sequence=1, serving=servings, demand=demand or {}
    )


def test_the_first_word_goes_out_and_the_same_one_does_not_again() -> None:
    publisher = Publisher(Timings())
    assert publisher.consider(word(), 0.0) == word()
    assert publisher.consider(word(), 100.0) is None
    assert publisher.deadline() is None


def test_states_are_told_soon_and_load_seldom() -> None:
    publisher = Publisher(Timings(publish_urgent=0.2, publish_soft=5.0))
    publisher.consider(word(serving("m", ModelStatus.LOADING)), 0.0)
    assert publisher.consider(word(serving("m")), 0.1) is None
    assert publisher.deadline() == 0.2
    told = publisher.consider(word(serving("m")), 0.2)
    assert told is not None
    assert told.sequence == 2
    busy = word(serving("m", in_flight=3), demand={"m": 10.0})
    assert publisher.consider(busy, 1.0) is None
    assert publisher.deadline() == 5.2
    told = publisher.consider(busy, 5.2)
    assert told is not None
    assert (told.sequence, told.serving[0].in_flight) == (3, 3)


def test_what_changed_back_is_not_told() -> None:
    publisher = Publisher(Timings())
    publisher.consider(word(serving("m")), 0.0)
    assert publisher.consider(word(serving("m", in_flight=1)), 1.0) is None
    assert publisher.consider(word(serving("m")), 2.0) is None
    assert publisher.deadline() is None


def test_the_last_words_are_told_at_once() -> None:
    publisher = Publisher(Timings())
    publisher.consider(word(serving("m")), 0.0)
    assert publisher.consider(word(serving("m", ModelStatus.STOPPING)), 0.0, at_once=True) is not None
