"""What a mesh shows to strangers, and how they choose among meshes: what may be joined, and a score of 0 to 100."""

import math
from collections.abc import Callable, Collection, Iterable

import msgspec

from mesh_llm.core.types.announcement import SCOPES, ListingScope, same_name
from mesh_llm.core.types.ids import MeshId

MAX_LISTED_MODELS = 32
"""Of each kind: served, wanted, on disk."""
MESH_KEY_DIGITS = 16
"""Hex digits of a mesh's key that people see and type: another key with the same ones takes 2^64 tries to find."""

_MODEL_SERVED, _MODEL_WANTED, _MODEL_ON_DISK, _MODEL_ANY = 40.0, 20.0, 10.0, 20.0
_ROOM_LOAD, _ROOM_CLIENTS = 15.0, 10.0
_NEAR_REGION, _NEAR_RTT, _RTT_UNKNOWN_MS = 10.0, 15.0, 200.0
_RTT_HALF_MS = 50.0
_SIZE_NODES, _SIZE_MEMORY = 4.0, 6.0
_GIGABYTE = 1e9


class ListedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model in a listing. `context`: tokens per request; where it is not served, as trained for; 0 unknown."""

    name: str
    context: int = 0


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """One mesh as strangers see it.

    Attributes:
        mesh: its id.
        name, region, max_clients, scope: of the publisher's ListingPolicy.
        version: of the publisher's program.
        nodes: members, without passive ones.
        clients: passive nodes.
        load: requests in flight over requests answered at once, 0.0 to 1.0, in tenths.
        memory_bytes: what all members together offer to models.
        serving: models that answer now.
        wanted: models that users gave to the mesh, and that nobody serves now.
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
        """Whether it accepts no more clients."""
        return 0 < self.max_clients <= self.clients


class ListingQuery(msgspec.Struct, frozen=True, kw_only=True):
    """What a stranger looks for.

    Attributes:
        model: part of a model's name in any case; empty: any model.
        region: where the mesh should be; empty: anywhere.
        min_memory_bytes: least memory of all members together.
        scope: least scope of the invite.
        near: region of the asker, for the score; empty: unknown.
    """

    model: str = ""
    region: str = ""
    min_memory_bytes: int = 0
    scope: ListingScope = "client"
    near: str = ""


