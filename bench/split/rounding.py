"""What rounded activations (`--wire f16`, `q8`) do to what a model says, against f32 over the same machines.

    python -m bench.split.rounding [--models tiny,small,middle] [--texts 8] [--tokens 96] [--workers 2]

A host with layers of its own and workers, each an engine, all in one process's tunnels over loopback. Each text is read
token by token: at each place the model is asked for the next one, after all that comes before it. *same token*: the
places at which the likeliest token is the one of f32; *same answers*: greedy answers that are f32's to the end;
*log p*: the mean and the largest change of the logarithm of the probability of the text's own token (natural);
*perplexity* of the texts. `tiny` reads conversations that it was not trained on; generated models, whose weights are
random, read what they say themselves at temperature 1. What was read stays in the cache with what rounding made of it,
and prompts of 128 tokens and more are read first, so that prompts and tokens are both rounded.
"""

import argparse
import asyncio
import json
import math
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bench.common import machine, table
from tests.integration.engine_fixtures import client_of
from tests.integration.split_fixtures import split
from tests.support.gguf_models import cached_model
from tests.support.http import HttpClient
from tools.train_tiny.chat import prompt
from tools.train_tiny.corpus import Conversation, documents

from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.library.library import builtin_path
from mesh_llm.wire.ggml_rpc.activations import Format, WireFormats

_UNSEEN = 20_261_130
"""The seed of texts that no training run had."""

_LIKELIEST = 256
_FIRST = 128


@dataclass
class Reading:
    """What one format made of all texts of a model.

    Attributes:
        likeliest: of each text, the likeliest token at each place.
        logs: of each text, the logarithm of the probability of its own token at each place; -inf beyond the likeliest.
        answers: greedy answers.
    """

    likeliest: list[list[int]]
    logs: list[list[float]]
    answers: list[list[int]]


@dataclass
class Result:
    """One row of the table."""

    model: str
    wire: str
    places: int
    same_token: float
    same_answers: float
    mean_change: float
    largest_change: float
    perplexity: float


async def _next(client: HttpClient, tokens: list[int], **words: Any) -> dict[str, Any]:
    body = {"prompt": tokens, "temperature": 0, "cache_prompt": True, "return_tokens": True, **words}
    return (await client.post("/completion", body)).expect().json()


async def read(client: HttpClient, texts: list[list[int]], first: int, answer: int) -> Reading:
    """Read all texts from place `first` on, and let each be continued."""
    found = Reading([], [], [])
    for text in texts:
        likeliest: list[int] = []
        logs: list[float] = []
        # The slot forgets what another format made of the same text.
        await _next(client, text[:first], n_predict=1, cache_prompt=False)
        for place in range(first, len(text)):
            said = await _next(client, text[:place], n_predict=1, n_probs=_LIKELIEST)
            tops = said["completion_probabilities"][0]["top_logprobs"]
            likeliest.append(tops[0]["id"])
            logs.append(next((one["logprob"] for one in tops if one["id"] == text[place]), -math.inf))
        found.likeliest.append(likeliest)
        found.logs.append(logs)
        said = await _next(client, text[:first], n_predict=answer, cache_prompt=False)
        found.answers.append(said["tokens"])
    return found


def compared(model: str, wire: str, exact: Reading, other: Reading) -> Result:
    """One format against f32."""
    pairs = [
        (a, b, one, two)
        for firsts, seconds, ones, twos in zip(exact.likeliest, other.likeliest, exact.logs, other.logs, strict=True)
        for a, b, one, two in zip(firsts, seconds, ones, twos, strict=True)
    ]
    both = [(one, two) for _, _, one, two in pairs if math.isfinite(one) and math.isfinite(two)]
    changes = [abs(two - one) for one, two in both]
    return Result(
        model=model,
        wire=wire,
        places=len(pairs),
        same_token=sum(a == b for a, b, _, _ in pairs) / len(pairs),
        same_answers=sum(a == b for a, b in zip(exact.answers, other.answers, strict=True)) / len(exact.answers),
        mean_change=sum(changes) / len(changes),
        largest_change=max(changes),
        perplexity=math.exp(-sum(two for _, two in both) / len(both)),
    )


