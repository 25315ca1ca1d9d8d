"""The vocabulary of `tiny` and its draft, learned from the first documents of the corpus."""

from __future__ import annotations

import itertools
import re

from tools.train_tiny.chat import SPECIAL_TOKENS, render
from tools.train_tiny.corpus import Conversation, Document, documents
from tools.train_tiny.corpus.counting import LARGEST, counted
from tools.train_tiny.tokenizer import Tokenizer, learn

SIZE = 2048
_DOCUMENTS = 15000
# So often that each number becomes one token: counting is then one step from token to token.
_NUMBER_REPEATS = 100

_SPECIAL = re.compile("|".join(re.escape(token) for token in SPECIAL_TOKENS))


def _text(document: Document) -> str:
    return "".join(text for text, _ in render(document)) if isinstance(document, Conversation) else document.text


def build(seed: int) -> Tokenizer:
    """Learns the vocabulary; the same for the same seed."""
    texts = [
        part for document in itertools.islice(documents(seed), _DOCUMENTS) for part in _SPECIAL.split(_text(document))
    ]
    return learn([*texts, *([" " + counted(0, LARGEST)] * _NUMBER_REPEATS)], SIZE, SPECIAL_TOKENS)
