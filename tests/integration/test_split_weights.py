"""Weights by reference: what both have is named; what differs, changed or is not there is sent, or ends the session."""

import asyncio
import os
import shutil
from pathlib import Path

from tests.integration.engine_fixtures import Model, embedded, model, rpc_embedded, small_spec, started, supervisor
from tests.integration.split_fixtures import index_of, offer_of, split, text
from tests.integration.test_split_tokens import solo

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Exit, Supervisor
from mesh_llm.models.tensor_cache.digests import DigestIndex, DigestStore, compute

__all__ = ["embedded", "model", "rpc_embedded", "started", "supervisor"]

PROMPT = "the mesh of all the nodes"


async def test_what_the_worker_lacks_is_sent(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, PROMPT)
    async with split(supervisor, rpc_embedded, path, 1, offer=DigestIndex()) as group:
        assert group.host.offered == {"w0": 0}
        engine = await group.start(path)
        assert [await text(engine)] == expected
        stats = group.host.stats().total
        assert stats.weight_bytes_referenced == 0
        assert stats.bytes_sent > 4_500_000
        await engine.stop()


async def test_another_file_with_the_same_tensors_serves_as_well(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, PROMPT)
    # Another name, another place, another header, and a tensor of another content.
    data = bytearray(path.read_bytes())
    other = tmp_path / "other.gguf"
    digests = compute(path)
    changed = next(tensor for tensor in digests.tensors if tensor.name == "blk.3.ffn_up.weight")
    data[changed.offset] ^= 0xFF
    other.write_bytes(data)
    async with split(supervisor, rpc_embedded, path, 1, offer=offer_of(compute(other))) as group:
        engine = await group.start(path)
        assert [await text(engine)] == expected
        stats = group.host.stats().total
        assert stats.weight_bytes_referenced > 4_000_000
        assert changed.size < stats.bytes_sent < changed.size + 600_000
        await engine.stop()


async def test_a_workers_file_that_changed_ends_the_session(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    path = model("small")
    copy = tmp_path / "copy.gguf"
    shutil.copy(path, copy)
    digests = compute(copy)
    tensor = next(tensor for tensor in digests.tensors if tensor.name == "blk.2.attn_q.weight")
    status = copy.stat()
    with copy.open("r+b") as file:
        file.seek(tensor.offset + 5)
        file.write(b"!")
    os.utime(copy, ns=(status.st_atime_ns, status.st_mtime_ns))
    async with split(supervisor, rpc_embedded, path, 1, offer=offer_of(digests)) as group:
        spec = small_spec(path, rpc=group.endpoints, tensor_split=(1.0,), threads=1)
        engine = await supervisor.launch(await supervisor.server_command(rpc_embedded, spec), "split")
        async with asyncio.timeout(20):
            end = await group.host.ended()
            assert isinstance(await engine.ready(), Exit)
        assert end.error.code == "split_weights_changed"
        assert end.error.message.startswith("w0: A model file changed")
        assert not end.push_failed


async def test_a_hosts_file_that_changed_is_sent_as_it_is(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    """The digests are of another content than the engine loads: nothing is named that is not the same."""
    path = model("small")
    own = tmp_path / "own.gguf"
    shutil.copy(path, own)
    digests = compute(own)
    tensor = next(tensor for tensor in digests.tensors if tensor.name == "blk.2.ffn_up.weight")
    with own.open("r+b") as file:
        file.seek(tensor.offset + 2 * (tensor.size // 34 // 2 // 2) * 34)
        file.write(bytes(34))
    expected = await solo(supervisor, rpc_embedded, own, PROMPT)
    async with split(
        supervisor, rpc_embedded, own, 1, own=index_of(own, digests), offer=offer_of(compute(path))
    ) as group:
        engine = await group.start(own)
        assert [await text(engine)] == expected
        stats = group.host.stats().total
        assert stats.weight_bytes_referenced > 4_000_000
        assert stats.weight_bytes_sent > tensor.size
        await engine.stop()


async def test_large_tensors_are_named_by_the_engines_own_hash_from_the_second_load_on(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, tmp_path: Path
) -> None:
    """The engine asks by hash above 10 MiB; first it is told no, and the hash is learned as the data passes."""
    path = model("half-gigabyte")
    store = DigestStore(tmp_path / "cache")
    digests = await asyncio.to_thread(store.get, path)
    index = index_of(path, digests, store)
    async with split(supervisor, rpc_embedded, path, 1, own=index, offer=offer_of(digests)) as group:
        said: list[str] = []
        referenced: list[int] = []
        for _ in range(2):
            before = group.host.stats().total
            engine = await group.start(path, embeddings=False)
            # A thousandth of what the tensors have.
            assert group.host.stats().total.minus(before).bytes_sent < 530_000
            said.append(await text(engine, tokens=4))
            referenced.append(group.host.stats().total.weight_bytes_referenced)
            await engine.stop()
        assert said[0] == said[1]
        assert referenced[1] == 2 * referenced[0] > 500_000_000
        stats = group.host.stats().total
        assert stats.weight_bytes_sent == 0
    index.save()
    kept = store.load(path)
    assert kept is not None
    assert len(kept.hashes) >= 12
