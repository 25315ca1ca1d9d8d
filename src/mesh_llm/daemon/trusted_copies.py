"""What trusted copies of a model write and answer, so that the answers of hosts can be compared with theirs.

A trusted copy is one that is loaded here, or on a host of this node's owner or of the user's group. It writes what
canaries ask, so that nothing of a client's request is in it.
"""

import random
import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from mesh_llm.api.canaries import CanaryClient, GiveWay
from mesh_llm.api.canary_shapes import CHAT, Question, RequestShape
from mesh_llm.api.dialects.ollama.catalogue import named_quantization
from mesh_llm.core.node import Node
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.canaries import CanaryAnswer
from mesh_llm.core.trust.canary_plan import CANARY_WORK, WRITING_WORK, Prompt, Seen, coarser_copy
from mesh_llm.core.trust.readback import Reading
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId

_LEAST_PROMPT = 8
_OWN_ANSWERS, _MOST_OWN_ANSWERS = 2, 8
"""So many of a copy's own answers are read back: more where they are short."""
_LEAST_FITS = 16
_MOST_NOTED = 64
_DATES = ("strftime_now", "date_string")
"""In a chat template: the prompt depends on the day, so hosts in other time zones read another one."""
_KINDS = (
    "a short question about", "a request to explain", "a request for advice on", "a message that asks for ideas about",
    "a follow-up question about", "a request for a short story about", "a request to compare two kinds of",
    "a request for a list of facts about", "a request to write an e-mail about", "a doubtful question about",
    "a beginner's question about", "an expert's question about", "a request for a short plan concerning",
    "a request to summarise what is known about", "a request for a small program about", "a personal question about",
)  # fmt: skip
_TOPICS = (
    "weather", "cooking", "a holiday", "bicycles", "taxes", "birds", "a garden", "mathematics", "history", "a database",
    "music", "sleep", "a job interview", "rivers", "a web page", "cats", "old books", "trains", "coffee", "a table",
    "running", "stars", "a birthday", "an engine", "painting", "a court case", "chess", "bread", "the sea", "a school",
    "networks", "a broken lamp", "insects", "money", "a language", "photographs", "mountains", "medicine", "football",
    "a film", "electricity", "a neighbour", "statistics", "clothes", "paper", "a robot", "forests", "an old house",
)  # fmt: skip

_ROLES = (
    "an assistant", "a helper of a shop's customers", "a patient teacher", "a careful translator", "a programmer",
    "a cook's assistant", "a librarian", "a travel agent", "a strict editor", "an analyst", "a friendly companion",
)  # fmt: skip


