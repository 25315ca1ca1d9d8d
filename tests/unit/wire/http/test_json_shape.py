"""The limits on bodies and schemas."""

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh_llm.wire.http import json_shape
from mesh_llm.wire.http.json_shape import SchemaBudget, TooComplexError, check_shape, resolved


def depth_of(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(depth_of, value), default=0)
    return 0


def nested(depth: int, width: int = 1) -> bytes:
    return b"[" + b",".join([b"[" * (depth - 1) + b"]" * (depth - 1)] * width) + b"]"


@pytest.mark.parametrize("width", [1, 200])
def test_depth_has_a_bound(width: int) -> None:
    check_shape(nested(json_shape.MOST_DEPTH, width))
    with pytest.raises(TooComplexError, match="deep"):
        check_shape(nested(json_shape.MOST_DEPTH + 1, width))


def test_brackets_in_strings_do_not_count() -> None:
    text = '{"a": "\\\\", [[[[{{{{' * 1000 + "\\" * 999 + '"'
    check_shape(json.dumps({"messages": [{"content": text}, {"content": "\\"}, {text: text}]}).encode())


def test_keys_and_containers_have_a_bound() -> None:
    check_shape(json.dumps({"k": {str(i): 1 for i in range(json_shape.MOST_KEYS - 1)}}).encode())
    with pytest.raises(TooComplexError, match="keys"):
        check_shape(json.dumps({str(i): 1 for i in range(json_shape.MOST_KEYS + 1)}).encode())
    with pytest.raises(TooComplexError, match="objects and arrays"):
        check_shape(b"[" + b"{}," * json_shape.MOST_CONTAINERS + b"{}]")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet='ab\\"[]{}:é'),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet='ab\\"[]{}:'), inner, max_size=4),
    max_leaves=40,
)


@given(json_values, st.integers(1, 12))
def test_depth_is_counted_as_json_has_it(value: object, most: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_shape, "MOST_DEPTH", most)
        body = json.dumps(value, ensure_ascii=False).encode()
        if depth_of(value) > most:
            with pytest.raises(TooComplexError):
                check_shape(body)
        else:
            check_shape(body)


@pytest.mark.parametrize("kind", ["prose", "deep", "wide"])
def test_four_megabytes_take_little_time(kind: str) -> None:
    bodies = {
        "prose": json.dumps({"messages": [{"content": 'say "[x]" \\ {y}\n' * 200}] * 1000}).encode(),
        "deep": nested(900, 2000),
        "wide": b"[" + b"[[[]]]," * 500_000 + b"[]]",
    }
    began = time.process_time()
    try:
        check_shape(bodies[kind])
    except TooComplexError:
        assert kind != "prose"
    assert time.process_time() - began < 0.5


def union(depth: int) -> dict[str, Any]:
    parts = {f"a{i}": {"anyOf": [{"$ref": f"#/$defs/a{i + 1}"}, {"$ref": f"#/$defs/a{i + 1}"}]} for i in range(depth)}
    return {"$ref": "#/$defs/a0", "$defs": {**parts, f"a{depth}": {"type": "string"}}}


def typed(depth: int) -> dict[str, Any]:
    return {"type": ["object", "null"], "properties": {"a": typed(depth - 1)} if depth else {}}


TREE = {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"kids": {"items": {"$ref": "#/$defs/n"}}}}}}
CIRCLE = {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        TREE,
        union(8),
        typed(4),
        {"enum": [f"{i}" for i in range(1000)]},
        {"properties": {f"p{i}": {"type": "string", "maxLength": 100} for i in range(json_shape.SCHEMA_PROPERTIES)}},
        {"type": "array", "minItems": 3, "maxItems": 3},
        {"type": "array", "minItems": 5},
        {"type": "string", "pattern": "^[a-z]{2,}x{3}{,4}$"},
        {"$ref": "#/nowhere"},
        {"$ref": "https://example.org/x"},
    ],
)
def test_common_schemas_pass(schema: object) -> None:
    SchemaBudget().check(schema)


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (CIRCLE, "leads to itself"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {}]}}}, "leads to itself"),
        (union(12), "alternatives"),
        (union(40), "alternatives"),
        (typed(26), "parts"),
        ({"a": json.loads("[" * 80 + "]" * 80)}, "deep"),
        ({"properties": {f"p{i}": {} for i in range(300)}}, "properties"),
        ([{"properties": {f"p{i}": {} for i in range(250)}} for _ in range(20)], "too many objects"),
        ({"properties": {"!" * 300: {}}}, "name"),
        ({"properties": {f"p{i}": {"maxLength": 2000} for i in range(40)}}, "repeats"),
        ({"properties": {f"p{i}": {"pattern": "^a{0,2000}$"} for i in range(40)}}, "repeats"),
        ({"minItems": 5, "maxItems": 2}, "lower bound"),
        ({"pattern": "^a{5,2}$"}, "lower bound"),
        ({"pattern": "a" * 2000}, "pattern"),
        ({"$ref": "#/" + "a" * 2000}, "reference"),
        ({"enum": list(range(3000))}, "alternatives"),
        # Each spelling of an index is a separate reference, and is built again.
        ({"x": [{"properties": {f"p{i}": {} for i in range(200)}}],
          "refs": [{"$ref": f"#/x/{'0' * i}"} for i in range(1, 250)]}, "parts|too many objects"),
    ],
)  # fmt: skip
def test_costly_schemas_are_refused_quickly(schema: object, why: str) -> None:
    began = time.process_time()
    with pytest.raises(TooComplexError, match=why):
        SchemaBudget().check(schema)
    assert time.process_time() - began < 2.0


def test_schemas_of_one_request_share_one_budget() -> None:
    budget = SchemaBudget()
    for _ in range(25):
        budget.check({"maxLength": 2000})
    with pytest.raises(TooComplexError, match="repeats"):
        budget.check({"maxLength": 2000})


def test_references_are_resolved_as_llama_cpp_does() -> None:
    document = {"a": [{"b": 1}, {"b": 2}], "": {"c": 3}}
    assert resolved(document, "#/a/1/b") == 2
    assert resolved(document, "#/a/001/b") == 2
    assert resolved(document, "#//c") == 3
    assert resolved(document, "#/a/7") is None
    assert resolved(document, "a/b") is None
