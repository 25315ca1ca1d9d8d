"""The pre-split against pieces worked out by hand from GPT-2's pattern."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.train_tiny.pretokenize import split


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Hello world", ["Hello", " world"]),
        ("it's we'll 'S", ["it", "'s", " we", "'ll", " '", "S"]),
        ("a  b", ["a", " ", " b"]),
        ("a \n\n b", ["a", " \n\n", " b"]),
        ("a\nb", ["a", "\n", "b"]),
        ("end  ", ["end", "  "]),
        (" ", [" "]),
        ("1, 2, 13.", ["1", ",", " 2", ",", " 13", "."]),
        ('{"a": "b"}', ['{"', "a", '":', ' "', "b", '"}']),
        ("x²y", ["x", "²", "y"]),
        ("e\u0301a", ["e", "\u0301", "a"]),
        ("a\u3000b", ["a", "\u3000", "b"]),
        ("_a_", ["_", "a", "_"]),
        ("", []),
    ],
)
def test_pieces(text: str, pieces: list[str]) -> None:
    assert list(split(text)) == pieces


@given(st.text())
def test_nothing_is_lost(text: str) -> None:
    assert "".join(split(text)) == text


@given(st.text(alphabet=" \n\tab'1.s"))
def test_no_piece_is_empty(text: str) -> None:
    assert all(split(text))
