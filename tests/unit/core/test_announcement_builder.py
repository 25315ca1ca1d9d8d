from tests.support.core_values import MESH, node_id, serving

from mesh_llm.core.announcement_builder import AnnouncementThrottle
from mesh_llm.core.config import Timings
from mesh_llm.core.types.announcement import Announcement, Serving
from mesh_llm.core.types.ids import Incarnation
from mesh_llm.core.types.model import ModelStatus


def announcement(*servings: Serving, demand: dict[str, float] | None = None) -> Announcement:
    return Announcement(
        mesh=MESH, node=node_id(1), incarnation=Incarnation(1), sequence=1, serving=servings, demand=demand or {}
    )


def test_the_first_word_goes_out_and_the_same_one_does_not_again() -> None:
    throttle = AnnouncementThrottle(Timings())
    assert throttle.consider(announcement(), 0.0) == announcement()
    assert throttle.consider(announcement(), 100.0) is None
    assert throttle.deadline() is None


def test_states_are_told_soon_and_load_seldom() -> None:
    throttle = AnnouncementThrottle(Timings(publish_urgent=0.2, publish_soft=5.0))
    throttle.consider(announcement(serving("m", ModelStatus.LOADING)), 0.0)
    assert throttle.consider(announcement(serving("m")), 0.1) is None
    assert throttle.deadline() == 0.2
    announced = throttle.consider(announcement(serving("m")), 0.2)
    assert announced is not None
    assert announced.sequence == 2
    busy = announcement(serving("m", in_flight=3), demand={"m": 10.0})
    assert throttle.consider(busy, 1.0) is None
    assert throttle.deadline() == 5.2
    announced = throttle.consider(busy, 5.2)
    assert announced is not None
    assert (announced.sequence, announced.serving[0].in_flight) == (3, 3)


def test_what_changed_back_is_not_told() -> None:
    throttle = AnnouncementThrottle(Timings())
    throttle.consider(announcement(serving("m")), 0.0)
    assert throttle.consider(announcement(serving("m", in_flight=1)), 1.0) is None
    assert throttle.consider(announcement(serving("m")), 2.0) is None
    assert throttle.deadline() is None


def test_the_last_words_are_told_at_once() -> None:
    throttle = AnnouncementThrottle(Timings())
    throttle.consider(announcement(serving("m")), 0.0)
    assert throttle.consider(announcement(serving("m", ModelStatus.STOPPING)), 0.0, at_once=True) is not None
