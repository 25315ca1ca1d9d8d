"""A byte-level BPE vocabulary: learned from a corpus, and applied to text."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tools.train_tiny.pretokenize import split

Pair = tuple[int, int]


def byte_characters() -> list[str]:
    """What stands for each byte in a GPT-2 vocabulary: its own printable character, or else one from U+0100 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    shown = set(own)
    return [chr(byte) if byte in shown else chr(next(others)) for byte in range(256)]


@dataclass
class Tokenizer:
    """Token ids: the 256 bytes, then one per merge in the order learned, then the special tokens."""

    merges: Sequence[Pair]
    special_tokens: Sequence[str]
    _ranks: dict[Pair, int] = field(init=False, repr=False)
    _bytes: list[bytes] = field(init=False, repr=False)
    _cache: dict[str, list[int]] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        self._bytes = [bytes([byte]) for byte in range(256)]
        for left, right in self.merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._special = {token: len(self._bytes) + place for place, token in enumerate(self.special_tokens)}
        self._special_pattern = re.compile("(" + "|".join(re.escape(token) for token in self.special_tokens) + ")")

    def __len__(self) -> int:
        return len(self._bytes) + len(self.special_tokens)

    def special_id(self, token: str) -> int:
        """The id of a special token."""
        return self._special[token]

    def encode(self, text: str) -> list[int]:
        """Ids of the text; special tokens in it count as such."""
        ids: list[int] = []
        for place, part in enumerate(self._special_pattern.split(text)):
            if place % 2:
                ids.append(self._special[part])
            else:
                for piece in split(part):
                    ids += self._encode_piece(piece)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids, special tokens as they are written."""
        count = len(self._bytes)
        return b"".join(
            self._bytes[token] if token < count else self.special_tokens[token - count].encode() for token in ids
        ).decode(errors="replace")

    def _encode_piece(self, piece: str) -> list[int]:
        known = self._cache.get(piece)
        if known is not None:
            return known
        ids = list(piece.encode())
        while len(ids) > 1:
            rank, place = min(
                (self._ranks.get(pair, len(self.merges)), place) for place, pair in enumerate(itertools.pairwise(ids))
            )
            if rank == len(self.merges):
                break
            ids[place : place + 2] = [256 + rank]
        self._cache[piece] = ids
        return ids

    def token_texts(self) -> list[str]:
        """Every token as GGUF stores it, in the order of the ids."""
        shown = byte_characters()
        return ["".join(shown[byte] for byte in token) for token in self._bytes] + list(self.special_tokens)

    def merge_texts(self) -> list[str]:
        """Every merge as GGUF stores it: the two parts with a space between."""
        texts = self.token_texts()
        return [f"{texts[left]} {texts[right]}" for left, right in self.merges]


def learn(texts: Iterable[str], size: int, special_tokens: Sequence[str]) -> Tokenizer:
    """A vocabulary of that size, special tokens included. The most frequent pair merges first, the lowest of equals."""
    words = Counter(piece for text in texts for piece in split(text))
    pieces = [list(word.encode()) for word in words]
    counts = list(words.values())
    pairs: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for place, piece in enumerate(pieces):
        for pair in itertools.pairwise(piece):
            pairs[pair] += counts[place]
            where[pair].add(place)
    merges: list[Pair] = []
    while len(merges) < size - 256 - len(special_tokens):
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]), default=(0, 0))
        if pairs[best] <= 0:
            raise ValueError(
                f"the corpus has pairs for {len(merges)} merges only; a vocabulary of {size} needs more text"
            )
        token = 256 + len(merges)
        merges.append(best)
        for place in sorted(where.pop(best)):
            piece = pieces[place]
            for pair in itertools.pairwise(piece):
                pairs[pair] -= counts[place]
                where[pair].discard(place)
            pieces[place] = piece = _merged(piece, best, token)
            for pair in itertools.pairwise(piece):
                pairs[pair] += counts[place]
                where[pair].add(place)
        del pairs[best]
    return Tokenizer(merges, special_tokens)


def _merged(piece: list[int], pair: Pair, token: int) -> list[int]:
    merged: list[int] = []
    place = 0
    while place < len(piece):
        if place + 1 < len(piece) and (piece[place], piece[place + 1]) == pair:
            merged.append(token)
            place += 2
        else:
            merged.append(piece[place])
            place += 1
    return merged
