"""The vocabulary of generated models: byte-level BPE with a few dozen whole words and ChatML's control tokens.

Any text can be tokenised; what the models write is chosen from words, comma, full stop and newline.
"""

from dataclasses import dataclass

import gguf
import numpy as np
import numpy.typing as npt

_WORD_LIST = """
    the of to in is that it for was on are with they at be this from have or by one not but what all
    were when we there can your which their said if will each about how out them then she many some so these
    would other into has more two mesh node token model split layer host peer
"""
WORDS = _WORD_LIST.split()
END_OF_TEXT, TURN_START, TURN_END, PADDING = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
_ROUNDED_TO = 64
"""The vocabulary's size is a multiple of this, as matrix kernels like it."""

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

REASONING_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['reasoning_content'] %}"
    "{{ '<think>\n' + message['reasoning_content'] + '</think>' }}"
    "{% endif %}"
    "{{ message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
"""As those of models that always reason: the prompt itself opens the reasoning."""


@dataclass(frozen=True)
class Vocabulary:
    """Tokens in the order of their ids, how to merge bytes into them, and which of them a model may write."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    writable: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)

    def id_of(self, token: str) -> int:
        """The id of a token."""
        return self.tokens.index(token)


def build_vocabulary() -> Vocabulary:
    """The one vocabulary that all generated models share, so that any can be a draft for any other."""
    letters = _printable_bytes()
    space = letters[ord(" ")]
    tokens = [letters[byte] for byte in range(256)]
    merges: list[str] = []
    known = set(tokens)
    # Each prefix of a word is a token too, reached from the one before by one merge.
    for word in WORDS:
        prefix = space
        for letter in word:
            if prefix + letter not in known:
                known.add(prefix + letter)
                tokens.append(prefix + letter)
                merges.append(f"{prefix} {letter}")
            prefix += letter
    types = [int(gguf.TokenType.NORMAL)] * len(tokens)
    for control in (END_OF_TEXT, TURN_START, TURN_END, PADDING):
        tokens.append(control)
        types.append(int(gguf.TokenType.CONTROL))
    while len(tokens) % _ROUNDED_TO:
        tokens.append(f"<|unused{len(tokens)}|>")
        types.append(int(gguf.TokenType.UNUSED))
    writable = np.zeros(len(tokens), bool)
    for text in [space + word for word in WORDS] + [letters[ord(sign)] for sign in ".,\n"]:
        writable[tokens.index(text)] = True
    return Vocabulary(tokens, types, merges, writable)


def _printable_bytes() -> dict[int, str]:
    """A printable character for each byte: GPT-2's mapping (its `encoder.py`), which "gpt2" tokenizers in GGUF use."""
    as_they_are = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = (byte for byte in range(256) if byte not in as_they_are)
    return {byte: chr(byte) for byte in as_they_are} | {byte: chr(256 + rank) for rank, byte in enumerate(others)}
