"""Which engine and which slot get a request."""

import json
from collections.abc import Sequence

from mesh_llm.api.upstream import Place
from mesh_llm.core.types.ids import ModelName
from mesh_llm.daemon.dispatch import Dispatch, DispatchedEngine
from mesh_llm.engine.supervisor import EngineReadyInfo

CHAT = "/v1/chat/completions"
LONG = "x" * 4000


def body(*texts: str, **more: object) -> bytes:
    messages = [{"role": "user" if at % 2 == 0 else "assistant", "content": one} for at, one in enumerate(texts)]
    return json.dumps({"messages": messages, **more}).encode()


def engines(*slots: int) -> Dispatch:
    """One engine for each number."""
    found = [
        DispatchedEngine(EngineReadyInfo(address=f"e{number}", key="", context=100, slots=count, embeddings=True))
        for number, count in enumerate(slots, 1)
    ]
    return Dispatch(ModelName("m"), found)


def slots(places: Sequence[Place]) -> list[int | None]:
    return [place.slot for place in places]


def test_a_conversation_goes_back_to_its_engine_while_that_has_room() -> None:
    group = engines(2, 2)
    first, second = group.place(CHAT, body("a")), group.place(CHAT, body("b"))
    assert {first.address, second.address} == {"e1", "e2"}
    second.done()
    # There is more room in the other one.
    again = group.place(CHAT, body("a", "x", "c"))
    assert again.address == first.address
    full = group.place(CHAT, body("a", "x", "c", "y", "d"))
    assert full.address == second.address
    for one in (first, again, full):
        one.done()
    assert [engine.busy for engine in group.engines] == [0, 0]
    # Two slots are always one pass.
    assert slots([first, second, again, full]) == [None] * 4


def test_a_gap_is_filled_before_another_is_made() -> None:
    one = engines(4)
    places = [one.place(CHAT, body(text)) for text in "abcd"]
    assert slots(places) == [0, 1, 2, 3]
    places[1].done()
    places[3].done()
    assert one.place(CHAT, body("e")).slot == 1


def test_a_long_conversation_gets_its_own_slot_and_a_short_one_any() -> None:
    one = engines(4)
    for text in (LONG, "b", "c"):
        one.place(CHAT, body(text)).done()
    other = one.place(CHAT, body("d"))
    assert other.slot == 3
    assert one.place(CHAT, body(LONG, "x", "y")).slot == 0
    assert one.place(CHAT, body("b", "x", "y")).slot == 1
    assert one.place(CHAT, body("c", "x", "y")).slot == 2


def test_what_was_in_a_slot_before_its_last_conversation_is_forgotten() -> None:
    one = engines(3)
    one.place(CHAT, body(LONG)).done()
    for number in range(3):
        one.place(CHAT, body(f"{number}")).done()
    busy = [one.place(CHAT, body("a")), one.place(CHAT, body("b"))]
    assert slots(busy) == [1, 2]
    busy[0].done()
    assert one.place(CHAT, body(LONG, "x", "y")).slot == 1


def test_with_the_same_room_the_engine_is_taken_that_needs_no_further_pass() -> None:
    group = engines(3, 3)
    places = [group.place(CHAT, body(text)) for text in "abcdef"]
    assert {(place.address, place.slot) for place in places} == {(e, s) for e in ("e1", "e2") for s in range(3)}
    # Of the first 0 and 1 go on, of the second 0 and 2.
    for place in places:
        if (place.address, place.slot) in {("e1", 2), ("e2", 1)}:
            place.done()
    last = group.place(CHAT, body("g"))
    assert (last.address, last.slot) == ("e2", 1)


def test_an_engine_chooses_for_itself_while_it_has_chosen() -> None:
    one = engines(4)
    several = one.place(CHAT, body("a", n=2))
    beside = one.place(CHAT, body("b"))
    assert slots([several, beside]) == [None, None]
    several.done()
    assert one.place(CHAT, body("c")).slot is None
    beside.done()
    # The third still goes on.
    assert one.engines[0].unnamed == 1


def test_a_request_more_than_there_are_slots_waits_in_the_engine_for_any() -> None:
    one = engines(3)
    places = [one.place(CHAT, body(text)) for text in "abcd"]
    assert slots(places) == [0, 1, 2, None]
    for place in places:
        place.done()
    assert (one.engines[0].busy, one.engines[0].unnamed, one.engines[0].taken) == (0, 0, set())
