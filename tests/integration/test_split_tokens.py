"""A model split over workers through the tunnel says what it says undivided."""

import asyncio
from pathlib import Path

import pytest
from tests.integration.engine_fixtures import Model, embedded, model, rpc_embedded, small_spec, started, supervisor
from tests.integration.split_fixtures import complete, split, text

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.split.worker import session as worker_session
from mesh_llm.wire.ggml_rpc.activations import Format, WireFormats, packed_size
from mesh_llm.wire.ggml_rpc.tunnel import MAX_PADDING

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

LONG = "the mesh of all the nodes and what they have of it " * 30
"""Some 360 tokens: several batches of 128."""

OTHER = "the nodes say what they have and who has more of it " * 26
"""Some 340 tokens."""

LONGER = "they can say which of the nodes have it, and if there are more " * 25
"""Some 470 tokens."""


async def solo(supervisor: Supervisor, source: EmbeddedSource, path: Path, *prompts: str) -> list[str]:
    """What the model says on one machine."""
    engine = await started(supervisor, source, small_spec(path, threads=1), "solo")
    said = [await text(engine, prompt) for prompt in prompts]
    await engine.stop()
    return said


@pytest.mark.parametrize("push", [True, False])
@pytest.mark.parametrize("workers", [1, 2, 3])
async def test_tokens_are_those_of_solo(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, workers: int, *, push: bool
) -> None:
    path = model("small")
    short = "the mesh of all the nodes"
    *expected, other = await solo(supervisor, rpc_embedded, path, short, LONG, LONGER)
    async with split(supervisor, rpc_embedded, path, workers, push=push) as group:
        engine = await group.start(path, batch=128, micro_batch=128)
        load = group.host.stats().total
        assert [await text(engine, prompt) for prompt in (short, LONG)] == expected
        # Again, with what was learned, and at once.
        assert await asyncio.gather(text(engine, short), text(engine, LONG)) == expected
        stats = group.host.stats().total
        assert (stats.pushed > 0) is (push and workers > 1)
        # A prompt that is new, and longer: whatever travels between workers is expected by now.
        assert await text(engine, LONGER) == other
        last = group.host.stats().total
        assert last.relayed == stats.relayed or not push
        assert (last.pushed - stats.pushed >= 4 * (workers - 1)) or not push
        assert load.weight_bytes_sent == 0
        assert load.weight_bytes_referenced > 4_000_000
        assert load.bytes_sent < 300_000 * workers
        assert load.round_trips <= 14 * workers
        # Masks: a prompt's and each token's.
        assert stats.packed > 400_000 * workers
        await engine.stop()


@pytest.mark.parametrize(("kind", "push"), [(Format.F16, True), (Format.Q8, True), (Format.Q8, False)])
async def test_rounded_activations_travel_in_fewer_bytes(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, kind: Format, *, push: bool
) -> None:
    path = model("small")
    ratio = 4 / packed_size(kind, 4096) * 1024
    async with split(supervisor, rpc_embedded, path, 2, push=push) as group:
        engine = await group.start(path, batch=128, micro_batch=128, gpu_layers=5)
        for prompt in (LONG, OTHER):
            await text(engine, prompt)
        before = group.host.stats().total
        exact = await text(engine, LONGER)
        whole = group.host.stats().total.minus(before)
        assert whole.rounded == whole.unrounded == 0
        group.host.use(WireFormats(kind, kind))
        await engine.stop()
        engine = await group.start(path, batch=128, micro_batch=128, gpu_layers=5)
        for prompt in (LONG, OTHER):
            await text(engine, prompt)
        before = group.host.stats().total
        # Of this model's tokens one is always much likelier than all others.
        assert await text(engine, LONGER) == exact
        rounded = group.host.stats().total.minus(before)
        assert rounded.unrounded == 0
        assert rounded.rounded > 400_000
        assert (rounded.pushed, rounded.relayed) == (whole.pushed, whole.relayed)
        saved = whole.bytes_sent + whole.bytes_received - rounded.bytes_sent - rounded.bytes_received
        assert saved == pytest.approx(rounded.rounded * (1 - 1 / ratio), rel=0.1)
        await engine.stop()


async def test_workers_of_an_older_version_get_activations_as_they_are(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_session, "ALL_FORMATS", 0)
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, "the mesh of all the nodes", LONG)
    async with split(supervisor, rpc_embedded, path, 2) as group:
        group.host.use(WireFormats(Format.Q8, Format.Q8))
        assert group.host.unable == ("w0", "w1")
        engine = await group.start(path, batch=128, micro_batch=128)
        assert [await text(engine, prompt) for prompt in ("the mesh of all the nodes", LONG)] == expected
        stats = group.host.stats().total
        assert stats.rounded == stats.unrounded == 0
        await engine.stop()


