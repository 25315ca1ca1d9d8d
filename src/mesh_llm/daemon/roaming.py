"""A node that was found, or wants to be: it merges into a larger mesh of its name, and looks again when left alone."""

import asyncio
from collections.abc import Callable

import structlog

from mesh_llm.core.effects import Notice, NoticeLevel
from mesh_llm.core.ids import MeshId
from mesh_llm.core.listing import Listing
from mesh_llm.core.listing_choice import larger_namesakes
from mesh_llm.core.model import Role
from mesh_llm.core.node import Node
from mesh_llm.daemon.auto_join import Found, describe, joining, look_around
from mesh_llm.daemon.finding import Candidate, Search
from mesh_llm.daemon.notices import NoticeBook
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.wire.invite import Invite, parse_invite

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
        alone = self._net.lost if self._node.role is Role.CLIENT else not self._node.members
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
