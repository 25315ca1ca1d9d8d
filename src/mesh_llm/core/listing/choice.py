"""Which listed mesh to join: what may be joined at all, and a score of 0 to 100 that says what it is made of."""

import math
from collections.abc import Iterable

import msgspec

from mesh_llm.core.listing.content import ListedModel, Listing
from mesh_llm.core.types.announcement import SCOPES, ListingScope, same_name

_MODEL_SERVED, _MODEL_WANTED, _MODEL_ON_DISK, _MODEL_ANY = 40.0, 20.0, 10.0, 20.0
_ROOM_LOAD, _ROOM_CLIENTS = 15.0, 10.0
_NEAR_REGION, _NEAR_RTT, _RTT_UNKNOWN_MS = 10.0, 15.0, 200.0
_RTT_HALF_MS = 50.0
_SIZE_NODES, _SIZE_MEMORY = 4.0, 6.0
_GIGABYTE = 1e9


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What is looked for.

    Attributes:
        model: part of a model's name, upper and lower case alike; empty: any.
        region: where the mesh should be; empty: anywhere.
        min_memory_bytes: memory of all its members that it must have.
        scope: what its invite must give at least.
        near: where the asker is, for the score; empty: unknown.
    """

    model: str = ""
    region: str = ""
    min_memory_bytes: int = 0
    scope: ListingScope = "client"
    near: str = ""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a score: its points, of how many, and why."""

    what: str
    points: float
    most: float
    why: str


class Score(msgspec.Struct, frozen=True, kw_only=True):
    """How good a mesh is, and what that is made of."""

    total: float
    parts: tuple[Part, ...]


class Offer(msgspec.Struct, frozen=True, kw_only=True):
    """A listing, and the round trip to its node where it was measured (ms; None: not measured)."""

    listing: Listing
    rtt_ms: float | None = None


def matches(listing: Listing, wish: Wish) -> bool:
    """Whether a mesh is what is looked for, and takes one more."""
    if listing.full or SCOPES.index(listing.scope) < SCOPES.index(wish.scope):
        return False
    if wish.region and listing.region.strip().casefold() != wish.region.strip().casefold():
        return False
    if listing.memory_bytes < wish.min_memory_bytes:
        return False
    every = (*listing.serving, *listing.wanted, *listing.on_disk)
    return not wish.model or _named(every, wish.model)


def score(offer: Offer, wish: Wish) -> Score:
    """How good a mesh is: it serves what is asked for, has room, is near, is large. What it claims is bounded."""
    listing = offer.listing
    parts = (_model(listing, wish), _room(listing), _near(offer, wish), _size(listing))
    return Score(total=round(sum(part.points for part in parts), 1), parts=parts)


def best_first(offers: Iterable[Offer], wish: Wish) -> list[tuple[Offer, Score]]:
    """Those that match, best first; the same for the same offers in whatever order."""
    scored = [(offer, score(offer, wish)) for offer in offers if matches(offer.listing, wish)]
    return sorted(scored, key=lambda entry: (-entry[1].total, entry[0].listing.mesh))


def larger_namesakes(own: Listing, others: Iterable[Listing]) -> list[Listing]:
    """Meshes that a lone node which lists itself as `own` should merge into, largest first.

    Only such as are strictly larger: of two lone nodes neither moves, so that they never chase each other.
    """
    if own.nodes != 1:
        return []
    larger = [
        other
        for other in others
        if other.mesh != own.mesh
        and other.nodes > own.nodes
        and same_name(own.name, other.name)
        and SCOPES.index(other.scope) >= SCOPES.index("serve")
        and not other.full
    ]
    return sorted(larger, key=lambda other: (-other.nodes, other.mesh))


def _named(models: Iterable[ListedModel], part: str) -> bool:
    wanted = part.strip().casefold()
    return any(wanted in model.name.casefold() for model in models)


def _model(listing: Listing, wish: Wish) -> Part:
    if not wish.model:
        points, why = (_MODEL_ANY, "serves models") if listing.serving else (0.0, "serves nothing yet")
    elif _named(listing.serving, wish.model):
        points, why = _MODEL_SERVED, f"serves {wish.model}"
    elif _named(listing.wanted, wish.model):
        points, why = _MODEL_WANTED, f"wants {wish.model}, does not serve it yet"
    elif _named(listing.on_disk, wish.model):
        points, why = _MODEL_ON_DISK, f"has {wish.model} on disk"
    else:
        points, why = 0.0, f"has no {wish.model}"
    return Part(what="model", points=points, most=_MODEL_SERVED, why=why)


def _room(listing: Listing) -> Part:
    taken = min(1.0, listing.clients / listing.max_clients) if listing.max_clients else 0.0
    points = _ROOM_LOAD * (1.0 - listing.load) + _ROOM_CLIENTS * (1.0 - taken)
    cap = f" of {listing.max_clients}" if listing.max_clients else ""
    why = f"load {listing.load:.0%}, {listing.clients}{cap} clients"
    return Part(what="room", points=round(points, 1), most=_ROOM_LOAD + _ROOM_CLIENTS, why=why)


def _near(offer: Offer, wish: Wish) -> Part:
    near = wish.region or wish.near
    same = bool(near) and offer.listing.region.strip().casefold() == near.strip().casefold()
    rtt = _RTT_UNKNOWN_MS if offer.rtt_ms is None else offer.rtt_ms
    points = (_NEAR_REGION if same else 0.0) + _NEAR_RTT * _RTT_HALF_MS / (_RTT_HALF_MS + rtt)
    where = f"region {offer.listing.region}" if offer.listing.region else "region unknown"
    measured = "round trip not measured" if offer.rtt_ms is None else f"{offer.rtt_ms:.0f} ms away"
    return Part(what="near", points=round(points, 1), most=_NEAR_REGION + _NEAR_RTT, why=f"{where}, {measured}")


def _size(listing: Listing) -> Part:
    nodes = min(_SIZE_NODES, math.log2(max(1, listing.nodes)))
    memory = min(_SIZE_MEMORY, math.log2(1.0 + listing.memory_bytes / (8 * _GIGABYTE)))
    gigabytes = listing.memory_bytes / _GIGABYTE
    why = f"{listing.nodes} node{'' if listing.nodes == 1 else 's'}, {gigabytes:.0f} GB"
    return Part(what="size", points=round(nodes + memory, 1), most=_SIZE_NODES + _SIZE_MEMORY, why=why)
