"""Discovery of meshes on Nostr: a search, the choice of a mesh at the start (`--auto`), and migration to a better one.

A node that found its mesh by a listing looks for it there when the other members are gone; one with `--auto` then goes
to another mesh. A lone listed node goes to a mesh that the user named by its key, or that it was in before (`--merge`).
The name of a mesh alone never decides: a stranger can take it.
"""

import asyncio
import importlib
from collections.abc import Callable, Iterable, Sequence

import msgspec
import structlog

from mesh_llm.core.listing.content import (
    MESH_KEY_DIGITS,
    Listing,
    ListingCandidate,
    ListingQuery,
    Score,
    best_first,
    merge_targets,
)
from mesh_llm.core.node import Node
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId
from mesh_llm.core.types.model import Role
from mesh_llm.daemon.published_state import NoticeLog, NoticeShown, ProgressListener, Stage
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.admission.credentials import verify
from mesh_llm.net.mesh import MeshNet
from mesh_llm.net.quic.endpoint import MOST_AT_ONCE, EndpointSettings, measure_round_trips
from mesh_llm.wire.mesh.invites import Invite, parse_invite

_log = structlog.get_logger(__name__)

DIRECT_SECONDS = 2.5
RELAYED_SECONDS = 5.0
"""How long a node may take to answer: by its addresses only, and with the help of a relay."""


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A mesh that can be joined. `token`: an invite; `rtt_ms`: to the node that the invite names."""

    listing: Listing
    token: str
    rtt_ms: float
    score: Score
    author: str
    expires: float
    relays: tuple[str, ...]


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """The result of a search.

    Attributes:
        candidates: reachable meshes, best first.
        seen: how many meshes are listed.
        unreachable: how many matching meshes did not answer.
        answered: relays that answered.
        failed: why the other relays did not answer.
        refused: how many events on the relays were invalid.
    """

    candidates: tuple[Candidate, ...]
    seen: int
    unreachable: int
    answered: tuple[str, ...]
    failed: dict[str, str]
    refused: int

    def check(self, wish: ListingQuery) -> None:
        """Raise MeshError if there is no mesh to join: `no_relay`, or `no_mesh_found` with the reason."""
        if self.candidates:
            return
        if not self.answered:
            reasons = "; ".join(f"{url}: {reason}" for url, reason in self.failed.items())
            raise MeshError(
                code="no_relay",
                message=f"No Nostr relay answered ({reasons}).",
                hint="Check the network, or use other relays: --nostr-relay URL",
                status=503,
            )
        if not self.seen:
            message = "No meshes are listed at present."
        elif self.unreachable:
            message = f"None of the {self.unreachable} meshes that match can be reached (of {self.seen} listed)."
        else:
            message = f"None of the {self.seen} listed meshes matches{_described(wish)}."
        raise MeshError(
            code="no_mesh_found",
            message=message,
            hint="Start one: mesh-llm --model NAME --publish. All that are listed: mesh-llm discover"
            + (". Most let others only ask: to use one, add --client" if self.seen and wish.scope != "client" else ""),
            status=404,
        )


Select = Callable[[Sequence[Listing]], Iterable[Listing]]
"""Which of the listings that were found are looked at further: the nodes of the others are not dialled."""


async def search(
    urls: tuple[str, ...],
    wish: ListingQuery,
    endpoint: EndpointSettings,
    select: Select | None = None,
    most: int = MOST_AT_ONCE,
) -> Search:
    """Ask the relays, drop meshes that do not match, dial the best `most`, and sort those that answer.

    It takes a few seconds at most: all relays, and then all nodes, are asked at once.
    """
    # A large library: loading it in this thread would delay running streams.
    await asyncio.to_thread(importlib.import_module, "mesh_llm.discovery.nostr.listings")
    from mesh_llm.discovery.nostr.listings import query_relays

    seen = await query_relays(urls, verify)
    found = {entry.listing.mesh: entry for entry in seen.found}
    listings = [entry.listing for entry in seen.found]
    selected = listings if select is None else select(listings)
    promising = best_first((ListingCandidate(listing=listing) for listing in selected), wish)[:most]
    invites: dict[MeshId, Invite] = {}
    for offer, _ in promising:
        invite = parse_invite(found[offer.listing.mesh].token)
        if isinstance(invite, Invite):
            invites[offer.listing.mesh] = invite
    measured = await measure_round_trips(invites, endpoint, RELAYED_SECONDS if endpoint.relay else DIRECT_SECONDS)
    near = [
        ListingCandidate(listing=offer.listing, rtt_ms=rtt)
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


def _described(wish: ListingQuery) -> str:
    parts = [
        f"a model named {wish.model}" if wish.model else "",
        f"in {wish.region}" if wish.region else "",
        f"with {wish.min_memory_bytes / 1e9:g} GB" if wish.min_memory_bytes else "",
        f"open to scope {wish.scope}" if wish.scope != "client" else "",
    ]
    said = ", ".join(part for part in parts if part)
    return f" ({said})" if said else ""


class MeshChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of a life in one mesh, and the meshes to try if that one does not admit this node.

    Attributes:
        settings: of this life.
        others: the meshes to try next.
        searched: the search is done.
        text: the message for the user then.
        own: the mesh that this node left for the chosen one (`--merge`), and to which it returns if not admitted.
        refused: meshes that did not admit this node; it does not move to them again.
    """

    settings: Settings
    others: tuple[Candidate, ...] = ()
    searched: bool = True
    text: str = ""
    own: MeshId | None = None
    refused: tuple[MeshId, ...] = ()

    def next(self) -> "MeshChoice | None":
        """The next choice if the chosen mesh did not admit this node; None if there is none."""
        settings = self.settings
        if self.others:
            best, *others = self.others
            text = f"that mesh admits nobody; joining {describe(best)}"
            return MeshChoice(settings=joining(settings, best), others=tuple(others), text=text)
        if self.own is not None and settings.join:
            chosen = parse_invite(settings.join[0])
            refused = (*self.refused, chosen.mesh_id) if isinstance(chosen, Invite) else self.refused
            text = "that mesh admits nobody; back to this node's own"
            return MeshChoice(settings=_without_mesh(settings), text=text, own=self.own, refused=refused)
        if settings.discovery.auto and settings.join and settings.models and not settings.client:
            text = "none of the listed meshes admits this node; starting a mesh of its own"
            return MeshChoice(settings=_without_mesh(settings), text=text)
        return None


