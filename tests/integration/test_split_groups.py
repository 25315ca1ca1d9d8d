"""Two engines over the same workers: the weights are there once, and each says what one alone says."""

import asyncio

import pytest
from tests.integration.engine_fixtures import Model, embedded, model, rpc_embedded, small_spec, started, supervisor
from tests.integration.split_fixtures import split, text

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.wire.ggml_rpc.tunnel import SESSION_BYTES

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

POOL = b"p" * SESSION_BYTES
SHORT = "the mesh of all the nodes"
LONG = "the mesh of all the nodes and what they have of it " * 30
"""Some 360 tokens: several batches of 128."""


@pytest.mark.parametrize("workers", [1, 2])
async def test_two_engines_at_once_say_what_one_says(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, workers: int
) -> None:
    path = model("small")
    solo = await started(supervisor, rpc_embedded, small_spec(path, threads=1), "solo")
    expected = [await text(solo, prompt) for prompt in (SHORT, LONG)]
    await solo.stop()
    async with split(supervisor, rpc_embedded, path, workers, pool=POOL) as group:
        assert group.host.pools
        first = await group.start(path, batch=128, micro_batch=128)
        assert [await text(first, prompt) for prompt in (SHORT, LONG)] == expected
        async with group.another() as other:
            second = await other.start(path, batch=128, micro_batch=128)
            loaded = other.host.stats().total
            assert loaded.weight_bytes_sent == 0
            assert loaded.weight_bytes_referenced > 4_000_000
            for _ in range(3):
                both = await asyncio.gather(*(text(engine, one) for engine in (first, second) for one in (SHORT, LONG)))
                assert both == expected * 2
            assert (group.host.stats().total.pushed > 0) is (workers > 1)
            assert (other.host.stats().total.pushed > 0) is (workers > 1)
            # The one that brought the weights dies within an answer; the other one has them all the same.
            answering = asyncio.gather(*(text(second, LONG) for _ in range(2)))
            dying = asyncio.gather(text(first, LONG), return_exceptions=True)
            first.kill()
            await dying
            assert await answering == [expected[1]] * 2
            await group.host.close()
            assert [await text(second, prompt) for prompt in (SHORT, LONG)] == expected
            # Its replacement finds them.
            async with other.another() as again:
                third = await again.start(path, batch=128, micro_batch=128)
                assert await asyncio.gather(text(second), text(third)) == [expected[0]] * 2
                assert again.host.stats().total.weight_bytes_sent == 0
                await third.stop()
            await second.stop()
        for worker in group.workers:
            await worker.idle()
