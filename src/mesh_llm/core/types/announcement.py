"""What a node says of the one split group that it takes part in; a piece of its announcement.

A node's wish that its mesh be listed for others to find, and which of several such nodes writes the listing.

What one node tells all others about itself.

Another node as decisions see it: its word, whether it is doubted, and how far away it is.

What nodes say to each other about the mesh: values only; `wire.gossip` turns them into bytes.

How much one announcement may hold. A node trims its own word to this; the wire refuses more of others.

Sizes are estimates of the encoded form, on the large side, so that what `trimmed` returns always fits a payload.
"""

import re
from collections.abc import Iterable
from typing import Literal, TypeAlias, TypeVar

import msgspec

from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import (
    MOST_SHARES,
    Capacity,
    ModelFacts,
    ModelKind,
    ModelStatus,
    Role,
    SplitLayout,
    SplitShare,
)

MAX_ROUND_TRIP_MS = 80.0
"""Longest round trip between two nodes of a group, unless the user says otherwise."""

MOST_ROUND_TRIPS = 32
"""Other members to which a node tells its distance."""


class SplitWish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a user fixed by hand for a split model; whoever becomes host honours it.

    Attributes:
        context: tokens per slot; 0: choose.
        slots: parallel requests; 0: choose.
        shares: relative parts of the host and the workers after it (`--tensor-split`); empty: by memory.
    """

    context: int = 0
    slots: int = 0
    shares: tuple[float, ...] = ()


class SplitWord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node takes part in the group of `model`: it lends memory to whoever is elected.

    Attributes:
        model: served name.
        fingerprint: of the file; only the same file can be shared.
        bare: the file is not here: the node can lend, and never lead; a host that gives files sends it what it needs.
        memory_bytes: what the node offers to this model.
        seeds: a user here wants the model, so the group exists.
        asked: a user here wants it split even where it fits one node (`--split`).
        max_rtt_ms: longest round trip that this node accepts.
        round_trips: milliseconds to other members; one that cannot be used is left out.
        term: highest number of this group's forms that the node knows of.
        leads: this node is the host of the form `term`.
        shares: that form, of the host only; this node first.
        wish: what the user here fixed by hand.
    """

    model: ModelName
    fingerprint: str = ""
    memory_bytes: int = 0
    seeds: bool = False
    asked: bool = False
    max_rtt_ms: float = MAX_ROUND_TRIP_MS
    round_trips: dict[NodeId, float] = {}
    term: int = 0
    leads: bool = False
    shares: tuple[SplitShare, ...] = ()
    wish: SplitWish = SplitWish()
    bare: bool = False

    def layout(self, rpc_version: str = "") -> SplitLayout | None:
        """The form that this node leads; None where it leads none."""
        if not self.leads or not self.shares:
            return None
        return SplitLayout(term=self.term, shares=self.shares, rpc_version=rpc_version)


MAX_MESH_NAME = 64
MAX_REGION = 32
MAX_CLIENTS = 1_000_000
ListingScope: TypeAlias = Literal["client", "serve", "split"]
SCOPES: tuple[ListingScope, ...] = ("client", "serve", "split")


