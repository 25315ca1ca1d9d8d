"""What the split benchmarks ask an engine: prompts of an exact length, many clients at once, and text that repeats.

Prompts are lists of token ids, random by a seed, so that each has its length and none is in a cache. Answers do not end
by themselves: stand-ins would end them at once.
"""

import asyncio
import json
import random
import time
from collections.abc import Sequence
from typing import Any

from tests.support.http import HttpClient
from tests.support.repeating_text import FIRST, LAST

from mesh_llm.daemon.dispatch import Dispatch

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
        `steady`: tokens per second while all of them are being written: without the prompts before, and without the
            time in which the last ones have the machines for themselves. An answer's tokens count as written evenly
            from its first one on. Where they never were written at the same time, the same as `together`.
        `slowest`: tokens per second of the slowest answer, from its first token on.
        `texts`: all answers.
    """

    async def one(client: HttpClient, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
        answer = (await client.post("/v1/completions", body)).expect().json()
        return answer, time.perf_counter()

    began = time.perf_counter()
    requests = [
        one(clients[number % len(clients)], _body(CLIENT_PROMPT, tokens, seed + number)) for number in range(streams)
    ]
    ended = await asyncio.gather(*requests)
    taken = time.perf_counter() - began
    answers = [answer for answer, _ in ended]
    together = streams * tokens / taken
    return {
        "together": together,
        "steady": _while_all_write([(answer["timings"], end) for answer, end in ended]) or together,
        "slowest": min(answer["timings"]["predicted_per_second"] for answer in answers),
        "texts": [answer["choices"][0]["text"] for answer in answers],
    }


async def ask_in_turns(
    client: HttpClient, dispatch: Dispatch | None, streams: int, turns: int, most: int, seed: int
) -> dict[str, Any]:
    """`streams` clients of one engine, each of which asks `turns` times, for a quarter of `most` tokens up to all.

    `dispatch`: names the slots; None: the engine chooses. Returns `together` and `texts` as `ask_all`.
    """
    rng = random.Random(seed)
    lengths = [[rng.randint(most // 4, most) for _ in range(turns)] for _ in range(streams)]

    async def one(number: int) -> list[str]:
        said: list[str] = []
        for turn, tokens in enumerate(lengths[number]):
            body = _body(CLIENT_PROMPT, tokens, seed + number + streams * turn)
            place = None if dispatch is None else dispatch.place("/v1/completions", json.dumps(body).encode())
            named = {} if place is None else {"id_slot": place.slot}
            answer = (await client.post("/v1/completions", body | named)).expect().json()
            if place is not None:
                place.done()
            said.append(answer["choices"][0]["text"])
        return said

    began = time.perf_counter()
    texts = await asyncio.gather(*map(one, range(streams)))
    taken = time.perf_counter() - began
    return {"together": sum(map(sum, lengths)) / taken, "texts": [text for said in texts for text in said]}


def _while_all_write(ends: Sequence[tuple[dict[str, Any], float]]) -> float:
    """Tokens per second of all between the last one's first token and the first one's end; 0.0 if that never was."""
    rates = [timings["predicted_n"] / (timings["predicted_ms"] * 1e-3) for timings, _ in ends]
    begun = max(end - timings["predicted_ms"] * 1e-3 for timings, end in ends)
    return sum(rates) if begun < min(end for _, end in ends) else 0.0


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
