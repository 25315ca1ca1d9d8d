"""The daemon's life. `Daemon.live` tells it from the start to the end; `composition.py` makes what it consists of."""

import asyncio
import os
import signal
import time
from contextlib import AsyncExitStack, suppress
from functools import partial

import msgspec
import structlog

from mesh_llm import __version__
from mesh_llm.api.server import ApiServer
from mesh_llm.api.types import ApiConfig
from mesh_llm.api.usage import KeyRing
from mesh_llm.console.app import ConsoleServer
from mesh_llm.console.auth import Sessions
from mesh_llm.core.node import Node
from mesh_llm.core.routing.aliases import Aliases
from mesh_llm.core.trust.circle import Owners
from mesh_llm.core.types.effects import Notice, NoticeLevel
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import (
    AddressesChanged,
    AnyEvent,
    EngineExited,
    PeerConnected,
    SettingsChanged,
    SplitScope,
    Started,
    StopRequested,
    TargetFailed,
)
from mesh_llm.daemon.accelerators import decide
from mesh_llm.daemon.composition import Core, Surroundings, make_core
from mesh_llm.daemon.configuration import ConfigurationControl, with_live_settings
from mesh_llm.daemon.console import console_keys, make_console
from mesh_llm.daemon.lan import LanPresence, join_by_lan
from mesh_llm.daemon.listing import ListingSwitch
from mesh_llm.daemon.log import DaemonLog, Signals, explain_disk_errors
from mesh_llm.daemon.management import Management
from mesh_llm.daemon.mesh import join, make_net, port_notices
from mesh_llm.daemon.mesh_discovery import MeshChoice, MeshMigration, discover_mesh
from mesh_llm.daemon.model_registry import probe_machine, watch_library
from mesh_llm.daemon.ollama import DescribedModels
from mesh_llm.daemon.other_nodes import OtherNodes
from mesh_llm.daemon.owner import watch_owner
from mesh_llm.daemon.ownership import owner_here, ownership_of
from mesh_llm.daemon.published_state import (
    InviteShown,
    NoticeShown,
    ProgressListener,
    PublishedState,
    Stage,
    ignore_progress,
)
from mesh_llm.daemon.receipts import ReceiptFacts
from mesh_llm.daemon.service_report import ServiceReport
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.startup_models import Ask, StartupDownload, nobody, provide_models
from mesh_llm.daemon.status import DaemonInfo, api_base
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.discovery.nostr.consent import PublicationConsent
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.net.admission.credentials import MeshStores, node_key, wants_ephemeral
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.home import Holder, Home
from mesh_llm.runtime.nodes import explain_taken
from mesh_llm.runtime.process import freeze_heap, wake_promptly
from mesh_llm.runtime.supervision import OnProblem, Supervision, TaskScope, error_text, use_supervision
from mesh_llm.service_manager.notify import Notifier
from mesh_llm.wire.mesh.admission import Scope

_log = structlog.get_logger(__name__)


def run_daemon(
    settings: Settings,
    on_progress: ProgressListener = ignore_progress,
    ask: Ask = nobody,
    configuration: ConfigurationControl | None = None,
) -> int:
    """Run a node until it is stopped; returns the exit status. For a process's main thread.

    Afterwards end the process with `runtime.process.exit_process`: the mesh's endpoint has threads of its own, and an
    ordinary exit of the interpreter may abort in them.

    Args:
        settings: the user's.
        on_progress: called with each step of the start, and with notices.
        ask: asks the user a question; called from any thread.
        configuration: where `settings` come from, to read them again; None: they do not change.

    Raises:
        MeshError: the node cannot start. Everything that was begun has been ended.
    """
    # The engines have all cores, and their messages to each other pass here.
    wake_promptly()
    if os.name == "posix":
        import uvloop

        return uvloop.run(run(settings, on_progress, ask, configuration))
    return asyncio.run(run(settings, on_progress, ask, configuration))