async def texts_of(client: HttpClient, model: str, count: int, tokens: int) -> list[list[int]]:
    """Texts of at least _FIRST + `tokens` tokens."""
    texts: list[list[int]] = []
    if model == "tiny":
        conversations = (one for one in documents(_UNSEEN) if isinstance(one, Conversation))
        while len(texts) < count:
            text: list[int] = []
            while len(text) < _FIRST + tokens:
                (one,) = islice(conversations, 1)
                words = prompt(one)
                found = (await client.post("/tokenize", {"content": words, "parse_special": True})).expect().json()
                text += found["tokens"]
            texts.append(text[: _FIRST + tokens])
        return texts
    for number in range(count):
        begin = (await client.post("/tokenize", {"content": f"the mesh of all the nodes {number}"})).expect().json()
        words = {"temperature": 1, "seed": number + 1, "n_predict": _FIRST + tokens, "ignore_eos": True, "top_k": 0}
        said = await _next(client, begin["tokens"], **words)
        texts.append((begin["tokens"] + said["tokens"])[: _FIRST + tokens])
    return texts


async def measure(source: EmbeddedSource, model: str, path: Path, arguments: argparse.Namespace) -> list[Result]:
    """All formats of one model."""
    layers = read_facts([read_header(path)], path.stem).layers
    here = max(1, layers // (arguments.workers + 1))
    formats: list[Format] = [Format.F32, Format.F32, Format.F16, Format.Q8]
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="bench-rounding-") as scratch:
        supervisor = Supervisor(Path(scratch))
        try:
            async with split(supervisor, source, path, arguments.workers) as group:
                engine = await group.start(
                    path, context=_FIRST + arguments.tokens + 64, slots=1, gpu_layers=layers - here + 1,
                    batch=_FIRST, micro_batch=_FIRST,
                )  # fmt: skip
                client = client_of(engine, 600.0)
                texts = await texts_of(client, model, arguments.texts, arguments.tokens)
                exact: Reading | None = None
                for kind in formats:
                    group.host.use(WireFormats(kind, kind))
                    before = group.host.stats().total
                    found = await read(client, texts, _FIRST, min(48, arguments.tokens))
                    stats = group.host.stats().total.minus(before)
                    if bool(stats.rounded) is (kind is Format.F32) or stats.unrounded:
                        raise SystemExit(f"{model}, {kind.name}: {stats.rounded} bytes rounded, {stats.unrounded} not")
                    exact = exact or found
                    results.append(compared(model, kind.name.lower(), exact, found))
                    print(f"  {model}, {kind.name}: {results[-1]}", file=sys.stderr, flush=True)
                await engine.stop()
        finally:
            await supervisor.close()
    # The first one is what all others are compared with; the second shows what repeating alone changes.
    return results[1:]


def shown(results: list[Result]) -> str:
    """For people."""
    columns = ("model", "--wire", "places", "same token", "same answers", "log p, mean", "largest", "perplexity")
    rows = [
        (one.model, one.wire, one.places, f"{one.same_token:.2%}", f"{one.same_answers:.0%}",
         f"{one.mean_change:.5f}", f"{one.largest_change:.4f}", f"{one.perplexity:.4f}")
        for one in results
    ]  # fmt: skip
    return table(columns, rows)


async def run(arguments: argparse.Namespace) -> list[Result]:
    """All models."""
    source = EmbeddedSource.find(Path(os.environ.get("MESH_LLM_HOME") or Path.home() / ".mesh-llm") / "cache")
    if source is None:
        raise SystemExit("the embedded engine is not installed: mesh-llm engine install")
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="bench-rounding-models-") as made:
        for model in arguments.models:
            path = builtin_path(model) or cached_model(Path(made), model)
            results += await measure(source, model, path, arguments)
    return results


def main() -> int:
    """Run and print."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--models", default=["tiny", "small", "middle"], type=lambda words: words.split(","))
    options.add_argument("--texts", type=int, default=8)
    options.add_argument("--tokens", type=int, default=96, help="of each text at which the next one is asked for")
    options.add_argument("--workers", type=int, default=2)
    options.add_argument("--json", type=Path)
    arguments = options.parse_args()
    results = asyncio.run(run(arguments))
    print(shown(results))
    if arguments.json:
        found = {"machine": machine(), "results": [asdict(one) for one in results]}
        arguments.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
