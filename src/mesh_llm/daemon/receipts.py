"""What receipts need of a running node: its key, the launches here, and what other nodes have announced."""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from mesh_llm.api.dialects.ollama.catalogue import quantization
from mesh_llm.api.receipts import Notary
from mesh_llm.core.node import Node
from mesh_llm.core.types.ids import ModelName, NodeId
from mesh_llm.core.types.receipt import Announced, Served
from mesh_llm.daemon.model_registry import ModelRegistry
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.net.admission.credentials import SigningKey, verify
from mesh_llm.runtime.supervision import TaskScope

_UNKNOWN = "unknown"
_log = structlog.get_logger(__name__)


class ReceiptFacts:
    """Facts for receipts. The digest of a large file takes a while: it is computed once, from the first request on."""

    def __init__(
        self, node: Node, registry: ModelRegistry, digests: ChunkDigestStore, wire: Callable[[ModelName], str]
    ) -> None:
        """`digests`: of model files; those that are known are not computed again.

        `wire`: how activations of a model that is split here travel, in words; empty for other models.
        """
        self._node = node
        self._models = registry
        self._digests = digests
        self._wire = wire
        self._contents: dict[tuple[ModelName, int], bytes] = {}
        self._computing: set[tuple[ModelName, int]] = set()
        self._one_at_a_time = asyncio.Lock()
        self._scope = TaskScope("receipt-facts")

    def notary(self, key: SigningKey, name_of: Callable[[NodeId], str]) -> Notary:
        """What the API needs."""
        return Notary(
            node=key.node_id,
            sign=key.sign,
            verify=verify,
            prepare=self.prepare,
            served=self.served,
            announced=self.announced,
            name_of=name_of,
        )

    async def close(self) -> None:
        """Stop reading files."""
        await self._scope.close()

    def prepare(self, model: ModelName) -> None:
        """Begin to digest the file of a model that is launched here."""
        launch = next((one for one in self._node.launches if one.model == model), None)
        found = self._models.find(model)
        if launch is None or found is None:
            return
        key = (model, launch.term)
        if key not in self._contents and key not in self._computing:
            self._computing.add(key)
            self._scope.spawn(self._compute(key, found.paths), f"digest {model}")

    async def _compute(self, key: tuple[ModelName, int], paths: Sequence[Path]) -> None:
        try:
            async with self._one_at_a_time:
                content = await asyncio.to_thread(content_digest, self._digests, paths)
        except OSError as error:
            _log.warning("model file not digested for receipts", model=key[0], reason=str(error))
        else:
            self._contents = {one: known for one, known in self._contents.items() if one[0] != key[0]}
            self._contents[key] = content
        finally:
            self._computing.discard(key)

    def served(self, model: ModelName, term: int) -> Served:
        """What is known of a launch here."""
        launch = next((one for one in self._node.launches if one.model == model and one.term == term), None)
        if launch is None:
            return Served()
        plan, facts = launch.order.plan, launch.order.facts
        kind = quantization(model, facts, None)
        return Served(
            content=self._contents.get((model, term), b""),
            fingerprint=facts.fingerprint,
            quantisation="" if kind == _UNKNOWN else kind,
            context=launch.context,
            engine=self._node.capacity.engine,
            cache_type=plan.cache_type,
            wire_type=self._wire(model) if plan.split is not None else "",
            system_prompt=bool(self._node.settings_of(model).system_prompt),
            workers=tuple(share.node for share in plan.split.workers) if plan.split is not None else (),
        )

    def announced(self, model: ModelName, node: NodeId) -> Announced:
        """What another node has announced about a model."""
        member = next((one.announcement for one in self._node.members if one.announcement.node == node), None)
        if member is None:
            return Announced()
        facts = next((one for one in member.on_disk if one.name == model), None)
        split = member.split if member.split is not None and member.split.model == model else None
        layout = split.layout() if split is not None else None
        return Announced(
            fingerprint=facts.fingerprint if facts is not None else "",
            workers=tuple(share.node for share in layout.workers) if layout is not None else (),
        )


def content_digest(digests: ChunkDigestStore, paths: Sequence[Path]) -> bytes:
    """The SHA-256 of a model's file; of several files, that over their digests in order. Blocks. Raises OSError."""
    found = [digests.make(path).sha256 for path in paths]
    return found[0] if len(found) == 1 else hashlib.sha256(b"".join(found)).digest()
