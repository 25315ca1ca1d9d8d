"""What this node found out about hosts: kept in the home, shown to its user, and forgotten when the user says so.

What canaries say decides whom this node's requests avoid; nobody else learns of it. What hosts announce and do not
keep is shown with it.
"""

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from mesh_llm.console.schema import TrustForgotten, TrustList, TrustRecord
from mesh_llm.console.status import StatusCorrection, StatusProblem
from mesh_llm.core.membership.names import AmbiguousNode, UnknownNode, resolve_node
from mesh_llm.core.node import Node
from mesh_llm.core.trust.canary_plan import HostRecord, Prompt, Standing, TrustState, bounded, distrusted
from mesh_llm.core.trust.circle import owner_of
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError, listed
from mesh_llm.core.types.events import AnyEvent, CorrectionsForgotten, HostsDistrusted
from mesh_llm.core.types.ids import ModelName, NodeId, OwnerId
from mesh_llm.daemon.status import shown_correction
from mesh_llm.runtime.state_file import read_state, write_state

_MOST_FILE = 16 << 20
_ABOUT = "what canaries say"
_SURE = 40.0


class TrustRecords:
    """What is known of hosts; implements console.calls.TrustControl.

    Attributes:
        hosts: what canaries said.
        prompts: recorded answers of trusted copies.
    """

    def __init__(
        self,
        file: Path,
        node: Node,
        circle: Callable[[], frozenset[OwnerId]],
        post: Callable[[AnyEvent], None],
        notify: Callable[[Notice], None],
        *,
        asks: bool,
    ) -> None:
        """Read what is remembered. `circle`: owners whose nodes are trusted, now; `asks`: canaries are sent."""
        self._file = file
        self._node = node
        self._circle = circle
        self._post = post
        self._notify = notify
        self._asks = asks
        saved, self._damage = read_state(file, TrustState, _MOST_FILE, _ABOUT)
        state = saved or TrustState()
        self.hosts = {one.key: one for one in state.hosts}
        self.prompts = list(state.prompts)

    def begin(self) -> None:
        """Avoid the hosts that were distrusted before. Called once, when the core runs."""
        if self._damage:
            text = f"What this node knew of hosts that it checked is lost: {self._file} {self._damage}."
            self._notify(Notice(level=NoticeLevel.WARNING, code="trust_lost", text=text))
        if any(one.standing is Standing.DISTRUSTED for one in self.hosts.values()):
            self._post(HostsDistrusted(hosts=distrusted(self.hosts.values())))

    async def save(self) -> None:
        """Write what is known, as far as it is kept."""
        state = bounded(self.hosts.values(), self.prompts, time.time())
        self.hosts = {one.key: one for one in state.hosts}
        self.prompts = list(state.prompts)
        await asyncio.to_thread(write_state, self._file, state, _ABOUT)

    def asked(self, prompt: Prompt, node: NodeId) -> None:
        """A host gets a prompt: it gets it only once."""
        asked = msgspec.structs.replace(prompt, asked=(*prompt.asked, node))
        self.prompts = [asked if one is prompt else one for one in self.prompts]

    def remember(self, record: HostRecord, before: HostRecord | None) -> None:
        """A host was checked. `before`: what was known of it then: what the user forgot since does not come back."""
        if before is not None and record.key not in self.hosts:
            return
        self.hosts[record.key] = record
        if record.standing is not Standing.DISTRUSTED or (before is not None and before.standing is record.standing):
            return
        found = [record] if record.node != self._node.snapshot.node else self._blame(record)
        self._post(HostsDistrusted(hosts=distrusted(self.hosts.values())))
        for one in found:
            self._notify(
                Notice(level=NoticeLevel.WARNING, code="host_distrusted", text=self._explained(one), about=one.node)
            )

    def _blame(self, record: HostRecord) -> list[HostRecord]:
        """A model that this node splits is computed wrongly: the workers that the user does not trust are avoided.

        Which of several it is, no answer says; all of them are remembered in place of the split. With one alone, it is
        that one, if this machine computes rightly.
        """
        del self.hosts[record.key]
        owners, circle, names = self._node.snapshot.owners, self._circle(), self._node.names
        outside = [one for one in record.workers if owner_of(one, owners, time.time()) not in circle]
        blamed: list[HostRecord] = []
        for one in outside:
            others = tuple(other for other in outside if other != one)
            name = names.get(one, one[:10])
            blamed.append(msgspec.structs.replace(record, node=one, name=name, workers=others, split=True))
        self.hosts |= {one.key: one for one in blamed}
        return blamed

    def _explained(self, record: HostRecord) -> str:
        """Why a host or a worker is distrusted, and what to type, for people."""
        names = [self._node.names.get(one, one[:10]) for one in record.workers]
        return f"{describe(record, names)} To use it again: mesh-llm trust forget {record.node[:10]}"

    def problems(self) -> tuple[StatusProblem, ...]:
        """The distrusted hosts, for the status."""
        return tuple(
            StatusProblem(
                what=f"trust {one.model} {one.node[:10]}",
                text=self._explained(one),
                since_s=round(max(0.0, time.time() - one.since), 1),
                times=one.canaries,
            )
            for one in self.hosts.values()
            if one.standing is Standing.DISTRUSTED
        )

    def trust(self) -> TrustList:
        """All hosts that were checked, and what hosts announce and did not keep."""
        shown = sorted(self.hosts.values(), key=lambda one: (one.standing is not Standing.DISTRUSTED, -one.at))
        return TrustList(
            asks=self._asks,
            hosts=tuple(
                TrustRecord(
                    node_id=one.node,
                    name=self._node.names.get(one.node, one.name),
                    model=one.model,
                    standing=one.standing.value,
                    canaries=one.canaries,
                    unanswered=one.unanswered,
                    tests=one.tests,
                    evidence=round(one.suspicion.evidence, 2),
                    ordinary=round(one.readback.evidence, 2),
                    at=one.at,
                    text=self._explained(one) if one.standing is Standing.DISTRUSTED else "",
                    workers=one.workers,
                )
                for one in shown
            ),
            corrections=self._corrections(),
        )

    def _corrections(self) -> tuple[StatusCorrection, ...]:
        node = self._node
        return tuple(shown_correction(one, node.names, node.config.epoch) for one in node.snapshot.corrections)

    async def forget(self, node: str, model: str = "") -> TrustForgotten:
        """Forget what was found out about a host, by its name or the beginning of its key; `model`: about this only.

        Its corrections end too: what it announces counts again. Raises node_unknown, node_ambiguous, model_unknown.
        """
        corrections = self._corrections()
        names = {NodeId(one.node_id): one.name for one in corrections}
        names |= {one.node: self._node.names.get(one.node, one.name) for one in self.hosts.values()}
        found = resolve_node(node, names)
        if isinstance(found, UnknownNode | AmbiguousNode):
            several = isinstance(found, AmbiguousNode)
            raise MeshError(
                code="node_ambiguous" if several else "node_unknown",
                message=f"{'Several checked hosts are' if several else 'No checked host is'} called {node[:80]}.",
                hint="mesh-llm trust list shows them; give the beginning of the key.",
                status=409 if several else 404,
            )
        keys = [key for key in self.hosts if key.node == found and model in ("", key.model)]
        ended = tuple(one for one in corrections if one.node_id == found and model in ("", one.model))
        if model and not keys and not ended:
            raise MeshError(
                "model_unknown",
                f"Nothing was found out about {model[:80]} on {names[found]}.",
                "mesh-llm trust list shows what was; without a model, all of it is forgotten.",
                404,
            )
        if keys:
            self.hosts = {key: one for key, one in self.hosts.items() if key not in keys}
            self._post(HostsDistrusted(hosts=distrusted(self.hosts.values())))
            await self.save()
        # Also where none holds now: answers that were timed count no more.
        self._post(CorrectionsForgotten(node=found, model=ModelName(model) if model else None))
        models = tuple(sorted(key.model for key in keys))
        return TrustForgotten(node_id=found, name=names[found], models=models, corrections=ended)


def describe(record: HostRecord, workers: Sequence[str] = ()) -> str:
    """Why a host or a worker is distrusted, for people. `workers`: the names of the record's other nodes."""
    odds = math.exp(min(_SURE, max(record.suspicion.evidence, record.between.evidence, record.readback.evidence)))
    found = f"{record.canaries} canaries were compared, and the odds are {odds:,.0f} to 1"
    if record.split:
        also = f" {listed(workers)} computed with it, and no answer shows which of them it is." if workers else ""
        return (
            f"{record.name} computes layers of {record.model} wrongly, or this machine does: the split model gave "
            f"other answers than its file. {found} for that.{also} This node splits that model with it no more."
        )
    others = (
        f" It computes that model with {listed(workers)}, and no answer shows which of these nodes computes wrongly."
        if workers
        else ""
    )
    return (
        f"{record.name} gave other answers for {record.model} than the file that it announces: {found} that it serves "
        f"something else.{others} This node sends it no requests for that model."
    )
