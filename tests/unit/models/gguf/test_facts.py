from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.gguf_writer import Tensor, Value, header, llama_metadata, llama_tensors

from mesh_llm.core.placement.fit import cache_bytes, compute_bytes
from mesh_llm.core.types.model import GGML_TYPES, ModelFacts, ModelKind
from mesh_llm.models.gguf.facts import (
    CacheShape,
    Shape,
    active_bytes,
    head_bytes,
    read_facts,
    split_part_name,
    weight_bits,
)
from mesh_llm.models.gguf.header import GgufError, GgufHeader, TensorInfo, parse_header, read_header

MIB = 1 << 20


def parsed(metadata: Mapping[str, Value], tensors: list[Tensor] | None = None) -> GgufHeader:
    import io

    data, size = header(metadata, llama_tensors() if tensors is None else tensors)
    return parse_header(io.BytesIO(data), size)


def facts(name: str = "m", **changes: object) -> ModelFacts:
    return read_facts([parsed(llama_metadata(**changes))], name)  # pyright: ignore[reportArgumentType]


def refusal(metadata: Mapping[str, Value], tensors: list[Tensor] | None = None) -> str:
    with pytest.raises(GgufError) as caught:
        read_facts([parsed(metadata, tensors)], "m")
    return caught.value.reason


def test_a_transformer() -> None:
    found = facts(layers=4, width=256, heads=4, kv_heads=2, feed_forward=768, context=4096)
    assert found.kind is ModelKind.CHAT
    assert (found.layers, found.context_train, found.embedding_length, found.vocabulary) == (4, 4096, 256, 4)
    assert found.kv_bytes_per_token == 4 * 2 * 64 * 2 * 2
    assert found.size_bytes == 2 * (256 * 4 * 2 + 4 * (256 * 256 + 256 * 768)) + 256 * 4
    assert found.output_bytes == 2 * 256 * 4 * 2
    assert found.compute_width == 3 * 768 + 5 * 256
    assert (found.window, found.kv_window_bytes_per_token, found.state_bytes) == (0, 0, 0)
    assert len(found.fingerprint) == 32


def test_heads_of_their_own_length_and_per_layer() -> None:
    lengths = {"llama.attention.key_length": 128, "llama.attention.value_length": 64}
    assert facts(extra=lengths).kv_bytes_per_token == 4 * 2 * (128 + 64) * 2
    assert facts(kv_heads=[1, 2, 4, 1]).kv_bytes_per_token == 8 * (64 + 64) * 2
    metadata = llama_metadata()
    del metadata["llama.attention.head_count_kv"]
    assert read_facts([parsed(metadata)], "m").kv_bytes_per_token == 4 * 4 * (64 + 64) * 2


def test_only_an_ordinary_cache_is_plain() -> None:
    def plain(**changes: object) -> CacheShape | None:
        return Shape(parsed(llama_metadata(**changes))).plain_cache()  # pyright: ignore[reportArgumentType]

    assert plain(kv_heads=[1, 2, 4, 1]) == CacheShape((1, 2, 4, 1), 64, 64)
    assert plain(extra={"llama.attention.key_length": 128}) == CacheShape((2, 2, 2, 2), 128, 64)
    assert plain(extra={"llama.attention.sliding_window": 512}) is None
    assert plain(extra={"llama.attention.key_length_mla": 192}) is None
    assert plain(kv_heads=[1, 0, 4, 1]) is None
    metadata = {key.replace("llama.", "qwen2vl."): value for key, value in llama_metadata().items()}
    assert Shape(parsed(metadata | {"general.architecture": "qwen2vl"})).plain_cache() is None


def test_compressed_attention_keeps_one_row() -> None:
    # DeepSeek-V3: 61 layers, 512 + 64 numbers each: 70,272 bytes a token.
    extra: dict[str, Value] = {
        "deepseek2.attention.key_length": 576,
        "deepseek2.attention.value_length": 512,
        "deepseek2.attention.key_length_mla": 192,
        "deepseek2.attention.value_length_mla": 128,
    }
    found = facts(architecture="deepseek2", layers=61, width=7168, heads=128, kv_heads=1, extra=extra)
    assert found.kv_bytes_per_token == 61 * 576 * 2
    # Files from before keep keys and values in full.
    assert facts(architecture="deepseek2", layers=61, width=7168, heads=128, kv_heads=128).kv_bytes_per_token > 10**6


