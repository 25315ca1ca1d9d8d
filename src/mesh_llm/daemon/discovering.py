"""Everything about Nostr that lives as long as the daemon: the listing, its switch in the console, and roaming."""

from collections.abc import Callable

from mesh_llm.core.effects import Publish
from mesh_llm.core.events import AnyEvent
from mesh_llm.core.node import Node
from mesh_llm.daemon.auto_join import Found
from mesh_llm.daemon.notices import NoticeBook
from mesh_llm.daemon.publication import Publications
from mesh_llm.daemon.publishing import Publishing
from mesh_llm.daemon.roaming import Roaming
from mesh_llm.daemon.settings import Settings
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.tasks import TaskScope


class Discovering:
    """Made before the core; `start` once there is one."""

    def __init__(
        self, settings: Settings, home: Home, net: MeshNet, post: Callable[[AnyEvent], None], notices: NoticeBook
    ) -> None:
        self._settings = settings
        self._net = net
        self._post = post
        self._notices = notices
        self._publishing = Publishing(net, home, settings.discovery, post, notices)

    def carry_out(self, effect: Publish) -> None:
        """The core's Publish."""
        self._publishing.carry_out(effect)

    def publications(self, node: Node) -> Publications:
        """The listing as the console sees and switches it."""
        return Publications(node, self._settings.discovery, self._settings.mesh_name, self._post)

    def start(
        self, scope: TaskScope, node: Node, settings: Settings, busy: Callable[[], bool], move: Callable[[Found], None]
    ) -> None:
        """Look for better meshes now and then.

        `settings`: of a life elsewhere, but for its mesh; `busy`: requests run here now; `move`: begin that life.
        """
        roaming = Roaming(node, self._net, settings, self._notices, busy, move)
        scope.supervise(roaming.run, "roaming")

    async def close(self) -> None:
        """Delete the listing."""
        await self._publishing.close()
