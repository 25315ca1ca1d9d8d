"""Idle connections to engines."""

from mesh_llm.api.upstream import EngineStream, IdlePool


class FakeStream:
    def __init__(self) -> None:
        self.usable = True
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


class Fixture:
    def __init__(self) -> None:
        self.now = 0.0
        self.pool = IdlePool(2, 3.0, lambda: self.now)

    def put(self, address: str) -> FakeStream:
        stream = FakeStream()
        self.pool.put(address, stream)  # type: ignore[arg-type]
        return stream

    def take(self, address: str) -> EngineStream | None:
        return self.pool.take(address)


def test_the_freshest_first_and_each_once():
    fixture = Fixture()
    first, second = fixture.put("a"), fixture.put("a")
    assert fixture.take("b") is None
    assert fixture.take("a") is second
    assert fixture.take("a") is first
    assert fixture.take("a") is None


def test_one_too_many_is_dropped():
    fixture = Fixture()
    streams = [fixture.put("a") for _ in range(3)]
    assert [stream.aborted for stream in streams] == [False, False, True]
    assert len(fixture.pool) == 2


def test_old_ones_are_dropped():
    fixture = Fixture()
    old = fixture.put("a")
    fixture.now = 2.0
    young = fixture.put("a")
    fixture.now = 4.0
    assert fixture.take("b") is None
    assert (old.aborted, young.aborted) == (True, False)
    assert fixture.take("a") is young


def test_closed_ones_are_passed_over():
    fixture = Fixture()
    alive, closed = fixture.put("a"), fixture.put("a")
    closed.usable = False
    assert fixture.take("a") is alive
    assert closed.aborted
    used_up = FakeStream()
    used_up.usable = False
    fixture.pool.put("a", used_up)  # type: ignore[arg-type]
    assert used_up.aborted


def test_closing_drops_all():
    fixture = Fixture()
    streams = [fixture.put("a"), fixture.put("b")]
    fixture.pool.close()
    assert all(stream.aborted for stream in streams)
    assert len(fixture.pool) == 0
