"""What a user may give an engine beside the settings that the node has for it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.model_settings import ModelSettings, Sampling
from mesh_llm.engine.arguments import ALLOWED, check_environment, read_arguments
from mesh_llm.engine.sources.binaries import server_arguments
from mesh_llm.engine.spec import CPU_DEVICE, EngineSpec


def spec(**fields: object) -> EngineSpec:
    defaults: dict[str, object] = {"model": Path("m.gguf"), "alias": "m", "context": 512, "slots": 1}
    return EngineSpec(**{**defaults, "devices": (CPU_DEVICE,), **fields})  # type: ignore[arg-type]


def test_options_and_settings_reach_the_embedded_engine() -> None:
    own = ModelSettings(temperature=0.25, top_k=7, seed=3, max_tokens=99).engine
    one = spec(
        sampling=own.sampling,
        chat_template="chatml",
        reasoning_budget=0,
        speculation="ngram-map-k4v",
        more=("-fa", "off", "--keep=5"),
    )
    program = [sys.executable, "-m", "tests.unit.engine.argument_places", one.to_json()]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {
        "differences": [],
        "settings": {
            "temp": 0.25, "top_k": 7, "seed": 3, "n_predict": 99, "n_keep": 5, "bits": (1 << 6) | (1 << 1),
            "template": "chatml", "budget": 0, "speculations": 1,
        },
    }  # fmt: skip


def test_settings_reach_programs_of_the_user() -> None:
    own = ModelSettings(temperature=0.25, top_k=7, max_tokens=99).engine
    one = spec(sampling=own.sampling, speculation="ngram-mod", more=("-fa", "off", "--keep=5"))
    known = frozenset(["--temp", "--top-k", "--predict", "--flash-attn", "--keep", "--spec-type"])
    words = server_arguments(one, known)
    for flag, value in {
        "--temp": "0.25", "--top-k": "7", "--predict": "99", "--flash-attn": "off", "--keep": "5",
        "--spec-type": "ngram-mod",
    }.items():  # fmt: skip
        assert words[words.index(flag) + 1] == value


def test_an_older_build_that_lacks_an_option_is_named() -> None:
    with pytest.raises(MeshError, match="--temp") as caught:
        server_arguments(spec(sampling=Sampling(temperature=0.1)), frozenset())
    assert caught.value.code == "engine_option_unknown"


@pytest.mark.parametrize(
    ("given_words", "message"),
    [
        (["--host", "0.0.0.0"], "opens the engine to other programs"),
        (["--port=1"], "opens the engine to other programs"),
        (["--rpc", "10.0.0.1:50052"], "opens the engine to other programs"),
        (["--slot-save-path", "/tmp"], "reads or writes files"),
        (["--lora", "x.gguf"], "reads or writes files"),
        (["--log-file", "x"], "reads or writes files"),
        (["--mcp-servers-config", "x"], "reads or writes files"),
        (["--sleep-idle-seconds", "5"], "reads or writes files"),
        (["--model", "x"], "set by the node itself"),
        (["--threads", "64"], "set by the node itself"),
        (["--ctx-size", "1"], "has a setting of its own"),
        (["--temp", "1"], "has a setting of its own"),
        (["--not-an-option"], "not among the options"),
        (["--flash-atn", "on"], "not among the options"),
        (["on"], "is no option"),
        (["--flash-attn"], "needs a value"),
        (["--flash-attn", "maybe"], "takes on, off, auto"),
        (["--keep", "nan"], "a whole number"),
        (["--no-warmup=1"], "takes no value"),
        (["--chat-template-kwargs", "["], "a JSON object"),
    ],
)
def test_what_is_refused_is_named_with_its_reason(given_words: list[str], message: str) -> None:
    with pytest.raises(MeshError, match=message) as caught:
        read_arguments(given_words)
    assert given_words[0].split("=")[0] in caught.value.message
    assert caught.value.hint
    with pytest.raises(MeshError, match=message):
        spec(more=tuple(given_words))


def test_the_nearest_option_is_proposed() -> None:
    with pytest.raises(MeshError) as caught:
        read_arguments(["--flash-atn", "on"])
    assert caught.value.hint == "Did you mean --flash-attn?"


@pytest.mark.parametrize(
    "name", ["LD_PRELOAD", "LD_LIBRARY_PATH", "PATH", "PYTHONPATH", "GGML_BACKEND_PATH", "VK_ICD_FILENAMES", "HOME",
             "LLAMA_ARG_HOST", "DYLD_INSERT_LIBRARIES", "CUDA_INJECTION64_PATH", ""]
)  # fmt: skip
def test_variables_that_load_or_hide_something_are_refused(name: str) -> None:
    with pytest.raises(MeshError) as caught:
        check_environment([name])
    assert caught.value.code == "engine_variable"
    with pytest.raises(MeshError):
        spec(environment=((name, "x"),))


def test_variables_of_devices_pass() -> None:
    check_environment(["CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"])


@given(st.lists(st.one_of(st.sampled_from(list(ALLOWED)), st.text(max_size=12)), max_size=6))
def test_any_words_are_read_or_refused(some: list[str]) -> None:
    try:
        found = read_arguments(some)
    except MeshError:
        return
    else:
        assert all(argument.flag in ALLOWED for argument, _ in found)
