"""What a self-test accepts, and what it sets aside."""

import math
from array import array
from pathlib import Path

import msgspec
import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.accelerators import selftest
from mesh_llm.engine.accelerators.selftest import check_operators, compare_texts, self_test
from mesh_llm.engine.accelerators.selftest_main import Operator, Text, Token, error_of
from mesh_llm.engine.process import Captured


def operator(name: str, error: float = 0.0, device: str = "Vulkan0") -> Operator:
    return Operator(name=name, device=device, error=error)


def token(number: int, **likeliest: float) -> Token:
    """`likeliest`: probabilities by `t` and number."""
    return Token(id=number, likeliest={int(name[1:]): math.log(value) for name, value in likeliest.items()})


def test_rounding_is_right() -> None:
    found = [operator("MUL_MAT q4_0", 2e-5), operator("ADD", 1e-9), operator("FLASH_ATTN_EXT", -1.0)]
    assert check_operators(found) == (("Vulkan0",), 2)


@pytest.mark.parametrize(("name", "error"), [("MUL_MAT q4_0", 0.01), ("ADD", 1e-3), ("ROPE", 1e9)])
def test_a_wrong_result_is_named(name: str, error: float) -> None:
    with pytest.raises(MeshError, match=f"wrong results: {name} on Vulkan0") as caught:
        check_operators([operator("MUL_MAT f16"), operator(name, error)])
    assert caught.value.code == selftest.CODE


def test_a_device_must_multiply_every_common_type() -> None:
    with pytest.raises(MeshError, match="does not compute MUL_MAT q6_K"):
        check_operators([operator("MUL_MAT f16"), operator("MUL_MAT q6_K", -1.0)])


def test_what_is_no_number_is_wrong() -> None:
    assert error_of(array("f", [1.0, 2.0]), array("f", [1.0, 2.0])) == 0
    assert error_of(array("f", [1.0]), array("f", [math.nan])) > 1
    assert error_of(array("f", [1.0]), array("f", [math.inf])) > 1
    assert error_of(array("f", [0.0]), array("f", [1.0])) == 1


SURE = token(1, t1=0.9, t2=0.05)


def test_texts_may_part_where_two_tokens_are_equally_likely() -> None:
    right = Text(tokens=(SURE, token(3, t3=0.41, t4=0.40), token(5, t5=0.9)))
    other = Text(tokens=(SURE, token(4, t3=0.40, t4=0.41), token(6, t6=0.9)))
    assert compare_texts(right, right) == 3
    assert compare_texts(right, other) == 1


def test_another_text_is_wrong() -> None:
    right = Text(tokens=(SURE, token(3, t3=0.8, t4=0.1)))
    with pytest.raises(MeshError, match="differs from the processor's at token 2"):
        compare_texts(right, Text(tokens=(SURE, token(4, t4=0.8, t3=0.1))))
    with pytest.raises(MeshError, match="at token 1"):
        compare_texts(right, Text(tokens=(token(1, t1=math.nan), SURE)))
    with pytest.raises(MeshError, match="has 1 tokens, and the processor's 2"):
        compare_texts(right, Text(tokens=(SURE,)))


def lines(*found: Operator) -> bytes:
    return b"\n".join(msgspec.json.encode(one) for one in found)


STARTED = Operator(name="ROPE", device="Vulkan0", started=True)


@pytest.mark.parametrize(
    ("done", "reason"),
    [
        (Captured(code=-11, stderr=b"bad driver"), r"it crashes when it is loaded \(SIGSEGV\): bad driver"),
        (
            Captured(code=-6, stdout=lines(operator("ADD"), STARTED), stderr=b"abort"),
            r"crashes at ROPE on Vulkan0 \(SIGABRT\)",
        ),
        (Captured(code=None, stdout=lines(STARTED), stderr=b"it did not end within 9 s"), "hangs at ROPE on Vulkan0"),
        (Captured(code=1, stderr=b"ggml does not load it"), "it fails when it is loaded: ggml does not load it"),
    ],
)
def test_a_crash_and_a_hang_say_what_was_being_done(
    monkeypatch: pytest.MonkeyPatch, done: Captured, reason: str
) -> None:
    async def run(*_: object) -> Captured:
        return done

    monkeypatch.setattr(selftest, "run", run)
    with pytest.raises(MeshError, match=reason) as caught:
        self_test(Path("plugin.so"), None, lambda _: None)
    assert caught.value.code == selftest.CODE


def test_a_plugin_that_finds_no_card_is_not_set_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*_: object) -> Captured:
        return Captured(code=0)

    monkeypatch.setattr(selftest, "run", run)
    with pytest.raises(MeshError) as caught:
        self_test(Path("plugin.so"), None, lambda _: None)
    assert caught.value.code == selftest.NO_DEVICE
