"""Fetching from a hub on loopback with the real client, and everything that can go wrong with it."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Generator
from pathlib import Path

import pytest
from tests.support.gguf_writer import Value, header, llama_metadata, llama_tensors
from tests.support.hub_server import Fault, HubServer

from mesh_llm.core.types.errors import MeshError
from mesh_llm.models.hub.client import HubClient
from mesh_llm.models.hub.fetch import Hub
from mesh_llm.models.hub.source_ref import SourceRef, parse_source
from mesh_llm.models.library.library import scan
from mesh_llm.runtime.transfer.partial_file import BLOCK_BYTES
from mesh_llm.runtime.transfer.progress import FetchCancelledError, Progress

REPOSITORY = "owner/Model-GGUF"
FILE = "Model-Q4_K_M.gguf"
PATH = f"{REPOSITORY}/{FILE}"


def model(seed: int = 1, width: int = 1024, **split: Value) -> bytes:
    metadata = llama_metadata(width=width, extra={key.replace("_", "."): value for key, value in split.items()})
    head, size = header(metadata, llama_tensors(width=width))
    return head + random.Random(seed).randbytes(size - len(head))


CONTENT = model()


@pytest.fixture
def server() -> Generator[HubServer]:
    with HubServer() as hub:
        hub.add(REPOSITORY, FILE, CONTENT)
        hub.add(REPOSITORY, "README.md", b"# A model", lfs=False)
        yield hub


class Fetching:
    def __init__(self, server: HubServer, cache: Path, token: str | bool = False) -> None:
        self.server = server
        self.cache = cache
        self.hub = Hub(HubClient(server.endpoint, token), cache, connections=3)
        self.progress: list[Progress] = []
        self.cancel = threading.Event()
        self.cancel_at: int | None = None

    def tell(self, progress: Progress) -> None:
        self.progress.append(progress)
        if self.cancel_at is not None and progress.done_bytes >= self.cancel_at:
            self.cancel.set()

    def fetch(self, spec: str = f"hf:{REPOSITORY}") -> tuple[Path, ...]:
        ref = parse_source(spec)
        return self.hub.fetch(self.hub.find(ref), self.tell, self.cancel, ref.revision)

    def refusal(self, spec: str = f"hf:{REPOSITORY}") -> MeshError:
        with pytest.raises(MeshError) as caught:
            self.fetch(spec)
        assert caught.value.hint
        return caught.value

    def offered(self) -> list[str]:
        return [str(name) for name in scan([self.cache], builtin=False).models]


@pytest.fixture
def fetching(server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fetching:
    monkeypatch.setattr("mesh_llm.runtime.transfer.fetch._LONGEST_PAUSE", 0.01)
    return Fetching(server, tmp_path / "hub")


def test_a_model_is_found_fetched_and_kept_as_other_tools_expect_it(fetching: Fetching) -> None:
    from huggingface_hub import hf_hub_download, scan_cache_dir  # pyright: ignore[reportUnknownVariableType]

    (path,) = fetching.fetch()
    assert path.read_bytes() == CONTENT
    assert path.is_symlink()
    assert fetching.offered() == ["Model-Q4_K_M"]
    assert fetching.progress[-1].total_bytes == len(CONTENT)
    # Several connections, each byte once, and the token nowhere.
    sent = [asked for asked in fetching.server.asked if asked.path.startswith("/content/")]
    assert len(sent) > 1
    assert fetching.server.content_bytes() == len(CONTENT)
    assert all(asked.host == fetching.server.content_host for asked in sent)

    theirs = hf_hub_download(REPOSITORY, FILE, cache_dir=fetching.cache, endpoint=fetching.server.endpoint, token=False)
    assert Path(theirs).samefile(path)
    assert fetching.server.content_bytes() == len(CONTENT)
    cached = scan_cache_dir(fetching.cache)
    assert [(repo.repo_id, repo.size_on_disk) for repo in cached.repos] == [(REPOSITORY, len(CONTENT))]
    assert not cached.warnings


def test_what_other_tools_fetched_is_used(fetching: Fetching) -> None:
    from huggingface_hub import hf_hub_download  # pyright: ignore[reportUnknownVariableType]

    hf_hub_download(REPOSITORY, FILE, cache_dir=fetching.cache, endpoint=fetching.server.endpoint, token=False)
    before = fetching.server.content_bytes()
    (path,) = fetching.fetch()
    assert path.read_bytes() == CONTENT
    assert fetching.server.content_bytes() == before


def test_parts_and_the_projector_come_together(fetching: Fetching) -> None:
    tensors = llama_tensors()
    parts: list[bytes] = []
    for number in range(2):
        split: dict[str, Value] = {"split.no": number, "split.count": 2, "split.tensors.count": len(tensors)}
        share = tensors[:5] if number == 0 else tensors[5:]
        head, size = header((llama_metadata() if number == 0 else {}) | split, share)
        parts.append(head.ljust(size, b"\0"))
        fetching.server.add("o/Big", f"Big-Q8_0-{number + 1:05d}-of-00002.gguf", parts[-1])
    head, size = header({"general.architecture": "clip"}, llama_tensors())
    for kind in ("BF16", "F16", "F32"):
        fetching.server.add("o/Big", f"mmproj-Big-{kind}.gguf", head.ljust(size, b"\0"))
    paths = fetching.fetch("hf:o/Big:Q8_0")
    assert [path.read_bytes() for path in paths] == parts
    assert fetching.offered() == ["Big-Q8_0"]
    assert [str(name) for name in scan([fetching.cache], builtin=False).projectors] == ["mmproj-Big-F16"]
    assert fetching.progress[-1].done_bytes == fetching.progress[-1].total_bytes


@pytest.mark.parametrize(
    "fault",
    [
        Fault(cut_after=BLOCK_BYTES + 5, times=6),
        Fault(status=503, times=3),
        Fault(status=429, retry_after="0", times=3),
        Fault(wrong_at=4_000_000, times=2),
        Fault(no_ranges=True),
    ],
)
def test_faults_that_pass_do_no_harm(fetching: Fetching, fault: Fault) -> None:
    fetching.server.faults[PATH] = fault
    (path,) = fetching.fetch()
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (Fault(cut_after=1000), "download_failed"),
        (Fault(status=500), "download_failed"),
        (Fault(status=404), "hub_failed"),
        (Fault(status=403), "download_failed"),
        (Fault(wrong_at=4_000_000), "download_corrupt"),
        (Fault(wrong_at=0), "download_invalid"),
    ],
)
def test_faults_that_stay_leave_nothing_that_is_offered(fetching: Fetching, fault: Fault, code: str) -> None:
    fetching.server.faults[PATH] = fault
    assert fetching.refusal().code == code
    assert fetching.offered() == []
    del fetching.server.faults[PATH]
    (path,) = fetching.fetch()
    assert path.read_bytes() == CONTENT


def test_cancelled_and_resumed_no_block_comes_twice_but_the_last(fetching: Fetching) -> None:
    fetching.server.faults[PATH] = Fault(bytes_per_second=20_000_000)
    fetching.cancel_at = 4 * BLOCK_BYTES
    with pytest.raises(FetchCancelledError):
        fetching.fetch()
    assert fetching.offered() == []
    fetching.cancel_at = None
    fetching.cancel.clear()
    fetching.fetch()
    assert fetching.offered() == ["Model-Q4_K_M"]
    assert fetching.server.content_bytes() <= len(CONTENT) + 3 * BLOCK_BYTES + 3 * 65_536


CHILD = """
import json, sys, threading
from pathlib import Path
from mesh_llm.models.hub.fetch import Hub
from mesh_llm.models.hub.client import HubClient
from mesh_llm.models.hub.source_ref import parse_source
endpoint, cache, spec = json.loads(sys.argv[1])
hub = Hub(HubClient(endpoint, False), Path(cache), connections=3)
def tell(progress):
    print(progress.phase, progress.done_bytes, flush=True)
