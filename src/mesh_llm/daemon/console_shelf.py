"""What this node could serve, and where each model would run. Satisfies core.console_ports.ModelShelf."""

from collections.abc import Callable

import msgspec

from mesh_llm.core.console_values import CatalogueModel, DiskModel, Fit, Library, UnusableFile
from mesh_llm.core.fit import DoesNotFit, plan_solo
from mesh_llm.core.local_models import Refused
from mesh_llm.core.model import LaunchOptions, ModelFacts
from mesh_llm.core.node import Node
from mesh_llm.core.status import Status, StatusModel
from mesh_llm.daemon.shelf import Shelf
from mesh_llm.models.catalog import CatalogEntry, catalog
from mesh_llm.models.library import LocalModel


class ConsoleShelf:
    """Reads what the daemon knows already; nothing is looked up on disk."""

    def __init__(self, node: Node, shelf: Shelf, status: Callable[[], Status]) -> None:
        self._node = node
        self._shelf = shelf
        self._status = status

    async def library(self) -> Library:
        """What is on disk and in the catalogue, and what of it fits."""
        library = self._shelf.library
        known = {model.name: model for model in self._status().models}
        others = sum(member.announcement.capacity.memory_bytes for member in self._node.members)
        here = self._node.capacity.memory_bytes
        return Library(
            memory_bytes=here,
            mesh_memory_bytes=here + others,
            disk=tuple(
                self._on_disk(model, known.get(model.name))
                for group in (library.models, library.drafts)
                for model in group.values()
            ),
            catalogue=tuple(self._listed(entry) for entry in catalog()),
            unusable=tuple(
                UnusableFile(name=one.name, path=str(one.path), reason=one.reason, incomplete=one.incomplete)
                for one in library.unusable
            ),
        )

    def _on_disk(self, model: LocalModel, known: StatusModel | None) -> DiskModel:
        facts = model.facts
        return DiskModel(
            name=model.name,
            kind=facts.kind.value,
            size_bytes=facts.size_bytes,
            context=facts.context_train,
            fit=self._fit(facts),
            architecture=facts.architecture,
            path=str(model.path),
            store=model.store,
            source=facts.source,
            draft=self._shelf.drafts.get(model.name, ""),
            builtin=model.builtin,
            vision=model.projector is not None,
            status=known.status if known is not None else "cold",
            here=known.here if known is not None else False,
        )

    def _listed(self, entry: CatalogEntry) -> CatalogueModel:
        have = self._shelf.library.find(entry.stem) if entry.stem else None
        return CatalogueModel(
            **msgspec.structs.asdict(entry.row()),
            fit=self._fit(entry.facts() if have is None else have.facts),
            on_disk=have.name if have is not None else "",
        )

    def _fit(self, facts: ModelFacts) -> Fit:
        """Beside what is served here now; else in the memory of others, alone or together."""
        plan = self._node.check_load(facts.name, facts=facts)
        if not isinstance(plan, Refused):
            have = self._node.capacity.memory_bytes
            return Fit(
                where="here", context=plan.context, slots=plan.slots, need_bytes=plan.memory_bytes, have_bytes=have
            )
        memories = [member.announcement.capacity.memory_bytes for member in self._node.members]
        own = self._node.capacity
        least = plan_solo(facts, 0, LaunchOptions())
        need = least.need_bytes if isinstance(least, DoesNotFit) else 0
        if not own.memory_bytes and not any(memories):
            return Fit(where="unknown", need_bytes=need, text="No node tells of memory for models.")
        elsewhere = any(memory >= need for memory in memories)
        together = bool(own.rpc_version) and own.memory_bytes + sum(memories) >= need and bool(memories)
        have = own.memory_bytes + sum(memories)
        where = "mesh" if elsewhere or together else "no"
        return Fit(where=where, need_bytes=need, have_bytes=have, text=f"{plan.message} {plan.hint}".strip())
