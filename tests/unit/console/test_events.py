"""The event stream: what it brings, where it goes on, and how many may read."""

import asyncio
from pathlib import Path

import msgspec
import pytest
from tests.unit.console.fake_daemon import FakeDaemon

from mesh_llm.console.auth import Sessions
from mesh_llm.console.calls import Backend, Capabilities
from mesh_llm.console.events import MOST_READERS, EventFeed
from mesh_llm.console.logs import LogReader
from mesh_llm.console.schema import DownloadRecord, NoticeRecord
from mesh_llm.core.types.errors import MeshError


@pytest.fixture
def daemon() -> FakeDaemon:
    return FakeDaemon()


@pytest.fixture
def desk(daemon: FakeDaemon, tmp_path: Path) -> Backend:
    return Backend(daemon, LogReader(tmp_path))


async def test_they_bring_notices_and_status_and_go_on(daemon: FakeDaemon, desk: Backend) -> None:
    stream = EventFeed(desk, "run").open(0)
    assert await anext(stream) == b"retry: 1000\n\n"
    assert (await anext(stream)).startswith(b"id: run.1\nevent: notice\n")
    assert (await anext(stream)).startswith(b"id: run.1\nevent: status\n")
    daemon.records.append(NoticeRecord(id=2, at=1.0, level="info", code="peer_joined", text="hello"))
    daemon.changed.set()
    assert (await anext(stream)).startswith(b"id: run.2\nevent: notice\n")
    await stream.aclose()


async def test_a_status_that_differs_by_the_clock_only_is_no_news(daemon: FakeDaemon, desk: Backend) -> None:
    stream = EventFeed(desk, "run").open(1)
    await anext(stream)
    assert b"event: status\n" in await anext(stream)
    daemon.uptime = 7.0
    daemon.ticks = 20
    assert await anext(stream) == b": still here\n\n"
    daemon.health = "loading"
    daemon.changed.set()
    assert b"event: status\n" in await anext(stream)
    await stream.aclose()


def test_they_resume_after_an_id_of_this_run_only(desk: Backend) -> None:
    feed = EventFeed(desk, "run")
    assert feed.after("run.7") == 7
    for other in (None, "", "7", "former.7", "run.", "run.-1", "run.1e3", "run." + "9" * 40, "run.٣"):
        assert feed.after(other) == 0


async def test_downloads_are_told_as_they_go_on(daemon: FakeDaemon, tmp_path: Path) -> None:
    records = [DownloadRecord(id="d1", model="m", phase="asking", started=0.0)]

    class Downloads:
        def records(self) -> list[DownloadRecord]:
            return list(records)

        async def start(self, model: str, *, load: bool, hub: bool = True) -> DownloadRecord:
            return records[0]

        async def cancel(self, download: str) -> DownloadRecord:
            return records[0]

    desk = Backend(daemon, LogReader(tmp_path), Capabilities(downloader=Downloads()))
    stream = EventFeed(desk, "run").open(1)
    await anext(stream)
    await anext(stream)
    assert b'"phase":"asking"' in await anext(stream)
    records[0] = msgspec.structs.replace(records[0], phase="fetching", done_bytes=5)
    daemon.changed.set()
    assert b'"done_bytes":5' in await anext(stream)
    await stream.aclose()


async def test_the_status_is_built_once_for_all_readers(daemon: FakeDaemon, desk: Backend) -> None:
    feed = EventFeed(desk, "run")
    streams = [feed.open(1) for _ in range(20)]
    for stream in streams:
        await anext(stream)
        assert b"event: status\n" in await anext(stream)
    assert daemon.built == 1
    daemon.health = "loading"
    daemon.changed.set()
    assert all(b'"health":"loading"' in event for event in [await anext(stream) for stream in streams])
    assert daemon.built == 2
    for stream in streams:
        await stream.aclose()
    # Nobody reads: nobody looks.
    daemon.changed.set()
    await asyncio.sleep(0)
    assert daemon.built == 2
    again = feed.open(1)
    await anext(again)
    assert b'"health":"loading"' in await anext(again)
    await again.aclose()
    await feed.close()


async def test_who_may_have_no_more_gets_no_more(daemon: FakeDaemon, desk: Backend) -> None:
    sessions = Sessions()
    session = sessions.open()
    feed = EventFeed(desk, "run")
    stream = feed.open(1, lambda: sessions.is_open(session.cookie))
    await anext(stream)
    assert b"event: status\n" in await anext(stream)
    sessions.end_all()
    daemon.health = "loading"
    daemon.changed.set()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await feed.close()


async def test_a_fault_ends_the_streams_and_the_next_reader_begins_anew(daemon: FakeDaemon, desk: Backend) -> None:
    feed = EventFeed(desk, "run")
    stream = feed.open(1)
    await anext(stream)
    await anext(stream)
    daemon.fault = RuntimeError("no status now")
    daemon.changed.set()
    with pytest.raises(RuntimeError, match="no status now"):
        await anext(stream)
    daemon.fault = None
    again = feed.open(1)
    await anext(again)
    assert b"event: status\n" in await anext(again)
    await again.aclose()
    await feed.close()


async def test_readers_are_counted(desk: Backend) -> None:
    feed = EventFeed(desk, "run")
    streams = [feed.open(0) for _ in range(MOST_READERS)]
    for stream in streams:
        await anext(stream)
    with pytest.raises(MeshError) as refused:
        feed.open(0)
    assert refused.value.code == "too_many_readers"
    await streams.pop().aclose()
    last = feed.open(0)
    await anext(last)
    for stream in [*streams, last]:
        await stream.aclose()
