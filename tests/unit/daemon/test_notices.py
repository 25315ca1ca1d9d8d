import asyncio

from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.daemon.published_state import ChangeSignal, NoticeLog


def notice(text: str) -> Notice:
    return Notice(level=NoticeLevel.WARNING, code="c", text=text, about="m")


async def test_notices_are_numbered_kept_and_told() -> None:
    told: list[Notice] = []
    book = NoticeLog(ChangeSignal(), told.append, wall_clock=lambda: 5.0)
    for text in ("one", "two", "three"):
        book.add(notice(text))
    assert [(record.id, record.text) for record in book.after(1)] == [(2, "two"), (3, "three")]
    assert book.after(3) == []
    (first, *_) = book.after(0)
    assert (first.at, first.level, first.code, first.about) == (5.0, "warning", "c", "m")
    assert [one.text for one in told] == ["one", "two", "three"]


async def test_old_ones_are_forgotten_and_numbers_go_on() -> None:
    book = NoticeLog(ChangeSignal(), lambda _: None)
    for number in range(700):
        book.add(notice(str(number)))
    records = book.after(0)
    assert (len(records), records[0].id, records[-1].id) == (500, 201, 700)


async def test_the_changes_wakes_all_and_each_ring_once() -> None:
    changes = ChangeSignal()
    waiting = asyncio.gather(changes.wait(5.0), changes.wait(5.0))
    await asyncio.sleep(0)
    changes.notify()
    assert await waiting == [True, True]
    assert await changes.wait(0.01) is False
