r"""Cuts text into the pieces inside which byte pairs may merge: the rule of GPT-2, which llama.cpp calls `gpt-2`.

The rule, as a pattern tried from left to right:
`'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`
(llama.cpp, `LLAMA_VOCAB_PRE_TYPE_GPT2`). The standard library has no `\p`, hence the scanner.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

_CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
# What `\s` means there: Unicode's White_Space.
_SPACES = frozenset(
    "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005"
    "\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
)


def _kind(character: str) -> str:
    """`s` for space, `L` for letter, `N` for number, `o` for all else."""
    if character in _SPACES:
        return "s"
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "o"


def split(text: str) -> Iterator[str]:
    """The pieces of the text, in order; joined they are the text again."""
    start, length = 0, len(text)
    while start < length:
        end = _piece_end(text, start, length)
        yield text[start:end]
        start = end


def _piece_end(text: str, start: int, length: int) -> int:
    for contraction in _CONTRACTIONS:
        if text.startswith(contraction, start):
            return start + len(contraction)
    body = start + 1 if text[start] == " " and start + 1 < length else start
    kind = _kind(text[body])
    if kind != "s":
        return _run_end(text, body, length, kind)
    end = _run_end(text, start, length, "s")
    # The last space before a word belongs to the word, or stands alone if it is not a blank.
    return end if end == length or end - start == 1 else end - 1


def _run_end(text: str, start: int, length: int, kind: str) -> int:
    end = start + 1
    while end < length and _kind(text[end]) == kind:
        end += 1
    return end
