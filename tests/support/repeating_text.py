"""Prompts whose answer by a generated model is known, and stands in the prompt as far as wanted."""

import random

from tests.support.gguf_models import PRESETS
from tests.support.gguf_vocabulary import build_vocabulary
from tests.support.gguf_weights import foretell

FIRST, LAST = 64, 320
"""Token ids that every generated model has, none of them special."""

TEXTS = {"repeated": 0, "edited": 48, "misleading": 12, "novel": None}
"""Kinds of text, by how many tokens are between two edits of what is repeated; 0: no edits; None: nothing is repeated.

A generated model writes what follows from the last few tokens. So a prompt that holds a beginning, what the model
writes after it, and the beginning again, is answered with what it holds, as an agent answers that repeats a file. An
edit changes a token of what the prompt holds. `misleading` has so many edits that most guesses are wrong.
"""

_BEGINNING = 24
_RUN = 8


def repeating_prompt(preset: str, kind: str, tokens: int, seed: int) -> list[int]:
    """A prompt whose greedy answer of so many tokens is in it, as its kind says. `preset`: the model that answers."""
    rng = random.Random(seed)

    def noise(count: int) -> list[int]:
        return [rng.randrange(FIRST, LAST) for _ in range(count)]

    vocabulary, every = build_vocabulary(), TEXTS[kind]
    beginning, written = list[int](), list[int]()
    while not written or _repeats_itself(written):
        beginning = noise(_BEGINNING)
        written = foretell(PRESETS[preset], vocabulary, beginning, tokens)
    if every is None:
        return [*noise(_BEGINNING + tokens), *beginning]
    for at in range(every // 2, tokens, every) if every else ():
        written[at] = rng.randrange(FIRST, LAST)
    return [*beginning, *written, *noise(_BEGINNING), *beginning]


def _repeats_itself(text: list[int]) -> bool:
    """Whether a few tokens in a row come twice, so that more might be guessed than the prompt says."""
    runs = [tuple(text[at : at + _RUN]) for at in range(len(text) - _RUN + 1)]
    return len(set(runs)) < len(runs)
