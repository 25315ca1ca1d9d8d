"""The user's own llama.cpp programs: their options, what they print, and how they run."""

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integration.engine_fixtures import CACHE
from tests.unit.engine.fake_binaries import write_program, write_rpc_server, write_server

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.binaries import (
    BinarySource,
    parse_devices,
    parse_flags,
    parse_version,
    server_arguments,
    with_places,
)
from mesh_llm.engine.spec import DeviceKind, EngineSpec, RpcWorkerSpec
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
    engine = await supervisor.launch(await supervisor.server_command(find(tmp_path), spec), "m")
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


SPEC = EngineSpec(model=Path("/m.gguf"), alias="m", context=1000, slots=4)
NEW = frozenset({"--model", "--rpc", "--fit", "--slots", "--no-webui", "--spec-type", "--model-draft", "--cache-ram"})


def pairs(arguments: list[str]) -> dict[str, str]:
    """Each option with the word after it."""
    return dict(zip(arguments, [*arguments[1:], ""], strict=True))


def test_in_a_split_devices_that_are_not_named_get_no_layers() -> None:
    split = replace(SPEC, rpc=("127.0.0.1:1",), devices=("CUDA2", "CUDA0"), tensor_split=(4.0, 2.0, 1.0))
    assert with_places(split, ("CUDA0", "CUDA1", "CUDA2")).tensor_split == (4.0, 1.0, 0.0, 2.0)


def test_the_plain_server() -> None:
    arguments = server_arguments(SPEC, NEW)
    options = pairs(arguments)
    assert options["--model"] == "/m.gguf"
    assert options["--host"] == "127.0.0.1"
    assert options["--port"] == "0"
    assert options["--ctx-size"] == "4000"
    assert options["--parallel"] == "4"
    assert options["--fit"] == "off"
    assert options["--pooling"] == "mean"
    assert {"--embeddings", "--metrics", "--slots", "--jinja"} <= set(arguments)
    assert "--device" not in arguments
    assert "--threads" not in arguments


def test_never_what_has_published_holes() -> None:
    everything = replace(
        SPEC,
        draft=Path("/d.gguf"),
        rpc=("127.0.0.1:1",),
        tensor_split=(1.0,),
        output_on_host=True,
        threads=1,
        mmproj=Path("/p.gguf"),
    )
    arguments = server_arguments(everything, NEW | {"--sleep-idle-seconds", "--slot-save-path"})
    assert not {"--sleep-idle-seconds", "--slot-save-path", "--props", "--api-key", "0.0.0.0"} & set(arguments)


def test_it_finds_no_program_for_videos() -> None:
    options = pairs(server_arguments(SPEC, NEW | {"--video-ffmpeg-dir"}))
    assert not Path(options["--video-ffmpeg-dir"]).is_dir()
    assert "--video-ffmpeg-dir" not in server_arguments(SPEC, NEW)


def test_a_split_with_the_output_at_home() -> None:
    split = replace(
        SPEC,
        rpc=("127.0.0.1:5001", "127.0.0.1:5002"),
        tensor_split=(3.0, 1.5),
        gpu_layers=20,
        output_on_host=True,
        draft=Path("/d.gguf"),
        draft_max=8,
    )
    options = pairs(server_arguments(split, NEW))
    assert options["--rpc"] == "127.0.0.1:5001,127.0.0.1:5002"
    assert options["--tensor-split"] == "3,1.5"
    assert options["--n-gpu-layers"] == "20"
    assert options["--override-tensor"] == "^output=CPU,^token_embd=CPU"
    assert options["--model-draft"] == "/d.gguf"
    assert options["--spec-type"] == "draft-simple"
    assert options["--spec-draft-n-max"] == "8"
    assert options["--device-draft"] == "none"


def test_older_builds_get_what_they_know() -> None:
    old = frozenset({"--model", "--model-draft"})
    arguments = server_arguments(replace(SPEC, draft=Path("/d.gguf"), draft_max=8), old)
    assert pairs(arguments)["--draft-max"] == "8"
    assert not {"--spec-type", "--fit", "--slots", "--cache-ram", "--no-webui"} & set(arguments)


