"""What of this node the console opens, put together."""

from collections.abc import Callable

from mesh_llm.core.console_ports import Activity, Approvals, ConsoleParts, Planner, Publisher
from mesh_llm.core.events import AnyEvent
from mesh_llm.core.management import Management
from mesh_llm.core.node import Node
from mesh_llm.daemon.console_shelf import ConsoleShelf
from mesh_llm.daemon.downloads import Downloads
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.obtaining import Obtainer
from mesh_llm.daemon.outlook import Outlook
from mesh_llm.daemon.settings import Settings


class ConsoleRooms:
    """Makes the parts that this node has: a passive one has no models of its own."""

    def __init__(
        self,
        settings: Settings,
        node: Node,
        machine: Machine,
        obtainer: Obtainer,
        post: Callable[[AnyEvent], None],
        outlook: Outlook,
        management: Management,
    ) -> None:
        self._serves = machine.source is not None
        self._shelf = ConsoleShelf(node, machine.shelf, management.status)
        self._downloads = Downloads(settings, machine, obtainer, post, outlook.bell, management.load, outlook.settled)

    async def close(self) -> None:
        """End what goes on."""
        await self._downloads.close()

    def parts(self, activity: Activity, approvals: Approvals, planner: Planner, publisher: Publisher) -> ConsoleParts:
        """For the console."""
        return ConsoleParts(
            shelf=self._shelf if self._serves else None,
            downloader=self._downloads if self._serves else None,
            activity=activity,
            approvals=approvals,
            planner=planner if self._serves else None,
            publisher=publisher if self._serves else None,
        )
