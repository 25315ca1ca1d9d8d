"""The public listing of this node's mesh on Nostr: its switch in the console, and its publication on the relays.

The Nostr library is loaded when something is published for the first time.
"""

import asyncio
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import structlog

from mesh_llm.console.schema import Publication
from mesh_llm.console.status import StatusListing
from mesh_llm.core.listing.content import Listing
from mesh_llm.core.listing.publisher import ListingState
from mesh_llm.core.node import Node
from mesh_llm.core.types.announcement import ListingPolicy
from mesh_llm.core.types.effects import Publish
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import AnyEvent, ListingOutcome, PublishRequested
from mesh_llm.core.types.model import Role
from mesh_llm.daemon.settings import PUBLISH_SCOPE, DiscoverySettings
from mesh_llm.discovery.nostr.consent import PublicationConsent, consent_text, scope_sentence
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import TaskScope, wait_for_event
from mesh_llm.wire.discovery import Posting, encode_posting

if TYPE_CHECKING:
    from mesh_llm.discovery.nostr.listings import ListingBoard

_DELETE_SECONDS = 5.0

_log = structlog.get_logger(__name__)


class ListingSwitch:
    """Switches the listing on and off, and shows its state; implements console.calls.ListingControl."""

    def __init__(
        self,
        node: Node,
        settings: DiscoverySettings,
        name: str,
        consent: PublicationConsent,
        post: Callable[[AnyEvent], None],
    ) -> None:
        """`name`: the user's name for the mesh."""
        self._node = node
        self._consent = consent
        self._settings = settings
        self._name = name
        self._post = post

    def publication(self) -> Publication:
        """Its present state."""
        return self._publication(on=self._node.listing.policy is not None)

    async def publish(self, *, on: bool, agreed: bool = False) -> Publication:
        """Begin or end to be listed. `agreed`: the user has read `consent` of `publication`, and agrees.

        Raises MeshError(client_cannot_publish, publication_not_agreed).
        """
        if on and self._node.role is Role.CLIENT:
            raise MeshError(
                code="client_cannot_publish",
                message="A client has no mesh of its own to list.",
                hint="List the mesh on a node that serves.",
                status=409,
            )
        wish = self._wish()
        if on and not self._consent.covers(wish, self._settings.urls):
            if not agreed:
                raise MeshError(
                    code="publication_not_agreed",
                    message="Nobody has agreed yet that this mesh becomes public.",
                    hint="Switch it on in the console, which asks; or start the node with --publish.",
                    status=409,
                )
            self._consent.give(wish, self._settings.urls)
        self._post(PublishRequested(publicity=wish if on else None))
        return self._publication(on=on)

    def status(self) -> StatusListing:
        """Its present state, for the node's status."""
        listing = self._node.listing
        wish = listing.policy
        return StatusListing(
            state=listing.state.value,
            publisher=listing.publisher or "",
            region=wish.region if wish is not None else "",
            scope=wish.scope if wish is not None else "",
            max_clients=wish.max_clients if wish is not None else 0,
            clients=self._clients(),
            problem=listing.reason,
        )

    def _wish(self) -> ListingPolicy:
        named = ListingPolicy(name=self._name, region=self._settings.region, scope=PUBLISH_SCOPE)
        return self._settings.publicity or named

    def _publication(self, *, on: bool) -> Publication:
        listing = self._node.listing
        wish = listing.policy or self._wish()
        listed = on and listing.state is ListingState.LISTED
        agreed = self._consent.covers(wish, self._settings.urls)
        return Publication(
            on=on,
            name=wish.name,
            relays=self._settings.urls,
            listed=listed,
            expires=None if listing.published_at is None or not listed else self._expires(listing.published_at),
            problem=listing.reason if on else "",
            consent="" if agreed else f"{consent_text(wish, self._settings.urls)} {scope_sentence(wish, None)}",
        )

    def _expires(self, published_at: float) -> float:
        return self._node.config.epoch + published_at + self._settings.life

    def _clients(self) -> int:
        others = (member.announcement.clients for member in self._node.members)
        return self._node.listing.clients + sum(others)


class ListingPublisher:
    """Carries out the core's Publish: it sends the listing, with an invite, to the relays, and reports the outcome.

    `close` deletes the listing; call it before the mesh is closed.
    """

    def __init__(
        self,
        net: MeshNet,
        home: Home,
        settings: DiscoverySettings,
        post: Callable[[AnyEvent], None],
    ) -> None:
        self._net = net
        self._home = home
        self._settings = settings
        self._post = post
        self._scope = TaskScope("publishing")
        self._wanted: Listing | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._board: ListingBoard | None = None
        self._author = b""

    def carry_out(self, effect: Publish) -> None:
        """Carry out Publish; returns at once."""
        self._want(effect.listing)

    def _want(self, listing: Listing | None) -> None:
        self._wanted = listing
        self._idle.clear()
        self._wake.set()
        if not len(self._scope):
            self._scope.supervise(self._run, "publish")

    async def close(self) -> None:
        """Delete the listing on the relays that answer within `_DELETE_SECONDS`."""
        if len(self._scope):
            self._want(None)
            await wait_for_event(self._idle, _DELETE_SECONDS)
        await self._scope.close()

    async def _run(self) -> None:
        # Repeat what a failed run before this one did not finish.
        self._wake.set()
        while True:
            if not self._wake.is_set():
                self._idle.set()
            await self._wake.wait()
            self._wake.clear()
            listing = self._wanted
            if listing is None:
                # The key goes with the board: another key may be there when publishing begins again.
                board, self._board = self._board, None
                if board is not None:
                    await board.close()
                continue
            try:
                await self._publish(listing)
            except MeshError as error:
                _log.warning("the mesh cannot be listed", reason=str(error))
                self._post(ListingOutcome(accepted=0, problem=error.message.rstrip(".")))

    async def _publish(self, listing: Listing) -> None:
        board = self._board or await self._open(listing)
        token, proof = await self._net.listing_invite(listing.scope, self._author)
        board.publish(encode_posting(Posting(listing=listing, token=token, proof=proof)), self._settings.life)

    async def _open(self, listing: Listing) -> "ListingBoard":
        # A large library: loading it in this thread would delay running streams.
        await asyncio.to_thread(importlib.import_module, "mesh_llm.discovery.nostr.listings")
        from mesh_llm.discovery.nostr.identity import load_or_make_key, public_bytes
        from mesh_llm.discovery.nostr.listings import ListingBoard
        from mesh_llm.discovery.nostr.relays import RelayPool

        keys = load_or_make_key(self._home.nostr_key)
        self._author = public_bytes(keys)
        self._board = ListingBoard(await RelayPool.open(self._settings.urls), keys, listing.mesh, self._report)
        return self._board

    def _report(self, accepted: int, problem: str) -> None:
        self._post(ListingOutcome(accepted=accepted, problem=problem))
