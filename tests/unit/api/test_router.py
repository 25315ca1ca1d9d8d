"""Conversations find the node that knows them."""

import msgspec

from mesh_llm.api.router import PrefixAffinity, prompt_prefixes
from mesh_llm.core.types.ids import ModelName, NodeId

MODEL = ModelName("tiny")
A, B, C, D = (NodeId(letter * 64) for letter in "abcd")
SYSTEM = {"role": "system", "content": "Be brief."}


def chat(*texts: str, system: bool = True, tools: object = None) -> bytes:
    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    body = {"model": "tiny", "messages": [SYSTEM, *messages] if system else messages}
    return msgspec.json.encode(body if tools is None else {**body, "tools": tools})


def test_the_next_turn_knows_its_node():
    table = PrefixAffinity()
    table.remember(MODEL, prompt_prefixes(chat("Hi", "Hello", "Tell me")), A)
    warmth = table.warmth(MODEL, prompt_prefixes(chat("Hi", "Hello", "Tell me", "A tale", "Go on")))
    assert warmth[A].conversation
    assert warmth[A].prefix_bytes > len("HiHelloTell me")


def test_a_shared_system_prompt_is_not_a_conversation():
    table = PrefixAffinity()
    table.remember(MODEL, prompt_prefixes(chat("Hi")), A)
    warmth = table.warmth(MODEL, prompt_prefixes(chat("Something else")))
    assert not warmth[A].conversation
    assert 0 < warmth[A].prefix_bytes < 100


def test_the_longest_known_beginning_counts():
    table = PrefixAffinity()
    table.remember(MODEL, prompt_prefixes(chat("Hi")), A)
    table.remember(MODEL, prompt_prefixes(chat("Hi", "Hello", "More")), B)
    warmth = table.warmth(MODEL, prompt_prefixes(chat("Hi", "Hello", "More", "Yes", "And")))
    assert warmth[B].prefix_bytes > warmth[A].prefix_bytes


def test_other_tools_models_and_words_are_unknown():
    table = PrefixAffinity()
    table.remember(MODEL, prompt_prefixes(chat("Hi", tools=[{"name": "a"}])), A)
    assert table.warmth(MODEL, prompt_prefixes(chat("Hi", tools=[{"name": "b"}]))) == {}
    assert table.warmth(ModelName("other"), prompt_prefixes(chat("Hi", tools=[{"name": "a"}]))) == {}
    assert table.warmth(MODEL, prompt_prefixes(chat("Hi", system=False))) == {}


def test_plain_prompts_by_blocks():
    table = PrefixAffinity()
    prompt = "word " * 1000
    table.remember(MODEL, prompt_prefixes(msgspec.json.encode({"prompt": prompt})), A)
    warmth = table.warmth(MODEL, prompt_prefixes(msgspec.json.encode({"prompt": prompt + "and more " * 100})))
    assert warmth[A].prefix_bytes > 4000
    assert warmth[A].conversation
    assert prompt_prefixes(msgspec.json.encode({"prompt": "short"})) == []


def test_responses_and_messages_apis():
    items = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    table = PrefixAffinity()
    table.remember(MODEL, prompt_prefixes(msgspec.json.encode({"input": items, "instructions": "x"})), A)
    table.remember(MODEL, prompt_prefixes(msgspec.json.encode({"messages": items, "system": "y"})), B)
    more = [*items, {"role": "user", "content": "More"}]
    assert set(table.warmth(MODEL, prompt_prefixes(msgspec.json.encode({"input": more, "instructions": "x"})))) == {A}
    assert set(table.warmth(MODEL, prompt_prefixes(msgspec.json.encode({"messages": more, "system": "y"})))) == {B}


def test_bodies_that_are_nothing_of_the_kind():
    for body in (b"", b"[]", b"{", b'{"messages": 7}', b'{"messages": [7]}', b'{"input": [', b"\xff", b"{}"):
        assert prompt_prefixes(body) == []


def test_the_table_is_bounded():
    table = PrefixAffinity(entries=100)
    for number in range(1000):
        table.remember(MODEL, prompt_prefixes(chat(f"{number}", "a", "b", "c", "d", "e")), A)
    assert len(table) == 100
    for node in (A, B, C, D):
        table.remember(MODEL, prompt_prefixes(chat("Hi")), node)
    assert set(table.warmth(MODEL, prompt_prefixes(chat("Hi")))) == {B, C, D}


def test_a_long_conversation_has_few_links():
    assert len(prompt_prefixes(chat(*map(str, range(1000))))) == 66