class Publicity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The wish, as it is announced.

    Attributes:
        name: what people call the mesh; may be empty.
        region: where it is, as in `AU`; may be empty.
        max_clients: passive nodes at which the mesh is full and no longer listed; 0: no limit.
        scope: of the invite in the listing: client, serve or split.
        failing: no relay takes this node's listing at present: another member should write it, if there is one.
    """

    name: str = ""
    region: str = ""
    max_clients: int = 0
    scope: ListingScope = "serve"
    failing: bool = False


def elected(words: Iterable["Announcement"]) -> "Announcement | None":
    """Of these members' words, that of the one who writes the mesh's listing; the same on every node.

    The one that has lived longest: a newcomer never takes the place of one that does it well.
    """
    willing = [(word.publicity.failing, word.incarnation, word.node, word) for word in words if word.publicity]
    return min(willing, key=lambda entry: entry[:3])[3] if willing else None


def mesh_name(words: Iterable["Announcement"]) -> str:
    """What the mesh is called: as its publisher says, or else as the one that has lived longest of those that say."""
    known = list(words)
    publisher = elected(known)
    if publisher is not None and publisher.publicity is not None and publisher.publicity.name:
        return publisher.publicity.name
    named = [(word.incarnation, word.node, word.publicity.name) for word in known if word.publicity]
    return next((name for _, _, name in sorted(named) if name), "")


def same_name(one: str, other: str) -> bool:
    """Whether two meshes are called the same; one without a name is called like no other."""
    return bool(one.strip()) and one.strip().casefold() == other.strip().casefold()


class Serving(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One model on one node.

    Attributes:
        model: served name.
        status: warm ones are routed to.
        term: launch number on that node.
        context: tokens per slot.
        slots: requests at once.
        in_flight: requests being answered, from everybody.
        tokens_per_second: measured generation speed of one request; 0.0 unknown.
        size_bytes: weights.
        reason: why it failed, bounded to 500 characters; else empty.
        embeddings: whether it answers /v1/embeddings.
        aliases: further exact names, such as the file stem.
        kind: what it is for.
    """

    model: ModelName
    status: ModelStatus
    term: int = 0
    context: int = 0
    slots: int = 1
    in_flight: int = 0
    tokens_per_second: float = 0.0
    size_bytes: int = 0
    reason: str = ""
    embeddings: bool = True
    aliases: tuple[str, ...] = ()
    kind: ModelKind = ModelKind.CHAT


class Announcement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A node's word about itself, ordered by (incarnation, sequence); signed by the node at the edge.

    Attributes:
        mesh: the mesh it belongs to.
        node: who speaks.
        incarnation: life number.
        sequence: rises with every change within one life.
        name: human name (host name by default), at most 64 characters.
        role: serve, standby or client.
        version: mesh-llm version.
        serving: models here.
        on_disk: models that it could load.
        wanted: models that its user seeded the mesh with (`--model`), in order.
        demand: requests per minute it saw asked, per model, decayed.
        capacity: memory and engine.
        addresses: `ip:port` where QUIC reaches it.
        relay: relay URL, or empty.
        certificate: encoded admission certificate, opaque to the core; verified at the edge.
        left: True in the last word of a node that leaves in good order.
        split: the split group that it takes part in, if any.
        shares: it gives the files of `on_disk` to others of the mesh.
        publicity: its wish that the mesh be listed for others to find; None: none.
        clients: passive nodes that follow it.
    """

    mesh: MeshId
    node: NodeId
    incarnation: Incarnation
    sequence: int
    name: str = ""
    role: Role = Role.SERVE
    version: str = ""
    serving: tuple[Serving, ...] = ()
    on_disk: tuple[ModelFacts, ...] = ()
    wanted: tuple[ModelName, ...] = ()
    demand: dict[str, float] = {}
    capacity: Capacity = Capacity()
    addresses: tuple[str, ...] = ()
    relay: str = ""
    certificate: bytes = b""
    left: bool = False
    split: SplitWord | None = None
    shares: bool = False
    publicity: Publicity | None = None
    clients: int = 0


class SignedAnnouncement(msgspec.Struct, frozen=True, kw_only=True):
    """An announcement with the exact bytes that its node signed. The edge verifies before the core sees it.

    The node's own entry has empty `payload` and `signature`: the edge fills them when it sends.
    """

    announcement: Announcement
    payload: bytes = b""
    signature: bytes = b""


def without_load(word: Announcement) -> Announcement:
    """The announcement without what changes all the time and need not be known at once.

    Everything else counts: a field that is added to an announcement is not load unless it is named here.
    """
    serving = tuple(msgspec.structs.replace(one, in_flight=0, tokens_per_second=0.0) for one in word.serving)
    return msgspec.structs.replace(word, serving=serving, demand={}, clients=0)


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A live or suspected node.

    Attributes:
        announcement: its newest word.
        suspect: it did not answer, and has not been heard to refute that.
        rtt_ms: round trip to it; 0.0 unknown.
        path: `direct`, `relay`, or `none` where there is no connection at present.
    """

    announcement: Announcement
    suspect: bool = False
    rtt_ms: float = 0.0
    path: str = "none"

    def hosts(self, model: ModelName) -> bool:
        """Whether it serves a model, or is about to."""
        return any(
            serving.model == model and serving.status in {ModelStatus.WARM, ModelStatus.LOADING}
            for serving in self.announcement.serving
        )