def test_window_layers_by_pattern_and_by_list() -> None:
    # Gemma 3 27B: 62 layers, 16 KV heads of 128, every sixth sees all.
    lengths = {"key_length": 128, "value_length": 128, "sliding_window": 1024}
    extra: dict[str, Value] = {f"gemma3.attention.{key}": value for key, value in lengths.items()}
    gemma = facts(architecture="gemma3", layers=62, width=5376, heads=32, kv_heads=16, extra=extra)
    assert gemma.window == 1024
    assert gemma.kv_bytes_per_token == 62 * 16 * 256 * 2
    assert gemma.kv_window_bytes_per_token == 52 * 16 * 256 * 2
    # Known: 10 full layers of 32k tokens are 2560 MiB, and 52 windowed ones of 1536 cells 624 MiB.
    assert cache_bytes(gemma, 32_768, 1) == (2560 + 624) * MIB

    listed = {
        "llama.attention.sliding_window": 512,
        "llama.attention.sliding_window_pattern": [True, False, True, True],
    }
    assert facts(extra=listed).kv_window_bytes_per_token == 3 * 2 * 128 * 2
    assert facts(extra={"llama.attention.sliding_window": 512}).window == 0
    assert facts(architecture="phi3", extra={"phi3.attention.sliding_window": 512}).window == 0
    everywhere = {"llama.attention.sliding_window": 512, "llama.attention.sliding_window_pattern": 0}
    assert facts(extra=everywhere).kv_window_bytes_per_token == facts().kv_bytes_per_token


def test_recurrent_and_hybrid_models() -> None:
    ssm: dict[str, Value] = {
        f"mamba.ssm.{k}": v for k, v in {"conv_kernel": 4, "inner_size": 512, "state_size": 16}.items()
    }
    metadata = llama_metadata(architecture="mamba", extra=ssm)
    del metadata["mamba.attention.head_count"], metadata["mamba.attention.head_count_kv"]
    mamba = read_facts([parsed(metadata)], "m")
    assert mamba.kv_bytes_per_token == 0
    assert mamba.state_bytes == 4 * (3 * 512 + 16 * 512) * 4

    hybrid = facts(
        architecture="jamba",
        kv_heads=[0, 2, 0, 0],
        extra={key.replace("mamba.", "jamba."): v for key, v in ssm.items()},
    )
    assert hybrid.kv_bytes_per_token == 2 * 128 * 2
    assert hybrid.state_bytes == 3 * (3 * 512 + 16 * 512) * 4

    next_ = facts(architecture="qwen3next", layers=8, extra={
        "qwen3next.ssm.conv_kernel": 4, "qwen3next.ssm.inner_size": 512, "qwen3next.ssm.state_size": 16,
        "qwen3next.ssm.group_count": 2, "qwen3next.full_attention_interval": 4,
    })  # fmt: skip
    assert next_.kv_bytes_per_token == 2 * 2 * 128 * 2
    assert next_.state_bytes == 6 * (3 * (512 + 2 * 2 * 16) + 16 * 512) * 4


def test_layers_that_only_predict_ahead_have_no_cache() -> None:
    assert facts(extra={"llama.nextn_predict_layers": 1}).kv_bytes_per_token == 3 * 2 * 128 * 2


@pytest.mark.parametrize(
    ("architecture", "head", "layers"),
    [("glm4moe", "blk.3.nextn.eh_proj.weight", 1), ("glm4moe", "blk.3.nextn", 0),
     ("llama", "blk.3.nextn.eh_proj.weight", 0)],
)  # fmt: skip
def test_heads_that_guess_count_where_they_are_there_and_known(architecture: str, head: str, layers: int) -> None:
    metadata = llama_metadata(architecture=architecture, extra={f"{architecture}.nextn_predict_layers": 1})
    found = read_facts([parsed(metadata, [*llama_tensors(), Tensor(head, (256, 512))])], "m")
    assert (found.mtp_layers, found.mtp_row) == (layers, layers * 2 * 128 * 2)
    assert found.kv_bytes_per_token == 3 * 2 * 128 * 2


