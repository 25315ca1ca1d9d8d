"""Where a daemon's models come from and go to: neighbours, what the mesh calls for, what the user brings, the disk."""

from collections.abc import Callable, Sequence

from mesh_llm.core.effects import FetchModel
from mesh_llm.core.events import AnyEvent
from mesh_llm.core.ids import NodeId
from mesh_llm.core.member import Member
from mesh_llm.daemon.bringing import Bringing
from mesh_llm.daemon.library_watch import watch_library
from mesh_llm.daemon.machine import Machine
from mesh_llm.daemon.mesh_fetches import MeshFetches
from mesh_llm.daemon.neighbours import GivingAway, Neighbours
from mesh_llm.daemon.obtaining import Obtainer
from mesh_llm.daemon.outlook import Outlook
from mesh_llm.daemon.progress import OnProgress
from mesh_llm.daemon.settings import Settings
from mesh_llm.models.neighbours.pace import Pace
from mesh_llm.net.mesh_net import MeshNet
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.tasks import TaskScope


class ModelRooms:
    """Made before the mesh is started; closed before its endpoint is."""

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        net: MeshNet,
        home: Home,
        members: Callable[[], Sequence[Member]],
        name: Callable[[NodeId], str],
        post: Callable[[AnyEvent], None],
        on_progress: OnProgress,
        pace: Pace,
    ) -> None:
        """`members`: the other nodes at present; `name`: of a node, for people; `pace`: of what is given to others."""
        self._settings = settings
        self._machine = machine
        self._members = members
        self._post = post
        self._on_progress = on_progress
        giving = GivingAway(give=settings.give and machine.source is not None, pace=pace)
        self._neighbours = Neighbours(net, machine.shelf, home.cache / "chunks", members, name, giving)
        self._fetches = MeshFetches(settings, machine, self._neighbours, post, on_progress)
        self.obtainer = Obtainer(machine, self._neighbours)

    def fetch(self, effect: FetchModel) -> None:
        """The core's FetchModel."""
        self._fetches.start(effect)

    def begin(self, scope: TaskScope, outlook: Outlook) -> None:
        """Watch the disk, and fetch what the user brings, as tasks of `scope`."""
        if self._machine.source is None:
            return
        scope.supervise(lambda: watch_library(self._settings.models_dirs, self._machine, self._post), "models")
        bringing = Bringing(
            self._settings, self._machine, self.obtainer, self._post, self._on_progress, outlook.notices
        )
        scope.spawn(bringing.run(outlook.bell, lambda: bool(self._members())), "bringing")

    async def close(self) -> None:
        """Fetch and give nothing more; what has arrived is kept."""
        await self._fetches.close()
        await self._neighbours.close()
