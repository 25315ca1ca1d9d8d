"""What a node announces about itself: fields, limits, and what counts as load.

The structs here are the one place where a field is declared. `msgspec.Meta` on a field is its limit: a node trims its
own announcement to it, and the wire (`wire/mesh/announcement.py`) refuses more of others. A field marked `LOAD` changes
all the time; a change of load alone is announced seldom, any other change at once.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NewType, TypeAlias, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec.structs import replace

from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId, OwnerId
from mesh_llm.core.types.model import (
    LATER,
    MAX_SPLIT_NODES,
    Capacity,
    ModelFacts,
    ModelKind,
    ModelStatus,
    Role,
    SplitLayout,
    SplitShare,
)

MAX_PAYLOAD = 16 * 1024
"""Bytes of one encoded announcement."""

MAX_NUMBER = 2**53
MAX_NAME = 64
MAX_TEXT = 256
MAX_REASON = 500
MAX_CERTIFICATE = 2048
MAX_SERVING = 16
MAX_ON_DISK = 64
MAX_WANTED = 32
MAX_DEMAND = 64
MAX_ADDRESSES = 16
MAX_DEVICES = 16
MAX_ALIASES = 8
MAX_MESH_NAME = 64
MAX_REGION = 32
MAX_CLIENTS = 1_000_000
MAX_DECLINED = 8
LATER_SIZES = ("kv_window_bytes_per_token", "window", "state_bytes", "compute_width", "companion_bytes")
"""Fields of `ModelFacts` that earlier versions do not know. They travel last, and only where one of them is not 0."""

MAX_ROUND_TRIP_MS = 80.0
"""Longest round trip between two nodes of a split group, unless the user says otherwise."""

MOST_ROUND_TRIPS = 32
"""Members to which a node of a split group announces its round trip."""

ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"
LINES = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
"""Texts that do no harm to a terminal or a log. `LINES` may hold line breaks and tabs."""

LOAD = msgspec.Meta(extra={"load": True})
"""Marks a field that is load."""

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=MAX_NUMBER)]
Rate: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1e12)]
Milliseconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0.0, le=1e6)]
Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_NAME, pattern=ONE_LINE)]
Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=MAX_TEXT, pattern=ONE_LINE)]
ModelText: TypeAlias = Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_TEXT, pattern=ONE_LINE)]
Model: TypeAlias = Annotated[ModelName, msgspec.Meta(min_length=1, max_length=MAX_TEXT, pattern=ONE_LINE)]
"""A model's name. It is announced unchanged or not at all: a cut name would mean another model."""


