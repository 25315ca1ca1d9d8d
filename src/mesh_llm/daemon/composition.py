"""Makes the core of one life of a node, and the capabilities that carry out its effects or inform it."""

import random
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial

import msgspec

from mesh_llm import __version__
from mesh_llm.api.server import ApiServer
from mesh_llm.core.config import NodeConfig, OnDemandPolicy, Timings
from mesh_llm.core.node import Node
from mesh_llm.core.trust.circle import Privacy
from mesh_llm.core.types.announcement import Member, Standing
from mesh_llm.core.types.events import AnyEvent
from mesh_llm.core.types.ids import Incarnation, NodeId, OwnerId
from mesh_llm.core.types.model import ModelKind, Role
from mesh_llm.daemon.accelerators import Devices, GpuPlan
from mesh_llm.daemon.canaries import Canaries
from mesh_llm.daemon.driver import Driver, effect_handlers
from mesh_llm.daemon.engine_setup import EngineSetup
from mesh_llm.daemon.engines import Engines
from mesh_llm.daemon.journal import Journal
from mesh_llm.daemon.listing import ListingPublisher
from mesh_llm.daemon.load_asks import LoadAsks
from mesh_llm.daemon.model_fetcher import ModelFetcher
from mesh_llm.daemon.model_registry import Machine, choose_models
from mesh_llm.daemon.model_sharing import MeshDownloads, ModelSharing
from mesh_llm.daemon.performance import PerformanceServices
from mesh_llm.daemon.prompt_cache import DIRECTORY, SlotCaches
from mesh_llm.daemon.prompt_moves import PromptMoves
from mesh_llm.daemon.published_state import ProgressListener, PublishedState
from mesh_llm.daemon.settings import Settings
from mesh_llm.daemon.split_host import SplitHostService, WireControl, tunnel_sockets
from mesh_llm.daemon.split_worker import SplitDisplay, WeightDigests, WorkerService, WorkerWeights
from mesh_llm.daemon.traffic import TrafficMeter
from mesh_llm.daemon.trust_records import TrustRecords
from mesh_llm.engine.prompt_cache.store import PromptCacheStore
from mesh_llm.engine.supervisor import Supervisor
from mesh_llm.models.hub.catalog import catalog
from mesh_llm.models.p2p.digests import ChunkDigestStore
from mesh_llm.models.p2p.seeder import RateLimit
from mesh_llm.models.tensor_cache.store import TensorCache, tensor_cache_directory
from mesh_llm.net.mesh import MeshNet
from mesh_llm.runtime.home import Home


