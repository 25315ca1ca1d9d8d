import os
import sys
from pathlib import Path

import pytest
from tests.integration.engine_fixtures import CACHE
from tests.unit.engine.fake_binaries import write_program, write_rpc_server, write_server

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.binaries import BinarySource
from mesh_llm.engine.spec import EngineSpec, RpcWorkerSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, Supervisor


def find(directory: Path) -> BinarySource:
    source = BinarySource.find(directory, CACHE)
    assert source is not None
    return source


@pytest.fixture(autouse=True)
def their_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """These programs are scripts: what they run on is to be readable as a real program's libraries are."""
    monkeypatch.setenv("LD_LIBRARY_PATH", os.pathsep.join((sys.prefix, sys.base_prefix)))


async def test_asks_the_programs_what_they_are(tmp_path: Path) -> None:
    write_server(tmp_path)
    write_rpc_server(tmp_path, "ggml-rpc-server")
    info = await find(tmp_path).info()
    assert info.usable
    assert info.problems == ()
    assert info.label == "binaries b6871"
    assert info.build == "commit 9a9a2cc, GNU 13.3.0 for Linux x86_64"
    assert info.rpc_version == "8.0.0"
    assert [device.id for device in info.devices] == ["CUDA0", "CPU"]


async def test_runs_until_ready_with_the_options_of_the_build(tmp_path: Path) -> None:
    write_server(tmp_path)
    model = tmp_path / "m.gguf"
    model.write_bytes(b"x")
    supervisor = Supervisor(tmp_path / "logs")
    spec = EngineSpec(model=model, alias="m", context=512, slots=2)
    engine = await supervisor.launch_server(find(tmp_path), spec, "m")
    ready = await engine.ready()
    assert isinstance(ready, EngineReadyInfo)
    assert (ready.context, ready.slots, ready.embeddings) == (512, 2, True)
    arguments = (tmp_path / "started.txt").read_text().splitlines()
    assert "--fit" in arguments
    # This build knows no Unix sockets, so its port is guarded by the key alone.
    assert ready.address.startswith("127.0.0.1:")
    assert ready.key
    assert ready.key not in " ".join(arguments)
    assert "--cache-ram" not in arguments
    assert arguments[arguments.index("--threads") + 1] == "1"
    await supervisor.close()
    assert not engine.running


async def test_rpc_workers_get_a_port_and_shake_hands(tmp_path: Path) -> None:
    write_server(tmp_path)
    write_rpc_server(tmp_path)
    supervisor = Supervisor(tmp_path / "logs")
    engine = await supervisor.launch_rpc_worker(find(tmp_path), RpcWorkerSpec(), "w")
    assert engine.info is not None
    assert engine.info.rpc_version == "8.0.0"
    await supervisor.close()


async def test_without_an_rpc_server_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    source = find(write_server(tmp_path).parent)
    info = await source.info()
    assert info.usable
    assert "cannot be split" in info.problems[0]
    with pytest.raises(MeshError) as caught:
        await source.rpc_worker(RpcWorkerSpec(port=1))
    assert caught.value.code == "engine_without_rpc"


async def test_a_program_that_crashes_is_a_problem_and_no_exception(tmp_path: Path) -> None:
    write_program(tmp_path / "llama-server", "import sys; sys.exit('libcuda.so.1: cannot open shared object file')")
    source = find(tmp_path)
    info = await source.info()
    assert not info.usable
    assert "libcuda.so.1" in info.problems[0]
    with pytest.raises(MeshError) as caught:
        await source.server(EngineSpec(model=tmp_path / "m", alias="m", context=1, slots=1))
    assert "libcuda.so.1" in caught.value.message


async def test_an_rpc_server_that_ends_at_once(tmp_path: Path) -> None:
    write_server(tmp_path)
    write_program(tmp_path / "rpc-server", "raise SystemExit(3)")
    info = await find(tmp_path).info()
    assert info.rpc_version == ""
    assert "rpc-server" in info.problems[0]


def test_an_empty_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MeshError) as caught:
        BinarySource.find(tmp_path, CACHE)
    assert caught.value.code == "bin_dir_empty"
    assert str(tmp_path) in caught.value.message


def test_path_is_searched_and_may_hold_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert BinarySource.find(None, CACHE) is None
    server = write_server(tmp_path)
    found = BinarySource.find(None, CACHE)
    assert found is not None
    assert found.path == server
