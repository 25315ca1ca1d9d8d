"""ChatML in Python; that the template in the model's file says the same is tested with the engine."""

from __future__ import annotations

from tools.train_tiny.chat import SPECIAL_TOKENS, prompt, render
from tools.train_tiny.corpus import Conversation, Message
from tools.train_tiny.packing import OTHER_WEIGHT, OWN_WEIGHT, tokens_of, windows
from tools.train_tiny.tokenizer import Tokenizer

_TALK = Conversation((Message("system", "Be brief."), Message("user", "Hi"), Message("assistant", "Hello!")))
_BYTES = Tokenizer((), SPECIAL_TOKENS)


def test_turns_are_marked() -> None:
    assert "".join(text for text, _ in render(_TALK)) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )


def test_only_the_answer_and_its_end_are_the_models_own() -> None:
    assert [text for text, own in render(_TALK) if own] == ["Hello!<|im_end|>"]


def test_a_prompt_ends_where_the_answer_begins() -> None:
    assert prompt(Conversation(_TALK.messages[:2])).endswith("Hi<|im_end|>\n<|im_start|>assistant\n")


def test_tools_join_the_system_part() -> None:
    tool = {"type": "function", "function": {"name": "now"}}
    call = Message("assistant", tool_call={"name": "now", "arguments": {}})
    text = "".join(
        text for text, _ in render(Conversation((_TALK.messages[0], Message("user", "Time?"), call), (tool,)))
    )
    assert text.startswith("<|im_start|>system\nBe brief.\n\nYou can call these tools:\n<tools>\n{")
    assert '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>' in text
    without = "".join(text for text, _ in render(Conversation((Message("user", "Time?"), call), (tool,))))
    assert without.startswith("<|im_start|>system\nYou can call")


def test_weights_follow_the_models_own_text() -> None:
    window = tokens_of(_TALK, _BYTES)
    own = [token for token, weight in zip(window.tokens, window.weights, strict=True) if weight == OWN_WEIGHT]
    assert _BYTES.decode(own) == "Hello!<|im_end|>"
    assert window.weights[-1] == OTHER_WEIGHT
    assert _BYTES.decode(window.tokens[-1:]) == "<|endoftext|>"


def test_windows_begin_with_a_document_and_hold_whole_ones() -> None:
    source = windows(iter([_TALK] * 500), _BYTES, 400)
    size = len(tokens_of(_TALK, _BYTES).tokens)
    for _ in range(3):
        window = next(source)
        assert len(window.tokens) == len(window.weights) == 400
        assert _BYTES.decode(window.tokens).startswith("<|im_start|>system")
        assert sum(weight == 0 for weight in window.weights) == 400 - 400 // size * size
