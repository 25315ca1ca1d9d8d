"""A long prompt after a restart: `python -m bench.prompt_cache [--quick] [--json FILE]`.

One node serves a generated model of 160 MB on the processor. Each round reads a prompt that no cache holds, and takes
the time to the first token; then the node is stopped and started, and the next turn of the same conversation is timed.
Both times are of requests to a node that is ready: the start of the node and the loading of the model are in neither.
A third time is that of the same turn once more, which finds its prompt in the engine's own memory.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common import ROOT, machine, table
from tests.support.gguf_models import PRESETS, write_model
from tests.support.http import HttpClient
from tests.support.node import NodeProcess

_MODELS = ROOT / ".pytest_cache" / "d" / "models"
_CONTEXT = 9216
_TOKENS_A_WORD = 2.9
"""Of the generated model's vocabulary, for the words of `prompt`."""
_WAIT = 1800.0


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
    client = HttpClient(node.api.port, timeout=_WAIT)
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


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one round of a short prompt")
    parser.add_argument("--tokens", type=int, default=8192, help="about how long the prompt is")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the numbers here too")
    options = parser.parse_args()
    tokens, rounds = (1024, 1) if options.quick else (options.tokens, options.rounds)
    with tempfile.TemporaryDirectory(prefix="mesh-llm-bench-") as scratch:
        results = asyncio.run(measure(tokens, rounds, Path(scratch)))
    columns = ("tokens", "read_s", "warm_s", "again_s", "ratio", "from_cache", "read_then", "stop_s", "saved_MB")
    print(table(columns, [[one[column] for column in columns] for one in results]))
    print(f"median of the pairs' ratios: {statistics.median(one['ratio'] for one in results):.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": machine(), "rounds": results}, indent=1))


if __name__ == "__main__":
    main()
