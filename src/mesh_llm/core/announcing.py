"""What this node says of itself: its models' states as others should see them, and the whole announcement."""

from collections.abc import Iterable, Mapping

from mesh_llm.core.announcement import Announcement, Serving
from mesh_llm.core.config import NodeConfig
from mesh_llm.core.demand import coarse
from mesh_llm.core.ids import ModelName
from mesh_llm.core.model import Capacity, ModelFacts, ModelStatus, Role
from mesh_llm.core.publicity import Publicity
from mesh_llm.core.serving import Launch
from mesh_llm.core.split_word import SplitWord


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
    split: SplitWord | None = None,
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
