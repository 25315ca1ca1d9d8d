"""The answer to `mesh-llm plan MODEL`: what would run where, whether it fits, and how fast it would be."""

import msgspec


class PlanNode(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that the model was thought through for.

    Attributes:
        node_id: who.
        name: for people.
        memory_bytes: what it offers to this model.
        has_file: whether it has the model's file; others can take no part before they have it.
        fits: whether the whole model fits there.
        tokens_per_second: predicted for one request, the whole model there; null where it does not fit or nothing was
            measured.
        gigabytes_per_second: how fast it reads this kind of weights for one token; null where nothing was measured.
        one_way_ms: of a small message between this node and the asked one; null for itself, or where it did not answer.
        megabytes_per_second: from the asked node to it; null the same.
        note: why it cannot take part in a split, or why nothing is known of it; else empty.
    """

    node_id: str
    name: str
    memory_bytes: int
    has_file: bool = True
    fits: bool = False
    tokens_per_second: float | None = None
    gigabytes_per_second: float | None = None
    one_way_ms: float | None = None
    megabytes_per_second: float | None = None
    note: str = ""


class PlanShare(msgspec.Struct, frozen=True, kw_only=True):
    """One node's part of a split, the host's first."""

    node_id: str
    name: str
    layers: int
    memory_bytes: int


class PlanSplit(msgspec.Struct, frozen=True, kw_only=True):
    """How the model would be divided.

    Attributes:
        shares: the host and then its workers, in the order in which a token visits them.
        context: tokens for each request.
        slots: requests at once.
        tokens_per_second: predicted for one request; null where something was not measured.
        ring_ms: the network's part of each token; null the same.
    """

    shares: tuple[PlanShare, ...]
    context: int
    slots: int
    tokens_per_second: float | None = None
    ring_ms: float | None = None


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All of it.

    Attributes:
        model: served name.
        size_bytes: its weights.
        context: tokens for each request that were asked for; 0: as many as fit.
        fits: `solo`, `split` or `no`.
        where: names of the nodes that would compute it, the host first.
        tokens_per_second: predicted for what `fits` says.
        message: the outcome in one sentence; what is missing where it does not fit.
        nodes: all that were thought of, the asked one first.
        split: how it would be divided, also where it fits one node; null where it cannot be.
    """

    model: str
    size_bytes: int
    context: int
    fits: str
    where: tuple[str, ...]
    tokens_per_second: float | None
    message: str
    nodes: tuple[PlanNode, ...]
    split: PlanSplit | None = None