class SplitPreferences(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a user fixed by hand for a split model. The host of the group follows it.

    Attributes:
        context: tokens per slot; 0: choose.
        slots: parallel requests; 0: choose.
        shares: relative parts of the host and the workers after it (`--tensor-split`); empty: by memory.
        cache_type: KV cache element type (`--cache-type`); empty: f16.
    """

    context: Count = 0
    slots: Count = 0
    shares: Annotated[tuple[Rate, ...], msgspec.Meta(max_length=MAX_SPLIT_NODES)] = ()
    cache_type: Annotated[str, msgspec.Meta(max_length=16, pattern=ONE_LINE), LATER] = ""


class SplitState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node's part in the split group of `model`: it lends memory to the elected host.

    Attributes:
        model: served name.
        fingerprint: of the file; only nodes with the same file form a group.
        memory_bytes: what the node offers to this model.
        seeds: a user of this node wants the model, so the group exists.
        asked: a user of this node wants it split even where it fits one node (`--split`).
        max_rtt_ms: longest round trip that this node accepts.
        round_trips: milliseconds to other members; a member that cannot be used is left out.
        term: highest term of this group that the node knows of.
        leads: this node is the host in that term.
        shares: the layout of that term, announced by the host only; this node first.
        wish: what the user of this node fixed by hand.
        bare: the file is not here. The node can lend and never lead; a host that shares files sends what it needs.
    """

    model: Model
    fingerprint: Text = ""
    memory_bytes: Count = 0
    seeds: bool = False
    asked: bool = False
    max_rtt_ms: Milliseconds = MAX_ROUND_TRIP_MS
    round_trips: Annotated[dict[NodeId, Milliseconds], msgspec.Meta(max_length=MOST_ROUND_TRIPS)] = {}
    term: Count = 0
    leads: bool = False
    shares: Annotated[tuple[SplitShare, ...], msgspec.Meta(max_length=MAX_SPLIT_NODES)] = ()
    wish: SplitPreferences = SplitPreferences()
    bare: bool = False

    def layout(self, rpc_version: str = "") -> SplitLayout | None:
        """The layout that this node leads; None if it leads none."""
        if not self.leads or not self.shares:
            return None
        return SplitLayout(term=self.term, shares=self.shares, rpc_version=rpc_version)


class SplitOffer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node offers to split models, whichever. Whether it takes part in one says `core/split/eligibility.py`.

    Attributes:
        obstacle: what keeps it out of all groups, as a code of `Obstacle`; empty: nothing.
        detail: more about the obstacle, for people.
        memory_bytes: what it could give to a model that does not run there.
        fetches: it also takes part in models whose file it lacks.
        brings: it does not, because it fetches a model of its own at present.
        declined: models that it does not take up: a user dropped them, or they failed.
    """

    obstacle: Text = ""
    detail: Text = ""
    memory_bytes: Count = 0
    fetches: bool = False
    brings: bool = False
    declined: Annotated[tuple[Model, ...], msgspec.Meta(max_length=MAX_DECLINED)] = ()


ListingScope: TypeAlias = Literal["client", "serve", "split"]
SCOPES: tuple[ListingScope, ...] = ("client", "serve", "split")
"""What the invite of a listing permits, from least to most."""


class ListingPolicy(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node's wish that its mesh be listed for others to find (`--publish`).

    Attributes:
        name: the mesh's name; may be empty.
        region: where the mesh is, as in `AU`; may be empty.
        max_clients: passive nodes at which the mesh is full and no longer listed; 0: no limit.
        scope: of the invite in the listing.
        failing: no relay accepts this node's listing at present; another member should publish it.
        marked: the invites of its listings say by their ids that they were public; not so up to version 0.2.
    """

    name: Annotated[str, msgspec.Meta(max_length=MAX_MESH_NAME, pattern=ONE_LINE)] = ""
    region: Annotated[str, msgspec.Meta(max_length=MAX_REGION, pattern=ONE_LINE)] = ""
    max_clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CLIENTS)] = 0
    scope: ListingScope = "serve"
    failing: bool = False
    marked: Annotated[bool, LATER] = False