class ScorePart(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a score: its points, the most possible points, and the reason."""

    what: str
    points: float
    most: float
    why: str


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How good a mesh is, and the parts of that."""

    total: float
    parts: tuple[ScorePart, ...]


class ListingCandidate(msgspec.Struct, frozen=True, kw_only=True):
    """A listing, and the round trip to its node where it was measured (ms; None: not measured)."""

    listing: Listing
    rtt_ms: float | None = None


def matches(listing: Listing, query: ListingQuery) -> bool:
    """Whether a mesh meets a query and accepts one more client."""
    if listing.full or SCOPES.index(listing.scope) < SCOPES.index(query.scope):
        return False
    if query.region and listing.region.strip().casefold() != query.region.strip().casefold():
        return False
    if listing.memory_bytes < query.min_memory_bytes:
        return False
    every = (*listing.serving, *listing.wanted, *listing.on_disk)
    return not query.model or bool(named(every, query.model))


def score(found: ListingCandidate, query: ListingQuery) -> Score:
    """How good a mesh is: it serves the model, has room, is near, is large. Each claim has a most of points."""
    listing = found.listing
    parts = (_model(listing, query), _room(listing), _near(found, query), _size(listing))
    return Score(total=round(sum(part.points for part in parts), 1), parts=parts)


def best_first(listings: Iterable[ListingCandidate], query: ListingQuery) -> list[tuple[ListingCandidate, Score]]:
    """Those that match, best first. The order of `listings` does not matter."""
    scored = [(found, score(found, query)) for found in listings if matches(found.listing, query)]
    return sorted(scored, key=lambda entry: (-entry[1].total, entry[0].listing.mesh))


def merge_targets(
    own: Listing, others: Iterable[Listing], keys: Collection[str], holds: Callable[[MeshId], bool]
) -> list[Listing]:
    """Meshes that a lone node, listed as `own`, may move to, best first. A name alone never suffices.

    Those whose key the user named come first, then the larger ones of the same name that this node holds a key or a
    certificate of. Of the latter only strictly larger ones count: of two lone nodes neither moves.

    Args:
        own: this node's listing.
        others: all listings that were found.
        keys: beginnings of keys, in lower case. One that fits several meshes counts for none.
        holds: whether this node has been in a mesh.
    """
    if own.nodes != 1:
        return []
    open_ones = [
        other
        for other in others
        if other.mesh != own.mesh and SCOPES.index(other.scope) >= SCOPES.index("serve") and not other.full
    ]
    fitting = [[other.mesh for other in open_ones if other.mesh.startswith(key)] for key in keys]
    named = {meshes[0] for meshes in fitting if len(meshes) == 1}
    return sorted(
        (
            other
            for other in open_ones
            if other.mesh in named
            or (other.nodes > own.nodes and same_name(own.name, other.name) and holds(other.mesh))
        ),
        key=lambda other: (other.mesh not in named, -other.nodes, other.mesh),
    )


def named(models: Iterable[ListedModel], part: str) -> list[ListedModel]:
    """Those whose name contains this part, in any case."""
    wanted = part.strip().casefold()
    return [model for model in models if wanted in model.name.casefold()]


def _model(listing: Listing, query: ListingQuery) -> ScorePart:
    if not query.model:
        points, why = (_MODEL_ANY, "serves models") if listing.serving else (0.0, "serves nothing yet")
    elif named(listing.serving, query.model):
        points, why = _MODEL_SERVED, f"serves {query.model}"
    elif named(listing.wanted, query.model):
        points, why = _MODEL_WANTED, f"wants {query.model}, does not serve it yet"
    elif named(listing.on_disk, query.model):
        points, why = _MODEL_ON_DISK, f"has {query.model} on disk"
    else:
        points, why = 0.0, f"has no {query.model}"
    return ScorePart(what="model", points=points, most=_MODEL_SERVED, why=why)


def _room(listing: Listing) -> ScorePart:
    taken = min(1.0, listing.clients / listing.max_clients) if listing.max_clients else 0.0
    points = _ROOM_LOAD * (1.0 - listing.load) + _ROOM_CLIENTS * (1.0 - taken)
    cap = f" of {listing.max_clients}" if listing.max_clients else ""
    why = f"load {listing.load:.0%}, {listing.clients}{cap} clients"
    return ScorePart(what="room", points=round(points, 1), most=_ROOM_LOAD + _ROOM_CLIENTS, why=why)


def _near(found: ListingCandidate, query: ListingQuery) -> ScorePart:
    near = query.region or query.near
    same = bool(near) and found.listing.region.strip().casefold() == near.strip().casefold()
    rtt = _RTT_UNKNOWN_MS if found.rtt_ms is None else found.rtt_ms
    points = (_NEAR_REGION if same else 0.0) + _NEAR_RTT * _RTT_HALF_MS / (_RTT_HALF_MS + rtt)
    where = f"region {found.listing.region}" if found.listing.region else "region unknown"
    measured = "round trip not measured" if found.rtt_ms is None else f"{found.rtt_ms:.0f} ms away"
    return ScorePart(what="near", points=round(points, 1), most=_NEAR_REGION + _NEAR_RTT, why=f"{where}, {measured}")


def _size(listing: Listing) -> ScorePart:
    nodes = min(_SIZE_NODES, math.log2(max(1, listing.nodes)))
    memory = min(_SIZE_MEMORY, math.log2(1.0 + listing.memory_bytes / (8 * _GIGABYTE)))
    gigabytes = listing.memory_bytes / _GIGABYTE
    why = f"{listing.nodes} node{'' if listing.nodes == 1 else 's'}, {gigabytes:.0f} GB"
    return ScorePart(what="size", points=round(nodes + memory, 1), most=_SIZE_NODES + _SIZE_MEMORY, why=why)
