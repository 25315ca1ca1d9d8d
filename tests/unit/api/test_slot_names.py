"""Naming an engine's slot in a request."""

import json

import pytest

from mesh_llm.api.slots import takes_one_slot, with_slot

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (CHAT, {"messages": []}),
        (CHAT, {"messages": [{"role": "user", "content": 'say "id_slot": 3'}], "n": 1}),
        (COMPLETION, {"prompt": "a [list] of {things}"}),
        (COMPLETION, {"prompt": [1, 2, 3]}),
        ("/completion", {"prompt": {"prompt_string": "a"}}),
        (CHAT, {}),
    ],
)
def test_one_answer_to_one_prompt_gets_its_slot(path: str, asked: dict[str, object]) -> None:
    for body in (json.dumps(asked), f"\n {json.dumps(asked, indent=1)} "):
        assert takes_one_slot(path, body.encode())
        assert json.loads(with_slot(body.encode(), 5)) == asked | {"id_slot": 5}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, '{"messages": [], "n": 2}'),
        (COMPLETION, '{"prompt": "a", "n_cmpl": 2}'),
        (COMPLETION, '{"prompt": ["a", "b"]}'),
        (COMPLETION, '{"prompt": [[1], [2]]}'),
        (COMPLETION, '{"prompt": [1, "a"]}'),
        (CHAT, '{"messages": [], "id_slot": 1}'),
        (CHAT, '{"messages": [], "n": "2"}'),
        (CHAT, "no JSON"),
        (CHAT, "[]"),
        (CHAT, '{"messages": "\xff'),
        ("/v1/messages", '{"messages": []}'),
        ("/v1/embeddings", '{"input": "a"}'),
    ],
)
def test_others_get_what_the_engine_chooses(path: str, body: str) -> None:
    assert not takes_one_slot(path, body.encode("latin-1"))