@dataclass(frozen=True)
class Core:
    """The core, and the capabilities that carry out its effects or inform it."""

    node: Node
    driver: Driver
    net: MeshNet
    machine: Machine
    published: PublishedState
    engines: Engines
    split_host: SplitHostService
    performance: PerformanceServices
    fetcher: ModelFetcher
    publisher: ListingPublisher
    setup: EngineSetup
    trust: TrustRecords
    canaries: Canaries


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What a life has before its core.

    Attributes:
        settings, home: the user's.
        net, published: this node in its mesh, and what it shows of itself.
        supervisor: runs the engines.
        traffic: counts requests.
        clock: the loop's.
        on_progress: called with each step of the start.
        post: hands an event to the core.
        members: all nodes that the core knows.
        standing: who another node is that asks for a model, wants its files, or has or wants a prompt cache.
        known: those of some members that are no strangers.
        name_of: a node's name for people.
        prompt_cache_key: kept prompt caches are encrypted with it; None: none are kept.
    """

    settings: Settings
    home: Home
    net: MeshNet
    published: PublishedState
    supervisor: Supervisor
    traffic: TrafficMeter
    clock: Callable[[], float]
    on_progress: ProgressListener
    post: Callable[[AnyEvent], None]
    members: Callable[[], Sequence[Member]]
    standing: Callable[[NodeId], Standing]
    known: Callable[[Sequence[Member]], frozenset[NodeId]]
    name_of: Callable[[NodeId], str]
    prompt_cache_key: bytes | None


def make_core(around: Surroundings, machine: Machine, api: ApiServer, gpu: GpuPlan, stack: AsyncExitStack) -> Core:
    """Make the core, and connect each kind of effect to the capability that carries it out. `stack` ends all."""
    settings, home, net, published, post = around.settings, around.home, around.net, around.published, around.post
    config = node_config(settings, net, machine, around.clock())
    seed = secrets.randbits(63)
    node = Node(config, random.Random(seed))  # noqa: S311 - the core's choices are no secrets, and are replayed
    journal = Journal(settings.journal, config, seed) if settings.journal is not None else None
    if journal is not None:
        stack.callback(journal.close)

    limit = RateLimit(settings.seed_limit)
    display = SplitDisplay(around.name_of, published.split_progress)
    digests = WeightDigests(home.cache / "digests")
    stack.push_async_callback(digests.close)
    cache = TensorCache(tensor_cache_directory(home.own_cache)) if settings.fetch else None
    weights = WorkerWeights(digests, cache, display.show)
    worker = WorkerService(net, machine, around.supervisor, weights, display, post)
    stack.push_async_callback(worker.close)
    sockets = partial(tunnel_sockets, around.supervisor, home.cache)
    split_host = SplitHostService(net, digests, post, display, limit.take, sockets)
    api.use_wire(split_host.wire_of)
    stack.push_async_callback(split_host.stop)
    engines = Engines(machine, around.supervisor, around.traffic, post, split_host, published.notices.add)
    stack.push_async_callback(engines.close)

    seeds = settings.seed and machine.source is not None
    chunks = ChunkDigestStore(home.cache / "chunks")
    if around.prompt_cache_key is not None:
        store = PromptCacheStore(home.own_cache / DIRECTORY, around.prompt_cache_key, settings.prompt_cache_bytes)
        engines.caches = SlotCaches(store, chunks, around.clock)
        engines.caches.wire = split_host.wire_of
        stack.push_async_callback(engines.caches.close)
    sharing = ModelSharing(
        net,
        machine.registry,
        chunks,
        around.members,
        around.name_of,
        limit if seeds else None,
        may_have=lambda node: settings.seed_strangers or around.standing(node) != "stranger",
    )
    sharing.doubted = lambda: node.snapshot.distrusted
    stack.push_async_callback(sharing.close)
    mesh_downloads = MeshDownloads(settings, machine, sharing, post, around.on_progress)
    stack.push_async_callback(mesh_downloads.close)
    publisher = ListingPublisher(net, home, settings.discovery, post)
    performance = PerformanceServices(net, node, machine, home, post, published.changes.notify)
    stack.push_async_callback(performance.close)
    split_host.wire = WireControl(
        settings.split.wire,
        performance.choose_wire,
        published.notices.add,
        performance.round_trips,
        around.traffic.idle,
    )
    if engines.caches is not None:
        measure = performance.measure_link
        moves = PromptMoves(net, engines.caches, measure, limit.take, around.standing, around.clock)
        engines.caches.moves = moves
        api.watch_moves(lambda: (moves.count.taken, moves.count.given))
        stack.push_async_callback(moves.close)

    devices = Devices(settings, machine, post, performance.devices_changed)

    circle = partial(trusted_owners, api)
    checks = settings.canaries and not settings.client
    trust = TrustRecords(home.trust, node, circle, post, published.notices.add, asks=checks)

    asks = LoadAsks(api.ask_to_load, post, client=settings.client)
    stack.push_async_callback(asks.close)

    handlers = effect_handlers(
        engines,
        net,
        published,
        asks=asks,
        lend=worker.lend,
        fetch=mesh_downloads.start,
        publish=publisher.carry_out,
        client=settings.client,
    )
    return Core(
        node=node,
        driver=Driver(node, handlers, around.clock, journal, around.known),
        net=net,
        machine=machine,
        published=published,
        engines=engines,
        split_host=split_host,
        performance=performance,
        fetcher=ModelFetcher(machine, sharing),
        publisher=publisher,
        setup=EngineSetup(machine, home, post, published, devices, gpu),
        trust=trust,
        canaries=Canaries(settings.canary_share, circle, node, api.canaries, trust),
    )


def node_config(settings: Settings, net: MeshNet, machine: Machine, now: float) -> NodeConfig:
    """The core's configuration. `now`: the daemon's clock, which `epoch` relates to the time of day."""
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
        models=settings.model_settings,
        split=settings.split,
        yields=settings.yields,
        publicity=settings.discovery.publicity,
        marks_listings=net.invite_book.all_marked,
        timings=Timings(listing_refresh=settings.discovery.period),
        epoch=clock - now,
        can_fetch=settings.fetch and machine.source is not None,
        shares=settings.seed and machine.source is not None,
        on_demand=on_demand_policy(settings),
        ownership=net.ownership,
    )


def trusted_owners(api: ApiServer) -> frozenset[OwnerId]:
    """The owners whose nodes are not checked, and whose answers others are compared with: this node's, the group's."""
    return api.owners.circle(Privacy.GROUP) or frozenset()


def on_demand_policy(settings: Settings) -> OnDemandPolicy:
    """The rules of models on demand; with `--fetch-on-demand` with the catalogue's models."""
    if not settings.fetch_on_demand:
        return settings.on_demand
    known = tuple(facts for entry in catalog() if (facts := entry.facts()).kind is not ModelKind.DRAFT)
    return msgspec.structs.replace(settings.on_demand, hub=True, catalogue=known)
