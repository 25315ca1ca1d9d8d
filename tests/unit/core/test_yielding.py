"""When the machine is its owner's: reasons, patience, and coming back."""

import pytest

from mesh_llm.core.config import YieldPolicy
from mesh_llm.core.placement.yielding import Yielding
from mesh_llm.core.types.events import OwnerSensed


class Machine:
    """What is sensed, over time; looks exactly when told to."""

    def __init__(self, **policy: object) -> None:
        self.yielding = Yielding(YieldPolicy(**policy))  # pyright: ignore[reportArgumentType]
        self.now = 0.0

    def senses(self, **sensed: object) -> str:
        self.yielding.sense(OwnerSensed(**sensed), self.now)  # pyright: ignore[reportArgumentType]
        self.yielding.look(self.now)
        return self.yielding.because

    def passes(self, seconds: float) -> str:
        until = self.now + seconds
        while (deadline := self.yielding.deadline()) is not None and deadline <= until:
            self.now = deadline
            assert self.yielding.look(self.now), "a deadline at which nothing changes"
        self.now = until
        return self.yielding.because


def test_nothing_is_looked_for_unasked() -> None:
    assert not YieldPolicy().watches
    machine = Machine()
    assert machine.senses(busy=1.0, on_battery=True, fullscreen=True, minute=600) == ""
    assert machine.passes(1000) == ""


@pytest.mark.parametrize(
    ("policy", "sensed"),
    [
        ({"battery": True}, {"on_battery": True}),
        ({"fullscreen": True}, {"fullscreen": True}),
        ({"schedule": ((540, 1020),)}, {"minute": 540}),
    ],
)
def test_what_lasts_counts_at_once(policy: dict[str, object], sensed: dict[str, object]) -> None:
    assert Machine(**policy).senses(**sensed)


def test_a_moment_of_load_is_no_reason() -> None:
    machine = Machine(load=0.5)
    assert machine.senses(busy=0.9) == ""
    assert machine.passes(3.0) == ""
    assert machine.senses(busy=0.2) == ""
    assert machine.passes(100.0) == ""
    machine.senses(busy=0.9)
    assert "processors" in machine.passes(4.0)


def test_load_must_fall_well_below_the_limit_and_stay_there() -> None:
    machine = Machine(load=0.5)
    machine.senses(busy=0.9)
    assert machine.passes(5.0)
    assert machine.senses(busy=0.4)
    assert machine.passes(1000.0)
    assert machine.senses(busy=0.2)
    assert machine.passes(29.0)
    assert machine.senses(busy=0.9)
    assert machine.senses(busy=0.1)
    assert machine.passes(29.0)
    assert machine.passes(1.5) == ""


def test_a_span_may_pass_midnight() -> None:
    machine = Machine(schedule=((22 * 60, 8 * 60),))
    assert machine.senses(minute=21 * 60 + 59) == ""
    assert machine.senses(minute=23 * 60) == "it is between 22:00 and 08:00"
    assert machine.senses(minute=7 * 60 + 59)
    assert machine.senses(minute=8 * 60) == ""


def test_the_reason_is_the_present_one() -> None:
    machine = Machine(battery=True, fullscreen=True)
    assert machine.senses(on_battery=True) == "it runs on its battery"
    assert machine.senses(fullscreen=True) == "a program fills its screen"
    assert machine.passes(1000.0) == "a program fills its screen"