class Message(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Base of all messages between nodes."""


class Ping(Message, frozen=True, kw_only=True):
    """Are you there? Answered by Ack with the same nonce."""

    nonce: int


class Ack(Message, frozen=True, kw_only=True):
    """I am here; or, relayed for a PingRequest, `about` is."""

    nonce: int
    about: NodeId | None = None


class PingRequest(Message, frozen=True, kw_only=True):
    """Please probe `target` for me, and Ack with my nonce if it answers."""

    nonce: int
    target: NodeId


class Digest(msgspec.Struct, frozen=True, array_like=True):
    """What the sender knows of one node: the newest (incarnation, sequence), and how it holds it.

    `state` is a letter: `a` alive, and the sender has had proof of it; `u` unproven, known by hearsay only or in doubt;
    `s` suspect; `d` dead.
    """

    node: NodeId
    incarnation: Incarnation
    sequence: int
    state: str = "a"


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """A suspicion (`s`) or death (`d`): about an incarnation of a node, never about the node. `by`: who says it."""

    node: NodeId
    incarnation: Incarnation
    state: str
    by: NodeId


class Exchange(Message, frozen=True, kw_only=True):
    """One step of gossip: fresh news pushed, and a stretch of the view compared.

    Attributes:
        digests: what the sender knows of some nodes: all those in `span`, and some with fresh news.
        entries: announcements that the receiver may lack.
        wanted: nodes whose announcement the sender asks for.
        verdicts: fresh suspicions and deaths.
        revocations: opaque to the core; the edge verifies them, and tells the core by RevocationLearned.
        reply: whether an Exchange is asked for in return. It is the proof of life that a step waits for.
        fingerprint: sums up the sender's members: equal views have equal ones. 0: not said.
        span: (after, until): `digests` holds all that the sender knows with `after < node <= until`, around the ring of
            ids in order; equal ends mean all of it. Whatever the receiver knows there beyond that, the sender lacks.
    """

    digests: tuple[Digest, ...] = ()
    entries: tuple[SignedAnnouncement, ...] = ()
    wanted: tuple[NodeId, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    revocations: tuple[bytes, ...] = ()
    reply: bool = False
    fingerprint: int = 0
    span: tuple[NodeId, NodeId] | None = None


MeshMessage: TypeAlias = Ping | Ack | PingRequest | Exchange


MAX_PAYLOAD = 16 * 1024
"""Bytes of one encoded announcement."""

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

MAX_DIGESTS = 192
MAX_ENTRIES = 48
MAX_ASKED = 64
MAX_VERDICTS = 64
MAX_REVOCATIONS = 4
MAX_REVOCATION = 4096
"""Items of one message, and bytes of one revocation."""
MOST_REVOCATIONS = 4096
"""That a node keeps, and tells others of."""

ONE_LINE = r"^[^\x00-\x1f\x7f-\x9f]*$"
LINES = r"^[^\x00-\x08\x0b-\x1f\x7f-\x9f]*$"
"""Texts that do no harm to a terminal or a log; the second may hold line breaks and tabs."""

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_CONTROL_BUT_BREAKS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")

_Item = TypeVar("_Item")


def _text(text: str, limit: int = MAX_TEXT, harmful: re.Pattern[str] = _CONTROL) -> str:
    """Cut to `limit` characters; what UTF-8 cannot carry (lone surrogates of odd file names) becomes `?`."""
    return harmful.sub(" ", text[:limit].encode("utf-8", "replace").decode("utf-8"))


def _is_name(text: str) -> bool:
    """Whether a model's name can be told as it is. A changed one would name something else."""
    return 0 < len(text) <= MAX_TEXT and _text(text) == text


def _texts(texts: Iterable[str], count: int) -> tuple[str, ...]:
    return tuple(_text(text) for _, text in zip(range(count), texts, strict=False))


def _cost(*texts: str) -> int:
    return sum(len(text.encode("utf-8", "replace")) + 3 for text in texts)


class _Budget:
    """Bytes left; what does not fit any more is left out, in order."""

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


def _serving(serving: Serving) -> tuple[Serving, int]:
    aliases = _texts(serving.aliases, MAX_ALIASES)
    trimmed = msgspec.structs.replace(
        serving, reason=_text(serving.reason, MAX_REASON, _CONTROL_BUT_BREAKS), aliases=aliases
    )
    return trimmed, 80 + _cost(trimmed.model, trimmed.reason, *aliases)


def _facts(facts: ModelFacts) -> tuple[ModelFacts, int]:
    return facts, 90 + _cost(facts.name, facts.architecture, facts.fingerprint, facts.source)


def _sound(facts: ModelFacts) -> bool:
    texts = (facts.architecture, facts.fingerprint, facts.source)
    return _is_name(facts.name) and all(not text or _is_name(text) for text in texts)


def _split(word: SplitWord | None) -> SplitWord | None:
    if word is None or not _is_name(word.model) or (word.fingerprint and not _is_name(word.fingerprint)):
        return None
    nearest = sorted(word.round_trips.items(), key=lambda item: (item[1], item[0]))[:MOST_ROUND_TRIPS]
    wish = msgspec.structs.replace(word.wish, shares=word.wish.shares[:MOST_SHARES])
    return msgspec.structs.replace(word, round_trips=dict(nearest), shares=word.shares[:MOST_SHARES], wish=wish)


def _split_cost(word: SplitWord | None) -> int:
    if word is None:
        return 0
    return 160 + _cost(word.model, word.fingerprint) + 44 * len(word.round_trips) + 56 * len(word.shares)


def _publicity(publicity: Publicity | None) -> Publicity | None:
    if publicity is None:
        return None
    name, region = _text(publicity.name, MAX_MESH_NAME), _text(publicity.region, MAX_REGION)
    return msgspec.structs.replace(publicity, name=name, region=region)


def trimmed(announcement: Announcement) -> Announcement:
    """Return the announcement cut to what may be told: names first, then what is served, then what lies on disk."""
    budget = _Budget(MAX_PAYLOAD - 1024 - MAX_CERTIFICATE)
    capacity = announcement.capacity
    split = _split(announcement.split)
    budget.left -= _split_cost(split)
    devices = budget.take((device, _cost(device)) for device in _texts(capacity.devices, MAX_DEVICES))
    addresses = budget.take((address, _cost(address)) for address in _texts(announcement.addresses, MAX_ADDRESSES))
    served = [one for one in announcement.serving if _is_name(one.model)][:MAX_SERVING]
    serving = budget.take(map(_serving, served))
    wanted = budget.take((name, _cost(name)) for name in announcement.wanted[:MAX_WANTED] if _is_name(name))
    busiest = sorted(announcement.demand.items(), key=lambda item: (-item[1], item[0]))[:MAX_DEMAND]
    demand = budget.take(((name, rate), _cost(name) + 9) for name, rate in busiest if _is_name(name))
    on_disk = budget.take([_facts(one) for one in announcement.on_disk if _sound(one)][:MAX_ON_DISK])
    return msgspec.structs.replace(
        announcement,
        name=_text(announcement.name, MAX_NAME),
        version=_text(announcement.version, MAX_NAME),
        relay=_text(announcement.relay),
        serving=serving,
        on_disk=on_disk,
        wanted=wanted,
        demand=dict(demand),
        addresses=addresses,
        capacity=Capacity(
            memory_bytes=capacity.memory_bytes,
            memory_total_bytes=capacity.memory_total_bytes,
            devices=devices,
            engine=_text(capacity.engine),
            rpc_version=_text(capacity.rpc_version, MAX_NAME),
            speed=capacity.speed,
        ),
        split=split,
        publicity=_publicity(announcement.publicity),
    )
