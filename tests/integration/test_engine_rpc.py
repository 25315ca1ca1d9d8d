"""The RPC plugin: workers on loopback, and a model split over them says what it says undivided."""

import asyncio
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.integration.engine_fixtures import (
    CACHE,
    Model,
    client_of,
    embedded,
    is_open,
    model,
    rpc_embedded,
    small_spec,
    started,
    supervisor,
)

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.probe import rpc_version
from mesh_llm.engine.sources.embedded.plugin import RPC_VERSION
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import CPU_DEVICE, RpcWorkerSpec
from mesh_llm.engine.supervisor import RunningEngine, Supervisor

__all__ = ["embedded", "model", "rpc_embedded", "supervisor"]

BODY: dict[str, Any] = {"prompt": "the mesh of all the nodes", "max_tokens": 40, "temperature": 0}


def nowhere(_: object) -> list[Path]:
    """No plugin anywhere."""
    return []


async def workers(supervisor: Supervisor, source: EmbeddedSource, count: int) -> tuple[RunningEngine, ...]:
    spec = RpcWorkerSpec(threads=1)
    return tuple([await supervisor.launch_rpc_worker(source, spec, f"worker{n}") for n in range(count)])


def endpoints(engines: tuple[RunningEngine, ...]) -> tuple[str, ...]:
    assert all(engine.info for engine in engines)
    return tuple(engine.info.address for engine in engines if engine.info)


async def test_the_plugin_speaks_the_pinned_protocol(rpc_embedded: EmbeddedSource) -> None:
    info = await rpc_embedded.info()
    assert info.problems == ()
    assert info.rpc_version == RPC_VERSION


async def test_the_processors_own_kernels_are_known_after_a_look_at_the_devices(
    rpc_embedded: EmbeddedSource, tmp_path: Path
) -> None:
    source = EmbeddedSource.find(CACHE)
    assert source is not None
    anything = RpcWorkerSpec(threads=1, socket=tmp_path / "rpc")
    assert not (await source.rpc_worker(anything)).reference
    assert (await source.rpc_worker(replace(anything, devices=(CPU_DEVICE,)))).reference
    accelerated = any(device.holds_models for device in (await source.info()).devices)
    assert (await source.rpc_worker(anything)).reference is not accelerated


async def test_a_worker_listens_on_a_private_socket_only_and_serves_again(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource
) -> None:
    (worker,) = await workers(supervisor, rpc_embedded, 1)
    assert worker.info is not None
    assert worker.info.rpc_version == RPC_VERSION
    assert not psutil.Process(worker.pid).net_connections("inet")
    assert worker.socket is not None
    assert worker.socket.parent.stat().st_mode & 0o777 == 0o700
    for _ in range(3):
        assert await rpc_version(worker.info.address) == RPC_VERSION
    await worker.stop()
    assert not is_open(worker.info.address)


@pytest.mark.parametrize("draft", [False, True])
async def test_split_tokens_are_solo_tokens(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model, *, draft: bool
) -> None:
    extra = {"draft": model("small-draft"), "draft_max": 6} if draft else {}
    solo = await started(supervisor, rpc_embedded, small_spec(model("small"), **extra), "solo")
    expected = (await client_of(solo).post("/v1/completions", BODY)).expect().json()["choices"][0]["text"]
    await solo.stop()
    rpc = endpoints(await workers(supervisor, rpc_embedded, 2))
    for layers, output_on_host in ((None, False), (3, True)):
        spec = small_spec(
            model("small"),
            rpc=rpc,
            tensor_split=(1.0, 1.0),
            gpu_layers=layers,
            output_on_host=output_on_host,
            **extra,
        )
        split = await started(supervisor, rpc_embedded, spec, "split")
        answer = (await client_of(split).post("/v1/completions", BODY)).expect().json()
        assert answer["choices"][0]["text"] == expected
        assert (answer["timings"].get("draft_n", 0) > 0) is draft
        await split.stop()


async def test_a_lost_worker_ends_the_host_and_is_told(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    lent = await workers(supervisor, rpc_embedded, 1)
    spec = small_spec(model("small"), rpc=endpoints(lent), tensor_split=(1.0,))
    host = await started(supervisor, rpc_embedded, spec, "host")
    lent[0].kill()
    await lent[0].wait()
    with pytest.raises(ConnectionError):
        await client_of(host).post("/v1/completions", BODY)
    async with asyncio.timeout(10):
        exit_ = await host.wait()
    assert exit_.code == -signal.SIGABRT
    assert "SIGABRT" in exit_.reason
    assert not exit_.never_ready


async def test_a_host_whose_worker_is_not_there_never_gets_ready(
    supervisor: Supervisor, rpc_embedded: EmbeddedSource, model: Model
) -> None:
    (worker,) = await workers(supervisor, rpc_embedded, 1)
    await worker.stop()
    spec = small_spec(model("small"), rpc=endpoints((worker,)), tensor_split=(1.0,))
    host = await supervisor.launch(await supervisor.server_command(rpc_embedded, spec), "host")
    exit_ = await host.wait()
    assert exit_.never_ready
    assert "Failed to connect" in exit_.reason


async def test_a_socket_that_is_taken_ends_the_worker(supervisor: Supervisor, rpc_embedded: EmbeddedSource) -> None:
    taken = supervisor.private() / "taken.sock"
    await asyncio.to_thread(taken.touch)
    command = await rpc_embedded.rpc_worker(RpcWorkerSpec(socket=taken))
    other = await supervisor.launch(command, "other")
    exit_ = await other.wait()
    assert exit_.code == 1
    assert "could not listen" in exit_.reason


async def test_a_device_that_is_not_there(supervisor: Supervisor, rpc_embedded: EmbeddedSource) -> None:
    worker = await supervisor.launch_rpc_worker(rpc_embedded, RpcWorkerSpec(devices=("CUDA9",)), "w")
    exit_ = await worker.wait()
    assert exit_.never_ready
    assert "there is no device CUDA9" in exit_.reason


async def test_without_the_plugin_it_is_said_how_to_get_it(embedded: EmbeddedSource, tmp_path: Any) -> None:
    from mesh_llm.engine.sources.embedded import plugin

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plugin, "directories", nowhere)
        with pytest.raises(MeshError) as caught:
            await embedded.rpc_worker(RpcWorkerSpec(port=1))
        info = await embedded.info()
    assert caught.value.code == "engine_without_rpc"
    assert "mesh-llm engine install" in caught.value.hint
    assert info.rpc_version == ""
    assert "mesh-llm engine install" in info.problems[0]
    assert info.usable
