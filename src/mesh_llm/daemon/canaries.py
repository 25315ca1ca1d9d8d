"""Checks hosts by canaries: asks them now and then, compares, and notes what came of it.

`core/trust/canary_plan.py` decides which host to ask and when, `core/trust/canaries.py` what the answers prove, and
`api/canaries.py` asks. References come from `trusted_copies.py`; what follows is in `trust_records.py`.
"""

import asyncio
import math
import random
import time
from collections.abc import Callable

import msgspec

from mesh_llm.api.canaries import CanaryClient, GaveWayError, GiveWay
from mesh_llm.api.canary_shapes import Question, RequestShape
from mesh_llm.api.dialects.ollama.catalogue import named_quantization
from mesh_llm.api.types import Usage
from mesh_llm.core.node import Node
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.trust.canaries import noise_of
from mesh_llm.core.trust.canary_plan import (
    CANARY_WORK,
    STOCK,
    Check,
    HostKey,
    HostRecord,
    Prompt,
    Schedule,
    Source,
    choose,
    compared,
    read_back,
    unanswered,
    unasked,
    work,
)
from mesh_llm.core.trust.matched_filter import noise_beside
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.daemon.trust_records import TrustRecords
from mesh_llm.daemon.trusted_copies import TrustedCopies
from mesh_llm.runtime.supervision import wait_for_event

_WITH_PROBABILITIES = 0.75
"""Part of the canaries that ask for probabilities."""