def wish_for(settings: Settings) -> ListingQuery:
    """What a node with these settings looks for. A client needs less access than a node that serves."""
    model = settings.models[0] if settings.client and settings.models else ""
    return ListingQuery(model=model, scope="client" if settings.client else "serve", near=settings.discovery.region)


async def search_for(settings: Settings, select: Select | None = None) -> Search:
    """The meshes for a node with these settings."""
    endpoint = EndpointSettings(relay=settings.relay)
    return await search(settings.discovery.urls, wish_for(settings), endpoint, select)


async def discover_mesh(life: MeshChoice, on_progress: ProgressListener) -> MeshChoice:
    """With `--auto` and no token: choose the best mesh, or none if the node begins a mesh of its own.

    Raises:
        MeshError: `no_mesh_found` or `no_relay`, for a client, and for a node without `--model`.
    """
    settings = life.settings
    if life.text:
        on_progress(Stage(name="discover", text=life.text, done=True))
    if life.searched or not settings.discovery.auto or settings.join:
        return life
    on_progress(Stage(name="discover", text="looking for a mesh on Nostr", done=False))
    found = await search_for(settings)
    if found.candidates:
        best, *others = found.candidates
        on_progress(Stage(name="discover", text=f"joining {describe(best)}", done=True))
        return MeshChoice(settings=joining(settings, best), others=tuple(others))
    try:
        found.check(wish_for(settings))
    except MeshError as error:
        if settings.client or not settings.models:
            raise
        listed = ", and listing it" if settings.discovery.publicity is not None else ""
        on_progress(Stage(name="discover", text=f"{error.message} Starting a mesh of its own{listed}.", done=True))
        on_progress(NoticeShown(level=NoticeLevel.INFO, code="mesh_not_found", text=error.message))
    return MeshChoice(settings=settings)


def joining(settings: Settings, candidate: Candidate) -> Settings:
    """The settings of a node that joins this mesh."""
    discovery = msgspec.structs.replace(settings.discovery, found=True)
    return msgspec.structs.replace(settings, join=(candidate.token,), discovery=discovery)


def _without_mesh(settings: Settings) -> Settings:
    """The settings without a mesh to join."""
    discovery = msgspec.structs.replace(settings.discovery, found=False)
    return msgspec.structs.replace(settings, join=(), discovery=discovery)


def describe(candidate: Candidate) -> str:
    """A mesh in a few words, for people."""
    listing = candidate.listing
    nodes = f"{listing.nodes} node{'' if listing.nodes == 1 else 's'}"
    key = listing.mesh[:MESH_KEY_DIGITS]
    return f"{listing.name or 'a mesh without a name'} ({nodes}, {candidate.rtt_ms:.0f} ms away, key {key})"