class TrustedCopies:
    """Asks copies of a model that the user trusts.

    Attributes:
        spent: work that other nodes were asked for, in tokens of an answer; set to 0 by who counts it.
        insists: see core.trust.canary_plan.Seen.
    """

    def __init__(self, node: Node, client: CanaryClient, circle: Callable[[], frozenset[OwnerId]]) -> None:
        """`circle`: owners whose nodes are trusted, now."""
        self.spent = 0.0
        self.insists = False
        self._node = node
        self._client = client
        self._circle = circle
        self._chance = random.SystemRandom().random
        self._dated: dict[tuple[NodeId, ModelName, int], bool] = {}
        self._readables: dict[tuple[NodeId, ModelName, int, str], bool] = {}

    def seen(self, model: ModelName) -> Seen:
        """What a choice is made from."""
        node = self._node
        return Seen(
            snapshot=node.snapshot,
            members=node.members,
            own={one.model: one.order.facts.fingerprint for one in node.launches},
            own_caches={one.model: one.cache_type for one in node.serving},
            in_flight=self._client.in_flight(model),
            circle=self._circle(),
            now=time.time(),
            insists=self.insists,
        )

    def cache_type(self, node: NodeId, model: ModelName) -> str:
        """The type of the KV cache with which a node says that it serves a model; empty: unknown."""
        if node == self._node.snapshot.node:
            serving = self._node.serving
        else:
            serving = next(
                (one.announcement.serving for one in self._node.members if one.announcement.node == node), ()
            )
        return next((one.cache_type for one in serving if one.model == model), "")

    async def prompt(self, copy: Target, model: ModelName, path: str, fingerprint: str) -> Prompt | None:
        """A prompt that a copy wrote, with its answer. None: not now, or not with this model. Raises GaveWayError."""
        asked = await self.write(copy, model, path)
        if asked is None:
            return None
        answer = await self._answer(copy, asked)
        if answer is None:
            return None
        cache = self.cache_type(copy.node, model)
        return Prompt(
            fingerprint=fingerprint,
            path=path,
            system=asked.system,
            text=asked.text,
            answer=answer,
            at=time.time(),
            cache_type=cache,
            coarser=await self._coarser_answer(asked, cache),
        )

    async def _answer(self, copy: Target, asked: Question) -> CanaryAnswer | None:
        self._ask(copy, CANARY_WORK)
        return await self._client.reference(copy, asked, self.in_the_way(copy, asked.model))

    async def _coarser_answer(self, asked: Question, cache: str) -> CanaryAnswer | None:
        """What a coarser copy of the model answers, if a trusted one is idle."""
        for name in coarser_names(asked.model, self._node.snapshot.models):
            copy = coarser_copy(name, cache, self.seen(name))
            if copy is not None:
                return await self._answer(copy, asked._replace(model=name))
        return None

    async def write(self, copy: Target, model: ModelName, path: str) -> Question | None:
        """Have a copy write what is asked. None: not now, or not with this model. Raises GaveWayError."""
        if path == CHAT and await self._depends_on_date(copy, model):
            return None
        self._ask(copy, WRITING_WORK)
        way, topic = self.in_the_way(copy, model), self._one_of(_TOPICS)
        about = f"Write one message that a person could send to an assistant: {self._one_of(_KINDS)} {topic}."
        text = await self._client.write(copy, model, f"{about} Write the message only.", way) or ""
        about = f"Write instructions for {self._one_of(_ROLES)}, in one sentence that begins with: You are"
        system = (await self._client.write(copy, model, about, way) or "") if path == CHAT else ""
        short = len(text) < _LEAST_PROMPT or (path == CHAT and len(system) < _LEAST_PROMPT)
        return None if short else Question(model, path, system, text)

    async def read_back(self, copy: Target, asked: Question, pieces: Sequence[str]) -> Reading | None:
        """Read an ordinary answer back. None: the copy could not. Raises GaveWayError."""
        self._ask(copy, CANARY_WORK)
        return await self._client.read_back(copy, asked, pieces, self.in_the_way(copy, asked.model))

    async def readable(self, copy: Target, shape: RequestShape, model: ModelName) -> bool:
        """Whether ordinary answers of a model can be read back. Raises GaveWayError.

        What a copy itself answers is read back first: with some templates and tokenisers its text is not what the
        tokens are, and nothing could be said about a host.
        """
        key = (copy.node, model, copy.term, shape.path)
        if key not in self._readables:
            fits = await self._own_fits(copy, shape, model)
            if fits is None:
                return False
            _bound(self._readables)
            self._readables[key] = fits >= _LEAST_FITS
        return self._readables[key]

    async def _own_fits(self, copy: Target, shape: RequestShape, model: ModelName) -> int | None:
        """Tokens of a copy's own answers that fit; 0 where one does not. None: not now."""
        fits = answers = 0
        while answers < _OWN_ANSWERS or (fits < _LEAST_FITS and answers < _MOST_OWN_ANSWERS):
            asked = await self.write(copy, model, shape.path)
            if asked is None:
                return None
            self._ask(copy, CANARY_WORK)
            pieces = await self._client.ask_ordinarily(copy, shape, asked, self.in_the_way(copy, model))
            reading = await self.read_back(copy, asked, pieces) if pieces is not None else None
            if reading is None:
                return None
            if reading.misfit:
                return 0
            answers += 1
            fits += reading.fits
        return fits

    async def _depends_on_date(self, copy: Target, model: ModelName) -> bool:
        key = (copy.node, model, copy.term)
        if key not in self._dated:
            template = await self._client.template(copy, model)
            if template is None:
                return True
            _bound(self._dated)
            self._dated[key] = any(one in template for one in _DATES)
        return self._dated[key]

    def in_the_way(self, target: Target, model: ModelName) -> GiveWay:
        """Whether a client's request shares the engine here, or has no place at a host, because of a canary."""
        places = 1 if target.local and not self.insists else max(1, target.slots)
        return lambda: self._client.in_flight(model).get(target.node, 0) > places

    def _one_of(self, texts: Sequence[str]) -> str:
        return texts[int(self._chance() * len(texts))]

    def _ask(self, copy: Target, work: float) -> None:
        self.spent += 0.0 if copy.local else work


def coarser_names(model: ModelName, known: Iterable[ModelName]) -> list[ModelName]:
    """Those of the models that are coarser files of the same one, as their names say; the next coarser one first."""
    family, bits = _family(model)
    named = [(_family(name), name) for name in known]
    coarser = [(-fewer, name) for (other, fewer), name in named if other == family and 0 < fewer < bits]
    return [name for _, name in sorted(coarser)]


def _family(name: ModelName) -> tuple[str, int]:
    """A name without its quantisation, and that one's bits; 0: it names none."""
    kind = named_quantization(name)
    digits = re.search(r"\d+", kind)
    written = name.casefold().replace("fp16", "f16")
    return written.replace(kind.casefold(), "") if kind else written, int(digits[0]) if digits else 0


def _bound(noted: dict[Any, bool]) -> None:
    if len(noted) >= _MOST_NOTED:
        noted.clear()
