from mesh_llm.core.membership.gossip import BroadcastQueue


def test_the_least_sent_goes_first() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    queue.add("old")
    queue.take(1, limit=5)
    queue.add("new")
    assert queue.take(1, limit=5) == ["new"]
    assert queue.take(2, limit=5) == ["old", "new"]


def test_each_is_sent_so_many_times() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    queue.add("a")
    assert [queue.take(5, limit=3) for _ in range(4)] == [["a"], ["a"], ["a"], []]
    assert "a" not in queue
    assert len(queue) == 0


def test_once_per_message() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    queue.add("a")
    assert queue.take(5, limit=9) == ["a"]


def test_adding_again_begins_again() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    queue.add("a")
    queue.take(1, limit=2)
    queue.add("a")
    assert [queue.take(1, limit=2) for _ in range(3)] == [["a"], ["a"], []]


def test_what_is_discarded_is_not_sent() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    queue.add("a")
    queue.discard("a")
    queue.discard("b")
    assert queue.take(5, limit=3) == []


def test_a_range_of_tellings() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    queue.add("a")
    assert queue.take(5, limit=4, since=2) == []
    assert queue.take(5, limit=4, until=2) == ["a"]
    assert queue.take(5, limit=4, until=2) == ["a"]
    assert queue.take(5, limit=4, until=2) == []
    assert queue.take(5, limit=4, until=0) == []
    assert queue.take(5, limit=4, since=2) == ["a"]


def test_the_first_refusal_ends_the_taking() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    for name in "abcd":
        queue.add(name)
    asked: list[str] = []

    def accept(key: str) -> bool:
        asked.append(key)
        return key != "c"

    assert queue.take(9, limit=3, accept=accept) == ["a", "b"]
    assert asked == ["a", "b", "c"]
    assert queue.take(9, limit=3) == ["c", "d", "a", "b"]


def test_the_most_sent_makes_room() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(2)
    queue.add("a")
    queue.add("b")
    queue.take(1, limit=9)
    queue.add("c")
    assert len(queue) == 2
    assert "a" not in queue
    assert queue.take(9, limit=9) == ["b", "c"]


def test_lesser_news_begins_as_if_sent_already() -> None:
    queue: BroadcastQueue[str] = BroadcastQueue(10)
    queue.add("small", sent=2)
    queue.add("great")
    assert queue.take(2, limit=3) == ["great", "small"]
    assert queue.take(2, limit=3) == ["great"]