class Serving(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model on one node.

    Attributes:
        model: served name.
        status: requests are routed to warm ones.
        term: launch number on that node.
        context: tokens per slot.
        slots: requests at once.
        in_flight: requests being answered, from everybody.
        tokens_per_second: measured generation speed of one request; 0.0 unknown.
        size_bytes: weights.
        reason: why it failed; else empty.
        embeddings: whether it answers /v1/embeddings.
        aliases: further exact names, such as the file stem.
        kind: what it is for.
        load_seconds: how long its load takes, measured or estimated; 0.0 unknown.
        cache_type: KV cache element type; empty: unknown.
    """

    model: Model
    status: ModelStatus
    term: Count = 0
    context: Count = 0
    slots: Count = 1
    in_flight: Annotated[Count, LOAD] = 0
    tokens_per_second: Annotated[Rate, LOAD] = 0.0
    size_bytes: Count = 0
    reason: Annotated[str, msgspec.Meta(max_length=MAX_REASON, pattern=LINES)] = ""
    embeddings: bool = True
    aliases: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_ALIASES)] = ()
    kind: ModelKind = ModelKind.CHAT
    load_seconds: Annotated[Rate, LATER] = 0.0
    cache_type: Annotated[str, msgspec.Meta(max_length=16, pattern=ONE_LINE), LATER] = ""


LoadScope: TypeAlias = Literal["off", "own", "members", "clients", "strangers"]
"""Which requests make a node load a model (`--on-demand`): from none to those of strangers by a public listing."""

Standing: TypeAlias = Literal["own", "member", "client", "stranger"]
"""Who asks for a model: a client of the node itself, a member, a passive client, or who came by a public listing."""


def may_load(scope: LoadScope, standing: Standing) -> bool:
    """Whether a node with this `--on-demand` loads a model for that asker."""
    order: dict[str, int] = {"own": 1, "member": 2, "client": 3, "stranger": 4}
    return order[standing] <= {"off": 0, "own": 1, "members": 2, "clients": 3, "strangers": 4}[scope]


class LoadOffer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node offers to models that somebody in the mesh asks for.

    Attributes:
        clients: it loads them for passive clients, too.
        free_bytes: memory that a further model could take now.
        room_bytes: the same after everything was unloaded that may be.
        free_host_bytes, room_host_bytes: main memory beside a GPU's.
        fetches: it also fetches a model for that from other nodes that have it.
        hub: it also fetches one from its source (`--fetch-on-demand`).
    """

    clients: bool = False
    free_bytes: Count = 0
    room_bytes: Count = 0
    free_host_bytes: Count = 0
    room_host_bytes: Count = 0
    fetches: bool = False
    hub: bool = False


class Ownership(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An owner's statement that a node is theirs. Whoever takes one from elsewhere verifies it (`wire/mesh/owners.py`).

    Attributes:
        owner: who signs.
        issued: UNIX seconds.
        expires: UNIX seconds after which it does not count.
        signature: the owner's.
    """

    owner: OwnerId
    issued: Count
    expires: Count
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]


class Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node's statement about itself, ordered by (incarnation, sequence). The network edge signs it.

    Attributes:
        mesh: the mesh that the node belongs to.
        node: the node that announces.
        incarnation: life number (SWIM).
        sequence: rises with every change within one incarnation.
        name: human name, the host name by default.
        role: serve, standby or client.
        version: mesh-llm version.
        serving: models here.
        on_disk: models that it could load.
        wanted: models that its user seeded the mesh with (`--model`), in order.
        demand: requests per minute that its clients made, per model, decayed.
        capacity: memory and engine.
        addresses: `ip:port` where QUIC reaches it.
        relay: relay URL, or empty.
        certificate: encoded admission certificate, opaque to the core; verified at the edge.
        left: True in the last announcement of a node that leaves in good order.
        split: the split group that it takes part in, if any.
        shares: it gives the files of `on_disk` to other members.
        publicity: its wish that the mesh be listed; None: no wish.
        clients: passive nodes that follow it.
        offer: what it offers to split models; None: not known yet, or an older version.
        loads: what it offers to models that are asked for; None: it loads none for other nodes.
        ownership: whose node it is; None: nobody says so. The edge takes out what does not hold.
    """

    mesh: MeshId
    node: NodeId
    incarnation: Incarnation
    sequence: Count
    name: Name = ""
    role: Role = Role.SERVE
    version: Name = ""
    serving: Annotated[tuple[Serving, ...], msgspec.Meta(max_length=MAX_SERVING)] = ()
    on_disk: Annotated[tuple[ModelFacts, ...], msgspec.Meta(max_length=MAX_ON_DISK)] = ()
    wanted: Annotated[tuple[Model, ...], msgspec.Meta(max_length=MAX_WANTED)] = ()
    demand: Annotated[dict[ModelText, Rate], msgspec.Meta(max_length=MAX_DEMAND), LOAD] = {}
    capacity: Capacity = Capacity()
    addresses: Annotated[tuple[Text, ...], msgspec.Meta(max_length=MAX_ADDRESSES)] = ()
    relay: Text = ""
    certificate: Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE)] = b""
    left: bool = False
    split: SplitState | None = None
    shares: bool = False
    publicity: ListingPolicy | None = None
    clients: Annotated[int, msgspec.Meta(ge=0, le=MAX_CLIENTS), LOAD] = 0
    offer: SplitOffer | None = None
    loads: LoadOffer | None = None
    ownership: Ownership | None = None


class SignedAnnouncement(msgspec.Struct, frozen=True, kw_only=True):
    """An announcement with the exact bytes that its node signed. The edge verifies before the core sees it.

    The node's own entry has empty `payload` and `signature`: the edge fills them in when it sends.
    """

    announcement: Announcement
    payload: bytes = b""
    signature: bytes = b""


def without_split(announcement: Announcement, scope: str) -> Announcement:
    """The announcement of a node whose admission is only for `scope`: it takes no part in split models."""
    offer = SplitOffer() if announcement.offer is None else announcement.offer
    offer = msgspec.structs.replace(offer, obstacle="scope", detail=scope)
    return msgspec.structs.replace(announcement, split=None, offer=offer)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """Another node, alive or suspected, as decisions see it.

    Attributes:
        announcement: its newest one.
        suspect: it did not answer and has not refuted that.
        rtt_ms: round trip to it; 0.0 unknown.
        path: `direct`, `relay`, or `none` where there is no connection at present.
        shown: its name, told apart from those of the other members (`core.membership.names`); empty: its own.
    """

    announcement: Announcement
    suspect: bool = False
    rtt_ms: float = 0.0
    path: str = "none"
    shown: str = ""

    @property
    def label(self) -> str:
        """What people call it, in every list and message."""
        return self.shown or self.announcement.name or self.announcement.node[:10]

    def hosts(self, model: ModelName) -> bool:
        """Whether it serves a model, or is about to."""
        return any(
            serving.model == model and serving.status in {ModelStatus.WARM, ModelStatus.LOADING}
            for serving in self.announcement.serving
        )


# The mesh's listing.


