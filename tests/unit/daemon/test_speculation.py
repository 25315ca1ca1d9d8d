import asyncio

from mesh_llm.core.performance.speculation import Guesses
from mesh_llm.daemon.speculation import EngineGuessing
from mesh_llm.engine.slots import SlotError
from mesh_llm.runtime.supervision import TaskScope


class FakeSwitch:
    def __init__(self, *, broken: bool = False) -> None:
        self.asked: list[bool] = []
        self.broken = broken
        self.reached = asyncio.Event()
        self.known = Guesses()

    async def speculate(self, *, on: bool) -> None:
        self.asked.append(on)
        self.reached.set()
        await asyncio.sleep(0)
        if self.broken:
            raise SlotError("gone")

    async def guesses(self) -> Guesses:
        await asyncio.sleep(0)
        if self.broken:
            raise SlotError("gone")
        return self.known


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_it_guesses_again_when_the_last_that_minds_has_ended() -> None:
    guessing, switch = EngineGuessing(), FakeSwitch()
    guessing.opened("m", 1, switch)
    first, second = await asyncio.gather(guessing.pause("m", 1), guessing.pause("m", 1))
    assert switch.asked == [False]
    first()
    first()
    await settled()
    assert switch.asked == [False]
    second()
    await settled()
    assert switch.asked == [False, True]
    await guessing.close()


async def test_one_that_cannot_be_switched_or_has_ended_is_left_alone() -> None:
    guessing, switch = EngineGuessing(), FakeSwitch()
    guessing.opened("m", 1, None)
    assert not guessing.active("m", 1)
    guessing.opened("m", 2, switch)
    assert guessing.active("m", 2)
    resume = await guessing.pause("m", 2)
    guessing.closed("m", 2)
    resume()
    await settled()
    assert switch.asked == [False]
    (await guessing.pause("m", 2))()
    await guessing.close()


async def test_an_engine_that_does_not_answer_is_asked_again_and_answers_go_on() -> None:
    guessing, switch = EngineGuessing(), FakeSwitch(broken=True)
    guessing.opened("m", 1, switch)
    for _ in range(2):
        (await guessing.pause("m", 1))()
        await settled()
    assert switch.asked == [False, False]
    await guessing.close()


async def test_a_pause_that_is_cancelled_does_not_last() -> None:
    guessing, switch = EngineGuessing(), FakeSwitch()
    guessing.opened("m", 1, switch)
    scope = TaskScope("test")
    task = scope.spawn(guessing.pause("m", 1), "pause")
    await switch.reached.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await settled()
    assert switch.asked == [False, True]
    await guessing.close()
    await scope.close()


async def test_it_says_what_guesses_gain() -> None:
    guessing, switch = EngineGuessing(), FakeSwitch()
    guessing.opened("m", 1, switch, kind="ngram-map-k", auto=True)
    guessing.opened("fixed", 1, None, kind="draft-simple")
    assert guessing.describe("fixed", 1) == "draft-simple"
    assert guessing.describe("m", 1) == "ngram-map-k (auto), nothing guessed yet"
    for known, text in (
        (Guesses(gain=0.52, guessed=40, accepted=30), "ngram-map-k (auto), gains 52%, 75% of guesses right"),
        (
            Guesses(gain=-0.01, guessed=40, waits=True),
            "ngram-map-k (auto), loses 1%, 0% of guesses right, waits: the last guesses did not pay",
        ),
    ):
        switch.known = known
        guessing.ended("m", 1)
        guessing.ended("m", 1)
        await settled()
        assert guessing.describe("m", 1) == text
    guessing.closed("m", 1)
    guessing.ended("m", 1)
    assert guessing.describe("m", 1) == ""
    await guessing.close()


async def test_an_engine_that_does_not_say_what_it_gains_is_asked_again() -> None:
    guessing, switch = EngineGuessing(), FakeSwitch(broken=True)
    guessing.opened("m", 1, switch, kind="ngram-map-k")
    guessing.ended("m", 1)
    await settled()
    switch.broken, switch.known = False, Guesses(gain=0.1, guessed=2, accepted=1)
    guessing.ended("m", 1)
    await settled()
    assert guessing.describe("m", 1) == "ngram-map-k, gains 10%, 50% of guesses right"
    await guessing.close()
