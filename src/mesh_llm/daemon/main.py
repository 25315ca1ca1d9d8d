"""What the core is told of a user's settings and of the machine.

The daemon's life: everything is made and bound here, in order, and ended in the opposite one.
"""

import asyncio
import os
import random
import secrets
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial

import msgspec
import structlog

from mesh_llm import __version__
from mesh_llm.api.server import ApiServer
from mesh_llm.console.app import ConsoleServer
from mesh_llm.console.auth import Sessions
from mesh_llm.console.calls import Capabilities
from mesh_llm.core.config import NodeConfig, Timings
from mesh_llm.core.node import Node
from mesh_llm.core.routing.ranking import Target
from mesh_llm.core.types.announcement import Member
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import (
    AddressesChanged,
    AnyEvent,
    PeerConnected,
    SplitScope,
    Started,
    StopRequested,
    TargetFailed,
)
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.core.types.model import Role
from mesh_llm.core.types.ports import ByteStream, EngineEnd
from mesh_llm.daemon.console import DaemonManagement, ModelLibrary, make_console, named_decisions
from mesh_llm.daemon.downloads import Downloads
from mesh_llm.daemon.driver import Driver, bind_effects
from mesh_llm.daemon.engines import Engines
from mesh_llm.daemon.journal import Journal
from mesh_llm.daemon.lan import Approvals, LanPresence, join_by_lan
from mesh_llm.daemon.listing import Discovering, Publications
from mesh_llm.daemon.log import DaemonLog, Signals, told_of_disk
from mesh_llm.daemon.mesh import MeshEffects, join, make_net
from mesh_llm.daemon.model_fetcher import Ask, nobody, provide
from mesh_llm.daemon.model_registry import Machine, choose_models, look
from mesh_llm.daemon.model_sharing import ModelRooms
from mesh_llm.daemon.notices import OnStage, Stage, silent
from mesh_llm.daemon.owner import watch_owner
from mesh_llm.daemon.planner import Foresight
from mesh_llm.daemon.published_state import Outlook
from mesh_llm.daemon.roaming import Found, find_mesh
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.split_host import SharingRooms, split_status
from mesh_llm.daemon.status import StatusMaker, Surroundings
from mesh_llm.daemon.traffic import TrafficMeter, api_base, api_config
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.p2p.seeder import RateLimit
from mesh_llm.net.admission.credentials import node_key, wants_ephemeral
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.home import Holder, Home
from mesh_llm.runtime.process import freeze_heap
from mesh_llm.runtime.supervision import OnProblem, Supervision, TaskScope, error_text, use_supervision
from mesh_llm.wire.mesh.admission import Scope


def core_config(settings: Settings, net: MeshNet, machine: Machine, now: float) -> NodeConfig:
    """`now`: the daemon's own clock, by which the core's times are turned into times of day."""
    models = choose_models(settings, machine, joins=net.joins)
    clock = time.time()
    return NodeConfig(
        node=net.node_id,
        mesh=net.mesh_id,
        name=settings.node_name,
        role=Role.CLIENT if settings.client else Role.SERVE,
        version=__version__,
        incarnation=Incarnation(int(clock * 1000)),
        wanted=models.wanted,
        joins=net.joins,
        brings=bool(settings.later),
        options=models.options,
        split=settings.split,
        yields=settings.yields,
        publicity=settings.discovery.publicity,
        timings=Timings(listing_refresh=settings.discovery.period),
        epoch=clock - now,
        can_fetch=settings.fetch and machine.source is not None,
        shares=settings.seed and machine.source is not None,
    )


_log = structlog.get_logger(__name__)


def run_daemon(settings: Settings, on_progress: OnStage = silent, ask: Ask = nobody) -> int:
    """Be a node until told to stop; returns the exit status. For a process's main thread. `ask`: from any thread.

    The process must end by `runtime.leave.leave` afterwards: the mesh's endpoint has threads of its own, and an
    ordinary exit of the interpreter may abort in them.

    Raises:
        MeshError: the node cannot start; everything that was begun has been ended.
    """
    if os.name == "posix":
        import uvloop

        return uvloop.run(run(settings, on_progress, ask))
    return asyncio.run(run(settings, on_progress, ask))


