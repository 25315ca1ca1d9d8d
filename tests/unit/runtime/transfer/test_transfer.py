import hashlib
import random
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples

from mesh_llm.core.types.errors import MeshError
from mesh_llm.runtime.transfer.fetch import Job, NoRangesError, TransientError, fetch
from mesh_llm.runtime.transfer.partial_file import BLOCK_BYTES, PartialFile
from mesh_llm.runtime.transfer.progress import FetchCancelledError, Progress

CONTENT = random.Random(1).randbytes(5 * BLOCK_BYTES + 12_345)


class Server:
    """Opens parts of a content; each list entry of `faults` spoils one connection."""

    def __init__(self, content: bytes = CONTENT, *, ranges: bool = True) -> None:
        self.content = content
        self.ranges = ranges
        self.faults: list[str] = []
        self.opened: list[tuple[int, int | None]] = []
        self.sent = 0
        self.limit: int | None = None
        self._lock = threading.Lock()

    @contextmanager
    def __call__(self, begin: int, end: int | None) -> Generator[Iterator[bytes]]:
        with self._lock:
            self.opened.append((begin, end))
            fault = self.faults.pop(0) if self.faults else ""
        if end is not None and not self.ranges:
            raise NoRangesError
        if fault == "refuse":
            raise TransientError("refused", 0.0)
        yield self._pieces(self.content[begin:end], fault)

    def _pieces(self, data: bytes, fault: str) -> Iterator[bytes]:
        if fault == "wrong":
            data = data[:100] + bytes([data[100] ^ 1]) + data[101:]
        stop = len(data) * 2 // 3 if fault in {"cut", "break"} else len(data)
        for at in range(0, stop, 70_000):
            with self._lock:
                if self.limit is not None and self.sent >= self.limit:
                    raise TransientError("enough", 0.0)
                self.sent += min(70_000, stop - at)
            yield data[at : min(at + 70_000, stop)]
        if fault == "break":
            raise TransientError("broken", 0.0)


class Place:
    def __init__(self, folder: Path) -> None:
        self.partial = folder / "blobs" / "x.incomplete"
        self.target = folder / "blobs" / "x"
        self.progress: list[Progress] = []
        self.cancel = threading.Event()
        self.cancel_at = len(CONTENT) + 1

    def tell(self, progress: Progress) -> None:
        self.progress.append(progress)
        if progress.done_bytes >= self.cancel_at:
            self.cancel.set()

    def fetch(self, server: Server, *, connections: int = 3, sha256: str | None = None, prefix: bytes = b"") -> None:
        digest = hashlib.sha256(CONTENT).hexdigest() if sha256 is None else sha256
        job = Job(
            name="m.gguf",
            size=len(CONTENT),
            sha256=digest,
            digest=digest or "etag",
            prefix=prefix,
            kind=("a GGUF file", "Choose another."),
        )
        fetch(job, self.partial, self.target, server, self.tell, self.cancel, connections, first_pause=0.0)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_a_file_arrives_whole_and_leaves_nothing_beside_it(place: Place) -> None:
    place.fetch(Server())
    assert place.target.read_bytes() == CONTENT
    assert [path.name for path in place.target.parent.iterdir()] == ["x"]
    fetching = [item for item in place.progress if item.phase == "fetching"]
    assert [item.done_bytes for item in fetching] == sorted(item.done_bytes for item in fetching)
    assert fetching[-1].done_bytes == fetching[-1].fetched_bytes == len(CONTENT)
    assert place.progress[-1].phase == "checking"
    assert place.progress[-1].done_bytes == place.progress[-1].total_bytes == len(CONTENT)


@pytest.mark.parametrize("fault", ["cut", "break", "refuse"])
def test_broken_connections_are_taken_up_where_they_broke(place: Place, fault: str) -> None:
    server = Server()
    server.faults = [fault] * 4
    place.fetch(server, connections=1)
    assert place.target.read_bytes() == CONTENT
    assert server.sent <= len(CONTENT) + 4 * BLOCK_BYTES


def test_a_server_that_never_gets_on_is_given_up_and_what_came_is_kept(place: Place) -> None:
    server = Server()
    server.limit = 3 * BLOCK_BYTES
    with pytest.raises(MeshError, match="cannot be fetched: enough") as caught:
        place.fetch(server)
    assert caught.value.code == "download_failed"
    assert not place.target.exists()
    kept = server.sent
    server.limit = None
    place.fetch(server)
    assert place.target.read_bytes() == CONTENT
    # At most the block that each connection was in the middle of comes twice.
    assert server.sent <= len(CONTENT) + 3 * BLOCK_BYTES
    assert server.sent < kept + len(CONTENT)


