"""What the split benchmarks ask an engine: prompts of an exact length, and many clients at once.

Prompts are lists of token ids, random by a seed, so that each has its length and none is in a cache. Answers do not end
by themselves: stand-ins would end them at once.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from tests.support.http import HttpClient

_FIRST, _LAST = 64, 320
"""Token ids that every generated model has, none of them special."""

CLIENT_PROMPT = 16
"""Tokens of each client's prompt: they are to answer, not to read."""


def _body(tokens: int, answer: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    return {
        "prompt": [rng.randrange(_FIRST, _LAST) for _ in range(tokens)],
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": True,
        "cache_prompt": False,
    }


async def read_prompt(client: HttpClient, tokens: int, seed: int) -> dict[str, Any]:
    """Seconds to the first token of an answer, milliseconds of reading as the engine reports them, and the token."""
    began = time.perf_counter()
    answer = (await client.post("/v1/completions", _body(tokens, 1, seed))).expect().json()
    taken, timings = time.perf_counter() - began, answer["timings"]
    if timings["prompt_n"] != tokens:
        raise ValueError(f"a prompt of {tokens} tokens was read as {timings['prompt_n']}")
    return {"text": answer["choices"][0]["text"], "first_s": taken, "prompt_ms": timings["prompt_ms"]}


async def ask_all(clients: Sequence[HttpClient], streams: int, tokens: int, seed: int) -> dict[str, Any]:
    """`streams` answers of `tokens` tokens at once, of several engines in turn.

    Returns:
        `together`: tokens per second of all, from the first request to the last answer's end.
        `slowest`: tokens per second of the slowest answer, from its first token on.
        `texts`: all answers.
    """
    began = time.perf_counter()
    requests = [
        clients[one % len(clients)].post("/v1/completions", _body(CLIENT_PROMPT, tokens, seed + one))
        for one in range(streams)
    ]
    answers = [answer.expect().json() for answer in await asyncio.gather(*requests)]
    taken = time.perf_counter() - began
    return {
        "together": streams * tokens / taken,
        "slowest": min(answer["timings"]["predicted_per_second"] for answer in answers),
        "texts": [answer["choices"][0]["text"] for answer in answers],
    }