hub.fetch(hub.find(parse_source(spec)), tell)
print("fetched", flush=True)
"""


def child(fetching: Fetching) -> subprocess.Popen[str]:
    argument = json.dumps([fetching.server.endpoint, str(fetching.cache), f"hf:{REPOSITORY}"])
    return subprocess.Popen([sys.executable, "-c", CHILD, argument], stdout=subprocess.PIPE, text=True, env=os.environ)


def test_killed_in_the_middle_it_goes_on_where_it_was(fetching: Fetching) -> None:
    fetching.server.faults[PATH] = Fault(bytes_per_second=4_000_000)
    process = child(fetching)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line.split()[1]) >= len(CONTENT) // 2:
            break
    process.send_signal(signal.SIGKILL)
    process.wait(20)
    process.stdout.close()
    assert fetching.offered() == []

    fetching.server.faults.clear()
    (path,) = fetching.fetch()
    assert path.read_bytes() == CONTENT
    twice = fetching.server.content_bytes() - len(CONTENT)
    print(f"killed after half of {len(CONTENT)} bytes; fetched twice: {twice}")
    # What each connection had under way, in its block, its socket and its pipe.
    assert twice <= 3 * (BLOCK_BYTES + (4 << 20))
    assert fetching.progress[0].done_bytes >= len(CONTENT) // 2


def test_two_processes_fetch_one_file_once(fetching: Fetching) -> None:
    slow = fetching.server.faults[PATH] = Fault(bytes_per_second=20_000)
    processes: list[subprocess.Popen[str]] = []
    for phase in ("fetching", "waiting"):
        process = child(fetching)
        processes.append(process)
        assert process.stdout is not None
        assert any(line.startswith(phase) for line in process.stdout)
    slow.bytes_per_second = 0
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert all(text.endswith("fetched\n") for text in said)
    assert fetching.server.content_bytes() == len(CONTENT)
    assert fetching.offered() == ["Model-Q4_K_M"]


def test_a_disk_that_is_too_small_is_told_before_the_first_byte(
    fetching: Fetching, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000
        total = 10**12

    def usage(path: Path) -> Usage:
        assert path.exists()
        return Usage()

    monkeypatch.setattr("shutil.disk_usage", usage)
    error = fetching.refusal()
    assert error.code == "disk_full"
    assert fetching.server.content_bytes() == 0


@pytest.mark.parametrize("size", [10**14, 10**18])
def test_a_hub_that_says_a_size_that_no_disk_has_is_refused_before_room_is_made_for_it(
    fetching: Fetching, size: int
) -> None:
    fetching.server.faults[f"{PATH}#metadata"] = Fault(size=size)
    tracemalloc.start()
    try:
        error = fetching.refusal()
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.code == "disk_full"
    # One byte for each of its blocks would be 95 MiB of memory, and as much of the disk.
    assert most < 20 << 20
    assert sum(path.stat().st_size for path in fetching.cache.rglob("*") if path.is_file()) < 1 << 20


@pytest.mark.parametrize("value", ["\xb2", "9" * 400, "1e9", "-1", ""])
def test_a_pause_that_makes_no_sense_is_none(fetching: Fetching, value: str) -> None:
    fetching.server.faults[f"{PATH}#metadata"] = Fault(status=429, retry_after=value)
    limited = fetching.refusal()
    assert (limited.code, limited.retry_after) == ("hub_rate_limited", None)


def test_what_is_not_there_is_told(fetching: Fetching) -> None:
    assert fetching.refusal("hf:no/where").code == "hub_not_found"
    assert fetching.refusal(f"hf:{REPOSITORY}@v9").code == "hub_not_found"
    assert "Model-Q4_K_M.gguf" in fetching.refusal(f"hf:{REPOSITORY}:Q8_0").hint
    ref = SourceRef(repository=REPOSITORY)
    gone = fetching.hub.find(ref)
    fetching.server.add(REPOSITORY, "other.gguf", b"x")
    del fetching.server.repositories[REPOSITORY].files[FILE]
    with pytest.raises(MeshError, match="no such revision"):
        fetching.hub.fetch(gone, fetching.tell)


def test_gated_repositories_need_a_token(fetching: Fetching) -> None:
    fetching.server.repositories[REPOSITORY].gated = True
    error = fetching.refusal()
    assert error.code == "hub_gated"
    assert "HF_TOKEN" in error.hint
    with_token = Fetching(fetching.server, fetching.cache, fetching.server.token)
    with_token.fetch()
    assert with_token.offered() == ["Model-Q4_K_M"]
    sent = [asked for asked in fetching.server.asked if asked.path.startswith("/content/")]
    assert sent
    assert not any(asked.authorised for asked in sent)


def test_rate_limits_and_outages_are_told(fetching: Fetching) -> None:
    fetching.server.faults[f"{PATH}#metadata"] = Fault(status=429, retry_after="7")
    limited = fetching.refusal()
    assert (limited.code, limited.retry_after) == ("hub_rate_limited", 7.0)
    fetching.server.faults[f"{PATH}#metadata"] = Fault(status=500)
    assert fetching.refusal().code == "hub_failed"
    down = Hub(HubClient("http://127.0.0.1:9", False), fetching.cache)
    with pytest.raises(MeshError) as caught:
        down.find(SourceRef(repository=REPOSITORY))
    assert caught.value.code == "hub_unreachable"


@pytest.mark.parametrize(
    "answer",
    [
        b"<html>Sign in to this network</html>",
        b"[]",
        b"{}",
        b'{"id": 3, "sha": 5}',
        b'{"id": "a/b", "sha": "abc", "siblings": [{}]}',
        b'{"id": "a/b", "sha": "abc", "siblings": "none"}',
        b'{"id": "a/b", "sha": "abc", "siblings": [{"rfilename": 7, "size": "much", "lfs": []}]}',
        b'[{"id": null, "downloads": "many"}]',
    ],
)
def test_an_answer_that_makes_no_sense_is_an_error_with_a_next_step(fetching: Fetching, answer: bytes) -> None:
    model = fetching.hub.find(parse_source(f"hf:{REPOSITORY}"))
    fetching.server.instead = answer
    with pytest.raises(MeshError) as found:
        fetching.fetch()
    with pytest.raises(MeshError) as fetched:
        fetching.hub.fetch(model, fetching.tell)
    assert {found.value.code, fetched.value.code} == {"hub_failed"}
    assert found.value.hint
    assert fetched.value.hint
    if answer.startswith((b"<", b"[{")):
        with pytest.raises(MeshError) as searched:
            fetching.hub.client.search("model")
        assert searched.value.code == "hub_failed"


def test_a_cache_that_cannot_be_written_is_an_error_with_a_next_step(fetching: Fetching, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    hub = Hub(HubClient(fetching.server.endpoint, token=False), tmp_path / "file" / "hub")
    model = hub.find(parse_source(f"hf:{REPOSITORY}"))
    with pytest.raises(MeshError) as caught:
        hub.fetch(model, fetching.tell)
    assert caught.value.code == "disk_failed"
    assert "HF_HOME" in caught.value.hint


def test_an_empty_endpoint_means_the_public_hub() -> None:
    code = "from mesh_llm.models.hub.client import HubClient; print(HubClient().endpoint)"
    environment = {**os.environ, "HF_ENDPOINT": ""}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("https://")


def test_warnings_of_the_hubs_library_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("huggingface_hub.utils._http").warning("Retrying in 1s [Retry 1/5].")
    assert "Retrying" not in capfd.readouterr().err


def test_a_file_that_is_no_model_is_not_kept(fetching: Fetching) -> None:
    fetching.server.add("o/Bad", "bad.gguf", b"GGUF" + b"\xff" * 100)
    error = fetching.refusal("hf:o/Bad")
    assert error.code == "download_invalid"
    assert not list((fetching.cache / "models--o--Bad" / "blobs").iterdir())


def test_searching(fetching: Fetching) -> None:
    fetching.server.add("other/Model-7B-GGUF", FILE, CONTENT)
    fetching.server.repositories["other/Model-7B-GGUF"].downloads = 99
    found = fetching.hub.client.search("model gguf")
    assert [hit.repository for hit in found] == ["other/Model-7B-GGUF", REPOSITORY]
