"""Downloads at the edges that a real hub does not show: how many, which are remembered, what is told at the end."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mesh_llm.console.schema import ModelAccepted
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.model import Capacity, ModelFacts
from mesh_llm.daemon import downloads as module
from mesh_llm.daemon import model_fetcher as fetching
from mesh_llm.daemon.downloads import MOST_AT_ONCE, Downloads
from mesh_llm.daemon.model_fetcher import HubFiles
from mesh_llm.daemon.model_registry import Machine, ModelRegistry
from mesh_llm.daemon.published_state import PublishedState, ignore_progress
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.hub.source_ref import RemoteModel, RepositoryFile, SourceRef
from mesh_llm.models.library.library import FactsCache, Library
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.runtime.transfer.progress import OnProgress, Progress


class Hub:
    """In place of the hub: each fetch goes on until it is told how to end."""

    def __init__(self) -> None:
        self.begun: list[SourceRef] = []
        self.ends: dict[str, asyncio.Future[Exception | None]] = {}
        self.changed = asyncio.Event()

    async def fetch(self, ref: SourceRef, watch: OnProgress, check: Callable[[RemoteModel], None]) -> HubFiles:
        self.begun.append(ref)
        end = self.ends[ref.repository] = asyncio.get_running_loop().create_future()
        name = ref.repository.partition("/")[2]
        files = (RepositoryFile(path=f"{name}.gguf", size=1000),)
        model = RemoteModel(name=name, files=files, repository=ref.repository, revision="main")
        check(model)
        self.changed.set()
        error = await end
        if error is not None:
            raise error
        watch(Progress(phase="checking", done_bytes=1000, total_bytes=1000, fetched_bytes=1000))
        return HubFiles(model, (Path(f"/cache/{name}.gguf"),))

    async def until_begun(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.begun) < count:
                self.changed.clear()
                await self.changed.wait()


class Alone:
    """Nobody else is in the mesh."""

    def shared(self) -> list[ModelFacts]:
        return []

    def who_has(self, name: ModelName, fingerprint: str) -> list[NodeId]:
        return []

    def names(self, nodes: Sequence[NodeId]) -> str:
        return ""

    async def take(
        self, name: ModelName, fingerprint: str, on_progress: OnProgress, *, published: RemoteModel | None = None
    ) -> tuple[Path, ...]:
        raise AssertionError("nobody was to be asked")


class World:
    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, joins: bool = False) -> None:
        self.hub = Hub()
        self.loaded: list[str] = []
        self.events: list[AnyEvent] = []
        monkeypatch.setattr(fetching, "fetch_watched", self.hub.fetch)
        monkeypatch.setenv("MESH_LLM_MODELS", str(tmp_path / "models"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
        monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
        cache = FactsCache()
        machine = Machine(
            source=None, devices=(), capacity=Capacity(), registry=ModelRegistry(Library(), cache), cache=cache
        )
        fetcher = fetching.ModelFetcher(machine, Alone())
        self.published = PublishedState(NodeId("a" * 64), ignore_progress, joins=joins)
        self.downloads = Downloads(
            Settings(home=tmp_path), machine, fetcher, self.events.append, self.published, self.load
        )

    async def load(self, name: str) -> ModelAccepted:
        self.loaded.append(name)
        if "big" in name:
            raise MeshError(code="does_not_fit", message="too big", hint="smaller")
        return ModelAccepted(model=name)

    async def ended(self, identity: str) -> module.DownloadRecord:
        async with asyncio.timeout(10):
            while True:
                record = next(one for one in self.downloads.records() if one.id == identity)
                if record.ended is not None:
                    return record
                await self.published.changes.wait(10)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    return World(tmp_path, monkeypatch)


async def test_few_at_once_and_none_twice(world: World) -> None:
    records = [await world.downloads.start(f"hf:o/m{number}", load=False) for number in range(MOST_AT_ONCE)]
    assert (await world.downloads.start("hf:o/m0", load=False)).id == records[0].id
    with pytest.raises(MeshError) as refused:
        await world.downloads.start("hf:o/other", load=False)
    assert refused.value.code == "too_many_downloads"
    await world.hub.until_begun(MOST_AT_ONCE)
    world.hub.ends["o/m0"].set_result(None)
    ended = await world.ended(records[0].id)
    assert (ended.phase, ended.path) == ("done", "/cache/m0.gguf")
    await world.downloads.start("hf:o/other", load=False)
    await world.downloads.close()
    phases = sorted(record.phase for record in world.downloads.records())
    assert phases == ["cancelled"] * MOST_AT_ONCE + ["done"]


async def test_without_the_hub_nobody_is_asked_where_no_neighbour_has_it(world: World) -> None:
    for source in ("hf:o/m", "hf:o/m:m.gguf"):
        with pytest.raises(MeshError) as refused:
            await world.downloads.start(source, load=False, hub=False)
        assert refused.value.code == "no_neighbour"
    assert world.downloads.records() == []
    assert world.hub.begun == []


async def test_what_is_on_disk_but_cannot_be_served_is_done_with_a_reason(world: World) -> None:
    record = await world.downloads.start("hf:o/big", load=True)
    await world.hub.until_begun(1)
    world.hub.ends["o/big"].set_result(None)
    ended = await world.ended(record.id)
    assert ended.phase == "done"
    assert ended.error is not None
    assert ended.error.code == "does_not_fit"
    await world.downloads.close()


async def test_a_failure_is_told_and_the_next_try_is_a_new_one(world: World) -> None:
    record = await world.downloads.start("hf:o/m", load=True)
    await world.hub.until_begun(1)
    world.hub.ends["o/m"].set_result(MeshError(code="hub_unreachable", message="no", hint="later"))
    ended = await world.ended(record.id)
    assert (ended.phase, ended.error is not None and ended.error.hint) == ("failed", "later")
    assert world.loaded == []
    again = await world.downloads.start("hf:o/m", load=True)
    assert again.id != record.id
    assert [one.id for one in world.downloads.records()] == [again.id, record.id]
    cancelled = await world.downloads.cancel(again.id)
    assert (cancelled.phase, (await world.downloads.cancel(again.id)).phase) == ("cancelled", "cancelled")
    await world.downloads.close()


async def test_old_ones_are_forgotten(world: World) -> None:
    begun: list[str] = []
    for _ in range(60):
        begun.append((await world.downloads.start("hf:o/m", load=False)).id)
        await world.downloads.cancel(begun[-1])
    assert [record.id for record in world.downloads.records()] == begun[:-51:-1]
    await world.downloads.close()


async def test_what_the_mesh_has_is_waited_for_while_the_node_joins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch, joins=True)

    async def joined() -> bool:
        return True

    async with TaskScope("test") as scope:
        starting = scope.spawn(world.downloads.start("hf:a/one:one.gguf", load=False), "start")
        await asyncio.sleep(0)
        assert world.downloads.records() == []
        joining = scope.spawn(joined(), "join")
        await world.published.follow_join(joining, lambda: True)
        assert (await starting).phase == "asking"
    await world.downloads.close()


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (PermissionError(13, "Permission denied", "/cache/x"), "disk_failed", "/cache/x: Permission denied"),
        (OSError(28, "No space left on device"), "disk_full", "No space left on device"),
        (ZeroDivisionError("nobody expected this"), "internal", "a fault in mesh-llm"),
    ],
)
async def test_whatever_happens_a_download_ends_and_says_why(
    world: World, failure: Exception, code: str, says: str
) -> None:
    record = await world.downloads.start("hf:o/m", load=True)
    await world.hub.until_begun(1)
    world.hub.ends["o/m"].set_result(failure)
    ended = await world.ended(record.id)
    assert ended.phase == "failed"
    assert ended.error is not None
    assert (ended.error.code, says in ended.error.message) == (code, True)
    assert ended.error.hint
    assert world.loaded == []
    await world.downloads.close()