def test_experts_widen_the_computation() -> None:
    extra: dict[str, Value] = {"qwen3moe.expert_used_count": 8, "qwen3moe.expert_feed_forward_length": 768}
    found = facts(architecture="qwen3moe", width=2048, heads=32, kv_heads=4, feed_forward=768, extra=extra)
    # 92.02 MiB were allocated, 4 MiB of them for the mask.
    assert found.compute_width * 512 * 4 >= 88 * MIB


def test_kinds() -> None:
    assert facts().kind is ModelKind.CHAT
    assert facts("tiny-draft").kind is ModelKind.DRAFT
    assert facts("Qwen3-DRAFT-0.6B").kind is ModelKind.DRAFT
    assert facts("draftsman").kind is ModelKind.CHAT
    assert facts(architecture="eagle3").kind is ModelKind.DRAFT
    bert = facts(architecture="nomic-bert", context=512)
    assert (bert.kind, bert.kv_bytes_per_token) == (ModelKind.EMBEDDING, 0)
    assert facts(architecture="qwen3", extra={"qwen3.pooling_type": 3}).kind is ModelKind.EMBEDDING
    assert facts(architecture="qwen3", extra={"qwen3.pooling_type": 0}).kind is ModelKind.CHAT
    assert (bert.encoder, bert.pooling, bert.one_batch) == (True, "", True)
    last = facts(architecture="qwen3", extra={"qwen3.pooling_type": 3})
    assert (last.encoder, last.pooling, last.one_batch) == (False, "last", False)
    ranker = facts(architecture="qwen3", extra={"qwen3.pooling_type": 4})
    assert (ranker.kind, ranker.one_batch) == (ModelKind.RERANK, False)
    head = [*llama_tensors(), Tensor("cls.output.weight", (256, 1))]
    unsaid = read_facts([parsed(llama_metadata(architecture="bert"), head)], "m")
    assert (unsaid.kind, unsaid.one_batch) == (ModelKind.RERANK, True)
    clip: dict[str, Value] = {"general.architecture": "clip", "clip.vision.projection_dim": 4096}
    projector = read_facts([parsed(clip)], "mmproj")
    assert (projector.kind, projector.embedding_length) == (ModelKind.PROJECTOR, 4096)
    named = read_facts([parsed({**clip, "clip.vision.projector_type": "gemma3"})], "mmproj")
    assert named.architecture == "gemma3"


def test_what_an_input_in_one_batch_takes_is_counted() -> None:
    bert = facts(architecture="bert", context=8192)
    assert compute_bytes(bert, 8192, 1) > 8 * compute_bytes(bert, 512, 1)
    chat = facts(context=8192)
    assert compute_bytes(chat, 8192, 1) < 2 * compute_bytes(chat, 512, 1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"general.architecture": ""}, "names no architecture"),
        ({"general.type": "adapter"}, "LoRA adapter"),
        ({"general.type": "vocab"}, "vocabulary only"),
        ({"general.architecture": "gptoss"}, "Ollama's own engine"),
        ({"general.architecture": "flux"}, "has no flux.block_count"),
        ({"llama.block_count": 0}, "0 layers"),
        ({"llama.block_count": 4_000_000}, "4000000 layers"),
        ({"llama.embedding_length": 1 << 31}, "makes no sense"),
        ({"llama.embedding_length": -1}, "makes no sense"),
        ({"llama.attention.head_count_kv": [2]}, "1 entries for 4 layers"),
        ({"tokenizer.ggml.tokens": "none"}, "no vocabulary"),
    ],
)
def test_what_is_no_language_model_is_refused(changes: dict[str, Value], says: str) -> None:
    assert says in refusal(llama_metadata() | changes)


def test_a_header_without_tensors_is_refused() -> None:
    assert "no tensors" in refusal(llama_metadata(), [])


def part(number: int, count: int, tensors: list[Tensor], total: int = 0) -> GgufHeader:
    base = llama_metadata() if number == 0 else {}
    split: dict[str, Value] = {"split.no": number, "split.count": count, "split.tensors.count": total}
    return parsed(base | split, tensors)


def test_parts_are_one_model() -> None:
    tensors = llama_tensors()
    parts = [part(0, 3, tensors[:4], len(tensors)), part(1, 3, tensors[4:8]), part(2, 3, tensors[8:])]
    whole = read_facts(parts, "m")
    assert whole.size_bytes == facts().size_bytes
    assert whole.fingerprint not in {header.digest for header in parts}
    for wrong, says in (
        (parts[:2], "has 3 parts, of which 2 are there"),
        ([parts[0], parts[2], parts[1]], "belongs to another model"),
        ([parts[0], parts[1], part(2, 3, tensors[8:10])], "tensors, but 11 are declared"),
    ):
        with pytest.raises(GgufError, match=says):
            read_facts(wrong, "m")


