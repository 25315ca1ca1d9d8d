from dataclasses import replace
from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources.binaries import server_arguments
from mesh_llm.engine.spec import EngineSpec

SPEC = EngineSpec(model=Path("/m.gguf"), alias="m", context=1000, slots=4)
NEW = frozenset({"--model", "--rpc", "--fit", "--slots", "--no-webui", "--spec-type", "--model-draft", "--cache-ram"})


def pairs(arguments: list[str]) -> dict[str, str]:
    """Each option with the word after it."""
    return dict(zip(arguments, [*arguments[1:], ""], strict=True))


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


def test_an_embedding_model_keeps_its_own_pooling() -> None:
    arguments = server_arguments(replace(SPEC, pooling=""), NEW)
    assert "--embeddings" in arguments
    assert "--pooling" not in arguments
    assert "--embeddings" not in server_arguments(replace(SPEC, embeddings=False), NEW)
