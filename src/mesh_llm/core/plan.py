"""The answer to `mesh-llm plan MODEL`: what would run where, whether it fits, and how fast it would be."""

import msgspec


class PlanNode(msgspec.Struct, frozen=True, kw_only=True):
    """A node's part in a plan; the host comes first. `layers` and `ratio` of the model, `memory_bytes` for it.

    `rtt_ms`: from the asked node, as its programs experience it; 0.0 for itself, or where it was not measured.
    """

    node_id: str
    name: str
    layers: int
    ratio: float
    memory_bytes: int
    rtt_ms: float = 0.0


class PlanMachine(msgspec.Struct, frozen=True, kw_only=True):
    """A machine that the model was thought through for, whether it is to take part or not.

    Attributes:
        node_id: who.
        name: for people.
        memory_bytes: what it offers to this model.
        has_file: whether it has the model's file; others can take no part before they have it.
        fits: whether the whole model fits there.
        predicted_tps: tokens per second of one request, the whole model there; null where it does not fit or nothing
            was measured.
        basis: what most of that comes from. `model`: this very model ran there; `machine`: other models did; `probe`:
            a short measurement of the machine; `told`: its own word, from its probe and its models; or empty.
        gigabytes_per_second: how fast it reads this kind of weights for one token; null where nothing was measured.
        rtt_ms: between the asked node's programs and its own; null for the asked one, or where it did not answer.
        megabytes_per_second: from the asked node to it; null the same.
        note: why it cannot take part in a split, or why nothing is known of it; else empty.
    """

    node_id: str
    name: str
    memory_bytes: int
    has_file: bool = True
    fits: bool = False
    predicted_tps: float | None = None
    basis: str = ""
    gigabytes_per_second: float | None = None
    rtt_ms: float | None = None
    megabytes_per_second: float | None = None
    note: str = ""


class PlanSplit(msgspec.Struct, frozen=True, kw_only=True):
    """How the model would be divided, also where it fits one node.

    Attributes:
        nodes: the host and then its workers, in the order in which a token visits them.
        context: tokens for each request.
        slots: requests at once.
        predicted_tps: tokens per second of one request; null where something was not measured.
        basis: as of a machine; `machine`: corrected by what split models took that the asked node hosted.
        ring_ms: the network's part of each token; null the same.
    """

    nodes: tuple[PlanNode, ...]
    context: int
    slots: int
    predicted_tps: float | None = None
    basis: str = ""
    ring_ms: float | None = None


class PlanAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What would become of a model if it were loaded now, without doing anything.

    `runs`: here, split, elsewhere or no. `message` is a sentence for people, `hint` what to do where it does not run.
    `nodes`, `predicted_tps` and `basis` are of what `runs` says; speeds are null where nothing was measured that they
    could be told from. `machines`: all that were thought of, the asked one first; `split`: how it would be divided.
    """

    model: str
    runs: str
    message: str
    hint: str = ""
    size_bytes: int = 0
    context: int = 0
    slots: int = 0
    need_bytes: int = 0
    have_bytes: int = 0
    on_disk: bool = False
    nodes: tuple[PlanNode, ...] = ()
    predicted_tps: float | None = None
    basis: str = ""
    round_trips_per_token: float | None = None
    machines: tuple[PlanMachine, ...] = ()
    split: PlanSplit | None = None
