import msgspec

from mesh_llm.core.placement.fit import DoesNotFit, cache_bytes, compute_bytes, launch_memory, mtp_memory, plan_solo
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import LaunchOptions, LaunchPlan, ModelFacts

GB = 10**9
MIB = 1 << 20


def facts(**changes: object) -> ModelFacts:
    # Llama-3.1-8B at Q4_K_M.
    values: dict[str, object] = {
        "name": ModelName("llama"),
        "size_bytes": 4_920_000_000,
        "layers": 32,
        "context_train": 131_072,
        "embedding_length": 4096,
        "vocabulary": 128_256,
        "kv_bytes_per_token": 131_072,
        "compute_width": 3 * 14_336 + 5 * 4096,
    }
    return ModelFacts(**(values | changes))  # pyright: ignore[reportArgumentType]


def plan(model: ModelFacts, free: float, **options: object) -> LaunchPlan:
    found = plan_solo(model, int(free), LaunchOptions(**options))  # pyright: ignore[reportArgumentType]
    assert isinstance(found, LaunchPlan), found
    assert found.memory_bytes <= free
    return found


def refused(model: ModelFacts, free: float, **options: object) -> DoesNotFit:
    found = plan_solo(model, int(free), LaunchOptions(**options))  # pyright: ignore[reportArgumentType]
    assert isinstance(found, DoesNotFit), found
    assert found.need_bytes > free
    return found


def test_cache_is_what_llama_cpp_allocates() -> None:
    # `llama_kv_cache: size = 512.00 MiB (4096 cells, 32 layers, 1/1 seqs)`, the well-known figure for this model.
    assert cache_bytes(facts(), 4096, 1) == 512 * MIB
    assert cache_bytes(facts(), 4096, 4) == 2048 * MIB
    assert cache_bytes(facts(), 4000, 1) == cache_bytes(facts(), 4096, 1)
    assert cache_bytes(facts(), 4096, 1, "q8_0") == 272 * MIB
    assert cache_bytes(facts(), 4096, 1, "q4_0") == 144 * MIB


def test_layers_with_a_window_stop_growing() -> None:
    windowed = facts(kv_window_bytes_per_token=98_304, window=1024)
    full, window = 131_072 - 98_304, 98_304
    assert cache_bytes(windowed, 32_768, 2) == 2 * (32_768 * full + 1536 * window)
    assert cache_bytes(windowed, 512, 1) == 512 * (full + window)


def test_recurrent_state_is_per_slot() -> None:
    assert cache_bytes(facts(kv_bytes_per_token=0, state_bytes=1000), 32_768, 3) == 3000


def test_compute_covers_what_was_seen() -> None:
    # llama.cpp prints 258.50 MiB for this model at 8192 tokens when it computes logits for whole batches.
    assert 258.5 * MIB <= compute_bytes(facts(), 8192, 1) <= 340 * MIB


def test_layers_that_guess_have_a_cache_and_buffers_of_their_own() -> None:
    # llama.cpp prints 24.00 and 17.51 MiB for a head of 768 numbers; hidden states of a whole batch come to it.
    narrow = facts(embedding_length=768, compute_width=9984, vocabulary=448, mtp_layers=1, mtp_row=2 * 384 * 2)
    extra = mtp_memory(narrow, 4096, 4)
    assert extra.cache == 24 * MIB
    assert (17.51 + 6) * MIB <= extra.compute <= 35 * MIB
    assert (
        launch_memory(narrow, 4096, 4).total
        == extra.total + launch_memory(msgspec.structs.replace(narrow, mtp_layers=0), 4096, 4).total
    )
    assert mtp_memory(facts(), 4096, 4).total == 0


def test_plenty_of_memory_gives_the_default() -> None:
    found = plan(facts(), 100 * GB)
    assert (found.context, found.slots) == (32_768, 4)
    assert found.memory_bytes == launch_memory(facts(), 32_768, 4).total
    assert (plan(facts(context_train=4096), 100 * GB).context, plan(facts(context_train=100), 100 * GB).context) == (
        4096,
        100,
    )