def test_says_what_a_build_lacks() -> None:
    with pytest.raises(MeshError) as caught:
        server_arguments(replace(SPEC, rpc=("127.0.0.1:1",)), frozenset({"--model"}))
    assert caught.value.code == "engine_without_rpc"
    assert "GGML_RPC=ON" in caught.value.hint


def test_devices() -> None:
    cpu = pairs(server_arguments(replace(SPEC, devices=("CPU",)), NEW))
    assert (cpu["--device"], cpu["--n-gpu-layers"]) == ("none", "0")
    two = pairs(server_arguments(replace(SPEC, devices=("CUDA0", "CUDA1")), NEW))
    assert (two["--device"], two["--n-gpu-layers"]) == ("CUDA0,CUDA1", "999")


def test_a_model_that_is_larger_than_video_memory() -> None:
    spec = replace(SPEC, gpu_layers=32, cpu_moe=3)
    newer = pairs(server_arguments(spec, NEW | {"--n-cpu-moe"}))
    assert (newer["--n-gpu-layers"], newer["--n-cpu-moe"]) == ("32", "3")
    older = pairs(server_arguments(spec, NEW))
    assert older["--override-tensor"] == r"blk\.(0|1|2)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"
    assert "--n-cpu-moe" not in older


def test_an_embedding_model_keeps_its_own_pooling() -> None:
    arguments = server_arguments(replace(SPEC, pooling=""), NEW)
    assert "--embeddings" in arguments
    assert "--pooling" not in arguments
    assert "--embeddings" not in server_arguments(replace(SPEC, embeddings=False), NEW)


NEW_VERSION = """ggml_cuda_init: found 1 CUDA devices:
version: 0.26.0 (build 6871, commit 9a9a2cc)
built with GNU 13.3.0 for Linux x86_64
"""
OLD_VERSION = """version: 4567 (a1b2c3d4)
built with cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu
"""
DEVICES = """load_backend: loaded CUDA backend from /opt/llama/libggml-cuda.so
Available devices:
  CUDA0: NVIDIA GeForce RTX 4090 (24217 MiB, 23816 MiB free)
  Vulkan0: AMD Radeon RX 7900 XTX (RADV NAVI31) (24560 MiB, 24500 MiB free)
  BLAS: Accelerate (0 MiB, 0 MiB free)
"""
HELP = """-m,    --model FNAME                    model path to load
-c,    --ctx-size N                     size of the prompt context
-md,   --model-draft FNAME              draft model (see --spec-type)
--rpc SERVERS                           comma-separated list of RPC servers (host:port)
-fit,  --fit [on|off]                   whether to adjust unset arguments
"""


def test_versions_of_both_forms() -> None:
    new, old = parse_version(NEW_VERSION), parse_version(OLD_VERSION)
    assert (new.version, new.build) == ("b6871", "commit 9a9a2cc, GNU 13.3.0 for Linux x86_64")
    assert (old.version, old.build) == (
        "b4567",
        "commit a1b2c3d4, cc (Debian 12.2.0-14) 12.2.0 for x86_64-linux-gnu",
    )
    assert parse_version("no such thing").version == ""


def test_devices_with_brackets_in_their_names() -> None:
    cuda, vulkan, blas = parse_devices(DEVICES)
    assert (cuda.id, cuda.name, cuda.kind) == ("CUDA0", "NVIDIA GeForce RTX 4090", DeviceKind.GPU)
    assert (cuda.memory_total, cuda.memory_free) == (24217 * 2**20, 23816 * 2**20)
    assert vulkan.name == "AMD Radeon RX 7900 XTX (RADV NAVI31)"
    assert not blas.holds_models


def test_no_devices() -> None:
    assert parse_devices("Available devices:\n  (none)\n") == ()


def test_flags() -> None:
    flags = parse_flags(HELP)
    assert {"-m", "--model", "--rpc", "--fit", "-md", "--spec-type"} <= flags
    assert "--cache-ram" not in flags
