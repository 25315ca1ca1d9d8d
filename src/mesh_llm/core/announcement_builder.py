"""What this node announces about itself, and when.

To announce a further field: declare it in `core/types/announcement.py`, fill it in `AnnouncementBuilder.build`.
"""

from dataclasses import dataclass

from msgspec.structs import replace

from mesh_llm.core.config import NodeConfig, Timings
from mesh_llm.core.listing.publisher import ListingPublisher
from mesh_llm.core.placement.controller import PlacementController
from mesh_llm.core.placement.demand import Usage, coarse, coarse_rates
from mesh_llm.core.placement.local_models import LocalModels
from mesh_llm.core.placement.on_demand import OnDemand
from mesh_llm.core.placement.yield_controller import YieldController
from mesh_llm.core.split.controller import SplitController
from mesh_llm.core.types.announcement import MAX_SERVING, Announcement, Serving, without_load
from mesh_llm.core.types.model import ModelStatus, Role


@dataclass(frozen=True)
class Parts:
    """The parts of a node that its announcement describes."""

    models: LocalModels
    usage: Usage
    split: SplitController
    placement: PlacementController
    on_demand: OnDemand
    yielding: YieldController
    listing: ListingPublisher


class AnnouncementBuilder:
    """Builds the announcement from the present state of the node's parts."""

    def __init__(self, config: NodeConfig, parts: Parts) -> None:
        self._config = config
        self._parts = parts
        self.addresses: tuple[str, ...] = ()
        self.relay = ""
        self.ownership = config.ownership

    def serving(self) -> tuple[Serving, ...]:
        """The models here, in the order asked for.

        Refused ones (not on disk, do not fit) are failed, with the reason; those that wait for other nodes' memory are
        cold; those that are being fetched are loading.
        """
        models, usage = self._parts.models, self._parts.usage
        served = [
            Serving(
                model=launch.model,
                status=launch.announced_status,
                term=launch.term,
                context=launch.context,
                slots=launch.slots,
                in_flight=usage.in_flight.get(launch.model, 0),
                tokens_per_second=coarse(usage.speeds.get(launch.model, 0.0)),
                size_bytes=launch.order.facts.size_bytes,
                reason=launch.reason,
                embeddings=launch.embeddings,
                kind=launch.order.facts.kind,
                load_seconds=coarse(self._parts.on_demand.residents.load_seconds(launch)),
                cache_type=launch.order.plan.cache_type,
            )
            for launch in models.launches
        ]
        present = {serving.model for serving in served}
        for status, reasons in (
            (ModelStatus.FAILED, models.refused),
            (ModelStatus.COLD, self._parts.split.waiting),
            (ModelStatus.LOADING, self._parts.placement.fetch.pending),
        ):
            served.extend(
                Serving(model=model, status=status, reason=reason)
                for model, reason in reasons.items()
                if model not in present
            )
        return tuple(served)

    def build(self, role: Role, now: float) -> Announcement:
        """The announcement, before its sequence and its signature."""
        config, parts = self._config, self._parts
        capacity = parts.models.capacity
        return Announcement(
            mesh=config.mesh,
            node=config.node,
            incarnation=config.incarnation,
            sequence=1,
            name=config.name,
            role=role,
            version=config.version,
            serving=self.serving()[:MAX_SERVING],
            on_disk=tuple(sorted(parts.models.on_disk.values(), key=lambda facts: facts.name)),
            wanted=tuple(parts.models.wanted),
            demand=coarse_rates(parts.usage.demand.rates(now)),
            # While the node yields, nobody may count on its memory.
            capacity=replace(capacity, memory_bytes=0, host_bytes=0) if parts.yielding.reason else capacity,
            addresses=self.addresses,
            relay=self.relay,
            split=parts.split.group.state,
            shares=config.shares,
            publicity=parts.listing.announced_policy,
            clients=parts.listing.clients,
            offer=parts.split.offer(parts.yielding.reason),
            loads=parts.on_demand.offer(parts.yielding.reason),
            ownership=self.ownership,
        )


class AnnouncementThrottle:
    """Bounds the rate of announcements: changes soon, load seldom, nothing twice. Sets the sequence."""

    def __init__(self, timings: Timings) -> None:
        self._timings = timings
        self._last: Announcement | None = None
        self._at = float("-inf")
        self._deadline: float | None = None

    def deadline(self) -> float | None:
        """When a change that was held back may be announced."""
        return self._deadline

    def consider(self, announcement: Announcement, now: float, *, at_once: bool = False) -> Announcement | None:
        """Return what to announce now; None if nothing changed, or it is too soon (then `deadline` is set)."""
        self._deadline = None
        if self._last is not None:
            announcement = replace(announcement, sequence=self._last.sequence)
            if announcement == self._last:
                return None
            urgent = without_load(announcement) != without_load(self._last)
            due = self._at + (self._timings.publish_urgent if urgent else self._timings.publish_soft)
            if now < due and not at_once:
                self._deadline = due
                return None
            announcement = replace(announcement, sequence=self._last.sequence + 1)
        self._last = announcement
        self._at = now
        return announcement
