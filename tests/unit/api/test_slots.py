"""Slots of several engines, numbered as those of one."""

import json
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.api_harness import FakeEngines, local, route, running_api
from tests.support.fake_upstream import Call, fake_upstream

from mesh_llm.api.slots import EngineSlots, SlotNumbers, asked_of_each, asked_slot, asking_for, gathered

PAIR = (EngineSlots("one", 0, 2), EngineSlots("other", 2, 2))


def slots(*busy: bool) -> bytes:
    return json.dumps([{"id": at, "n_ctx": 512, "is_processing": one} for at, one in enumerate(busy)]).encode()


@pytest.mark.parametrize(
    ("body", "slot"),
    [
        (b"", None),
        (b'{"prompt": "id_slot"}', None),
        (b'{"id_slot": 3, "prompt": "x"}', 3),
        (b'{"id_slot": -1}', None),
        (b'{"id_slot": "3"}', None),
        pytest.param(b'{"_slot": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", None, id="nested"),
        (b'{"prompt": "\\"id_slot\\": 3"}', None),
        (b"id_slot", None),
    ],
)
def test_a_slot_that_is_asked_for_is_found(body: bytes, slot: int | None) -> None:
    assert asked_slot(body) == slot


def test_another_slot_changes_nothing_else() -> None:
    body = b'{"prompt": [1, 2.50], "id_slot": 3, "seed": 9}'
    assert asked_slot(asking_for(body, 1)) == 1
    assert json.loads(asking_for(body, 1)) == {**json.loads(body), "id_slot": 1}


def test_all_slots_are_there_each_with_a_number_of_its_own() -> None:
    status, body = gathered("/slots", [(PAIR[0], slots(True, False)), (PAIR[1], slots(False, True))])
    assert status == 200
    found = json.loads(body)
    assert [one["id"] for one in found] == [0, 1, 2, 3]
    assert [one["is_processing"] for one in found] == [True, False, False, True]
    assert {one["n_ctx"] for one in found} == {512}


def test_a_slot_keeps_its_number_while_another_engine_is_away() -> None:
    assert [one["id"] for one in json.loads(gathered("/slots", [(PAIR[1], slots(False, True))])[1])] == [2, 3]


def test_whether_no_slot_is_free_is_asked_of_all_engines_together() -> None:
    asked = "/slots?model=m&fail_on_no_slot=1"
    assert asked_of_each(asked) == "/slots?model=m"
    assert asked_of_each("/slots?fail_on_no_slot=1") == "/slots"
    full, free = (PAIR[0], slots(True, True)), (PAIR[1], slots(True, False))
    assert gathered(asked, [full, free])[0] == 200
    status, body = gathered(asked, [full, (PAIR[1], slots(True, True))])
    assert (status, json.loads(body)["error"]["message"]) == (503, "no slot available")
    assert gathered("/slots", [full])[0] == 200


def test_properties_are_those_of_one_engine_with_the_slots_of_all() -> None:
    props = b'{"total_slots": 2, "chat_template": "x"}'
    status, body = gathered("/props?model=m", [(PAIR[0], props), (PAIR[1], props)])
    assert (status, json.loads(body)) == (200, {"total_slots": 4, "chat_template": "x"})


def test_what_is_no_list_of_slots_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        gathered("/slots", [(PAIR[0], b'{"error": 1}')])


ANSWER = b'data: {"content":"say \\"id_slot\\":1, \xe2\x82\xac","id_slot":1,"stop":false}\n\ndata: {"id_slot": 0}\n\n'
EXPECTED = ANSWER.replace(b'"id_slot":1,"stop"', b'"id_slot":11,"stop"').replace(b'"id_slot": 0', b'"id_slot": 10')


@given(st.lists(st.integers(0, len(ANSWER)), max_size=12))
def test_an_answer_names_the_slot_by_its_number_however_it_is_cut(cuts: list[int]) -> None:
    numbers, places = SlotNumbers(10), [0, *sorted(cuts), len(ANSWER)]
    pieces = [numbers.cut(ANSWER[one:other]) for one, other in pairwise(places)]
    assert b"".join(pieces) + numbers.rest() == EXPECTED


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_nothing_else_is_changed_or_lost(one: bytes, other: bytes) -> None:
    if b"id_slot" in one + other:
        return
    numbers = SlotNumbers(10)
    assert numbers.cut(one) + numbers.cut(other) + numbers.rest() == one + other


@given(st.integers(0, 20))
def test_a_number_at_the_end_is_whole(slot: int) -> None:
    numbers = SlotNumbers(7)
    said = b'"id_slot":%d' % slot
    pieces = [numbers.cut(said[place : place + 1]) for place in range(len(said))]
    assert b"".join(pieces) + numbers.rest() == b'"id_slot":%d' % (slot + 7)


# Requests


async def engine(call: Call) -> None:
    """An engine with two slots, of which it names the asked one, or its first."""
    match call.target.partition("?")[0]:
        case "/slots":
            await call.respond(slots(True, False))
        case "/props":
            await call.respond(b'{"total_slots": 2}')
        case "/completion" if b'"stream":true' in call.body:
            await call.begin_stream()
            for _ in range(2):
                await call.event(b'{"content":"x","id_slot":%d}' % (asked_slot(call.body) or 0))
            await call.end_stream()
        case _:
            await call.respond(b'{"content":"x","id_slot":%d}' % (asked_slot(call.body) or 0))


async def test_several_engines_show_all_slots_and_get_what_is_meant_for_theirs():
    async with fake_upstream(engine) as one, fake_upstream(engine) as other:
        here = msgspec.structs.replace(local(one.address), slots=4)
        async with running_api([route("tiny", here)]) as api:
            members = (EngineSlots(one.address, 0, 2), EngineSlots(other.address, 2, 2))
            api.server.use_engines(FakeEngines(members=members))
            shown = await api.client.get("/slots?fail_on_no_slot=1")
            assert [(slot["id"], slot["is_processing"]) for slot in shown.json()] == [
                (0, True), (1, False), (2, True), (3, False)
            ]  # fmt: skip
            assert (await api.client.get("/props")).json() == {"total_slots": 4}
            for slot in (3, 0, 2):
                answer = await api.post(b'{"prompt":"x","id_slot":%d}' % slot, "/completion")
                assert answer.json() == {"content": "x", "id_slot": slot}
            assert [asked_slot(call.body) for call in other.calls if call.body] == [1, 0]
            assert [asked_slot(call.body) for call in one.calls if call.body] == [0]
            streamed = await api.post(b'{"prompt":"x","id_slot":3,"stream":true}', "/completion")
            assert streamed.text == 'data: {"content":"x","id_slot":3}\n\n' * 2
            before = len(one.calls)
            await api.post(b'{"prompt":"x","id_slot":4}', "/completion")
            assert one.calls[before].body == b'{"prompt":"x","id_slot":-1}', "any will do, as llama.cpp does it"


async def test_an_engine_that_is_gone_leaves_the_slots_of_the_others():
    async with fake_upstream(engine) as one, fake_upstream(engine) as other:
        here = msgspec.structs.replace(local(one.address), slots=4)
        async with running_api([route("tiny", here)]) as api:
            members = (EngineSlots("127.0.0.1:1", 0, 2), EngineSlots(other.address, 2, 2))
            api.server.use_engines(FakeEngines(members=members))
            assert [slot["id"] for slot in (await api.client.get("/slots")).json()] == [2, 3]


async def test_one_engine_is_asked_for_its_slots_as_they_are():
    async with fake_upstream(engine) as one:
        here = msgspec.structs.replace(local(one.address), slots=2)
        async with running_api([route("tiny", here)]) as api:
            assert (await api.client.get("/slots?fail_on_no_slot=1")).content == slots(True, False)
            assert one.calls[-1].target == "/slots?fail_on_no_slot=1"
            assert (await api.post(b'{"prompt":"x","id_slot":1}', "/completion")).json()["id_slot"] == 1
            await api.post(b'{"prompt":"x","id_slot":2}', "/completion")
            assert one.calls[-1].body == b'{"prompt":"x","id_slot":2}'
