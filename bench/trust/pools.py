"""Real answers of real engines to the same questions, by what the engine runs on: hosts are drawn from them."""

import asyncio
import os
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from tests.integration.accelerator_fixtures import VULKAN_PLUGIN, installed
from tests.integration.engine_fixtures import client_of, small_spec, started
from tests.integration.split_fixtures import split
from tests.support.gguf_models import PRESETS, write_model
from tests.support.gguf_vocabulary import WORDS
from tools.train_tiny.chat import prompt
from tools.train_tiny.corpus import Conversation, documents

from mesh_llm.core.trust.canaries import AnswerToken, CanaryAnswer
from mesh_llm.engine.sources.embedded.archive import VERSION
from mesh_llm.engine.sources.embedded.source import EmbeddedSource
from mesh_llm.engine.spec import NGRAM
from mesh_llm.engine.supervisor import RunningEngine, Supervisor
from mesh_llm.models.gguf.facts import read_facts
from mesh_llm.models.gguf.header import read_header
from mesh_llm.models.library.library import builtin_path

Pool = dict[int, CanaryAnswer]
"""Answers by the number of the question."""

LISTED = 5
_UNSEEN = 20_261_124
"""The seed of questions that no training run had."""
_WORDS = 16
_CONVERSATIONS = 120
"""So many questions to `tiny` are like those that it was trained with."""
_WORKERS = 2
_CONTEXT = 512
_AT_A_TIME = 8
"""Questions between two savings."""


@dataclass(frozen=True, eq=False)
class Configuration:
    """How a host computes.

    Attributes:
        name: for people.
        about: one line.
        changes: to the engine's spec.
        at_once: requests at a time.
        vulkan: on Vulkan's software device.
        split: over two RPC workers.
        draft: a draft model guesses.
    """

    name: str
    about: str
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    at_once: int = 1
    vulkan: bool = False
    split: bool = False
    draft: bool = False

    @property
    def cache(self) -> str:
        """Element type of the KV cache."""
        return self.changes.get("cache_type", "f16")


def _with_cache(kind: str) -> tuple[Configuration, ...]:
    """Configurations with a rougher cache, the plain one first. Without flash attention there is none."""
    name, about = f"KV {kind}", f"cache of {kind}"
    cache: dict[str, Any] = {"cache_type": kind}
    return (
        Configuration(name, about, cache),
        Configuration(f"{name} batch 32", f"{about}, batches of 32", cache | {"batch": 32, "micro_batch": 16}),
        Configuration(f"{name} 4 at once", f"{about}, four requests at a time", cache | {"slots": 4}, at_once=4),
        Configuration(f"{name} 2 threads", f"{about}, two threads", cache | {"threads": 2}),
        Configuration(f"{name} draft", f"{about}, guessing by a draft model", cache | {"draft_max": 4}, draft=True),
        Configuration(f"{name} Vulkan", f"{about}, Mesa's software device", cache | _VULKAN, vulkan=True),
    )


_VULKAN: dict[str, Any] = {"devices": ("Vulkan0",)}

PLAIN = Configuration("plain", "one thread, f16 cache")
HONEST = (
    PLAIN,
    Configuration("2 threads", "two threads", {"threads": 2}),
    Configuration("batch 32", "batches of 32 tokens, computed 16 at a time", {"batch": 32, "micro_batch": 16}),
    Configuration("4 at once", "four requests at a time in one batch", {"slots": 4}, at_once=4),
    Configuration("no flash", "without flash attention", {"more": ("--flash-attn", "off")}),
    Configuration("no repack", "weights as they are in the file", {"more": ("--no-repack",)}),
    Configuration("n-grams", "guessing by n-grams", {"speculation": NGRAM}),
    Configuration("draft", "guessing by a draft model", {"draft_max": 4}, draft=True),
    Configuration("Vulkan", "Mesa's software device", _VULKAN, vulkan=True),
    Configuration("split", "over two RPC workers and the host", split=True),
    *_with_cache("q8_0"),
    *_with_cache("q4_0"),
)
"""The first is the one that asks. A cache of another type than f16 is only honest where it is announced."""

LIARS = tuple(how for how in HONEST if how is PLAIN or how.name in ("Vulkan", "KV q8_0", "KV q4_0"))
"""How liars compute."""


def questions(model: str, count: int) -> list[str]:
    """Prompts that no two configurations get in another order. A number means the same one, however many there are."""
    asked: list[str] = []
    if model == "tiny":
        found = (one for one in documents(_UNSEEN) if isinstance(one, Conversation))
        asked = [prompt(one) for one in islice(found, min(count, _CONVERSATIONS))]
    return [*asked, *(_free(number) for number in range(count - len(asked)))]


def _free(number: int) -> str:
    chance = random.Random(_UNSEEN + number)
    return " ".join(chance.choice(WORDS) for _ in range(_WORDS + chance.randrange(_WORDS)))


