from hypothesis import given
from hypothesis import strategies as st
from tests.support.examples import examples

from mesh_llm.core.placement.fit import DoesNotFit, launch_memory, plan_solo
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import CACHE_TYPES, DEFAULT_SLOTS, LaunchOptions, LaunchPlan, ModelFacts


@st.composite
def models(draw: st.DrawFn) -> ModelFacts:
    per_token = draw(st.integers(0, 16_384)) * 64
    window = draw(st.sampled_from([0, 128, 1024, 4096]))
    return ModelFacts(
        name=ModelName("m"),
        size_bytes=draw(st.integers(1_000_000, 500 * 10**9)),
        layers=draw(st.integers(1, 128)),
        context_train=draw(st.sampled_from([1, 300, 512, 2048, 4096, 40_960, 131_072, 1_048_576])),
        embedding_length=draw(st.integers(64, 16_384)),
        vocabulary=draw(st.integers(256, 262_144)),
        kv_bytes_per_token=per_token,
        kv_window_bytes_per_token=per_token // 2 if window else 0,
        window=window,
        state_bytes=draw(st.sampled_from([0, 10**6, 10**8])),
        compute_width=draw(st.integers(0, 200_000)),
    )


options = st.builds(
    LaunchOptions,
    context=st.one_of(st.none(), st.integers(1, 200_000)),
    slots=st.one_of(st.none(), st.integers(1, 64)),
    cache_type=st.sampled_from(CACHE_TYPES),
)
memory = st.integers(0, 600 * 10**9)


@given(models(), memory, options, st.one_of(st.none(), models()))
@examples(200)
def test_never_over_budget_and_explicit_values_kept(
    model: ModelFacts, free: int, asked: LaunchOptions, draft: ModelFacts | None
) -> None:
    found = plan_solo(model, free, asked, draft)
    if isinstance(found, DoesNotFit):
        assert found.need_bytes > free
        assert found.have_bytes == free
        assert found.need_bytes == found.parts.total
        assert found.context == min(asked.context or 2048, model.context_train)
        assert found.slots == (asked.slots or 1)
        assert found.message
        assert found.hint
        return
    counted = launch_memory(model, found.context, found.slots, asked.cache_type)
    if draft is not None:
        counted += launch_memory(draft, found.context, found.slots)
    assert found.memory_bytes == counted.total <= free
    assert (asked.context is not None and found.context == min(asked.context, model.context_train)) or (
        asked.context is None and min(2048, model.context_train) <= found.context <= min(32_768, model.context_train)
    )
    assert found.slots == asked.slots or (asked.slots is None and found.slots in {1, 2, DEFAULT_SLOTS})


extra = st.integers(0, 100 * 10**9)


@given(models(), extra, extra, options)
@examples(150)
def test_more_memory_never_gives_fewer_slots_or_less_context(
    model: ModelFacts, above: int, more: int, asked: LaunchOptions
) -> None:
    least = plan_solo(model, 0, asked)
    assert isinstance(least, DoesNotFit)
    small = plan_solo(model, least.need_bytes + above, asked)
    large = plan_solo(model, least.need_bytes + above + more, asked)
    assert isinstance(small, LaunchPlan)
    assert isinstance(large, LaunchPlan)
    assert large.slots >= small.slots
    if large.slots == small.slots:
        assert large.context >= small.context


@given(models(), memory, options)
@examples(200)
def test_a_refused_plan_fits_with_exactly_the_memory_it_needs(
    model: ModelFacts, free: int, asked: LaunchOptions
) -> None:
    found = plan_solo(model, free, asked)
    if isinstance(found, DoesNotFit):
        enough = plan_solo(model, found.need_bytes, asked)
        assert isinstance(enough, LaunchPlan)
        assert isinstance(plan_solo(model, found.need_bytes - 1, asked), DoesNotFit)


@given(models(), memory, st.sampled_from(CACHE_TYPES))
@examples(100)
def test_the_next_step_of_context_would_not_fit(model: ModelFacts, free: int, cache_type: str) -> None:
    found = plan_solo(model, free, LaunchOptions(cache_type=cache_type))
    if isinstance(found, LaunchPlan) and found.context < min(32_768, model.context_train):
        assert launch_memory(model, found.context + 256, found.slots, cache_type).total > free
