"""A GPU through the engine's plugin, and through a llama.cpp that was built by hand, in turn, on the same device.

    python -m bench gpu                                          with .venv/llama-bin and the installed plugin
    python -m bench.gpu --bin-dir DIR [--device CUDA0] [--model FILE] [--prompt 512] [--tokens 128] [--rounds 5]

Both are started as a node starts them, with the same spec. In each round both get the same prompt, one after the other,
never twice the same, and llama-server's own timings count. The median of the rounds' ratios is the result. For a fair
comparison build the programs from the plugin's release, with the same backend:

    .venv/bin/python tools/build_binaries.py .venv/llama-bin --gpu cuda
"""

import argparse
import asyncio
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from bench.common import machine, table
from tests.integration.engine_fixtures import client_of
from tests.support.gguf_models import cached_model

from mesh_llm.core.types.errors import MeshError
from mesh_llm.engine.sources import EngineSource
from mesh_llm.engine.sources.binaries import BinarySource
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import DeviceInfo, EngineSpec
from mesh_llm.engine.supervisor import EngineReadyInfo, RunningEngine, Supervisor
from mesh_llm.runtime.home import Home

_BINARIES = Path(sys.prefix) / "llama-bin"
_WAIT_SECONDS = 600.0
_WORDS = ("mesh", "story", "river", "number", "light", "word", "stone", "answer")
_GOAL = 0.97
"""Of what a llama.cpp that was built by hand does on the same card."""


class NothingToCompareError(Exception):
    """The text says what is missing."""


async def device_of(source: EngineSource, wanted: str) -> DeviceInfo:
    """The device to compute on: the named one, or the first GPU. Raises NothingToCompareError."""
    devices = (await source.info()).devices
    found = next((one for one in devices if (one.id == wanted if wanted else one.holds_models)), None)
    if found is None:
        there = ", ".join(one.id for one in devices)
        raise NothingToCompareError(f"{source.name}: there is no {wanted or 'GPU'}; there are {there}")
    return found


async def prompt_of(engine: RunningEngine, tokens: int, number: int) -> list[int]:
    """A prompt of so many tokens. It differs by number from its beginning on, so that no cache knows it."""
    words = [f"{number}"] + [_WORDS[(number * 7 + place * place) % len(_WORDS)] for place in range(tokens)]
    answer = await client_of(engine, _WAIT_SECONDS).post("/tokenize", {"content": " ".join(words)})
    return answer.expect().json()["tokens"][:tokens]


async def ask(engine: RunningEngine, prompt: list[int], tokens: int) -> tuple[float, float, str]:
    """Tokens per second of the prompt and of the answer, and the answer."""
    body: dict[str, Any] = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "cache_prompt": False}
    body["ignore_eos"] = True
    answer = (await client_of(engine, _WAIT_SECONDS).post("/completion", body)).expect().json()
    timings = answer["timings"]
    return timings["prompt_per_second"], timings["predicted_per_second"], answer["content"]


async def started(supervisor: Supervisor, source: EngineSource, spec: EngineSpec) -> RunningEngine:
    """An engine that is ready. Raises NothingToCompareError."""
    engine = await supervisor.launch(await supervisor.server_command(source, spec), source.name)
    ready = await engine.ready()
    if not isinstance(ready, EngineReadyInfo):
        raise NothingToCompareError(f"{source.name} does not start: {ready.reason}")
    return engine


async def compare(options: argparse.Namespace, model: Path) -> dict[str, Any]:
    """All rounds; the numbers."""
    home = Home(options.home) if options.home is not None else Home.default()
    plugin = EmbeddedSource.find(home.cache)
    if plugin is None:
        raise NothingToCompareError("the engine's wheel is not installed")
    try:
        own = BinarySource.find(options.bin_dir, home.cache)
    except MeshError as error:
        raise NothingToCompareError(f"{error.message} {error.hint}") from error
    assert own is not None
    sources: tuple[EngineSource, ...] = (plugin, own)
    devices = [await device_of(source, options.device) for source in sources]
    context = options.prompt + options.tokens + 64
    spec = EngineSpec(model=model, alias="bench", context=context, slots=1, embeddings=False, pooling="")
    names = [source.name for source in sources]
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    same = 0
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as logs:
        supervisor = Supervisor(Path(logs))
        try:
            engines = [
                await started(supervisor, source, replace(spec, devices=(device.id,)))
                for source, device in zip(sources, devices, strict=True)
            ]
            for engine in engines:
                # Pipelines are compiled, and clocks rise.
                await ask(engine, await prompt_of(engine, options.prompt, 0), options.tokens)
            for number in range(1, options.rounds + 1):
                prompt = await prompt_of(engines[0], options.prompt, number)
                turns = list(zip(names, engines, strict=True))
                said: list[str] = []
                for name, engine in turns if number % 2 else reversed(turns):
                    prompt_rate, rate, text = await ask(engine, prompt, options.tokens)
                    rates[name].append((prompt_rate, rate))
                    said.append(text)
                same += said[0] == said[1]
        finally:
            await supervisor.close()
    infos = [await source.info() for source in sources]
    ratios = [
        [ours[part] / theirs[part] for ours, theirs in zip(rates[names[0]], rates[names[1]], strict=True)]
        for part in range(2)
    ]
    return {
        "machine": machine(),
        "device": devices[0].name,
        "model": model.name,
        "engines": {name: f"{info.version}, {info.build}" for name, info in zip(names, infos, strict=True)},
        "prompt_tokens": options.prompt,
        "tokens": options.tokens,
        "rates": rates,
        "prompt_ratio": round(median(ratios[0]), 3),
        "decode_ratio": round(median(ratios[1]), 3),
        "rounds_with_the_same_text": same,
    }


def show(found: dict[str, Any]) -> str:
    """The numbers as a table, with what they are of."""
    rows = [
        (name, median(one[0] for one in rates), median(one[1] for one in rates))
        for name, rates in found["rates"].items()
    ]
    rounds = len(next(iter(found["rates"].values())))
    return "\n".join(
        (
            f"{found['device']}, {found['model']}, prompts of {found['prompt_tokens']} tokens",
            *(f"  {name}: {text}" for name, text in found["engines"].items()),
            table(("ENGINE", "PROMPT tokens/s", "DECODE tokens/s"), rows),
            f"plugin / own: prompt {found['prompt_ratio']:.3f}, decode {found['decode_ratio']:.3f} (wanted: {_GOAL})",
            f"the same text in {found['rounds_with_the_same_text']} of {rounds} rounds",
        )
    )


def main() -> int:
    """Entry point; the exit status. Where there is nothing to compare, it says so, and that is no failure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument("--bin-dir", type=Path, default=_BINARIES, help="llama-server's directory")
    parser.add_argument("--home", type=Path, help="the home whose cache has the plugin; default: this user's")
    parser.add_argument("--device", default="", help="as both name it, as in CUDA0; default: the first GPU of each")
    parser.add_argument("--model", type=Path, help="a GGUF file; default: a generated one of 530 MB")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a small model, and less of all")
    options = parser.parse_args()
    if options.quick:
        options.prompt, options.tokens, options.rounds = 64, 16, 3
    try:
        cached = Path(tempfile.gettempdir()) / "mesh-llm-models"
        model = options.model or cached_model(cached, "small" if options.quick else "half-gigabyte")
        found = asyncio.run(compare(options, model))
    except NothingToCompareError as missing:
        print(f"nothing to compare: {missing}")
        return 0
    print(show(found))
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
