"""The public listing as the console sees it and switches it: satisfies core.console_ports.Publisher."""

from collections.abc import Callable

from mesh_llm.core.console_values import Publication
from mesh_llm.core.errors import MeshError
from mesh_llm.core.events import AnyEvent, PublishRequested
from mesh_llm.core.lister import ListerState
from mesh_llm.core.model import Role
from mesh_llm.core.node import Node
from mesh_llm.core.publicity import Publicity
from mesh_llm.core.status import StatusListing
from mesh_llm.daemon.settings import DiscoverySettings


class Publications:
    """Passes wishes to the core, and tells how it is."""

    def __init__(self, node: Node, settings: DiscoverySettings, name: str, post: Callable[[AnyEvent], None]) -> None:
        """`name`: of the mesh, as the user called it."""
        self._node = node
        self._settings = settings
        self._name = name
        self._post = post

    def publication(self) -> Publication:
        """How it is at present."""
        return self._publication(on=self._node.lister.wish is not None)

    async def publish(self, *, on: bool) -> Publication:
        """Begin or end to be listed. Raises MeshError(client_cannot_publish)."""
        if on and self._node.role is Role.CLIENT:
            raise MeshError(
                code="client_cannot_publish",
                message="A client has no mesh of its own to list.",
                hint="List the mesh on a node that serves.",
                status=409,
            )
        self._post(PublishRequested(publicity=self._wish() if on else None))
        return self._publication(on=on)

    def status(self) -> StatusListing:
        """The same, as part of the node's status."""
        lister = self._node.lister
        wish = lister.wish
        return StatusListing(
            state=lister.state.value,
            publisher=lister.writer or "",
            region=wish.region if wish is not None else "",
            scope=wish.scope if wish is not None else "",
            max_clients=wish.max_clients if wish is not None else 0,
            clients=self._clients(),
            problem=lister.reason,
        )

    def _wish(self) -> Publicity:
        return self._settings.publicity or Publicity(name=self._name, region=self._settings.region)

    def _publication(self, *, on: bool) -> Publication:
        lister = self._node.lister
        wish = lister.wish or self._wish()
        listed = on and lister.state is ListerState.LISTED
        return Publication(
            on=on,
            name=wish.name,
            relays=self._settings.urls,
            listed=listed,
            expires=None if lister.published_at is None or not listed else self._expires(lister.published_at),
            problem=lister.reason if on else "",
        )

    def _expires(self, published_at: float) -> float:
        return self._node.config.epoch + published_at + self._settings.life

    def _clients(self) -> int:
        others = (member.announcement.clients for member in self._node.members)
        return self._node.lister.clients + sum(others)