def elect_publisher(announcements: Iterable[Announcement]) -> Announcement | None:
    """The announcement of the member that publishes the mesh's listing; the same on every node.

    The member that has lived longest wins, so a newcomer never replaces a publisher that works.
    """
    willing = [(one.publicity.failing, one.incarnation, one.node, one) for one in announcements if one.publicity]
    return min(willing, key=lambda entry: entry[:3])[3] if willing else None


def mesh_name(announcements: Iterable[Announcement]) -> str:
    """The mesh's name: the publisher's, or else that of the longest-lived member that has one."""
    known = list(announcements)
    publisher = elect_publisher(known)
    if publisher is not None and publisher.publicity is not None and publisher.publicity.name:
        return publisher.publicity.name
    named = [(one.incarnation, one.node, one.publicity.name) for one in known if one.publicity]
    return next((name for _, _, name in sorted(named) if name), "")


def same_name(one: str, other: str) -> bool:
    """Whether two meshes have the same name. A mesh without a name shares it with no other."""
    return bool(one.strip()) and one.strip().casefold() == other.strip().casefold()


# Load.


def _load_defaults(kind: type[msgspec.Struct]) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    marked = {name for name, hint in hints.items() if LOAD in get_args(hint)[1:]}
    return {
        one.name: one.default if one.default is not msgspec.NODEFAULT else one.default_factory()
        for one in msgspec.structs.fields(kind)
        if one.name in marked
    }


_NO_LOAD = _load_defaults(Announcement)
_NO_SERVING_LOAD = _load_defaults(Serving)


def without_load(announcement: Announcement) -> Announcement:
    """The announcement with every `LOAD` field at its default."""
    serving = tuple(replace(one, **_NO_SERVING_LOAD) for one in announcement.serving)
    return replace(announcement, serving=serving, **_NO_LOAD)


def only_load_differs(first: Announcement, second: Announcement) -> bool:
    """Whether two announcements of one node differ in load and sequence only."""
    return without_load(first) == without_load(replace(second, sequence=first.sequence))


# A node trims its own announcement.

_Struct = TypeVar("_Struct", bound=msgspec.Struct)
_Item = TypeVar("_Item")
_Fit: TypeAlias = Callable[[Any], Any]


def trimmed(announcement: Announcement) -> Announcement:
    """Cut an announcement to its fields' limits and to `MAX_PAYLOAD`.

    Names come first, then what is served, then what lies on disk. Sizes are estimates of the encoded form, on the
    large side, so that the result always fits a payload.
    """
    fitted = fit(
        replace(
            announcement,
            serving=(),
            on_disk=(),
            wanted=(),
            demand={},
            split=None,
            offer=_trimmed_offer(announcement.offer),
        )
    )
    budget = _Budget(MAX_PAYLOAD - 1024 - MAX_CERTIFICATE)
    if fitted.offer is not None:
        budget.left -= 20 + _cost(fitted.offer.obstacle, fitted.offer.detail, *fitted.offer.declined)
    split = _trimmed_split(announcement.split)
    if split is not None:
        budget.left -= (
            160 + _cost(split.model, split.fingerprint) + 44 * len(split.round_trips) + 56 * len(split.shares)
        )
    devices = budget.take((device, _cost(device)) for device in fitted.capacity.devices[:MAX_DEVICES])
    addresses = budget.take((address, _cost(address)) for address in fitted.addresses)
    serving = [fit(one) for one in announcement.serving if is_model_name(one.model)][:MAX_SERVING]
    served = budget.take((one, 80 + _cost(one.model, one.reason, *one.aliases)) for one in serving)
    wanted = budget.take((name, _cost(name)) for name in announcement.wanted[:MAX_WANTED] if is_model_name(name))
    rates = [(name, _bounded(rate, 0.0, 1e12)) for name, rate in announcement.demand.items() if is_model_name(name)]
    busiest = sorted(rates, key=lambda item: (-item[1], item[0]))[:MAX_DEMAND]
    demand = budget.take(((name, rate), _cost(name) + 9) for name, rate in busiest)
    on_disk = [fit(one) for one in announcement.on_disk if _is_sound(one)][:MAX_ON_DISK]
    facts = budget.take((one, _cost_of_facts(one)) for one in on_disk)
    return replace(
        fitted,
        serving=served,
        on_disk=facts,
        wanted=wanted,
        demand=dict(demand),
        addresses=addresses,
        capacity=replace(fitted.capacity, devices=devices),
        split=split,
    )


