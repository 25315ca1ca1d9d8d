"""Looks for meshes on Nostr, measures the way to the best of them, and puts them in order.

`--auto`: finds a mesh on Nostr before the node takes a place in one, and has the next best at hand.

A node that was found, or wants to be: it merges into a larger mesh of its name, and looks again when left alone.
"""

import asyncio
import importlib
from collections.abc import Callable, Collection

import msgspec
import structlog

from mesh_llm.core.listing.choice import Offer, Score, Wish, best_first, larger_namesakes
from mesh_llm.core.listing.content import Listing
from mesh_llm.core.node import Node
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId
from mesh_llm.core.types.model import Role
from mesh_llm.daemon.notices import NoticeBook, OnStage, Stage, Told
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.admission.credentials import verify
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.endpoint import MOST_AT_ONCE, EndpointSettings, measure_round_trips
from mesh_llm.wire.mesh.invites import Invite, parse_invite

DIRECT_SECONDS = 2.5
RELAYED_SECONDS = 5.0
"""How long a node may take to answer where only its addresses lead to it, and where a relay of the network helps."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A mesh that can be joined. `rtt_ms`: to the node that its invite names; `token`: that invite."""

    listing: Listing
    token: str
    rtt_ms: float
    score: Score
    author: str
    expires: float
    relays: tuple[str, ...]


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What was found.

    Attributes:
        candidates: best first, all of which can be reached.
        seen: how many meshes are listed.
        unreachable: how many that match did not answer.
        answered: relays that did.
        failed: why the others did not.
        refused: how many events on the relays were not believed.
    """

    candidates: tuple[Candidate, ...]
    seen: int
    unreachable: int
    answered: tuple[str, ...]
    failed: dict[str, str]
    refused: int

    def check(self, wish: Wish) -> None:
        """Raise MeshError where there is nothing to join: `no_relay`, or `no_mesh_found` with why."""
        if self.candidates:
            return
        if not self.answered:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.failed.items())
            raise MeshError(
                code="no_relay",
                message=f"No Nostr relay answered ({reasons}).",
                hint="Whether there are meshes is not known. Check the network, or ask other relays: --nostr-relay URL",
                status=503,
            )
        if not self.seen:
            message = "No meshes are listed at present."
        elif self.unreachable:
            message = f"None of the {self.unreachable} meshes that match can be reached (of {self.seen} listed)."
        else:
            message = f"None of the {self.seen} meshes that are listed is what you look for{_described(wish)}."
        raise MeshError(
            code="no_mesh_found",
            message=message,
            hint="Start one: mesh-llm --model NAME --publish. All that are listed: mesh-llm discover",
            status=404,
        )


async def search(
    urls: tuple[str, ...],
    wish: Wish,
    endpoint: EndpointSettings,
    skip: Collection[MeshId] = (),
    most: int = MOST_AT_ONCE,
) -> Search:
    """Ask the relays, leave out what does not match and `skip`, dial the best `most`, and order what answers.

    Takes a few seconds at most: relays and nodes are asked all at once.
    """
    # A large library: loading it in this thread would hold up whatever streams now.
    await asyncio.to_thread(importlib.import_module, "mesh_llm.discovery.nostr.listings")
    from mesh_llm.discovery.nostr.listings import query_relays

    seen = await query_relays(urls, verify)
    found = {entry.listing.mesh: entry for entry in seen.found if entry.listing.mesh not in skip}
    promising = best_first((Offer(listing=entry.listing) for entry in found.values()), wish)[:most]
    invites: dict[MeshId, Invite] = {}
    for offer, _ in promising:
        invite = parse_invite(found[offer.listing.mesh].token)
        if isinstance(invite, Invite):
            invites[offer.listing.mesh] = invite
    measured = await measure_round_trips(invites, endpoint, RELAYED_SECONDS if endpoint.relay else DIRECT_SECONDS)
    near = [
        Offer(listing=offer.listing, rtt_ms=rtt)
        for offer, _ in promising
        if (rtt := measured.get(offer.listing.mesh)) is not None
    ]
    candidates = tuple(
        Candidate(
            listing=offer.listing,
            token=found[offer.listing.mesh].token,
            rtt_ms=offer.rtt_ms or 0.0,
            score=scored,
            author=found[offer.listing.mesh].author,
            expires=found[offer.listing.mesh].expires,
            relays=found[offer.listing.mesh].relays,
        )
        for offer, scored in best_first(near, wish)
    )
    return Search(
        candidates=candidates,
        seen=len(found),
        unreachable=len(promising) - len(near),
        answered=seen.answered,
        failed=seen.failed,
        refused=seen.refused,
    )


def _described(wish: Wish) -> str:
    parts = [
        f"a model named {wish.model}" if wish.model else "",
        f"in {wish.region}" if wish.region else "",
        f"with {wish.min_memory_bytes / 1e9:g} GB" if wish.min_memory_bytes else "",
        f"open to scope {wish.scope}" if wish.scope != "client" else "",
    ]
    said = ", ".join(part for part in parts if part)
    return f" ({said})" if said else ""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """A life's settings, and the meshes to try if theirs does not let this node in.

    `searched`: there is no need to look; `told`: what to tell the user then.
    """

    settings: Settings
    others: tuple[Candidate, ...] = ()
    searched: bool = True
    told: str = ""

    def next(self) -> "Found | None":
        """What to do where the mesh that was chosen did not let this node in; None: nothing is left to try."""
        settings = self.settings
        if self.others:
            best, *others = self.others
            text = f"that one lets nobody in; joining {describe(best)}"
            return Found(settings=joining(settings, best), others=tuple(others), told=text)
        if settings.discovery.auto and settings.join and settings.models and not settings.client:
            text = "none of the listed meshes lets this node in; starting a mesh of its own"
            return Found(settings=msgspec.structs.replace(settings, join=()), told=text)
        return None


def wish_of(settings: Settings) -> Wish:
    """What a node with these settings looks for: who only asks is content with less than who serves."""
    model = settings.models[0] if settings.client and settings.models else ""
    return Wish(model=model, scope="client" if settings.client else "serve", near=settings.discovery.region)


async def look_around(settings: Settings, skip: Collection[MeshId] = ()) -> Search:
    """What is there for such a node."""
    endpoint = EndpointSettings(relay=settings.relay)
    return await search(settings.discovery.urls, wish_of(settings), endpoint, skip)


async def find_mesh(life: Found, on_progress: OnStage) -> Found:
    """With `--auto` and no token: the best mesh's token, or none where the node begins a mesh of its own.

    Raises:
        MeshError: `no_mesh_found` or `no_relay`, for a node that has no `--model` to begin a mesh with.
    """
    settings = life.settings
    if life.told:
        on_progress(Stage(name="discover", text=life.told, done=True))
    if life.searched or not settings.discovery.auto or settings.join:
        return life
    on_progress(Stage(name="discover", text="looking for a mesh on Nostr", done=False))
    found = await look_around(settings)
    if found.candidates:
        best, *others = found.candidates
        on_progress(Stage(name="discover", text=f"joining {describe(best)}", done=True))
        return Found(settings=joining(settings, best), others=tuple(others))
    try:
        found.check(wish_of(settings))
    except MeshError as error:
        if settings.client or not settings.models:
            raise
        listed = ", and listing it" if settings.discovery.publicity is not None else ""
        on_progress(Stage(name="discover", text=f"{error.message} Starting a mesh of its own{listed}.", done=True))
        on_progress(Told(level=NoticeLevel.INFO, code="mesh_not_found", text=error.message))
    return Found(settings=settings)


def joining(settings: Settings, candidate: Candidate) -> Settings:
    """The settings of a node that joins this mesh."""
    discovery = msgspec.structs.replace(settings.discovery, auto=True)
    return msgspec.structs.replace(settings, join=(candidate.token,), discovery=discovery)


def describe(candidate: Candidate) -> str:
    """A mesh in a few words."""
    listing = candidate.listing
    name = listing.name or f"mesh {listing.mesh[:10]}"
    return f"{name} ({listing.nodes} node{'' if listing.nodes == 1 else 's'}, {candidate.rtt_ms:.0f} ms away)"


_LOOKS_IN_PERIOD = 4
"""How many looks a node that was left alone takes in the time in which listings are renewed."""

_log = structlog.get_logger(__name__)

Move = Callable[[Found], None]
"""Ends this life in good order and begins another one, in another mesh."""


class Roaming:
    """Run `run` in a task for a node that publishes or came by discovery."""

    def __init__(
        self, node: Node, net: MeshNet, settings: Settings, notices: NoticeBook, busy: Callable[[], bool], move: Move
    ) -> None:
        """`busy`: whether requests are being answered now, which a move would break off."""
        self._node = node
        self._net = net
        self._settings = settings
        self._notices = notices
        self._busy = busy
        self._move = move
        self._together = False
        self._looks_alone = 0

    async def run(self) -> None:
        """Look now and then; until cancelled, or until the node moves."""
        pause = self._settings.discovery.period / _LOOKS_IN_PERIOD
        while True:
            await asyncio.sleep(pause)
            if self._node.stopping:
                return
            if self._left_alone():
                moved = await self._look_again()
            elif self._may_merge():
                moved = await self._merge()
            else:
                continue
            if moved:
                return

    def _left_alone(self) -> bool:
        """Whether this node came by discovery, was in company, and is not any more."""
        alone = self._net.routes_client.source is None if self._node.role is Role.CLIENT else not self._node.members
        if not alone:
            self._together, self._looks_alone = True, 0
        admitted = self._net.scope is not None and not self._net.founder
        return alone and (self._together or admitted) and self._settings.discovery.auto

    async def _look_again(self) -> bool:
        """The same mesh first: it may be listed by somebody whom this node does not know. Then any other."""
        self._looks_alone += 1
        found = await look_around(self._settings)
        same = [entry for entry in found.candidates if entry.listing.mesh == self._net.mesh_id]
        for candidate in same:
            invite = parse_invite(candidate.token)
            if isinstance(invite, Invite) and invite.issuer != self._net.node_id:
                _log.info("the mesh is listed; joining it again", by=invite.issuer[:10])
                self._net.rejoin_by(invite)
                return False
        others = [entry for entry in found.candidates if entry not in same]
        if self._looks_alone < _LOOKS_IN_PERIOD or not others or self._busy() or not self._left_alone():
            return False
        self._go(others[0], "nobody of the mesh that it was in is left")
        return True

    def _may_merge(self) -> bool:
        discovery, own = self._settings.discovery, self._node.lister.listing
        return discovery.merge and own is not None and bool(own.name) and not self._node.members and not self._busy()

    async def _merge(self) -> bool:
        found = await look_around(self._settings)
        own = self._node.lister.listing
        if own is None or not self._may_merge():
            return False
        larger = _first(found, [listing.mesh for listing in larger_namesakes(own, _listings(found))])
        if larger is None:
            return False
        self._go(larger, "it is larger and of the same name")
        return True

    def _go(self, candidate: Candidate, why: str) -> None:
        text = f"Going over to {describe(candidate)}, because {why}."
        self._notices.add(Notice(level=NoticeLevel.INFO, code="mesh_moved", text=text))
        self._move(Found(settings=joining(self._settings, candidate), told=f"joining {describe(candidate)}"))


def _listings(found: Search) -> list[Listing]:
    return [candidate.listing for candidate in found.candidates]


def _first(found: Search, meshes: list[MeshId]) -> Candidate | None:
    known = {candidate.listing.mesh: candidate for candidate in found.candidates}
    return known[meshes[0]] if meshes else None