class Canaries:
    """Sends canaries to the hosts that this node's clients use."""

    def __init__(
        self,
        share: float,
        circle: Callable[[], frozenset[OwnerId]],
        node: Node,
        client: CanaryClient,
        records: TrustRecords,
    ) -> None:
        """`share`: of the work that clients give a host; `circle`: owners whose nodes are trusted, now."""
        self._node = node
        self._client = client
        self._records = records
        self._copies = TrustedCopies(node, client, circle)
        self._clock = asyncio.get_running_loop().time
        self._chance = random.SystemRandom().random
        self._schedule = Schedule(share)
        self._earned = asyncio.Event()

    def worked(self, model: ModelName, node: NodeId, usage: Usage) -> None:
        """A client of this node got an answer that another node computed, or a part of it."""
        done = work(usage.prompt, usage.cached, usage.generated)
        self._schedule.earned(HostKey(node, model), done, self._clock(), self._chance())
        self._earned.set()

    async def run(self) -> None:
        """Send canaries when hosts are due; until cancelled."""
        while True:
            deadline = self._schedule.deadline()
            wait = math.inf if deadline is None else deadline - self._clock()
            if wait > 0.0:
                self._earned.clear()
                await (self._earned.wait() if math.isinf(wait) else wait_for_event(self._earned, wait))
                continue
            for key in self._schedule.due(self._clock()):
                await self._check(key)

    async def _check(self, key: HostKey) -> None:
        """Send one canary to a host, if it can be checked now. What that costs other nodes is taken off its credit."""
        self._copies.spent, self._copies.insists = 0.0, self._schedule.insists(key)
        checked = False
        try:
            checked = await self._send(key)
        except GaveWayError:
            # A client needed the place. That says nothing about the host.
            return
        finally:
            self._schedule.spent(key, self._copies.spent, self._clock(), self._chance(), checked=checked)

    async def _send(self, key: HostKey) -> bool:
        """Send a canary, and note what came of it. False: it could not be sent. Raises GaveWayError."""
        records, copies = self._records, self._copies
        shape = self._client.shapes.pick(self._chance())
        if shape is None:
            return False
        check = choose(key, shape.path, copies.seen(key.model), records.prompts, self._node.snapshot.distrusted)
        if check is None:
            return False
        known, record, copy = records.hosts.get(key), self._record(key, check), check.reference
        if copy is not None and self._ordinary(shape) and await copies.readable(copy, shape, key.model):
            after = await self._ask_ordinarily(check.host, copy, shape, record)
        else:
            after = await self._ask(check, shape, record)
        if after is None:
            return False
        records.remember(after, known)
        # At once: what follows may take minutes.
        await records.save()
        if check.source is Source.OWN and copy is not None and await self._stock(copy, key.model, shape, record):
            await records.save()
        return True

    def _ordinary(self, shape: RequestShape) -> bool:
        """Whether the next canary asks for nothing unusual, where such answers of the model can be read back."""
        return shape.streamed and self._chance() >= _WITH_PROBABILITIES

    async def _ask(self, check: Check, shape: RequestShape, record: HostRecord) -> HostRecord | None:
        """Ask for probabilities; the record afterwards. None: the host was not asked."""
        prompt = check.prompt
        if check.reference is not None:
            prompt = await self._new_prompt(check.reference, record.model, shape.path, check.fingerprint)
        if prompt is None:
            return None
        self._records.asked(prompt, record.node)
        self._copies.spent += CANARY_WORK
        way = self._way(check.host, record.model)
        answer = await self._client.ask(check.host, shape, _question(prompt, record.model), way)
        if answer is None:
            return unanswered(record, time.time())
        announced = self._copies.cache_type(record.node, record.model)
        # By the name alone: bits for each weight are the same of several types, and some of them round more.
        noise = noise_of(named_quantization(record.model), prompt.cache_type, announced)
        # Two types of caches are as far apart as two files may be.
        coarser = prompt.coarser if prompt.cache_type == announced else None
        if coarser is not None:
            noise = noise_beside(prompt.answer, coarser, answer, noise, announced)
        return compared(record, prompt.answer, answer, time.time(), noise, coarser)

    async def _ask_ordinarily(
        self, host: Target, copy: Target, shape: RequestShape, record: HostRecord
    ) -> HostRecord | None:
        """Ask for nothing unusual, and read the answer back; the record afterwards. None: nothing came of it."""
        asked = await self._copies.write(copy, record.model, shape.path)
        if asked is None:
            return None
        self._copies.spent += CANARY_WORK
        way = self._way(host, record.model)
        pieces = await self._client.ask_ordinarily(host, shape, asked, way)
        if pieces is None:
            return unanswered(record, time.time())
        reading = await self._copies.read_back(copy, asked, pieces)
        return read_back(record, reading, time.time()) if reading is not None else None

    def _way(self, host: Target, model: ModelName) -> GiveWay:
        """When a canary is left for a client's request: never at a host that was spared too often."""
        return (lambda: False) if self._copies.insists else self._copies.in_the_way(host, model)

    def _record(self, key: HostKey, check: Check) -> HostRecord:
        """The record of a host; a new one if it announces another file than before."""
        name = self._node.names.get(key.node, key.node[:10])
        known = self._records.hosts.get(key)
        if known is not None and known.fingerprint == check.fingerprint:
            record = msgspec.structs.replace(known, name=name)
        else:
            record = HostRecord(node=key.node, model=key.model, fingerprint=check.fingerprint, name=name)
        return record.with_workers(check.host.workers)

    async def _new_prompt(self, copy: Target, model: ModelName, path: str, fingerprint: str) -> Prompt | None:
        """A recorded prompt that nobody was asked yet. None: not now, or not with this model."""
        prompt = await self._copies.prompt(copy, model, path, fingerprint)
        if prompt is not None:
            self._records.prompts.append(prompt)
        return prompt

    async def _stock(self, copy: Target, model: ModelName, shape: RequestShape, record: HostRecord) -> bool:
        """Record one more answer for the time when this model is not loaded here; whether there is one."""
        stocked = len(unasked(self._records.prompts, record.fingerprint, shape.path)) >= STOCK
        if stocked or self._client.in_flight(model):
            return False
        return await self._new_prompt(copy, model, shape.path, record.fingerprint) is not None


def _question(prompt: Prompt, model: ModelName) -> Question:
    return Question(model, prompt.path, prompt.system, prompt.text)
