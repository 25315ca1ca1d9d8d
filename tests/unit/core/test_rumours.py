from mesh_llm.core.membership.gossip import Rumours


def test_the_least_told_goes_first() -> None:
    rumours: Rumours[str] = Rumours(10)
    rumours.add("old")
    rumours.take(1, limit=5)
    rumours.add("new")
    assert rumours.take(1, limit=5) == ["new"]
    assert rumours.take(2, limit=5) == ["old", "new"]


def test_each_is_told_so_many_times() -> None:
    rumours: Rumours[str] = Rumours(10)
    rumours.add("a")
    assert [rumours.take(5, limit=3) for _ in range(4)] == [["a"], ["a"], ["a"], []]
    assert "a" not in rumours
    assert len(rumours) == 0


def test_once_per_message() -> None:
    rumours: Rumours[str] = Rumours(10)
    rumours.add("a")
    assert rumours.take(5, limit=9) == ["a"]


def test_adding_again_begins_again() -> None:
    rumours: Rumours[str] = Rumours(10)
    rumours.add("a")
    rumours.take(1, limit=2)
    rumours.add("a")
    assert [rumours.take(1, limit=2) for _ in range(3)] == [["a"], ["a"], []]


def test_what_is_discarded_is_not_told() -> None:
    rumours: Rumours[str] = Rumours(10)
    rumours.add("a")
    rumours.discard("a")
    rumours.discard("b")
    assert rumours.take(5, limit=3) == []


def test_a_range_of_tellings() -> None:
    rumours: Rumours[str] = Rumours(10)
    rumours.add("a")
    assert rumours.take(5, limit=4, since=2) == []
    assert rumours.take(5, limit=4, until=2) == ["a"]
    assert rumours.take(5, limit=4, until=2) == ["a"]
    assert rumours.take(5, limit=4, until=2) == []
    assert rumours.take(5, limit=4, until=0) == []
    assert rumours.take(5, limit=4, since=2) == ["a"]


def test_the_first_refusal_ends_the_taking() -> None:
    rumours: Rumours[str] = Rumours(10)
    for name in "abcd":
        rumours.add(name)
    asked: list[str] = []

    def accept(key: str) -> bool:
        asked.append(key)
        return key != "c"

    assert rumours.take(9, limit=3, accept=accept) == ["a", "b"]
    assert asked == ["a", "b", "c"]
    assert rumours.take(9, limit=3) == ["c", "d", "a", "b"]


def test_the_most_told_makes_room() -> None:
    rumours: Rumours[str] = Rumours(2)
    rumours.add("a")
    rumours.add("b")
    rumours.take(1, limit=9)
    rumours.add("c")
    assert len(rumours) == 2
    assert "a" not in rumours
    assert rumours.take(9, limit=9) == ["b", "c"]


def test_lesser_news_begins_as_if_told_already() -> None:
    rumours: Rumours[str] = Rumours(10)
    rumours.add("small", told=2)
    rumours.add("great")
    assert rumours.take(2, limit=3) == ["great", "small"]
    assert rumours.take(2, limit=3) == ["great"]