async def test_a_token_takes_one_round_trip_and_few_writes(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    path = model("small")
    async with split(supervisor, rpc_embedded, path, 2) as group:
        engine = await group.start(path)
        await text(engine)
        before = group.host.stats()
        answer = await complete(engine, tokens=40)
        after = group.host.stats()
        first, last = (after.workers[name].minus(before.workers[name]) for name in ("w0", "w1"))
        tokens = answer["usage"]["completion_tokens"]
        # The first worker hands on, the last one answers; beside that only the prompt's state is read.
        assert first.pushed >= tokens - 2
        assert first.round_trips <= 8
        assert tokens - 2 <= last.round_trips <= tokens + 8
        assert first.bytes_sent + last.bytes_sent < 8_000 * tokens
        # The last worker's window was filled for the sizes that come again, and then no more.
        assert 0 < after.workers["w1"].padding <= MAX_PADDING
        assert last.padding < last.bytes_received
        await engine.stop()


async def test_with_a_draft_and_layers_on_the_host(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, "the mesh of all the nodes")
    async with split(supervisor, rpc_embedded, path, 2) as group:
        engine = await group.start(path, gpu_layers=5, draft=model("small-draft"), draft_max=6)
        for _ in range(2):
            answer = await complete(engine)
            assert answer["choices"][0]["text"] == expected[0]
            assert answer["timings"]["draft_n"] > 0
        await engine.stop()


async def test_one_tensor_travels_between_machines_of_which_the_host_is_the_first(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, LONG, LONGER)
    width, batch = 256, 64
    async with split(supervisor, rpc_embedded, path, 2) as group:
        # Without the cache of former prompts, which reads the workers' KV caches.
        cut = {"batch": batch, "micro_batch": batch, "prompt_cache_mib": 0}
        engine = await group.start(path, tensor_split=(2.0, 3.0), host_layers=2, **cut)
        assert await text(engine, LONG) == expected[0]
        before = group.host.stats()
        answer = await complete(engine, LONGER)
        after = group.host.stats()
        assert answer["choices"][0]["text"] == expected[1]
        first, last = (after.workers[name].minus(before.workers[name]) for name in ("w0", "w1"))
        prompt, said = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
        sent = 4 * width * (prompt + said)
        # Beside it travel masks and graphs, packed.
        assert sent < first.bytes_sent < 1.5 * sent
        # The second worker's come from the first.
        assert last.bytes_sent < 0.5 * sent
        assert first.relayed == last.relayed == 0
        assert first.pushed == -(-prompt // batch) + said - 1
        # What comes back is a token's state; the window is filled once.
        assert last.bytes_received - last.padding < 4 * width * (said + 2) + 4000
        await engine.stop()


async def test_engine_after_engine_on_one_session(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, "the mesh of all the nodes")
    async with split(supervisor, rpc_embedded, path, 2) as group:
        trips: list[int] = []
        for _ in range(2):
            before = group.host.stats().total
            engine = await group.start(path)
            trips.append(group.host.stats().total.minus(before).round_trips)
            assert [await text(engine)] == expected
            await engine.stop()
        # What the first one asked is known.
        assert trips[1] < trips[0]


async def test_workers_that_cannot_reach_each_other(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, "the mesh of all the nodes")
    async with split(
        supervisor, rpc_embedded, path, 2, change=lambda ws: ws[0].unreachable.add(ws[1].address)
    ) as group:
        engine = await group.start(path)
        assert [await text(engine)] == expected
        stats = group.host.stats()
        assert stats.total.pushed == 0
        assert stats.total.relayed > 0
        broken = next(pair for pair in stats.pairs if pair.source == "w0")
        assert (broken.target, broken.reachable, broken.reason) == ("w1", False, "there is no way to it")
        await engine.stop()


async def test_a_push_stream_that_breaks_is_replaced_by_the_host(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    path = model("small")
    expected = await solo(supervisor, rpc_embedded, path, "the mesh of all the nodes")
    async with split(supervisor, rpc_embedded, path, 2) as group:
        engine = await group.start(path)
        assert [await text(engine)] == expected
        assert group.host.stats().total.pushed > 0
        for stream in group.workers[0].pushes:
            stream.abort()
        assert [await text(engine)] == expected
        stats = group.host.stats().total
        assert stats.rescued >= 1
        pushed = stats.pushed
        assert [await text(engine)] == expected
        assert group.host.stats().total.pushed == pushed
        await engine.stop()
