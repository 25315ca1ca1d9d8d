"""The mesh's models, as Ollama describes its own."""

from datetime import UTC, datetime

import pytest
from msgspec.structs import replace
from tests.support.api_harness import local, remote, route
from tests.support.core_values import facts

from mesh_llm.api.dialects.ollama.catalogue import (
    Props,
    capabilities,
    human_number,
    listed,
    moment,
    parameter_size,
    quantization,
    running,
    shown,
    tagged,
)
from mesh_llm.core.types.model import ModelKind, ModelStatus


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("tiny", "tiny:latest"),
        ("llama3.2:3b", "llama3.2:3b"),
        ("hf.co/a/b", "hf.co/a/b:latest"),
        ("h:1/a", "h:1/a:latest"),
    ],
)
def test_names_have_tags(name: str, tag: str):
    assert tagged(name) == tag


@pytest.mark.parametrize(
    ("name", "size", "quant"),
    [
        ("Qwen3-30B-A3B-Q4_K_M", "30B", "Q4_K_M"),
        ("mixtral-8x7b-instruct.Q5_0", "8x7B", "Q5_0"),
        ("llama3.2:3b", "3B", "unknown"),
        ("smollm2-135m-iq4_xs", "135M", "IQ4_XS"),
        ("model-fp16", "", "F16"),
        ("gpt-oss-20b-mxfp4", "20B", "MXFP4"),
        ("bm25", "", "unknown"),
    ],
)
def test_sizes_and_quantisations_by_name(name: str, size: str, quant: str):
    assert (parameter_size(name, None), quantization(name, None, None)) == (size, quant)


@pytest.mark.parametrize(
    ("engine", "quant"),
    [("Q4_K - Medium", "Q4_K_M"), ("all F32", "F32"), ("(guessed) Q8_0", "Q8_0"), ("IQ4_XS - 4.25 bpw", "IQ4_XS"),
     ("MXFP4 MoE", "MXFP4")],
)  # fmt: skip
def test_an_engines_words_for_a_quantisation(engine: str, quant: str):
    assert quantization("x", None, Props(model_ftype=engine)) == quant


def test_sizes_by_the_file():
    known = replace(facts("x", 8.5), weight_bits=8.5)
    assert (parameter_size("x", known), quantization("x", known, None)) == ("8.0B", "Q8_0")
    assert [human_number(count) for count in (7.6e9, 137e6, 5e3, 12)] == ["7.6B", "137M", "5K", "12"]


def test_capabilities():
    thinks = Props(chat_template="{% if enable_thinking %}", modalities={"audio": True})
    assert capabilities(ModelKind.CHAT, thinks, {}) == ["completion", "audio", "thinking"]
    fills = {"tokenizer.ggml.fim_mid_token_id": 3}
    assert capabilities(ModelKind.CHAT, None, fills) == ["completion", "insert"]
    assert capabilities(ModelKind.EMBEDDING, thinks, fills) == ["embedding"]
    assert capabilities(ModelKind.RERANK, thinks, fills) == []


def test_the_list_has_warm_models_first_and_one_digest_for_one_file():
    known = {"a": facts("a")}
    routes = [route("a", status=ModelStatus.LOADING), route("b")]
    one, other = listed(routes, known, {"a": 0.5}), listed(routes, known, {})
    assert [entry["name"] for entry in one] == ["b:latest", "a:latest"]
    assert [entry["modified_at"] for entry in one] == ["1970-01-01T00:00:07.000000Z", "1970-01-01T00:00:00.500000Z"]
    assert [entry["digest"] for entry in one] == [entry["digest"] for entry in other]
    assert one[1]["details"]["family"] == known["a"].architecture


def test_running_models_and_where_they_are():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    routes = [route("here", local("x:1")), route("there", remote()), route("cold", status=ModelStatus.COLD)]
    for gpu in (True, False):
        here, there = running(routes, {}, now, gpu=gpu)
        assert (here["size_vram"] > 0, there["size_vram"] > 0) == (gpu, True)
        assert here["expires_at"].startswith("2318-")


def test_a_model_is_shown_with_the_context_that_can_be_used():
    known = replace(facts("a"), context_train=131072)
    answer = shown(route("a"), known, {"general.parameter_count": 7_600_000_000, "general.name": "A"}, None, 0.0)
    family = known.architecture
    assert answer["model_info"][f"{family}.context_length"] == 2048
    assert "general.name" not in answer["model_info"]
    assert answer["details"]["parameter_size"] == "7.6B"
    assert answer["parameters"].split() == ["num_ctx", "2048"]


def test_times():
    assert moment(-1.0) == moment(0.0) == "1970-01-01T00:00:00.000000Z"
