"""Models are taken from neighbours: whole, right, from several at once, and nothing wrong is ever offered."""

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

import msgspec
import pytest
from tests.support.neighbours import Mesh, Spoiled, content, fingerprint_of, put, real

from mesh_llm.core.types.ids import NodeId
from mesh_llm.models.hub.cache import CachedRepository
from mesh_llm.models.hub.source_ref import SourceRef
from mesh_llm.models.p2p.assembler import in_hub_cache
from mesh_llm.models.p2p.digests import CHUNK_BYTES, ChunkDigestStore
from mesh_llm.models.p2p.downloader import NoSeedersError
from mesh_llm.runtime.supervision import TaskScope

COMMIT = "a" * 40


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, random_model: Callable[[str], Path]) -> Path:
    """A GGUF of several chunks: what follows the tensors belongs to the file as well."""
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    path.write_bytes(content(random_model("small")) + bytes(range(256)) * (5 * CHUNK_BYTES // 256) + b"end")
    return path


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncGenerator[Mesh]:
    async with Mesh(tmp_path) as mesh:
        yield mesh


def _is_clean(directory: Path, *names: str) -> bool:
    return sorted(path.name for path in directory.iterdir()) == sorted(names)


async def test_a_model_is_taken_whole_and_can_be_given_on(mesh: Mesh, model: Path) -> None:
    mesh.add(1, model)
    (path,), taking = await mesh.take(model)
    assert path == mesh.root / "taken" / "m.gguf"
    assert content(path) == content(model)
    assert taking.received.total == len(content(model))
    assert _is_clean(path.parent, "m.gguf")
    kept = ChunkDigestStore(mesh.root / "lists").get(path)
    assert kept is not None
    assert kept.sha256 == hashlib.sha256(content(model)).digest()
    assert [one.phase for one in mesh.progress][-1] == "fetching"
    assert mesh.progress[-1].done_bytes == mesh.progress[-1].total_bytes == len(content(model))


async def test_a_source_puts_it_where_the_hub_would(mesh: Mesh, model: Path) -> None:
    mesh.add(1, model)
    ref = SourceRef(repository="some/repo", file="quants/m.gguf", revision=COMMIT)
    place = in_hub_cache(ref, mesh.root / "hub")
    (path,), _ = await mesh.take(model, place=place)
    repository = CachedRepository(mesh.root / "hub", "some/repo")
    assert path == repository.link(COMMIT, "quants/m.gguf")
    assert real(path) == repository.content(hashlib.sha256(content(model)).hexdigest())
    assert content(path) == content(model)
    # A second process that asks for it finds it, and takes nothing.
    _, again = await mesh.take(model, place=place)
    assert again.received.total == 0


async def test_several_nodes_give_at_once(mesh: Mesh, model: Path) -> None:
    nodes = [mesh.add(number, model, rate=40e6) for number in (1, 2, 3)]
    (path,), taking = await mesh.take(model)
    assert content(path) == content(model)
    assert set(taking.received.by_seeder) == set(nodes)
    assert min(taking.received.by_seeder.values()) > 0


async def test_a_node_that_lies_is_dropped_and_the_rest_comes_from_others(mesh: Mesh, model: Path) -> None:
    liar = mesh.add(1, model, spoil=lambda end: Spoiled(end, flip_at=CHUNK_BYTES + 5000))
    mesh.add(2, model, rate=20e6)
    (path,), taking = await mesh.take(model)
    assert content(path) == content(model)
    assert mesh.failures[liar].liar
    assert taking.received.total < len(content(model)) + 6 * CHUNK_BYTES


async def test_a_node_that_dies_is_made_up_for(mesh: Mesh, model: Path) -> None:
    dying = mesh.add(1, model, spoil=lambda end: Spoiled(end, die_at=2 * CHUNK_BYTES))
    mesh.add(2, model, rate=20e6)
    (path,), _ = await mesh.take(model)
    assert content(path) == content(model)
    assert not mesh.failures[dying].liar


@pytest.mark.parametrize("silent", [1, 2])
async def test_a_node_whose_tcp_is_silent_is_asked_once_more(mesh: Mesh, model: Path, silent: int) -> None:
    node = mesh.nodes[mesh.add(1, model)]
    node.silent = silent
    if silent == 1:
        (path,), _ = await mesh.take(model)
        assert content(path) == content(model)
    else:
        with pytest.raises(NoSeedersError, match="do not come by TCP"):
            await mesh.take(model)
    assert node.opened == 2


async def test_what_has_arrived_is_not_taken_again(mesh: Mesh, model: Path) -> None:
    size = len(content(model))
    mesh.add(1, model, spoil=lambda end: Spoiled(end, die_at=4 * CHUNK_BYTES))
    with pytest.raises(NoSeedersError, match="reset"):
        await mesh.take(model)
    taken = mesh.root / "taken"
    assert _is_clean(taken, ".m.gguf.mesh-llm.incomplete", ".m.gguf.mesh-llm.incomplete.journal")
    # And one chunk of it is spoiled on the disk meanwhile.
    put(taken / ".m.gguf.mesh-llm.incomplete", b"?", at=CHUNK_BYTES + 9)
    second = mesh.add(2, model)
    (path,), taking = await mesh.take(model, nodes=[second])
    assert content(path) == content(model)
    assert taking.received.total <= size - 2 * CHUNK_BYTES
    assert _is_clean(taken, "m.gguf")


async def test_cancelled_it_keeps_what_it_has(mesh: Mesh, model: Path) -> None:
    mesh.add(1, model, rate=20e6)
    async with TaskScope("cancelled") as scope, asyncio.timeout(30):
        scope.spawn(mesh.take(model), "take")
        await mesh.arrived.wait()
    assert not (mesh.root / "taken" / "m.gguf").exists()
    second = mesh.add(2, model)
    (path,), taking = await mesh.take(model, nodes=[second])
    assert content(path) == content(model)
    assert taking.received.total < len(content(model))


async def test_the_publishers_word_decides(mesh: Mesh, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    put(other, content(model)[:-1] + b"?")
    wrong = mesh.add(1, other)
    mesh.add(2, model)
    assert fingerprint_of(other) == fingerprint_of(model)
    (path,), _ = await mesh.take(model, sha256=(hashlib.sha256(content(model)).digest(),))
    assert content(path) == content(model)
    assert mesh.failures[wrong].reason == "what it offers is not what was published"


async def test_a_list_that_lies_about_the_whole_is_found_out(mesh: Mesh, model: Path) -> None:
    """It tells the publisher's digest with chunks of other content: each chunk is right, and the whole is not."""
    other = mesh.root / "other.gguf"
    put(other, content(model)[:-1] + b"?")
    right = hashlib.sha256(content(model)).digest()
    liar = mesh.add(1, other)
    store = ChunkDigestStore(mesh.root / "lists-1")
    store.save(other, msgspec.structs.replace(store.make(other), sha256=right))
    with pytest.raises(NoSeedersError, match="the whole file is not what its list says"):
        await mesh.take(model, sha256=(right,), nodes=[liar])
    assert mesh.failures[liar].liar
    assert _is_clean(mesh.root / "taken")
    honest = mesh.add(2, model)
    (path,), _ = await mesh.take(model, sha256=(right,), nodes=[liar, honest])
    assert content(path) == content(model)


async def test_another_model_than_was_announced_is_not_offered(mesh: Mesh, model: Path) -> None:
    liar = mesh.add(1, model, fingerprint="ab" * 16)
    with pytest.raises(NoSeedersError, match="another model than was announced"):
        await mesh.take(model, fingerprint="ab" * 16)
    assert mesh.failures[liar].liar
    assert _is_clean(mesh.root / "taken")


async def test_what_is_no_model_is_not_offered(mesh: Mesh, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    put(path, b"GGUF" + bytes(range(256)) * 100)
    mesh.add(1, path, fingerprint="ab" * 16)
    with pytest.raises(NoSeedersError, match="no usable GGUF"):
        await mesh.take(path, fingerprint="ab" * 16)
    assert _is_clean(mesh.root / "taken")


async def test_nobody_has_it(mesh: Mesh, model: Path) -> None:
    mesh.add(1, model, name="other")
    with pytest.raises(NoSeedersError, match="it has no such model"):
        await mesh.take(model)
    with pytest.raises(NoSeedersError, match="nobody is there"):
        await mesh.take(model, nodes=[NodeId("f" * 64)])
    with pytest.raises(NoSeedersError, match="no other node has it"):
        await mesh.take(model, nodes=[])


async def test_what_is_too_large_is_refused(mesh: Mesh, model: Path) -> None:
    mesh.add(1, model)
    with pytest.raises(NoSeedersError, match="larger than what fits"):
        await mesh.take(model, most_bytes=1000)


async def test_two_that_want_it_at_once_take_it_once(mesh: Mesh, model: Path) -> None:
    mesh.add(1, model, rate=40e6)
    place = in_hub_cache(SourceRef(repository="some/repo", file="m.gguf", revision=COMMIT), mesh.root / "hub")
    (one, first), (two, second) = await asyncio.gather(mesh.take(model, place=place), mesh.take(model, place=place))
    assert one == two
    assert first.received.total + second.received.total == len(content(model))


async def test_the_file_changes_while_it_is_given(mesh: Mesh, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "changing.gguf"
    put(path, content(model))
    node = mesh.add(1, path)
    store = ChunkDigestStore(mesh.root / "lists-1")
    store.make(path)
    put(path, b"changed", at=3 * CHUNK_BYTES)
    # The list is made anew, as the file is another one; its whole is not what was published.
    right = hashlib.sha256(content(model)).digest()
    with pytest.raises(NoSeedersError):
        await mesh.take(model, sha256=(right,))
    assert not mesh.failures[node].liar