def test_part_names() -> None:
    assert split_part_name("big-00002-of-00005") == ("big", 2, 5)
    assert split_part_name("big-0002-of-0005") == ("big-0002-of-0005", 1, 1)
    assert split_part_name("big") == ("big", 1, 1)


def test_numbers_of_the_wrong_type_are_not_taken() -> None:
    metadata = llama_metadata() | {"llama.block_count": True}
    assert "has no llama.block_count" in refusal(metadata)


TINY = Path("src/mesh_llm/models/builtin/tiny.gguf")


def test_all_but_the_looked_up_embedding_is_read() -> None:
    header = read_header(TINY)
    sizes = {tensor.name: tensor.size for tensor in header.tensors}
    assert head_bytes([header]) == sizes["output.weight"]
    assert active_bytes([header], Shape(header)) == sum(sizes.values()) - sizes["token_embd.weight"]
    assert weight_bits([header]) == 8.0 * GGML_TYPES[8].bytes / GGML_TYPES[8].block


def test_of_experts_those_that_are_used() -> None:
    header = read_header(TINY)

    def tensor(name: str, elements: int) -> TensorInfo:
        return TensorInfo(name, (elements // 32, 32), 1, 0, elements * 2)

    metadata = dict(header.metadata) | {"llama.expert_count": 8, "llama.expert_used_count": 2}
    tensors = (
        tensor("token_embd.weight", 1024),
        tensor("blk.0.attn_q.weight", 1024),
        tensor("blk.0.ffn_up_exps.weight", 8192),
    )
    mixed = replace(header, metadata=metadata, tensors=tensors)
    # The head is the embedding where there is no other.
    assert head_bytes([mixed]) == 2048
    assert active_bytes([mixed], Shape(mixed)) == 2048 + 2048 + 16384 // 4
    assert weight_bits([mixed]) == 16.0


def test_each_layer_with_what_can_be_moved() -> None:
    found = facts(layers=4, width=256, heads=4, kv_heads=2, feed_forward=768, context=4096)
    assert len(found.layer_facts) == 4
    assert {one.row for one in found.layer_facts} == {found.kv_bytes_per_token // 4}
    assert {(one.experts, one.windowed, one.state) for one in found.layer_facts} == {(0, False, 0)}
    assert found.input_bytes == found.output_bytes - found.head_bytes == 256 * 4 * 2
    assert sum(one.weights for one in found.layer_facts) == found.size_bytes - found.output_bytes - 256 * 4
    assert found.largest_bytes == 2 * 256 * 768


def test_experts_of_a_layer_and_its_window_and_state() -> None:
    header = read_header(TINY)
    names = {"attn_q": 1024, "ffn_up_exps": 8192, "ffn_gate_up_exps": 4096, "ffn_up": 2048, "ffn_down_chexps": 1024}
    tensors = tuple(
        TensorInfo(f"blk.1.{name}.weight", (size // 32, 32), 1, 0, size * 2) for name, size in names.items()
    )
    metadata = dict(header.metadata) | {"llama.attention.sliding_window": 64}
    metadata["llama.attention.sliding_window_pattern"] = 2
    shape = Shape(replace(header, metadata=metadata))
    layers = shape.layer_facts([replace(header, tensors=tensors)])
    assert [one.weights for one in layers[:2]] == [0, 2 * sum(names.values())]
    assert layers[1].experts == 2 * (8192 + 4096 + 1024)
    assert [one.windowed for one in layers[:2]] == [True, False]
    assert sum(one.row for one in layers) == shape.cache_bytes_per_token()
    assert sum(one.row for one in layers if one.windowed) == shape.window()[1]


@pytest.mark.parametrize(("head", "quantises"), [(64, True), (128, True), (80, False), (576, False)])
def test_a_cache_is_quantised_only_where_every_backend_can(head: int, quantises: bool) -> None:
    lengths: dict[str, Value] = {"llama.attention.key_length": head, "llama.attention.value_length": head}
    assert facts(extra=lengths).quantises is quantises
