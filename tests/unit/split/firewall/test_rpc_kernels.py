"""The rules were read from the source of the engine that is pinned, and docs/firewall.md is what they say."""

from pathlib import Path

import pytest
from tools.engine_source import KEPT
from tools.firewall_table import DOCUMENT, document
from tools.rpc_kernels import Source, changed, enumeration, table

from mesh_llm.core.types.model import GGML_TYPES
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.wire.ggml_rpc.rules import RULES_BY_NAME, sources
from mesh_llm.wire.ggml_rpc.rules.rule import CACHE, QUANTIZED, SAME
from mesh_llm.wire.ggml_rpc.tensors import OPERATORS


@pytest.fixture(scope="module")
def source() -> Source:
    if not KEPT.exists():
        pytest.skip("the engine's source is not here: run `make setup-dev`")
    return Source(KEPT)


def test_the_rules_were_read_from_the_pinned_release() -> None:
    assert table()["release"] == VERSION, "read the rules against the new release: make rpc-kernels"
    assert set(table()) == {"release", *sources()}


@pytest.mark.slow
def test_no_kernel_has_changed_since_its_rule_was_read(source: Source) -> None:
    assert changed(source) == []


@pytest.mark.slow
def test_a_changed_kernel_is_seen(source: Source) -> None:
    name = "ggml-cpu/ops.cpp:ggml_compute_forward_argsort_f32"
    path = "ggml-cpu/ops.cpp"
    text = source.text(name)
    assert text is not None
    assert "nb01" in text
    whole = source.files[path]
    source.files[path] = whole.replace(text, text.replace("i*nb01", "i*nb02"))
    try:
        assert changed(source) == [name]
    finally:
        source.files[path] = whole


@pytest.mark.slow
def test_operators_and_types_have_the_pinned_releases_numbers(source: Source) -> None:
    operators = [member.partition(" ")[0].removeprefix("GGML_OP_").lower() for member in enumeration(source, "ggml_op")]
    assert operators[:-1] == list(OPERATORS)
    assert len(enumeration(source, "ggml_unary_op")) - 1 == 22
    assert len(enumeration(source, "ggml_glu_op")) - 1 == 7
    numbers: dict[str, int] = {}
    for member in enumeration(source, "ggml_type"):
        name, _, number = member.partition("=")
        numbers[name.strip().removeprefix("GGML_TYPE_").lower()] = int(number)
    del numbers["count"]
    assert numbers == {kind.name.lower(): number for number, kind in GGML_TYPES.items()}


@pytest.mark.slow
def test_types_have_the_functions_that_rules_take_for_granted(source: Source) -> None:
    traits, processor = source.text("ggml.c:type_traits"), source.text("ggml-cpu/ggml-cpu.c:type_traits_cpu")
    assert traits is not None
    assert processor is not None
    for number in QUANTIZED:
        entry = f"[GGML_TYPE_{GGML_TYPES[number].name.upper()}] = {{"
        assert ".to_float " in traits.partition(entry)[2].partition("    },")[0], entry
        assert ".vec_dot " in processor.partition(entry)[2].partition("    },")[0], entry
    for number in CACHE:
        entry = f"[GGML_TYPE_{GGML_TYPES[number].name.upper()}] = {{"
        assert ".from_float " in processor.partition(entry)[2].partition("    },")[0], entry
    assert SAME < CACHE


def test_each_rule_names_what_it_was_read_from() -> None:
    assert [name for name, rule in RULES_BY_NAME.items() if not rule.kernels] == []
    assert set(RULES_BY_NAME) <= set(OPERATORS)


def test_the_page_says_what_the_rules_say() -> None:
    assert Path(DOCUMENT).read_text() == document(), "run `python tools/firewall_table.py`"
