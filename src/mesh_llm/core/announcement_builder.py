"""What this node says of itself: its models' states as others should see them, and the whole announcement.

When a node tells the others that it changed: at once for what is served, seldom for load, never for nothing.
"""

from collections.abc import Iterable, Mapping

import msgspec

from mesh_llm.core.config import NodeConfig, Timings
from mesh_llm.core.placement.demand import coarse
from mesh_llm.core.placement.launches import Launch
from mesh_llm.core.types.announcement import Announcement, Publicity, Serving, SplitState, without_load
from mesh_llm.core.types.ids import ModelName
from mesh_llm.core.types.model import Capacity, ModelFacts, ModelStatus, Role


def own_serving(
    launches: Iterable[Launch],
    refused: Mapping[ModelName, str],
    in_flight: Mapping[str, int],
    speeds: Mapping[str, float],
    waiting: Mapping[ModelName, str],
    coming: Mapping[ModelName, str],
) -> tuple[Serving, ...]:
    """The models here, in the order asked for; refused ones (not on disk, does not fit) as failed, with the reason.

    Those that wait for other nodes' memory are cold; those that are being fetched are loading.
    """
    served = [
        Serving(
            model=launch.model,
            status=launch.status,
            term=launch.term,
            context=launch.context,
            slots=launch.slots,
            in_flight=in_flight.get(launch.model, 0),
            tokens_per_second=coarse(speeds.get(launch.model, 0.0)),
            size_bytes=launch.order.facts.size_bytes,
            reason=launch.reason,
            embeddings=launch.embeddings,
            kind=launch.order.facts.kind,
        )
        for launch in launches
    ]
    present = {serving.model for serving in served}
    served.extend(
        Serving(model=model, status=ModelStatus.FAILED, reason=reason)
        for model, reason in refused.items()
        if model not in present
    )
    served.extend(
        Serving(model=model, status=ModelStatus.COLD, reason=reason)
        for model, reason in waiting.items()
        if model not in present
    )
    served.extend(
        Serving(model=model, status=ModelStatus.LOADING, reason=reason)
        for model, reason in coming.items()
        if model not in present
    )
    return tuple(served)


def own_announcement(
    config: NodeConfig,
    *,
    role: Role,
    serving: tuple[Serving, ...],
    on_disk: Iterable[ModelFacts],
    wanted: tuple[ModelName, ...],
    demand: dict[str, float],
    capacity: Capacity,
    addresses: tuple[str, ...],
    relay: str,
    split: SplitState | None = None,
    publicity: Publicity | None = None,
    clients: int = 0,
) -> Announcement:
    """The announcement, before its numbers and its signature."""
    return Announcement(
        mesh=config.mesh,
        node=config.node,
        incarnation=config.incarnation,
        sequence=1,
        name=config.name,
        role=role,
        version=config.version,
        serving=serving,
        on_disk=tuple(sorted(on_disk, key=lambda facts: facts.name)),
        wanted=wanted,
        demand=demand,
        capacity=capacity,
        addresses=addresses,
        relay=relay,
        split=split,
        shares=config.shares,
        publicity=publicity,
        clients=clients,
    )


class Publisher:
    """Bounds the rate of announcements. The announcement's `sequence` is set here and rises with each one."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._said: Announcement | None = None
        self._at = float("-inf")
        self._deadline: float | None = None

    def deadline(self) -> float | None:
        """When a change that was held back may be told."""
        return self._deadline

    def consider(self, word: Announcement, now: float, *, at_once: bool = False) -> Announcement | None:
        """Return what to announce now; None if nothing changed, or it is too soon (then `deadline` is set)."""
        self._deadline = None
        if self._said is not None:
            word = msgspec.structs.replace(word, sequence=self._said.sequence)
            if word == self._said:
                return None
            hard = without_load(word) != without_load(self._said)
            due = self._at + (self._timings.publish_urgent if hard else self._timings.publish_soft)
            if now < due and not at_once:
                self._deadline = due
                return None
            word = msgspec.structs.replace(word, sequence=self._said.sequence + 1)
        self._said = word
        self._at = now
        return word