def fit(struct: _Struct) -> _Struct:
    """Bring every field of a struct within its limits.

    Numbers are clamped; what is no finite number becomes 0. Texts and lists are cut, control characters become spaces,
    and what UTF-8 cannot carry (lone surrogates of odd file names) becomes `?`. Names of models are left alone.
    """
    changes = {name: fitter(getattr(struct, name)) for name, fitter in _fitters(type(struct))}
    return replace(struct, **changes)


def has_later_sizes(facts: ModelFacts) -> bool:
    """Whether `LATER_SIZES` travel."""
    return any(getattr(facts, name) for name in LATER_SIZES)


def is_model_name(text: str) -> bool:
    """Whether a model's name can be announced unchanged."""
    return 0 < len(text) <= MAX_TEXT and _clean(text, MAX_TEXT, ONE_LINE) == text


@cache
def _fitters(kind: type[msgspec.Struct]) -> tuple[tuple[str, _Fit], ...]:
    hints = get_type_hints(kind, include_extras=True)
    found = ((name, _fitter(hints[name])) for name in kind.__struct_fields__)
    return tuple((name, fitter) for name, fitter in found if fitter is not None)


def _fitter(hint: Any) -> _Fit | None:
    """How values of this type are brought within its limits; None: they have none."""
    metas: Sequence[msgspec.Meta] = ()
    if get_origin(hint) is Annotated:
        hint, *metas = get_args(hint)
    if hint in {ModelName, NodeId, MeshId}:
        return None
    while isinstance(hint, NewType):
        hint = hint.__supertype__
    low, high = _limit(metas, "ge", 0), _limit(metas, "le", MAX_NUMBER)
    most, pattern = _limit(metas, "max_length", MAX_TEXT), _limit(metas, "pattern", ONE_LINE)
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is int:
        return lambda value: min(max(low, value), high)
    if hint is float:
        return lambda value: _bounded(value, low, high)
    if hint is str:
        return lambda value: _clean(value, most, pattern)
    if origin is tuple:
        inner = _fitter(arguments[0]) or _same
        return lambda value: tuple(map(inner, value[:most]))
    if origin in {Union, UnionType}:
        inner = next((_fitter(one) for one in arguments if one is not NoneType), None) or _same
        return lambda value: None if value is None else inner(value)
    return fit if isinstance(hint, type) and issubclass(hint, msgspec.Struct) else None


def _limit(metas: Sequence[msgspec.Meta], name: str, default: Any) -> Any:
    return next((limit for meta in metas if (limit := getattr(meta, name)) is not None), default)


def _same(value: Any) -> Any:
    return value


def _bounded(value: float, low: float, high: float) -> float:
    return min(max(low, value), high) if math.isfinite(value) else 0.0


def _clean(text: str, most: int, pattern: str) -> str:
    return _HARMFUL[pattern].sub(" ", text[:most].encode("utf-8", "replace").decode("utf-8"))


_HARMFUL = {ONE_LINE: re.compile(r"[\x00-\x1f\x7f-\x9f]"), LINES: re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")}


def _is_sound(facts: ModelFacts) -> bool:
    texts = (facts.architecture, facts.fingerprint, facts.source)
    return is_model_name(facts.name) and all(not text or is_model_name(text) for text in texts)


def _trimmed_split(split: SplitState | None) -> SplitState | None:
    if split is None or not is_model_name(split.model) or (split.fingerprint and not is_model_name(split.fingerprint)):
        return None
    trips = ((node, _bounded(value, 0.0, 1e6)) for node, value in split.round_trips.items())
    nearest = sorted(trips, key=lambda item: (item[1], item[0]))[:MOST_ROUND_TRIPS]
    return replace(fit(split), round_trips=dict(nearest))


def _trimmed_offer(offer: SplitOffer | None) -> SplitOffer | None:
    if offer is None:
        return None
    return replace(offer, declined=tuple(name for name in offer.declined if is_model_name(name)))


def _cost_of_facts(one: ModelFacts) -> int:
    later = 9 * len(LATER_SIZES) if has_later_sizes(one) else 0
    return 90 + later + _cost(one.name, one.architecture, one.fingerprint, one.source)


def _cost(*texts: str) -> int:
    return sum(len(text.encode("utf-8", "replace")) + 3 for text in texts)


class _Budget:
    """Bytes left. The first item that does not fit, and all after it, are left out."""

    def __init__(self, total: int) -> None:
        self.left = total

    def take(self, items: Iterable[tuple[_Item, int]]) -> tuple[_Item, ...]:
        kept: list[_Item] = []
        for item, cost in items:
            if cost > self.left:
                break
            self.left -= cost
            kept.append(item)
        return tuple(kept)
