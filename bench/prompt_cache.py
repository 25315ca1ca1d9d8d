"""A long prompt after a restart, or after a move: `python -m bench.prompt_cache [--moved] [--quick] [--json FILE]`.

One node serves a generated model of 160 MB on the processor. Each round reads a prompt that no cache holds, and takes
the time to the first token; then the node is stopped and started, and the next turn of the same conversation is timed.
Both times are of requests to a node that is ready: the start of the node and the loading of the model are in neither.
A third time is that of the same turn once more, which finds its prompt in the engine's own memory.

With `--moved` there are two nodes on hosts of their own, joined by a link of 1 Gbit/s (`tests/netlab`), in each round
anew. The first one reads the prompt. The second one reads a short prompt, by which it knows its own speed and the link.
Then the first one does not serve the model any more, and the next turn, which a client sends to it, is answered by the
second one, with the cache that it fetches.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import ROOT, machine, table
from tests.netlab.lab import NetLab
from tests.support.gguf_models import PRESETS, write_model
from tests.support.http import HttpClient
from tests.support.node import NodeProcess
from tests.support.pool import until, warm
from watchfiles import awatch

_MODELS = ROOT / ".pytest_cache" / "d" / "models"
_CONTEXT = 9216
_TOKENS_A_WORD = 2.9
"""Of the generated model's vocabulary, for the words of `prompt`."""
_WAIT = 1800.0
_SHORT = 800
"""Tokens of the prompt by which the second node learns its own speed."""


def long_model(directory: Path = _MODELS) -> Path:
    """The preset `middle` with a context that is long enough; generated once."""
    recipe = replace(PRESETS["middle"], name="random-middle-long", context=16384)
    path = directory / f"{recipe.name}.gguf"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        write_model(path, recipe)
    return path


def prompt(number: int, tokens: int) -> str:
    """A text of about so many tokens that begins differently for each number."""
    return f"r{number} " + " ".join(f"w{(word * 7 + number) % 97}" for word in range(int(tokens / _TOKENS_A_WORD)))


async def first_token(node: NodeProcess, messages: list[dict[str, str]]) -> tuple[float, dict[str, Any], str]:
    """Seconds to the first event with text; the engine's timings; the whole text."""
    body = {"model": "random-middle-long", "messages": messages, "max_tokens": 4, "temperature": 0, "stream": True}
    began, first, text = time.perf_counter(), 0.0, ""
    timings: dict[str, Any] = {}
    client = HttpClient(node.api.port, lab=node.options.lab, host=node.options.host, timeout=_WAIT)
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for event in answer.events():
            if event.data == "[DONE]":
                break
            piece = event.json()
            timings = piece.get("timings", timings)
            delta = piece["choices"][0]["delta"].get("content") if piece["choices"] else None
            if delta and not first:
                first = time.perf_counter() - began
            text += delta or ""
    return first, timings, text


async def measure(tokens: int, rounds: int, scratch: Path) -> list[dict[str, float]]:
    """All rounds, in turn."""
    arguments = ["--parallel", "1", "--ctx-size", str(_CONTEXT)]
    node = await NodeProcess.start(scratch / "home", models=[long_model()], arguments=arguments)
    results: list[dict[str, float]] = []
    try:
        for number in range(rounds):
            messages = [{"role": "user", "content": prompt(number, tokens)}]
            read, read_timings, text = await first_token(node, messages)
            began = time.perf_counter()
            await node.stop(60.0)
            stopped = time.perf_counter() - began
            await node.restart()
            turn = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
            warm, warm_timings, _ = await first_token(node, turn)
            again, _, _ = await first_token(node, turn)
            results.append(
                {
                    "tokens": read_timings["prompt_n"],
                    "read_s": read,
                    "warm_s": warm,
                    "again_s": again,
                    "ratio": warm / read,
                    "from_cache": warm_timings["cache_n"],
                    "read_then": warm_timings["prompt_n"],
                    "stop_s": stopped,
                    "saved_MB": sum(file.stat().st_size for file in (node.home / "cache/prompts").iterdir()) / 1e6,
                }
            )
            print(json.dumps(results[-1]), flush=True)
    finally:
        await node.close()
    return results


_MODEL = "random-middle-long"
_LINK_KNOWN = "link measured for prompt caches"
_MOVED = "prompt cache moved"


async def measure_moved(tokens: int, rounds: int, scratch: Path) -> list[dict[str, float]]:
    """All rounds, in turn."""
    results: list[dict[str, float]] = []
    for number in range(rounds):
        with NetLab(2, rate_mbps=1000) as lab:
            result = await _moved(tokens, number, scratch / str(number), lab)
        results.append(result)
        print(json.dumps(result), flush=True)
    return results


async def _moved(tokens: int, number: int, scratch: Path, lab: NetLab) -> dict[str, float]:
    arguments = ["--parallel", "1", "--ctx-size", str(_CONTEXT)]
    options: dict[str, Any] = {"models": [long_model()], "arguments": arguments, "lab": lab}
    first = await NodeProcess.start(scratch / "first", host=0, **options)
    nodes = [first]
    try:
        other = [{"role": "user", "content": prompt(number + 50, _SHORT)}]
        await first_token(first, other)
        messages = [{"role": "user", "content": prompt(number, tokens)}]
        read, read_timings, text = await first_token(first, messages)
        second = await NodeProcess.start(scratch / "second", host=1, join=[await first.invite()], **options)
        nodes.append(second)
        await until(first, warm(_MODEL, 2), "knowing both hosts", 120.0)
        await first.cli("drop", _MODEL)
        await until(first, warm(_MODEL, 1), "only the second", 120.0)
        while not await _logged(second, _LINK_KNOWN):
            await first_token(first, other)
        turn = [*messages, {"role": "assistant", "content": text}, {"role": "user", "content": "go on"}]
        moved, timings, _ = await first_token(first, turn)
        line = next(line for line in second.log().splitlines() if _MOVED in line)
        return {
            "tokens": read_timings["prompt_n"],
            "read_s": read,
            "moved_s": moved,
            "ratio": moved / read,
            "from_cache": timings["cache_n"],
            "read_then": timings["prompt_n"],
            **{name: float(_said(line, name)) for name in ("seconds", "predicted", "bytes")},
        }
    finally:
        for node in nodes:
            await node.close()


def _said(line: str, name: str) -> str:
    """A field of a line of the log."""
    return line.partition(f" {name}=")[2].partition(" ")[0]


async def _logged(node: NodeProcess, words: str) -> bool:
    """Whether the node's log says something within seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10.0):
            async for _ in awatch(node.home / "logs", yield_on_timeout=True, rust_timeout=500):
                if words in node.log():
                    return True
    return False


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of a short prompt")
    parser.add_argument("--tokens", type=int, default=8192, help="about how long the prompt is")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--moved", action="store_true", help="after a move to another node, instead of a restart")
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    tokens, rounds = (1024, 1) if options.quick else (options.tokens, options.rounds)
    with tempfile.TemporaryDirectory(prefix="mesh-llm-bench-") as scratch:
        results = asyncio.run((measure_moved if options.moved else measure)(tokens, rounds, Path(scratch)))
    columns = tuple(results[0])
    print(table(columns, [[one[column] for column in columns] for one in results]))
    print(f"median of the pairs' ratios: {statistics.median(one['ratio'] for one in results):.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rounds": results}, indent=1))


if __name__ == "__main__":
    main()
