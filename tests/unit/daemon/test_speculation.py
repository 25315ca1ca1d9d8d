import asyncio

from mesh_llm.core.performance.speculation import Answer
from mesh_llm.daemon.speculation import EngineGuessing
from mesh_llm.engine.slots import SlotError
from mesh_llm.runtime.supervision import TaskScope


class FakeSwitch:
    def __init__(self, *, broken: bool = False) -> None:
        self.asked: list[bool] = []
        self.broken = broken
        self.reached = asyncio.Event()

    async def speculate(self, *, on: bool) -> None:
        self.asked.append(on)
        self.reached.set()
        await asyncio.sleep(0)
        if self.broken:
            raise SlotError("gone")


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
    guessing = EngineGuessing()
    guessing.opened("m", 1, FakeSwitch(), kind="draft-simple", auto=True)
    guessing.opened("fixed", 1, None, kind="ngram-map-k")
    assert (guessing.describe("m", 1), guessing.describe("fixed", 1)) == ("draft-simple", "ngram-map-k")
    for answer in (Answer(90, 9.0), Answer(100, 10.0), Answer(100, 5.0, 60, 50)):
        guessing.answered("m", 1, answer)
    assert guessing.describe("m", 1).startswith("draft-simple, gains ")
    guessing.closed("m", 1)
    assert guessing.describe("m", 1) == ""
    await guessing.close()


async def test_guesses_that_do_not_pay_stop_and_come_back_unless_the_user_chose_them() -> None:
    guessing, found, named = EngineGuessing(), FakeSwitch(), FakeSwitch()
    guessing.opened("found", 1, found, auto=True)
    guessing.opened("named", 1, named)
    for number in range(80):
        guesses = 200 + number % 2 * 100 if found.asked[-1:] != [False] else 0
        answer = Answer(100, 1.0 + guesses * 0.01, guesses, 0)
        guessing.answered("found", 1, answer)
        guessing.answered("named", 1, answer)
        guessing.answered("gone", 1, answer)
        await settled()
    assert found.asked[:3] == [False, True, False]
    # A request that minds guesses changes nothing while there are none.
    resume = await guessing.pause("found", 1)
    asked = list(found.asked)
    resume()
    await settled()
    assert (found.asked, named.asked) == (asked, [])
    assert found.asked[-1] is False
    await guessing.close()