def test_slots_are_given_up_for_context_and_then_context() -> None:
    seen = [
        (found.slots, found.context)
        for free in (22, 14.5, 12.5, 10.3, 8.2, 6.3, 5.8)
        for found in [plan(facts(), free * GB)]
    ]
    assert [slots for slots, _ in seen] == [4, 4, 2, 2, 1, 1, 1]
    assert all(context >= 16_384 for slots, context in seen if slots > 1)
    assert seen[-1][1] < seen[-2][1] < 16_384
    assert seen[-1][1] % 256 == 0


def test_explicit_values_are_kept() -> None:
    assert plan(facts(), 100 * GB, context=100_000).context == 100_000
    assert plan(facts(), 100 * GB, context=1000).context == 1000
    assert plan(facts(), 100 * GB, slots=7).slots == 7
    found = plan(facts(), 8 * GB, slots=4)
    assert found.slots == 4
    assert 2048 <= found.context < 16_384
    assert plan(facts(), 12 * GB, context=30_000).slots == 1
    quantised = plan(facts(), 12 * GB, context=30_000, cache_type="q8_0")
    assert (quantised.slots, quantised.cache_type) == (2, "q8_0")


def test_no_context_is_planned_beyond_the_trained_one() -> None:
    """llama.cpp gives a slot no more: memory for it would be lost, and a model that fits could be refused."""
    small = facts(context_train=4096)
    assert plan(small, 100 * GB, context=100_000) == plan(small, 100 * GB, context=4096)
    assert plan(small, 7 * GB, context=100_000, slots=1).context == 4096
    assert refused(small, 1 * GB, context=100_000, slots=1).context == 4096
    assert plan(facts(context_train=0), 100 * GB, context=5000).context == 5000


def test_a_refusal_gives_the_sum() -> None:
    big = facts(name=ModelName("big"), size_bytes=40_100_000_000, kv_bytes_per_token=327_680, compute_width=100_000)
    found = refused(big, 51.5 * GB, context=36_352, slots=1)
    assert found.parts.total == found.need_bytes
    assert found.message == (
        "big does not fit: need 52.5 GB, have 51.5 GB: "
        "weights 40.1 + KV 11.9 + compute 0.5, for 36352 tokens in one slot."
    )
    assert "--ctx-size" in found.hint
    assert "smaller model" in refused(big, 30 * GB).hint
    assert refused(big, 30 * GB).context == 2048
    assert "for 2048 tokens in each of 8 slots" in refused(big, 43 * GB, slots=8).message


def test_small_sums_are_told_in_megabytes() -> None:
    tiny = facts(
        size_bytes=5_000_000, kv_bytes_per_token=4096, vocabulary=4096, embedding_length=256, compute_width=4000
    )
    assert "MB, have 20.0 MB: weights 5.0" in refused(tiny, 20_000_000).message


def test_what_goes_with_a_model_counts() -> None:
    alone, with_eyes = launch_memory(facts(), 2048, 1), launch_memory(facts(companion_bytes=GB), 2048, 1)
    assert with_eyes.weights - alone.weights == with_eyes.total - alone.total == GB


def test_a_draft_counts() -> None:
    draft = facts(size_bytes=GB, kv_bytes_per_token=32_768)
    alone = plan_solo(facts(), 8 * GB, LaunchOptions())
    both = plan_solo(facts(), 8 * GB, LaunchOptions(), draft)
    assert isinstance(alone, LaunchPlan)
    assert isinstance(both, LaunchPlan)
    assert both.context < alone.context
    assert both.memory_bytes <= 8 * GB
    none = plan_solo(facts(), 6 * GB, LaunchOptions(), draft)
    assert isinstance(none, DoesNotFit)
    assert "--no-draft" in none.hint
