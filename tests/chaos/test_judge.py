"""The judge itself: what a wrong, doubled, shortened or silent answer is called."""

import json

import pytest
from tests.chaos.faults import FAULTS
from tests.chaos.load import Asked
from tests.chaos.questions import End, Question, Read, error_of, judge, questions, read
from tests.chaos.report import BEGIN, FINISH, write
from tests.chaos.verdict import Strike, conclude
from tests.chaos.watch import Holding, grown
from tests.support.http import Answer

CHAT = Question("red", "chat", "hello", 4, streamed=True)
EXPECTED = "one two three four"


def chunk(text: str, ident: str = "c1") -> str:
    return json.dumps({"id": ident, "choices": [{"delta": {"content": text}}]})


LAST = json.dumps({"id": "c1", "choices": [], "usage": {"completion_tokens": 4}})


async def answered(*data: str) -> tuple[End, str]:
    async def body():
        for one in data:
            yield f"data: {one}\n\n".encode()

    got = Read()
    await read(CHAT, Answer(200, {}, body()), got)
    return judge(CHAT, got, EXPECTED)


@pytest.mark.parametrize(
    ("data", "end"),
    [
        ((chunk("one two"), chunk(" three four"), LAST, "[DONE]"), End.WHOLE),
        ((chunk("one two"), chunk(" four"), LAST, "[DONE]"), End.WRONG),
        ((chunk("one two"), chunk(" two three four"), LAST, "[DONE]"), End.WRONG),
        ((chunk("one two"), chunk(" three four", "c2"), LAST, "[DONE]"), End.WRONG),
        ((chunk("one two"), chunk(" three four"), LAST.replace("4", "3"), "[DONE]"), End.WRONG),
        ((chunk("one two"), "[DONE]"), End.WRONG),
        ((chunk("one two"),), End.CUT),
        ((chunk("one two"), '{"error": {"message": "lost"}}'), End.BROKEN),
        ((chunk("one tow"), '{"error": {"message": "lost"}}'), End.WRONG),
    ],
)
async def test_streams_are_called_by_their_names(data: tuple[str, ...], end: End) -> None:
    assert (await answered(*data))[0] is end


def test_an_error_counts_only_in_the_shape_of_its_api() -> None:
    message = Question("red", "messages", "hello", 4, streamed=True)
    ours = b'{"error": {"message": "busy"}}'
    assert error_of(CHAT, ours) == "busy"
    assert error_of(message, ours) is None
    assert error_of(message, b'{"type": "error", "error": {"message": "busy"}}') == "busy"
    assert error_of(CHAT, b"<html>") is None


def asked(end: End, *, model: str = "red", door: int = 0, host: str = "b", began: float = 0.0) -> Asked:
    one = Asked(Question(model, "chat", "x", 4, streamed=True), door, began, host=host, end=end, ended=began + 10)
    one.got.pieces.append("x")
    return one


def strike(name: str, node: int, *, open_then: frozenset[int] = frozenset()) -> Strike:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    return Strike(fault, node, "b", 5.0, open_then, undone=7.0, whole_again=8.0)


def test_who_was_on_an_engine_that_ended_by_itself_reads_so_and_after_two_such_ends_is_refused() -> None:
    died, again = "The engine crashed while it worked on", "Engines crashed 2 times while they worked on this request"
    for end, why, crashes, right in (
        (End.BROKEN, died, 1, True),
        (End.REFUSED, died, 1, True),
        (End.BROKEN, died, 0, False),
        (End.BROKEN, "the node was lost", 1, False),
        (End.REFUSED, again, 2, True),
        (End.REFUSED, again, 1, False),
        (End.WRONG, died, 2, False),
        (End.CUT, died, 2, False),
    ):
        one = asked(end)
        one.why = why
        strikes = [strike("llama-server crash", 1), strike("llama-server crash", 2)][:crashes]
        strikes += [strike("llama-server killed", 1)]
        assert (conclude([one], strikes).violations == []) is right, (end, why, crashes)


def test_what_is_a_violation() -> None:
    crash = strike("power cut", 1, open_then=frozenset({0}))
    assert conclude([asked(End.WHOLE)], [crash]).violations == []
    assert conclude([asked(End.BROKEN)], [crash]).violations
    assert conclude([asked(End.BROKEN, model="green")], [crash]).violations
    assert conclude([asked(End.REFUSED)], [crash]).violations
    assert conclude([asked(End.REFUSED, model="green")], [crash]).violations == []
    assert conclude([asked(End.REFUSED, model="green")], []).violations
    for end in (End.HUNG, End.CUT, End.WRONG):
        assert conclude([asked(end, model="green")], [crash]).violations
    # One engine of several: the model is served all the time.
    one_of_two = strike("first of two engines of a split killed", 3)
    assert conclude([asked(End.WHOLE, model="green")], [one_of_two]).violations == []
    assert conclude([asked(End.REFUSED, model="green")], [one_of_two]).violations
    assert conclude([asked(End.REFUSED, model="green")], [one_of_two, crash]).violations == []
    cut = strike("network cut", 1)
    assert conclude([asked(End.BROKEN, door=1)], [cut]).violations == []
    assert conclude([asked(End.BROKEN)], [cut]).violations
    assert conclude([asked(End.CUT, door=1)], [crash]).violations == []
    assert conclude([asked(End.WRONG, door=1)], [crash]).violations
    row = conclude([asked(End.WHOLE)], [crash]).rows["power cut"]
    assert (row.times, row.requests, row.hit, row.carried_on) == (1, 1, 1, 1)


def test_a_mesh_that_stays_broken_is_a_violation() -> None:
    crash = strike("power cut", 1)
    crash.whole_again = 0.0
    assert "not whole again" in conclude([], [crash]).violations[0]


def test_questions_hold_every_api_and_form() -> None:
    made = questions(("red",), 64, 1, seed=1)
    assert {(one.api, one.streamed) for one in made} == {
        (api, streamed) for api in ("chat", "completions", "messages", "responses") for streamed in (True, False)
    }


def test_the_table_goes_between_its_markers(tmp_path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{FINISH}\nafter\n")
    write(page, "new")
    assert page.read_text() == f"before\n{BEGIN}\nnew\n{FINISH}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="no place"):
        write(page, "new")


def held(**kinds: int) -> Holding:
    return Holding(3, 100.0, 50, 2, 15, sum(kinds.values()), 0, kinds)


def test_what_grew_is_named() -> None:
    before = held(watch=40, stream=8, serve=2)
    assert grown(before, before) == []
    assert grown(before, held(watch=40, stream=12, serve=5, ask=3)) == []
    # Few of all, many of one kind: what ended meanwhile hides nothing.
    assert grown(before, held(watch=33, stream=15, serve=2)) == ["tasks grew from 50 to 50: stream 8 → 15"]
    # Some of each kind, many of all.
    many = held(watch=40, stream=13, serve=6, ask=5)
    assert grown(before, many) == ["tasks grew from 50 to 64: stream 8 → 13, ask 0 → 5, serve 2 → 6"]
    assert grown(before, many, tasks=20) == []
