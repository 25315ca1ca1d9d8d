"""What is learned from an answer that has passed. The bodies are llama-server's own, shortened."""

import pytest

from mesh_llm.api.transcript import Transcript, Usage

CHAT = (
    b'{"choices":[{"finish_reason":"length"}],"usage":{"completion_tokens":5,"prompt_tokens":21,"total_tokens":26,'
    b'"prompt_tokens_details":{"cached_tokens":1}},"timings":{"cache_n":1,"prompt_n":20,"prompt_ms":3.123,'
    b'"predicted_n":5,"predicted_ms":2.5,"predicted_per_second":1817.3}}'
)
CHAT_STREAM = (
    b'data: {"choices":[{"delta":{"content":"\\"predicted_n\\":99"}}]}\n\n'
    b'data: {"choices":[],"timings":{"cache_n":20,"prompt_n":1,"predicted_n":3,"predicted_ms":1000.0}}\n\n'
    b"data: [DONE]\n\n"
)
MESSAGES_STREAM = (
    b'event: message_start\ndata: {"message":{"usage":{"cache_read_input_tokens":20,"input_tokens":1,'
    b'"output_tokens":0}}}\n\n'
    + b'event: content_block_delta\ndata: {"delta":{"text":"x"}}\n\n' * 2000
    + b'event: message_delta\ndata: {"usage":{"output_tokens":3}}\n\n'
)
RESPONSES = b'{"usage":{"input_tokens":21,"output_tokens":3,"input_tokens_details":{"cached_tokens":20}}}'


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (CHAT, Usage(prompt=21, cached=1, generated=5, seconds=0.0025)),
        (CHAT_STREAM, Usage(prompt=21, cached=20, generated=3, seconds=1.0)),
        (MESSAGES_STREAM, Usage(prompt=21, cached=20, generated=3)),
        (RESPONSES, Usage(prompt=21, cached=20, generated=3)),
        (b'{"usage":{"prompt_tokens":4,"total_tokens":4},"data":[]}', Usage(prompt=4)),
        (b"", Usage()),
    ],
)
@pytest.mark.parametrize("step", [100, 10_000_000])
def test_usage_is_found_however_the_body_came(body: bytes, usage: Usage, step: int):
    transcript = Transcript()
    for at in range(0, len(body), step):
        transcript.add(body[at : at + step])
    assert transcript.size == len(body)
    assert transcript.usage() == usage


def test_what_is_kept_is_bounded():
    transcript = Transcript(limit=1000)
    for _ in range(1000):
        transcript.add(b"x" * 100)
    kept = sum(map(len, transcript._tail))
    assert 1000 <= kept < 1100


def test_between_events():
    transcript = Transcript()
    assert transcript.between_events
    transcript.add(b"data: a")
    assert not transcript.between_events
    transcript.add(b"\n\n")
    assert transcript.between_events
