"""What the console shows of a node, and what it may have it do: made of the core and of the capabilities around it."""

from collections.abc import Callable
from contextlib import AsyncExitStack
from functools import partial

from mesh_llm.api.server import ApiServer
from mesh_llm.console.calls import Capabilities
from mesh_llm.console.schema import Owned
from mesh_llm.console.status import Status, StatusCutOff, StatusPromptCaches
from mesh_llm.core.types.events import AnyEvent, OwnershipChanged
from mesh_llm.core.types.ids import NodeId
from mesh_llm.daemon.composition import Core
from mesh_llm.daemon.configuration import ConfigurationControl
from mesh_llm.daemon.console import DaemonManagement, ModelLibrary, named_decisions
from mesh_llm.daemon.downloads import Downloads
from mesh_llm.daemon.lan import Approvals
from mesh_llm.daemon.listing import ListingSwitch
from mesh_llm.daemon.model_registry import register_fetched
from mesh_llm.daemon.ollama import ClientsModels
from mesh_llm.daemon.ownership import owner_here, ownership_of
from mesh_llm.daemon.prompt_cache import SlotCaches, caches_status
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.status import DaemonInfo, StatusBuilder, StatusSources, split_status
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.runtime.home import Home
from mesh_llm.runtime.supervision import Supervision


class Management:
    """Makes what the console shows of one life of a node, and what the console may change."""

    def __init__(
        self,
        settings: Settings,
        home: Home,
        core: Core,
        api: ApiServer,
        listing: ListingSwitch,
        name_of: Callable[[NodeId], str],
        post: Callable[[AnyEvent], None],
    ) -> None:
        """`name_of`: a node's name for people; `post`: hands an event to the core."""
        self._settings = settings
        self._home = home
        self._core = core
        self._api = api
        self._listing = listing
        self._name_of = name_of
        self._post = post

    def status(
        self, info: DaemonInfo, traffic: TrafficMeter, uptime: Callable[[], float], supervision: Supervision
    ) -> StatusBuilder:
        """Make what describes the node. `traffic`: its requests; `uptime`: in seconds."""
        core, api = self._core, self._api
        net, performance, tokens = core.net, core.performance, traffic.tokens
        sources = StatusSources(
            invite=net.invite_book.standing,
            scope_of=lambda node: scope.word if (scope := net.scope_of(node)) is not None else "",
            transport_of=lambda node: net.transport_of(node) or ("", ""),
            requests=api.summary,
            cut_off=lambda: tuple(
                StatusCutOff(who=one.who, address=one.source, seconds=round(left, 1), reason=one.reason)
                for one, left in net.connections.bans()
            ),
            uptime=uptime,
            connected=net.connections.nodes,
            approvals=Approvals(net.approvals).waiting,
            listing=self._listing.status,
            split=lambda: split_status(
                core.node, core.split_host.session, tokens, performance.split_speed, performance.prompt_speed
            ),
            predict=performance.solo_speed,
            prompts=performance.prompt_speed,
            guessing=core.engines.guessing.describe,
            lending=lambda: core.machine.lending,
            engine_parts=lambda: core.setup.parts,
            prompt_caches=lambda: self._prompt_caches(core.engines.caches),
            needs_key=lambda: api.needs_key,
            owner=lambda: api.owners.own,
            problems=core.trust.problems,
        )
        return StatusBuilder(core.node, info, sources, supervision)

    def capabilities(
        self, status: Callable[[], Status], configuration: ConfigurationControl | None, stack: AsyncExitStack
    ) -> tuple[DaemonManagement, Capabilities]:
        """What the console may ask for; `stack` ends it. A client has no models of its own, and no listing."""
        core, api = self._core, self._api
        machine = core.machine
        management = DaemonManagement(
            core.node, machine.registry, core.published, core.net, post=self._post, status=status
        )
        downloads = Downloads(self._settings, machine, core.fetcher, self._post, core.published, management.load)
        stack.push_async_callback(downloads.close)
        serves, caches = machine.source is not None, core.engines.caches
        if serves:
            register = partial(register_fetched, self._settings, machine, self._post)
            blobs = self._home.cache / "uploads"
            changes = core.published.changes
            api.use_store(ClientsModels(core.node, machine.registry, downloads, changes, register, blobs))
        return management, Capabilities(
            library=ModelLibrary(core.node, machine.registry, status).library if serves else None,
            downloader=downloads if serves else None,
            approvals=Approvals(core.net.approvals),
            listing=self._listing if serves else None,
            plan=core.performance.plan if serves else None,
            configuration=configuration,
            trust=core.trust,
            decisions=named_decisions(api.traces, self._name_of),
            history=api.traces.hour.history,
            clear_prompt_caches=partial(self._clear_prompt_caches, caches) if caches is not None else None,
            read_ownership=self._read_ownership,
        )

    def _read_ownership(self) -> Owned:
        """Read the owner from the home again. If it has changed, announce it to the mesh."""
        core, api = self._core, self._api
        api.use_owner(owner_here(self._home))
        ownership = ownership_of(self._home, core.net.node_id)
        self._post(OwnershipChanged(ownership=ownership))
        return Owned(owner=api.owners.own, announced=ownership is not None)

    async def _clear_prompt_caches(self, caches: SlotCaches) -> StatusPromptCaches:
        return caches_status(caches, await caches.clear(), self._settings.prompt_cache_bytes)

    def _prompt_caches(self, caches: SlotCaches | None) -> StatusPromptCaches | None:
        return None if caches is None else caches_status(caches, caches.usage, self._settings.prompt_cache_bytes)
