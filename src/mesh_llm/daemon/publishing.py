"""Carries out the core's Publish: the listing, with an invite in it, goes to the relays; how it went comes back.

The Nostr library is loaded when something is published for the first time.
"""

import asyncio
import importlib
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from mesh_llm.core.effects import Notice, NoticeLevel, Publish
from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent, ListingOutcome
from mesh_llm.core.listing import Listing
from mesh_llm.core.publicity import Publicity
from mesh_llm.daemon.notices import NoticeBook
from mesh_llm.daemon.settings import DiscoverySettings
from mesh_llm.discovery.consent import consent_text
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.nostr_listing import Posting, encode_posting

if TYPE_CHECKING:
    from mesh_llm.discovery.board import Board

_GOODBYE_SECONDS = 5.0

_log = structlog.get_logger(__name__)


class Publishing:
    """One node's listing. `close` deletes it; call it before the mesh is closed."""

    def __init__(
        self,
        net: MeshNet,
        home: Home,
        settings: DiscoverySettings,
        post: Callable[[AnyEvent], None],
        notices: NoticeBook,
    ) -> None:
        self._net = net
        self._home = home
        self._settings = settings
        self._post = post
        self._notices = notices
        self._scope = TaskScope("publishing")
        self._wanted: Listing | None = None
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._board: Board | None = None
        self._author = b""

    def carry_out(self, effect: Publish) -> None:
        """The core's Publish. Returns at once; what becomes public is told before anything does."""
        if effect.listing is not None and not self._home.nostr_key.exists():
            listing = effect.listing
            publicity = Publicity(name=listing.name, region=listing.region, scope=listing.scope)
            text = consent_text(publicity, self._settings.urls)
            self._notices.add(Notice(level=NoticeLevel.WARNING, code="publish_first", text=text))
        self._want(effect.listing)

    def _want(self, listing: Listing | None) -> None:
        self._wanted = listing
        self._idle.clear()
        self._wake.set()
        if not len(self._scope):
            self._scope.supervise(self._run, "publish")

    async def close(self) -> None:
        """Delete the listing wherever a relay answers in a moment."""
        if len(self._scope):
            self._want(None)
            with suppress(TimeoutError):
                async with asyncio.timeout(_GOODBYE_SECONDS):
                    await self._idle.wait()
        await self._scope.close()

    async def _run(self) -> None:
        # Also what a run before this one failed to do.
        self._wake.set()
        while True:
            if not self._wake.is_set():
                self._idle.set()
            await self._wake.wait()
            self._wake.clear()
            listing = self._wanted
            if listing is None:
                # With the board goes the key: another one may be there when publishing begins anew.
                board, self._board = self._board, None
                if board is not None:
                    await board.close()
                continue
            try:
                await self._show(listing)
            except MeshError as error:
                _log.warning("the mesh cannot be listed", reason=str(error))
                self._post(ListingOutcome(accepted=0, problem=error.message.rstrip(".")))

    async def _show(self, listing: Listing) -> None:
        board = self._board or await self._open(listing)
        token, proof = self._net.listing_invite(listing.scope, self._author)
        board.post(encode_posting(Posting(listing=listing, token=token, proof=proof)), self._settings.life)

    async def _open(self, listing: Listing) -> "Board":
        # A large library: loading it in this thread would hold up whatever streams now.
        await asyncio.to_thread(importlib.import_module, "mesh_llm.discovery.board")
        from mesh_llm.discovery.board import Board
        from mesh_llm.discovery.identity import load_or_make, public_bytes
        from mesh_llm.discovery.relays import RelayPool

        keys = load_or_make(self._home.nostr_key)
        self._author = public_bytes(keys)
        self._board = Board(await RelayPool.open(self._settings.urls), keys, listing.mesh, self._told)
        return self._board

    def _told(self, accepted: int, problem: str) -> None:
        self._post(ListingOutcome(accepted=accepted, problem=problem))