async def run(
    settings: Settings,
    on_progress: ProgressListener = ignore_progress,
    ask: Ask = nobody,
    configuration: ConfigurationControl | None = None,
) -> int:
    """`run_daemon` on a running loop. A node that moves to another mesh begins another life."""
    life: MeshChoice | None = MeshChoice(settings=settings, searched=False)
    sessions = Sessions()
    daemon: Daemon | None = None
    guest = settings.client or wants_ephemeral()
    service = ServiceReport(Notifier.from_environment(), on_progress)
    reload = None if configuration is None else lambda: daemon and daemon.reload()
    with Signals(lambda number: daemon and daemon.stop(number), lambda: daemon and daemon.kill(), reload) as signals:
        while life is not None and not signals.number:
            try:
                with explain_disk_errors(settings.home):
                    async with AsyncExitStack() as stack:
                        home, lock = Home(settings.home).enter(guest=guest)
                        stack.callback(lock.release)
                        daemon = Daemon(life, home, service, ask, sessions, configuration)
                        life = await daemon.live(stack)
            except asyncio.CancelledError:
                if not signals.number:
                    raise
                return 128 + signals.number
    return 0


class Daemon:
    """One life of a node: in one mesh, until it is stopped or moves."""

    def __init__(
        self,
        life: MeshChoice,
        home: Home,
        service: ServiceReport,
        ask: Ask,
        sessions: Sessions,
        configuration: ConfigurationControl | None,
    ) -> None:
        """Make it on the running loop, in the task that will call `live`. `home`: locked, or a guest's place."""
        self._life = life
        self._settings = life.settings
        self._next: MeshChoice | None = None
        self._service = service
        self._on_progress = service.on_progress
        self._ask = ask
        self._sessions = sessions
        self._configuration = configuration
        self._console_keys = KeyRing(console_keys(life.settings))
        self._jobs = TaskScope("configuration")
        self._supervision = Supervision()
        use_supervision(self._supervision)
        self._home = home
        saves = self._settings.prompt_cache_bytes > 0 and not self._settings.client and not home.is_guest
        self._supervisor = Supervisor(self._home.logs, saves_slots=saves)
        self._saves_slots = saves
        self._secret = b""
        self._traffic = TrafficMeter(self._post)
        self._task = asyncio.current_task()
        self._clock = asyncio.get_running_loop().time
        self._began = self._clock()
        self._core: Core | None = None
        self._others = OtherNodes()
        self._scope_reported: Scope | None = None
        self._shown_scope = ""
        self._running = False

    async def live(self, stack: AsyncExitStack) -> MeshChoice | None:
        """Start, and run until the core has finished. `stack` then ends everything, in the opposite order.

        Returns the next life; None if there is none.
        """
        # The log.
        home = self._home
        log = self._open_log(stack)
        stack.push_async_callback(self._supervisor.close)

        # Which mesh: a given token, one on this network (--lan), one on Nostr (--auto), or this node's own.
        net = await self._choose_mesh()
        published = PublishedState(net.node_id, self._on_progress, joins=net.joins)
        self._supervision.on_problem = partial(_report_soon, asyncio.get_running_loop(), published.problem)

        # The API and the console bind their ports early: a taken port is reported before anything slow begins.
        console = make_console(self._settings, home, published.notices, self._sessions, self._console_keys)
        stack.push_async_callback(console.stop)
        api = self._make_api(published)
        self._traffic.open = lambda: api.in_flight
        self._traffic.node, self._traffic.standing = net.node_id, self._others.standing
        api_port = await self._start_api(api)
        stack.push_async_callback(api.stop)
        base = api_base(self._settings.listen, api_port)
        self._on_progress(Stage(name="api", text=base, done=True))

        # The invite: others can be told before a model is fetched or loaded.
        await net.bind()
        stack.push_async_callback(net.endpoint.close)
        self._show_invite(net)

        # The machine: its engine, its memory, the models on its disk. A missing model is fetched.
        machine = await probe_machine(self._settings, home, self._on_progress)
        gpu = await decide(self._settings, home, machine, self._on_progress, self._ask)
        settings = self._settings = await provide_models(
            self._settings, machine, self._on_progress, self._ask, joins=net.joins
        )

        # The core, and the capabilities around it.
        core = self._core = self._others.core = make_core(self._surroundings(net, published), machine, api, gpu, stack)
        api.use_engines(core.engines, core.engines.caches, core.engines.guessing)
        api.use_mesh(net.open_http, self._others.stranger_source, net.cut_off)
        api.use_models(DescribedModels(core.node, machine.registry, self._post))
        self._make_receipts(core, api, stack)
        listing = ListingSwitch(core.node, settings.discovery, settings.mesh_name, PublicationConsent(home), self._post)
        info = DaemonInfo(
            mesh_name=settings.mesh_name,
            api_port=api_port,
            api_base=base,
            ollama_base=api_base(settings.listen, api.ollama_port).removesuffix("/v1") if api.ollama_port else "",
            pid=os.getpid(),
            home=str(home.shared),
        )
        management = Management(self._settings, home, core, api, listing, self._others.name_of, self._post)
        status = management.status(info, self._traffic, lambda: self._clock() - self._began, self._supervision)

        # The network, and the core's first event.
        net.serve_http(api.serve_peer)
        await net.start()
        stack.push_async_callback(net.close)
        for notice in port_notices(net):
            published.notices.add(notice)
        stack.push_async_callback(core.publisher.close)
        scope = TaskScope("daemon")
        stack.push_async_callback(scope.close)
        driving = await self._start_core(core, api, scope)

        # The console answers.
        capabilities = management.capabilities(status.status, self._configuration, stack)
        await console.start(*capabilities, api.trusted_app)
        self._write_holder(api_port, console, core.node)
        stack.callback(home.clear_holder)
        published.watch_for_ready(status.status, console.url, console.sign_in_link)
        freeze_heap()
        self._running = True
        scope.supervise(partial(self._service.run, published.changes, status.status), "service manager")
        self._follow_configuration(core, api, log, stack)

        # Others find this mesh; this node finds better ones. A life in another mesh keeps these ports.
        if settings.lan and not settings.client:
            lan = LanPresence(net, status.status, published)
            stack.push_async_callback(lan.close)
            lan.start()
        ports = {"api_port": api_port, "ollama_port": api.ollama_port or settings.ollama_port}
        onward = msgspec.structs.replace(settings, **ports, console_port=console.port)
        self._life = msgspec.structs.replace(self._life, settings=onward)
        migration = MeshMigration(core.node, net, self._life, published.notices, self._traffic.busy, self.move)
        scope.supervise(migration.run, "migration")

        # Join, and serve until the end.
        joining = scope.spawn(join(net, published.notices, self._on_progress), "join", self._join_failed)
        scope.spawn(
            published.follow_join(joining, lambda: core.node.synced), "join barrier", published.join_barrier_failed
        )
        await self._until_ended(driving, joining)
        return self._next

    def _open_log(self, stack: AsyncExitStack) -> DaemonLog:
        log = DaemonLog(self._home.logs / "daemon.log", self._settings.log_level)
        stack.callback(log.close)
        _log.info("starting", version=__version__, pid=os.getpid(), home=str(self._home.root))
        return log

    def stop(self, number: int) -> None:
        """Stop in good order, because of a signal. SIGTERM comes from a service manager, which does not hurry."""
        if self._running:
            patience = self._settings.drain if number == signal.SIGTERM else 0.0
            self._post(StopRequested(drain_seconds=patience))
        elif self._task is not None:
            self._task.cancel()

    def reload(self) -> None:
        """Read the configuration again."""
        if self._configuration is not None:
            self._jobs.spawn(self._service.while_reloading(self._configuration.reload_by_signal), "reload")

    def move(self, life: MeshChoice) -> None:
        """Stop in good order, and begin another life: in another mesh, with the same ports."""
        self._next = life
        if self._core is not None:
            self._core.driver.post(StopRequested())

    def kill(self) -> None:
        """Kill the child processes at once; they would outlive this process for a moment."""
        self._supervisor.kill()

    async def _choose_mesh(self) -> MeshNet:
        key = node_key(self._home, ephemeral=self._home.is_guest)
        self._secret = key.secret
        kept = None if self._home.is_guest else self._home
        settings = await join_by_lan(self._settings, key, kept, self._on_progress)
        self._life = await discover_mesh(msgspec.structs.replace(self._life, settings=settings), self._on_progress)
        self._settings = self._life.settings
        if self._life.own is not None and not self._settings.join and kept is not None:
            MeshStores(kept.mesh).choose(self._life.own)
        return make_net(self._settings, key, kept, self._post, ownership_of(self._home, key.node_id))

    def _make_api(self, published: PublishedState) -> ApiServer:
        settings = self._settings
        config = ApiConfig(
            host=settings.listen,
            port=settings.api_port,
            ollama_port=settings.ollama_port,
            default_model=settings.default_model,
            allowed_hosts=settings.allow_hosts,
            allowed_origins=settings.allow_origins,
            store=self._home.responses if settings.store else None,
            keys=settings.api_keys,
            key_limits=settings.key_limits,
            usage_file=self._home.root / "usage.json",
            stranger_limits=settings.stranger_limits,
            stranger_file=self._home.root / "strangers.json",
            queue_wait=settings.queue_wait,
            resume_wait=settings.resume_wait,
            load_wait=settings.load_wait,
            receipts=settings.receipts,
            privacy=settings.privacy,
            owners=Owners(own=owner_here(self._home), group=settings.group),
        )
        api = ApiServer(config, published, self._traffic, self._clock)
        api.use_names(settings.default_model, Aliases(settings.aliases))
        self._others.owners = lambda: api.owners
        return api

    def _make_receipts(self, core: Core, api: ApiServer, stack: AsyncExitStack) -> None:
        """Let the API make receipts, signed with this node's key."""
        chunks = ChunkDigestStore(self._home.cache / "chunks")
        facts = ReceiptFacts(core.node, core.machine.registry, chunks, core.split_host.wire_of)
        stack.push_async_callback(facts.close)
        api.use_notary(facts.notary(core.net.credentials.key, self._others.name_of))

    def _follow_configuration(self, core: Core, api: ApiServer, log: DaemonLog, stack: AsyncExitStack) -> None:
        """Take new settings from now on, as far as they can change while the node runs."""
        api.use_settings(core.node.settings_of)
        control = self._configuration
        if control is None:
            return

        def apply(read: Settings) -> None:
            settings = with_live_settings(self._settings, read)
            wanted = core.node.config.wanted
            first = core.machine.registry.find(wanted[0]) if wanted else None
            options = core.machine.registry.with_draft(settings.launch, first) if first is not None else settings.launch
            # Nothing from here on may fail.
            self._settings = settings
            self._life = msgspec.structs.replace(self._life, settings=with_live_settings(self._life.settings, read))
            api.use_names(settings.default_model, Aliases(settings.aliases))
            api.use_access(settings.api_keys, settings.allow_origins)
            api.use_limits(settings.key_limits)
            api.strangers.use_limits(settings.stranger_limits)
            self._console_keys.use(console_keys(settings))
            log.use_level(settings.log_level)
            self._post(SettingsChanged(options=options, models=settings.model_settings))

        async def end() -> None:
            control.apply = None
            await self._jobs.close()

        control.notify = core.published.notices.add
        stack.push_async_callback(end)
        if control.begin(apply):
            self.reload()

    async def _start_api(self, api: ApiServer) -> int:
        """Listen; returns the API's port."""
        settings = self._settings
        try:
            return await api.start()
        except MeshError as error:
            option = error.param or "--port"
            port = settings.ollama_port if option == "--ollama-port" else settings.api_port
            raise explain_taken(error, self._home, settings.listen, port or 0, option) from error

    def _surroundings(self, net: MeshNet, published: PublishedState) -> Surroundings:
        return Surroundings(
            settings=self._settings,
            home=self._home,
            net=net,
            published=published,
            supervisor=self._supervisor,
            traffic=self._traffic,
            clock=self._clock,
            on_progress=self._on_progress,
            post=self._post,
            members=self._others.members,
            standing=self._others.standing,
            known=self._others.known,
            name_of=self._others.name_of,
            prompt_cache_key=self._secret if self._saves_slots else None,
        )

    async def _start_core(self, core: Core, api: ApiServer, scope: TaskScope) -> asyncio.Task[object]:
        """Send the core its first event, and start everything that informs it. Returns the driver's task."""
        settings, machine, net = self._settings, core.machine, core.net
        await watch_owner(settings.yields, self._post, self._on_progress, scope)
        reachable = net.reachable()
        # Before the first model is planned: what does not fit may be split.
        self._post(machine.rpc)
        self._post(
            Started(
                capacity=machine.capacity,
                on_disk=machine.registry.facts(),
                drafts=machine.registry.drafts,
                addresses=reachable.addresses,
                relay=reachable.relay,
            )
        )
        self._report_split_scope()
        core.performance.begin(self._traffic)
        core.trust.begin()
        driving = scope.spawn(core.driver.run(), "driver")
        scope.supervise(self._traffic.run, "traffic")
        if settings.canaries and not settings.client:
            api.use_canaries(core.canaries.worked)
            scope.supervise(core.canaries.run, "canaries")
        if machine.source is not None:
            scope.supervise(partial(watch_library, settings.models_dirs, machine, self._post), "models")
            scope.supervise(core.setup.run, "engine setup")
            startup = StartupDownload(settings, machine, core.fetcher, self._post, core.published, self._on_progress)
            scope.spawn(startup.run(lambda: bool(self._others.members())), "startup download")
        return driving

    def _join_failed(self, error: BaseException) -> None:
        """That a mesh admits this node never is no fault inside: `_until_ended` says it, and what follows."""
        if not isinstance(error, MeshError):
            self._supervision.lost("daemon/join", error)

    async def _until_ended(self, driving: asyncio.Task[object], joining: asyncio.Task[bool]) -> None:
        """Wait for the core's end.

        If no token can ever admit this node, it tries the next discovered mesh; without one, the daemon ends.
        """
        await asyncio.wait({driving, joining}, return_when=asyncio.FIRST_COMPLETED)
        if joining.done():
            error = joining.exception()
            following = self._life.next() if error is not None or not joining.result() else None
            if following is not None:
                if isinstance(error, MeshError):
                    text = f"That mesh does not admit this node. {error.message}"
                    self._on_progress(NoticeShown(level=NoticeLevel.INFO, code="not_admitted", text=text))
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

    def _write_holder(self, api_port: int, console: ConsoleServer, node: Node) -> None:
        wanted = node.config.wanted
        role = "client" if self._settings.client else "ephemeral" if self._home.is_guest else "serve"
        holder = Holder(
            pid=os.getpid(),
            api_port=api_port,
            console_port=console.port,
            console_host=console.host,
            socket=console.socket_place,
            started=time.time(),
            model=wanted[0] if wanted else "",
            role=role,
        )
        self._home.write_holder(holder)

    def _post(self, event: AnyEvent) -> None:
        """Hand an event to the core."""
        if self._core is None:
            _log.debug("event before the core", kind=type(event).__name__)
            return
        if isinstance(event, StopRequested):
            self._next = None
            self._service.stopping(event.drain_seconds)
        self._core.driver.post(event)
        if isinstance(event, EngineExited) and event.code != 0:
            self._core.setup.suspect()
        if isinstance(event, PeerConnected | AddressesChanged):
            self._report_split_scope()
            self._show_invite(self._core.net)
        if isinstance(event, TargetFailed) and self._settings.client:
            self._core.net.routes_client.refresh()

    def _show_invite(self, net: MeshNet) -> None:
        """Show the invite as soon as there is one, and again if its scope changes."""
        invite = net.invite_book.standing()
        if invite is not None and invite.scope != self._shown_scope:
            self._shown_scope = invite.scope
            own = net.scope.word if net.scope is not None else ""
            self._on_progress(InviteShown(token=invite.token, scope=invite.scope, own_scope=own))

    def _report_split_scope(self) -> None:
        """Report to the core what this node's admission lets it do. Each new token may change that."""
        scope = self._core.net.scope if self._core is not None else None
        if self._core is not None and scope is not None and scope != self._scope_reported:
            if self._scope_reported is not None:
                text = f"Another node of the mesh changed the scope of this one: it is {scope.word} now."
                self._core.published.notices.add(Notice(level=NoticeLevel.INFO, code="scope_changed", text=text))
            self._scope_reported = scope
            self._core.driver.post(SplitScope(granted=scope >= Scope.SPLIT, scope=scope.word))


def _report_soon(loop: asyncio.AbstractEventLoop, report: OnProblem, code: str, text: str) -> None:
    """Report from any thread, after the code that failed has ended: the log itself may be what failed."""
    with suppress(RuntimeError):
        # The loop may have ended.
        loop.call_soon_threadsafe(report, code, text)
