"""What is learned from an answer that has passed. The bodies are llama-server's own, shortened."""

import pytest

from mesh_llm.api.transcript import MemoryBudget, Transcript, WholeEvents
from mesh_llm.api.types import Usage

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
        (CHAT, Usage(prompt=21, cached=1, generated=5, seconds=0.0025, prompt_seconds=3.123 / 1000)),
        (CHAT_STREAM, Usage(prompt=21, cached=20, generated=3, seconds=1.0)),
        (MESSAGES_STREAM, Usage(prompt=21, cached=20, generated=3)),
        (RESPONSES, Usage(prompt=21, cached=20, generated=3)),
        (b'{"usage":{"prompt_tokens":4,"total_tokens":4},"data":[]}', Usage(prompt=4)),
        (b"", Usage()),
    ],
)
@pytest.mark.parametrize("step", [100, 10_000_000])
@pytest.mark.parametrize("budget", [None, MemoryBudget(10**7, 10**7), MemoryBudget(10**5, 10**5)])
def test_usage_is_found_however_the_body_came(body: bytes, usage: Usage, step: int, budget: MemoryBudget | None):
    transcript = Transcript(budget=budget)
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


def test_with_a_room_all_is_kept_and_given_back():
    budget = MemoryBudget(max_each=10**6, total=10**6)
    transcript = Transcript(budget=budget)
    pieces = [b"%06d" % number * 50 for number in range(1000)]
    for piece in pieces:
        transcript.add(piece)
    assert transcript.whole == b"".join(pieces)
    assert budget.free == 10**6 - sum(map(len, pieces)) // 65700 * 65700
    transcript.close()
    assert (budget.free, transcript.whole) == (10**6, None)
    transcript.close()
    assert budget.free == 10**6


def test_what_is_too_long_for_the_room_is_given_up_alone():
    budget = MemoryBudget(max_each=200_000, total=300_000)
    long, other = Transcript(budget=budget), Transcript(budget=budget)
    for _ in range(3):
        other.add(b"y" * 50_000)
        for _ in range(100):
            long.add(b"x" * 1000)
    assert long.whole is None
    assert other.whole == b"y" * 150_000
    assert sum(map(len, long._tail)) < 2 * 65536
    other.close()
    assert budget.free == 300_000


def test_nobody_has_the_room_that_another_holds():
    budget = MemoryBudget(max_each=10**6, total=100_000)
    one, two = Transcript(budget=budget), Transcript(budget=budget)
    one.add(b"x" * 90_000)
    for _ in range(90):
        two.add(b"y" * 1000)
    assert one.whole is not None
    assert two.whole is None
    assert two._end().endswith(b"y")
    one.close()
    assert budget.free == 100_000


@pytest.mark.parametrize("ending", [b"\n\n", b"\r\n\r\n"])
def test_only_whole_events_pass(ending: bytes):
    stream = b"".join(b"data: %d" % number + ending for number in range(20))
    for step in range(1, 40):
        cutter = WholeEvents()
        passed = b""
        for at in range(0, len(stream), step):
            passed += cutter.cut(stream[at : at + step])
            assert not passed or passed.endswith(ending)
            assert stream.startswith(passed)
        assert passed == stream
        assert cutter.rest() == b""


def test_what_is_no_stream_of_events_is_not_held_back_for_ever():
    cutter = WholeEvents()
    sent = [cutter.cut(b"x" * 100_000) for _ in range(11)]
    assert sent[:10] == [b""] * 10
    assert len(sent[10]) == 1_100_000
    assert cutter.cut(b"data: half") == b""
    assert cutter.rest() == b"data: half"


def test_guesses_are_counted():
    transcript = Transcript()
    transcript.add(b'{"timings":{"predicted_n":40,"predicted_ms":500.0,"draft_n":32,"draft_n_accepted":21}}')
    usage = transcript.usage()
    assert (usage.generated, usage.seconds, usage.guessed, usage.accepted) == (40, 0.5, 32, 21)