_SEARCHES_PER_PERIOD = 4
"""Searches of a node that was left alone, in the time in which listings are renewed."""

Move = Callable[[MeshChoice], None]
"""Ends this life, and begins another one in another mesh."""


class MeshMigration:
    """Migrates a node to another mesh, as `--auto` and `--merge` allow it."""

    def __init__(
        self, node: Node, net: MeshNet, life: MeshChoice, notices: NoticeLog, busy: Callable[[], bool], move: Move
    ) -> None:
        """`busy`: whether requests are being answered now; a move would break them off."""
        self._node = node
        self._net = net
        self._life = life
        self._settings = life.settings
        self._notices = notices
        self._busy = busy
        self._move = move
        self._together = False
        self._searches_alone = 0

    async def run(self) -> None:
        """Search from time to time; until cancelled, or until the node moves."""
        pause = self._settings.discovery.period / _SEARCHES_PER_PERIOD
        while True:
            await asyncio.sleep(pause)
            if self._node.stopping:
                return
            if self._left_alone() and await self._search_again():
                return
            if self._may_merge() and await self._merge():
                return

    def _left_alone(self) -> bool:
        """Whether this node found its mesh by a listing (or would), had other members there, and has none now."""
        alone = self._net.routes_client.source is None if self._node.role is Role.CLIENT else not self._node.members
        if not alone:
            self._together, self._searches_alone = True, 0
        admitted = self._net.scope is not None and not self._net.founder
        discovery = self._settings.discovery
        return alone and (self._together or admitted) and (discovery.auto or discovery.found)

    def _may_leave(self) -> bool:
        """Whether this node may go to any other mesh: the user said `--auto`, and it did not found this one."""
        return self._settings.discovery.auto and not self._net.founder

    async def _search_again(self) -> bool:
        """Rejoin the same mesh if an unknown member lists it. Otherwise move to another mesh, if `--auto` allows it."""
        self._searches_alone += 1
        found = await search_for(self._settings, None if self._may_leave() else self._same)
        same = [entry for entry in found.candidates if entry.listing.mesh == self._net.mesh_id]
        for candidate in same:
            invite = parse_invite(candidate.token)
            if isinstance(invite, Invite) and invite.issuer != self._net.node_id:
                _log.info("the mesh is listed; joining it again", by=invite.issuer[:10])
                self._net.rejoin_by(invite)
                return False
        others = [entry for entry in found.candidates if entry not in same] if self._may_leave() else []
        if self._searches_alone < _SEARCHES_PER_PERIOD or not others or self._busy() or not self._left_alone():
            return False
        self._go(others[0], "no other node of its mesh is left", own=None)
        return True

    def _same(self, listings: Sequence[Listing]) -> list[Listing]:
        return [listing for listing in listings if listing.mesh == self._net.mesh_id]

    def _may_merge(self) -> bool:
        discovery = self._settings.discovery
        asked = bool(discovery.merge_keys) or discovery.merge_held
        return asked and self._node.listing.listing is not None and not self._node.members and not self._busy()

    def _targets(self, listings: Sequence[Listing]) -> list[Listing]:
        """The meshes that `--merge` lets this node move to, best first."""
        discovery, own = self._settings.discovery, self._node.listing.listing
        if own is None:
            return []
        holds = self._net.stores.holds if discovery.merge_held else _holds_none
        targets = merge_targets(own, listings, discovery.merge_keys, holds)
        return [listing for listing in targets if listing.mesh not in self._life.refused]

    async def _merge(self) -> bool:
        found = await search_for(self._settings, self._targets)
        if not self._may_merge():
            return False
        reached = {candidate.listing.mesh: candidate for candidate in found.candidates}
        targets = self._targets([candidate.listing for candidate in found.candidates])
        if not targets:
            return False
        self._go(reached[targets[0].mesh], "--merge says so", own=self._net.mesh_id)
        return True

    def _go(self, candidate: Candidate, why: str, own: MeshId | None) -> None:
        text = f"Moving to {describe(candidate)}, because {why}."
        self._notices.add(Notice(level=NoticeLevel.INFO, code="mesh_moved", text=text))
        self._move(
            MeshChoice(
                settings=joining(self._settings, candidate),
                text=f"joining {describe(candidate)}",
                own=own,
                refused=self._life.refused,
            )
        )


def _holds_none(_: MeshId) -> bool:
    return False
