"""What a mesh shows to strangers: the content of its public listing, made from the view."""

from collections.abc import Iterable, Sequence

import msgspec

from mesh_llm.core.placement.assignment import wanted_order
from mesh_llm.core.types.announcement import Announcement, ListingScope, Publicity
from mesh_llm.core.types.ids import MeshId, ModelName
from mesh_llm.core.types.model import ModelKind, ModelStatus

MOST_MODELS = 32
"""Of each kind: served, wanted, on disk."""
_LOAD_STEPS = 10


class ListedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a listing. `context`: tokens that a request may have; where nobody serves it, that it was trained for.

    0 is unknown.
    """

    name: str
    context: int = 0


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """One mesh as strangers see it.

    Attributes:
        mesh: which one.
        name, region, max_clients, scope: as its publisher wishes; see Publicity.
        version: of the publisher's program.
        nodes: members, passive ones not counted.
        clients: passive nodes.
        load: requests in flight over requests answered at once, 0.0 to 1.0, in tenths.
        memory_bytes: what the members offer to models together.
        serving: models that can be asked for now.
        wanted: models that members were told to serve.
        on_disk: models that members could serve.
    """

    mesh: MeshId
    name: str = ""
    region: str = ""
    max_clients: int = 0
    scope: ListingScope = "serve"
    version: str = ""
    nodes: int = 1
    clients: int = 0
    load: float = 0.0
    memory_bytes: int = 0
    serving: tuple[ListedModel, ...] = ()
    wanted: tuple[ListedModel, ...] = ()
    on_disk: tuple[ListedModel, ...] = ()

    @property
    def full(self) -> bool:
        """Whether it takes no more clients."""
        return 0 < self.max_clients <= self.clients


def make_listing(publicity: Publicity, own: Announcement, others: Sequence[Announcement]) -> Listing:
    """What `own`'s node would publish for the mesh of itself and these others."""
    words = (own, *others)
    known = {facts.name: facts.context_train for word in words for facts in word.on_disk}
    contexts: dict[ModelName, int] = {}
    flying = slots = 0
    for word in words:
        for served in word.serving:
            if served.status is ModelStatus.WARM:
                contexts[served.model] = min(served.context, contexts.get(served.model, served.context))
                flying += served.in_flight
                slots += served.slots
    on_disk = {facts.name for word in words for facts in word.on_disk if facts.kind is not ModelKind.DRAFT}
    return Listing(
        mesh=own.mesh,
        name=publicity.name,
        region=publicity.region,
        max_clients=publicity.max_clients,
        scope=publicity.scope,
        version=own.version,
        nodes=len(words),
        clients=sum(word.clients for word in words),
        load=min(1.0, round(flying / slots * _LOAD_STEPS) / _LOAD_STEPS) if slots else 0.0,
        memory_bytes=sum(word.capacity.memory_bytes for word in words),
        serving=_models(sorted(contexts), contexts),
        wanted=_models(wanted_order(word.wanted for word in words), known),
        on_disk=_models(sorted(on_disk), known),
    )


def _models(names: Iterable[ModelName], contexts: dict[ModelName, int]) -> tuple[ListedModel, ...]:
    return tuple(ListedModel(name=name, context=contexts.get(name, 0)) for name in [*names][:MOST_MODELS])


def coarse_clients(count: int) -> int:
    """A number of clients as it is told to others: above 100 in steps of a tenth, so that it does not change always."""
    step = 1
    while count // step >= 100:
        step *= 10
    return count // step * step
