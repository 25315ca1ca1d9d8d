"""Byte pairs: learned in order of frequency, applied in order of learning, and reversible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tools.train_tiny.tokenizer import Tokenizer, byte_characters, learn

_SPECIAL = ("<|end|>", "<|start|>")
_TEXTS = ["the cat sat on the mat", "the cat ate the rat", "the mat, the rat, the cat"]


def _tokenizer(size: int = 268) -> Tokenizer:
    return learn(_TEXTS, size, _SPECIAL)


def test_size_counts_bytes_merges_and_special_tokens() -> None:
    tokenizer = _tokenizer()
    assert len(tokenizer) == 268
    assert len(tokenizer.merges) == 268 - 256 - 2
    assert len(set(tokenizer.token_texts())) == 268


def test_the_most_frequent_pair_merges_first() -> None:
    tokenizer = _tokenizer()
    # "at" stands in cat, sat, mat, ate and rat: 9 times; "th" 7 times.
    assert tokenizer.merge_texts()[0] == "a t"
    assert "Ġthe" in tokenizer.token_texts()


def test_learning_twice_gives_the_same() -> None:
    assert list(_tokenizer().merges) == list(_tokenizer().merges)


def test_learned_words_become_one_token() -> None:
    tokenizer = _tokenizer()
    assert len(tokenizer.encode(" the the the")) == 3


def test_special_tokens_are_one_token_and_never_split() -> None:
    tokenizer = _tokenizer()
    ids = tokenizer.encode("<|start|>the<|end|>")
    assert ids[0] == tokenizer.special_id("<|start|>") == 267
    assert ids[-1] == tokenizer.special_id("<|end|>") == 266
    assert tokenizer.decode(ids) == "<|start|>the<|end|>"


def test_bytes_are_shown_as_gpt2_shows_them() -> None:
    shown = byte_characters()
    assert (shown[ord("A")], shown[ord(" ")], shown[ord("\n")], shown[0xAD]) == ("A", "Ġ", "Ċ", "Ń")
    assert len(set(shown)) == 256


@given(st.text(max_size=60))
def test_any_text_comes_back(text: str) -> None:
    tokenizer = _CACHED
    assert tokenizer.decode(tokenizer.encode(text)) == text


_CACHED = _tokenizer()


def test_too_little_text_is_said() -> None:
    with pytest.raises(ValueError, match="needs more text"):
        learn(["ab"], 300, ())