async def run(settings: Settings, on_progress: OnStage = silent, ask: Ask = nobody) -> int:
    """The same on a running loop."""
    life: Found | None = Found(settings=settings, searched=False)
    sessions = Sessions()
    daemon: Daemon | None = None
    with Signals(lambda: daemon and daemon.stop(), lambda: daemon and daemon.kill()) as signals:
        while life is not None and not signals.number:
            daemon = Daemon(life, on_progress, ask, sessions)
            try:
                with told_of_disk(settings.home):
                    async with AsyncExitStack() as stack:
                        life = await daemon.live(stack)
            except asyncio.CancelledError:
                if not signals.number:
                    raise
                return 128 + signals.number
    return 0


@dataclass(frozen=True)
class _Parts:
    """What is bound together once all of it is there."""

    foresight: Foresight
    node: Node
    driver: Driver
    net: MeshNet
    outlook: Outlook
    machine: Machine
    models: ModelRooms


def _soon(loop: asyncio.AbstractEventLoop, report: OnProblem, code: str, text: str) -> None:
    """Report from whatever thread, and never in the middle of what failed, which may be the log."""
    with suppress(RuntimeError):
        # The loop may have ended.
        loop.call_soon_threadsafe(report, code, text)


class Daemon:
    """One node's process."""

    def __init__(self, life: Found, on_progress: OnStage, ask: Ask, sessions: Sessions) -> None:
        """To be made on the running loop, by the task that will `live`."""
        self._life = life
        self._next: Found | None = None
        settings = self._settings = life.settings
        self._on_progress = on_progress
        self._ask = ask
        self._supervision = Supervision()
        use_supervision(self._supervision)
        self._sessions = sessions
        self._home = Home(settings.home)
        self._supervisor = Supervisor(self._home.logs)
        self._traffic = TrafficMeter(self._post)
        self._task = asyncio.current_task()
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._parts: _Parts | None = None
        self._engines: Engines | None = None
        self._sharing: SharingRooms | None = None
        self._granted: bool | None = None
        self._running = False

    def stop(self) -> None:
        """End in good order."""
        if self._running:
            self._post(StopRequested())
        elif self._task is not None:
            self._task.cancel()

    def move(self, life: Found) -> None:
        """End in good order, and begin another life: in another mesh, with the same ports."""
        self._next = life
        if self._parts is not None:
            self._parts.driver.post(StopRequested())

    def kill(self) -> None:
        """End at once what would survive this process for a moment."""
        self._supervisor.kill()

    async def live(self, stack: AsyncExitStack) -> Found | None:
        """Start, and run until the core has finished; `stack` ends everything, and on a failure what there is.

        Returns what to live on with; None: no more.
        """
        home = self._home
        stack.callback(home.lock().release)
        stack.callback(DaemonLog(home.logs / "daemon.log", self._settings.log_level).close)
        _log.info("starting", version=__version__, pid=os.getpid(), home=str(home.root))
        stack.push_async_callback(self._supervisor.close)
        ephemeral = self._settings.client or wants_ephemeral()
        key = node_key(home, ephemeral=ephemeral)
        kept = None if ephemeral else home
        settings = self._settings = await join_by_lan(self._settings, key, kept, self._on_progress)
        self._life = await find_mesh(msgspec.structs.replace(self._life, settings=settings), self._on_progress)
        settings = self._settings = self._life.settings
        net = make_net(settings, key, kept, self._post)
        outlook = Outlook(net.node_id, self._on_progress, joins=net.joins)
        console = make_console(settings, home, self._sessions)
        stack.push_async_callback(console.stop)
        api = self._make_api(outlook)
        self._traffic.open = lambda: api.in_flight
        api_port = await api.start()
        stack.push_async_callback(api.stop)
        self._on_progress(Stage(name="api", text=api_base(settings.listen, api_port), done=True))
        machine = await look(settings, home, self._on_progress)
        self._settings = await provide(settings, machine, self._on_progress, self._ask, joins=net.joins)
        discovering = Discovering(self._settings, home, net, self._post, outlook.notices)
        parts = self._parts = self._bind(net, outlook, machine, discovering, stack)
        publications = discovering.publications(parts.node)
        status = self._status(parts, api, api_port, publications)
        net.serve_http(api.serve_peer)
        await net.start()
        stack.push_async_callback(net.close)
        stack.push_async_callback(discovering.close)
        scope = TaskScope("daemon")
        stack.push_async_callback(scope.close)
        await watch_owner(settings.yields, self._post, self._on_progress, scope)
        reachable = net.reachable()
        self._post(
            Started(
                capacity=machine.capacity,
                on_disk=machine.shelf.facts(),
                drafts=machine.shelf.drafts,
                addresses=reachable.addresses,
                relay=reachable.relay,
            )
        )
        self._tell_scope(net)
        parts.foresight.begin(self._traffic)
        driving = scope.spawn(parts.driver.run(), "driver")
        scope.supervise(self._traffic.run, "traffic")
        parts.models.begin(scope, outlook)
        management = DaemonManagement(parts.node, machine.shelf, outlook, net, post=self._post, status=status.status)
        downloads = Downloads(
            self._settings, machine, parts.models.obtainer, self._post, outlook.bell, management.load, outlook.settled
        )
        stack.push_async_callback(downloads.close)
        serves = machine.source is not None
        capabilities = Capabilities(
            library=ModelLibrary(parts.node, machine.shelf, status.status).library if serves else None,
            downloader=downloads if serves else None,
            approvals=Approvals(net.approvals),
            listing=publications if serves else None,
            plan=parts.foresight.planner.plan if serves else None,
            decisions=named_decisions(api.decisions, self._name_of),
            history=api.decisions.hour.history,
        )
        await console.start(management, capabilities, api.checked_door)
        self._write_holder(api_port, console, parts.node)
        stack.callback(home.clear_holder)
        outlook.watch_for_ready(status.status, console.url, console.sign_in_link)
        freeze_heap()
        self._running = True
        if settings.lan and not settings.client:
            lan = LanPresence(net, status.status, outlook.notices, outlook.bell)
            stack.push_async_callback(lan.close)
            lan.start()
        self._roam(discovering, scope, parts.node, api_port, console.port)
        joining = scope.spawn(join(net, outlook.notices, self._on_progress), "join")
        scope.spawn(outlook.arrive(joining, lambda: parts.node.synced), "arrival", outlook.arrival_broke)
        await self._until_ended(driving, joining)
        return self._next

    def _roam(self, discovering: Discovering, scope: TaskScope, node: Node, api_port: int, console_port: int) -> None:
        """Look for better meshes from now on. A life in another mesh keeps the ports that this one has."""
        onward = msgspec.structs.replace(self._settings, api_port=api_port, console_port=console_port)
        self._life = msgspec.structs.replace(self._life, settings=onward)
        discovering.start(scope, node, onward, self._traffic.busy, self.move)

    async def _until_ended(self, driving: asyncio.Task[object], joining: asyncio.Task[bool]) -> None:
        """Wait for the core's end. A hopeless join ends the daemon, if it fails before; a found mesh has others."""
        await asyncio.wait({driving, joining}, return_when=asyncio.FIRST_COMPLETED)
        if joining.done():
            error = joining.exception()
            following = self._life.next() if error is not None or not joining.result() else None
            if following is not None:
                self.move(following)
            elif isinstance(error, MeshError):
                raise error
        await asyncio.wait({driving})
        broken = driving.exception()
        if broken is not None:
            raise MeshError(
                code="core_failed",
                message=f"The node ended by a fault in mesh-llm: {error_text(broken)}.",
                hint="Start it again. Its log says where it happened: mesh-llm logs. Please report it.",
                status=500,
            ) from broken
        _log.info("finished")

    def _make_api(self, outlook: Outlook) -> ApiServer:
        settings = self._settings
        return ApiServer(
            api_config(settings), outlook, self._traffic, self._open_stream, self._clock, self._end_of, self._key_of
        )

    async def _end_of(self, model: str, term: int) -> EngineEnd:
        """How an engine of this node ended; before there are any, none has."""
        return await self._engines.end_of(model, term) if self._engines is not None else EngineEnd.EXPLAINED

    def _key_of(self, address: str) -> str:
        return self._engines.key_of(address) if self._engines is not None else ""

    def _bind(
        self, net: MeshNet, outlook: Outlook, machine: Machine, discovering: Discovering, stack: AsyncExitStack
    ) -> _Parts:
        """Make the core, and give each kind of effect to whoever carries it out."""
        settings = self._settings
        loop = asyncio.get_running_loop()
        self._supervision.on_problem = partial(_soon, loop, outlook.problem)
        config = core_config(settings, net, machine, self._clock())
        seed = secrets.randbits(63)
        journal = Journal(settings.journal, config, seed) if settings.journal is not None else None
        if journal is not None:
            stack.callback(journal.close)
        pace = RateLimit(settings.seed_limit)
        sharing = self._sharing = SharingRooms(
            net,
            machine,
            self._supervisor,
            self._home,
            self._post,
            self._name_of,
            self._traffic.tokens,
            outlook.sharing,
            pace.take,
            keeps=settings.fetch,
        )
        stack.push_async_callback(sharing.close)
        engines = self._engines = Engines(
            machine.source,
            machine.devices,
            self._supervisor,
            machine.shelf,
            self._traffic,
            self._post,
            sharing.hosting,
            machine.accelerators,
            outlook.notices.add,
        )
        stack.push_async_callback(engines.close)
        rooms = ModelRooms(
            settings, machine, net, self._home, self._members, self._name_of, self._post, self._on_progress, pace
        )
        stack.push_async_callback(rooms.close)
        node = Node(config, random.Random(seed))  # noqa: S311 - the core's choices are no secrets, and are replayed
        mesh = MeshEffects(net, passive=settings.client)
        carried = (sharing.lend, rooms.fetch, discovering.carry_out)
        handlers = bind_effects(engines, mesh, outlook, *carried)
        foresight = Foresight(net, node, machine, self._home, self._post, outlook.bell.ring, stack)
        driver = Driver(node, handlers, self._clock, journal)
        return _Parts(foresight, node, driver, net, outlook, machine, rooms)

    def _status(self, parts: _Parts, api: ApiServer, api_port: int, publications: Publications) -> StatusMaker:
        surroundings = Surroundings(
            mesh_name=self._settings.mesh_name,
            api_port=api_port,
            api_base=api_base(self._settings.listen, api_port),
            pid=os.getpid(),
            home=str(self._home.root),
            lending=parts.machine.lending,
        )
        return StatusMaker(
            parts.node,
            surroundings,
            token=parts.net.invite_book.token,
            requests=api.summary,
            uptime=lambda: self._clock() - self._began,
            connected=parts.net.connections.nodes,
            approvals=lambda: tuple(Approvals(parts.net.approvals).waiting()),
            listing=publications.status,
            split=lambda: split_status(
                parts.node,
                self._sharing.hosting.session if self._sharing else None,
                self._traffic.tokens,
                parts.foresight.planner.split_speed,
            ),
            foresee=parts.foresight.planner.solo_speed,
            supervision=self._supervision,
        )

    def _write_holder(self, api_port: int, console: ConsoleServer, node: Node) -> None:
        wanted = node.config.wanted
        model = wanted[0] if wanted else ""
        holder = Holder(
            pid=os.getpid(),
            api_port=api_port,
            console_port=console.port,
            console_host=console.host,
            socket=console.socket_place,
            started=time.time(),
            model=model,
        )
        self._home.write_holder(holder)

    async def _open_stream(self, target: Target) -> ByteStream:
        """core.ports.OpenStream: late bound, since the front door opens before the mesh."""
        if self._parts is None:
            raise MeshError(code="target_unreachable", message="The node is still starting.", status=503)
        return await self._parts.net.open_http(target)

    def _tell_scope(self, net: MeshNet) -> None:
        """Tell the core what this node's own admission is for, where that changed: it does with each token."""
        granted = net.scope is not None and net.scope >= Scope.SPLIT
        if self._parts is not None and granted != self._granted:
            self._granted = granted
            self._parts.driver.post(SplitScope(granted=granted))

    def _members(self) -> Sequence[Member]:
        return self._parts.node.members if self._parts is not None else ()

    def _name_of(self, node: NodeId) -> str:
        if self._parts is not None and node == self._parts.node.config.node:
            return self._parts.node.config.name
        names = (member.announcement.name for member in self._members() if member.announcement.node == node)
        return next(names, "") or node[:10]

    def _post(self, event: AnyEvent) -> None:
        if self._parts is None:
            _log.debug("event before the core", kind=type(event).__name__)
            return
        if isinstance(event, StopRequested):
            self._next = None
        self._parts.driver.post(event)
        if isinstance(event, PeerConnected | AddressesChanged):
            self._tell_scope(self._parts.net)
        if isinstance(event, TargetFailed) and self._settings.client:
            self._parts.net.routes_client.refresh()