def test_a_wrong_byte_is_caught_and_fetched_again(place: Place) -> None:
    server = Server()
    server.faults = ["wrong"]
    place.fetch(server)
    assert place.target.read_bytes() == CONTENT


def test_a_file_that_stays_wrong_is_never_offered(place: Place) -> None:
    with pytest.raises(MeshError) as caught:
        place.fetch(Server(bytes([CONTENT[0] ^ 1]) + CONTENT[1:]))
    assert caught.value.code == "download_corrupt"
    assert not list(place.target.parent.iterdir())


def test_what_does_not_begin_right_is_given_up_at_once(place: Place) -> None:
    server = Server()
    with pytest.raises(MeshError, match="is not a GGUF file") as caught:
        place.fetch(server, connections=1, prefix=b"GGUF")
    assert caught.value.code == "download_invalid"
    assert server.sent < 2 * BLOCK_BYTES


def test_a_server_without_ranges_is_read_in_one_go(place: Place) -> None:
    server = Server(ranges=False)
    server.faults = ["", "cut"]
    place.fetch(server, connections=1)
    assert place.target.read_bytes() == CONTENT
    assert server.opened[1:] == [(0, None), (0, None)]


def test_cancelling_keeps_what_came(place: Place) -> None:
    server = Server()
    place.cancel_at = 2 * BLOCK_BYTES
    with pytest.raises(FetchCancelledError):
        place.fetch(server, connections=1)
    assert not place.target.exists()
    assert place.partial.exists()


def test_without_a_known_digest_the_size_decides(place: Place) -> None:
    place.fetch(Server(), sha256="")
    assert place.target.read_bytes() == CONTENT


def test_an_empty_file(tmp_path: Path) -> None:
    job = Job(name="e", size=0, sha256=hashlib.sha256(b"").hexdigest(), digest="e")
    fetch(job, tmp_path / "p", tmp_path / "t", Server(b""), lambda _: None, threading.Event())
    assert (tmp_path / "t").read_bytes() == b""


def test_blocks_are_remembered(tmp_path: Path) -> None:
    path = tmp_path / "p"
    with PartialFile(path, len(CONTENT), "d") as file:
        assert list(file.missing(4)) == [range(4), range(4, 6)]
        for block in (1, 5):
            begin, end = file.block_range(block)
            file.write(block, CONTENT[begin:end])
        assert file.done_bytes == BLOCK_BYTES + 12_345
        with pytest.raises(ValueError, match="block 0"):
            file.write(0, b"short")
    with PartialFile(path, len(CONTENT), "d") as file:
        assert list(file.missing(4)) == [range(1), range(2, 5)]
    with PartialFile(path, len(CONTENT), "other") as file:
        assert file.done_bytes == 0


@given(st.binary(max_size=100), st.integers(0, 3 * BLOCK_BYTES))
@examples(60)
def test_a_journal_of_any_content_claims_no_block_that_is_not_there(
    tmp_path_factory: pytest.TempPathFactory, garbage: bytes, there: int
) -> None:
    path = tmp_path_factory.mktemp("p") / "p"
    with PartialFile(path, 2 * BLOCK_BYTES + 1, "d") as file:
        line = path.with_name("p.journal").read_bytes()[: -file.blocks]
    for journal in (garbage, line + garbage):
        path.with_name("p.journal").write_bytes(journal)
        with path.open("wb") as cut:
            cut.truncate(there)
        with PartialFile(path, 2 * BLOCK_BYTES + 1, "d") as file:
            missing = {block for run in file.missing(8) for block in run}
            assert file.complete == (not missing)
            assert {block for block in range(3) if file.block_range(block)[1] > there and there != file.size} <= missing
            assert len(path.with_name("p.journal").read_bytes()) >= len(line)


def test_a_thread_that_fails_in_an_unexpected_way_ends_the_fetch(tmp_path: Path) -> None:
    place = Place(tmp_path)

    @contextmanager
    def broken(begin: int, end: int | None) -> Generator[Iterator[bytes]]:
        raise LookupError("nobody expected this")
        yield iter(())

    job = Job(name="x", size=len(CONTENT), sha256="", digest="x")
    with pytest.raises(LookupError, match="nobody expected"):
        fetch(job, place.partial, place.target, broken, place.progress.append, threading.Event())
