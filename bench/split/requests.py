"""What the split benchmarks ask an engine: prompts of an exact length, many clients at once, and text that repeats.

Prompts are lists of token ids, random by a seed, so that each has its length and none is in a cache. Answers do not end
by themselves: stand-ins would end them at once.
"""

import asyncio
import random
import time
from collections.abc import Sequence
from typing import Any

from tests.support.http import HttpClient
from tests.support.repeating_text import FIRST, LAST

CLIENT_PROMPT = 16
"""Tokens of each client's prompt: they are to answer, not to read."""


def _body(tokens: int, answer: int, seed: int) -> dict[str, Any]:
    rng = random.Random(seed)
    return {
        "prompt": [rng.randrange(FIRST, LAST) for _ in range(tokens)],
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


async def write_on(client: HttpClient, prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """Answers of so many tokens to prompts, one after the other.

    Returns:
        `rate`: tokens per second of all, from the first token of each on, as the engine reports them; `rates`: of each.
        `guessed`, `accepted`: tokens that it guessed ahead, and how many of them were right.
        `texts`: all answers.
    """
    texts: list[str] = []
    rates: list[float] = []
    seconds, generated, guessed, accepted = 0.0, 0, 0, 0
    for prompt in prompts:
        body = {"prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        answer = (await client.post("/v1/completions", body)).expect().json()
        timings = answer["timings"]
        texts.append(answer["choices"][0]["text"])
        rates.append(timings["predicted_per_second"])
        seconds += timings["predicted_ms"] * 1e-3
        generated += timings["predicted_n"]
        guessed += timings.get("draft_n", 0)
        accepted += timings.get("draft_n_accepted", 0)
    return {"rate": generated / seconds, "rates": rates, "guessed": guessed, "accepted": accepted, "texts": texts}