class Engines:
    """Starts engines of all configurations."""

    def __init__(self, directory: Path, supervisor: Supervisor) -> None:
        source = EmbeddedSource.find(Path(os.environ.get("MESH_LLM_HOME") or Path.home() / ".mesh-llm") / "cache")
        if source is None:
            raise SystemExit("the embedded engine is not installed: mesh-llm engine install")
        self._directory = directory
        self._supervisor = supervisor
        self._source = source
        self._started = 0

    def has(self, configuration: Configuration) -> bool:
        """Whether this machine can do it."""
        return not configuration.vulkan or VULKAN_PLUGIN.exists()

    @asynccontextmanager
    async def running(self, model: str, path: Path, how: Configuration) -> AsyncGenerator[RunningEngine]:
        """An engine, stopped at the end."""
        fields: dict[str, Any] = {"context": _CONTEXT, "slots": 1, "embeddings": False, "threads": 1, **how.changes}
        # Threads that wait spin otherwise, which takes long where other work has the cores.
        fields["more"] = (*fields.get("more", ()), "--poll", "0")
        self._started += 1
        name = f"{self._started}-{model}"
        if how.split:
            layers = read_facts([read_header(path)], path.stem).layers
            offloaded = layers - max(1, layers // (_WORKERS + 1)) + 1
            async with split(self._supervisor, self._source, path, _WORKERS) as group:
                engine = await group.start(path, gpu_layers=offloaded, **fields)
                yield engine
                await engine.stop()
            return
        if how.draft:
            fields["draft"] = self._draft(model)
        source = self._vulkan() if how.vulkan else self._source
        spec = small_spec(path, **({} if how.vulkan else {"devices": ("CPU",)}) | fields)
        engine = await started(self._supervisor, source, spec, name)
        yield engine
        await engine.stop()

    def _draft(self, model: str) -> Path:
        if model == "tiny":
            path = builtin_path("tiny-draft")
            if path is None:
                raise SystemExit("tiny-draft is not part of this installation")
            return path
        path = self._directory / "draft.gguf"
        if not path.exists():
            write_model(path, PRESETS["small-draft"])
        return path

    def _vulkan(self) -> EmbeddedSource:
        # As tests/integration/accelerator_fixtures.py does: only a named software device is shown.
        os.environ["GGML_VK_VISIBLE_DEVICES"] = "0"
        # Mesa keeps what it compiled, so a second run begins at once.
        home = self._directory / "vulkan"
        installed(home, VULKAN_PLUGIN)
        source = EmbeddedSource.find(home)
        if source is None:
            raise SystemExit("the Vulkan plugin for tests does not load")
        return source


async def answers(engine: RunningEngine, asked: Sequence[str], tokens: int, at_once: int) -> list[CanaryAnswer]:
    """Greedy answers with probabilities, in the order of the questions."""
    client = client_of(engine, 600.0)
    free = asyncio.Semaphore(at_once)

    async def answer(question: str) -> CanaryAnswer:
        body = {"prompt": question, "max_tokens": tokens, "temperature": 0, "logprobs": LISTED}
        async with free:
            said = (await client.post("/v1/completions", body)).expect().json()
        return read(said["choices"][0].get("logprobs"))

    return list(await asyncio.gather(*(answer(one) for one in asked)))


def read(said: dict[str, Any] | None) -> CanaryAnswer:
    """What llama-server says of an answer's tokens."""
    return CanaryAnswer(
        tuple(
            AnswerToken(
                one["token"], one["logprob"], tuple((top["token"], top["logprob"]) for top in one["top_logprobs"])
            )
            for one in (said or {}).get("content") or []
        )
    )


class Store:
    """Answers that are kept in a directory, one file for each model, file and configuration: a run can go on later."""

    def __init__(self, directory: Path, tokens: int) -> None:
        self._directory = directory
        self._tokens = tokens

    def load(self, model: str, key: str) -> Pool:
        """The answers so far. Those of another engine, or of other lengths, do not count."""
        path = self._path(model, key)
        if not path.exists():
            return {}
        kept = msgspec.msgpack.decode(path.read_bytes(), type=_Kept)
        return kept.answers if (kept.engine, kept.tokens) == (VERSION, self._tokens) and kept.listed >= LISTED else {}

    def save(self, model: str, key: str, pool: Pool) -> None:
        """Keep them. The file appears complete or not at all."""
        path = self._path(model, key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(msgspec.msgpack.encode(_Kept(VERSION, self._tokens, LISTED, pool)))
        unfinished.replace(path)

    def _path(self, model: str, key: str) -> Path:
        return self._directory / model / f"{key.replace(', ', '-').replace(' ', '_')}.msgpack"


class _Kept(msgspec.Struct):
    engine: str
    tokens: int
    listed: int
    answers: Pool


async def collect(
    engines: Engines, model: str, path: Path, how: Configuration, asked: Mapping[int, str], tokens: int
) -> AsyncGenerator[Pool]:
    """The answers of one file in one configuration, some at a time. `asked`: by their numbers."""
    numbers = list(asked)
    async with engines.running(model, path, how) as engine:
        for first in range(0, len(numbers), _AT_A_TIME):
            some = numbers[first : first + _AT_A_TIME]
            found = await answers(engine, [asked[number] for number in some], tokens, how.at_once)
            yield dict(zip(some, found, strict=True))
