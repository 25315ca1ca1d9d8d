"""Documents as token ids, packed into windows of one length."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tools.train_tiny.chat import DOCUMENT_END, render
from tools.train_tiny.corpus import Conversation, Document
from tools.train_tiny.tokenizer import Tokenizer

# How much a token counts in the loss: what the model is to write itself, and what others write.
OWN_WEIGHT, OTHER_WEIGHT = 1.0, 0.1
_WAITING = 48


@dataclass(frozen=True)
class Window:
    """Token ids, and for each how much its prediction counts."""

    tokens: list[int]
    weights: list[float]


def tokens_of(document: Document, tokenizer: Tokenizer) -> Window:
    """One document, ended by the end-of-document token."""
    pieces = render(document) if isinstance(document, Conversation) else [(document.text, True)]
    tokens: list[int] = []
    weights: list[float] = []
    for text, own in pieces:
        ids = tokenizer.encode(text)
        tokens += ids
        weights += [OWN_WEIGHT if own else OTHER_WEIGHT] * len(ids)
    tokens.append(tokenizer.special_id(DOCUMENT_END))
    weights.append(OTHER_WEIGHT if isinstance(document, Conversation) else OWN_WEIGHT)
    return Window(tokens, weights)


def windows(documents: Iterator[Document], tokenizer: Tokenizer, length: int) -> Iterator[Window]:
    """Windows that each begin where a document does; whole documents follow as long as one that fits is waiting."""
    waiting: list[Window] = []
    filler = tokenizer.special_id(DOCUMENT_END)
    while True:
        waiting += [tokens_of(next(documents), tokenizer) for _ in range(_WAITING - len(waiting))]
        first = waiting.pop(0)
        tokens, weights = first.tokens[:length], first.weights[:length]
        place = 0
        while place < len(waiting):
            if len(waiting[place].tokens) <= length - len(tokens):
                fitting = waiting.pop(place)
                tokens = tokens + fitting.tokens
                weights = weights + fitting.weights
            else:
                place += 1
        missing = length - len(tokens)
        yield Window(tokens + [filler] * missing, weights + [0.0] * missing)
