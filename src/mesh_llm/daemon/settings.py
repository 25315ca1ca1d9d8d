"""Everything that a user can set for one daemon, parsed and checked; the command line makes it."""

import socket
from collections.abc import Mapping
from pathlib import Path

import msgspec

from mesh_llm.api.types import KeyLimit
from mesh_llm.core.config import OnDemandPolicy, SplitOptions, YieldPolicy
from mesh_llm.core.trust.canary_plan import DEFAULT_SHARE
from mesh_llm.core.trust.circle import Privacy
from mesh_llm.core.trust.strangers import StrangerLimits
from mesh_llm.core.types.announcement import ListingPolicy, ListingScope
from mesh_llm.core.types.ids import OwnerId
from mesh_llm.core.types.model import LaunchOptions
from mesh_llm.core.types.model_settings import ModelSettings
from mesh_llm.discovery.nostr import DEFAULT_RELAYS

API_PORT = 9337
CONSOLE_PORT = 3131
LISTING_PERIOD = 60.0
PROMPT_CACHE_BYTES = 4 * 10**9
PUBLISH_SCOPE: ListingScope = "client"
"""What the invite of a listing permits, unless the user says otherwise (`--publish-scope`)."""


class DiscoverySettings(msgspec.Struct, frozen=True, kw_only=True):
    """How this node finds a mesh, and lets its own be found, on Nostr.

    Attributes:
        auto: find a mesh there and join it (`--auto`).
        publicity: list this node's mesh (`--publish`); None: do not.
        relays: `--nostr-relay`, each; empty: the public default ones.
        region: where this node is (`--region`).
        merge_keys: a lone listed node goes over to a mesh whose key begins so (`--merge KEY`).
        merge_held: it goes over to a larger mesh of its name that it was in before (`--merge`).
        found: the mesh of this node was found by its listing: if it is left alone, it looks for that mesh there.
        period: seconds after which an unchanged listing is published again (`MESH_LLM_LISTING_PERIOD`).
    """

    auto: bool = False
    publicity: ListingPolicy | None = None
    relays: tuple[str, ...] = ()
    region: str = ""
    merge_keys: tuple[str, ...] = ()
    merge_held: bool = False
    found: bool = False
    period: float = LISTING_PERIOD

    @property
    def urls(self) -> tuple[str, ...]:
        """The relays in use."""
        return self.relays or DEFAULT_RELAYS

    @property
    def life(self) -> float:
        """Seconds after which a listing expires."""
        return 2 * self.period


class UnavailableModel(msgspec.Struct, frozen=True, kw_only=True):
    """A `--model` that cannot be had at present, though others can.

    Attributes:
        spec: as the user wrote it.
        name: what requests call it.
        reason: why, and what to do.
        lasting: trying again cannot help.
    """

    spec: str
    name: str
    reason: str
    lasting: bool = False


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon's options.

    Attributes:
        home: the daemon's own directory (`MESH_LLM_HOME`).
        models: `--model`, in order; names, paths, sources or URLs. Empty: client, standby, or the default.
        later: of `models`, what a joiner has not got: fetched once it has joined. Filled in at the start.
        unavailable: of `models`, those that cannot be had. Filled in at the start.
        join: invite tokens; one reachable is enough.
        client: passive node: no engine, no model, no gossip.
        name: what people call this node; empty: the host's name.
        api_port: API; 0 picks a free one.
        ollama_port: the API for clients of Ollama (`--ollama-port`); None: on `api_port` only.
        console_port: management API and page; 0 picks a free one.
        console_listen: address the console binds; others than loopback need an API key.
        console_origins: public addresses of proxies with TLS before the console (`--console-origin`), each as a URL
            that ends in a slash.
        console_page: False with `--headless`: the API of the console only.
        listen: address the API binds.
        allow_hosts: further names by which API and console may be asked (`--allow-host`).
        allow_origins: pages and programs that may use the API from a browser (`--allow-origin`).
        key_limits: limits of API keys by name (`--key-limit`).
        stranger_limits: quotas of nodes that came by a public listing (`--stranger-limit`).
        api_keys: keys that requests must show; empty on loopback only.
        max_memory_bytes: cap on what models may take (`--max-vram`).
        devices: `--device` picks; empty: all.
        gpu: the plugin for this machine's GPU (`--gpu`): auto, its kind, or none.
        bin_dir: the user's own llama.cpp binaries.
        lend_unconfined: lend memory for split models also where RPC servers cannot be confined (`--lend-unconfined`).
        launch: context, slots, draft.
        model_settings: of single models, by name (`[models."NAME"]` in the configuration file).
        aliases: further names of models, and patterns of names (`[aliases]` there).
        split: about models that are computed by several machines.
        models_dirs: further model directories besides `~/.models` (`--models-dir`).
        journal: file that records every event with its time.
        quic_port: UDP port of the mesh, and TCP port for its direct connections; 0 picks one.
        tls: requests and split models take TLS over TCP where nodes reach each other directly (not with
            `--transport quic`).
        relay: False: only direct connections, no public relays or lookup services (`MESH_LLM_RELAY=off`).
        log_level: of the daemon's own log.
        fetch: fetch what the mesh calls for and is not here (not with `--no-fetch`).
        yields: when the machine is given back to its owner (`--yield`).
        use: part of the machine that is offered (`--use`): of its memory, and of its processors for each engine.
        lan: announce this mesh on the local network, find one there, and let others ask to join (`--lan`).
        mesh_name: what people call this mesh; with `lan` and without a token, which one to join.
        seed: send model files to other nodes of the mesh (not with `--no-seed`).
        seed_strangers: send them also to nodes that came by a public listing (`--seed-strangers`).
        seed_limit: most bytes a second that are sent to them (`--seed-limit`); None: no limit.
        yes: fetch the default model, and install what the GPU needs, without asking (`--yes`).
        default_model: answers requests that name no model, or one that no node of the mesh knows (`--default-model`).
        store: keep answers to Responses, so that clients can come back to them (not with `--no-store`).
        privacy: how far prompts of this node's clients may go (`--privacy`).
        group: owners whose nodes may see them with `group` (`--group`).
        canaries: check hosts now and then (not with `--canaries off`).
        canary_share: part of the work of clients' requests that this may add (`--canary-share`).
        receipts: make a signed receipt for each answer (`--receipts`); else where a request asks for one.
        drain: seconds that answers under way may take when the node is told to end (`--drain`).
        queue_wait: seconds that a request may wait for its model, and then for a place there (`--queue-wait`).
        resume_wait: seconds that a lost answer waits for a node that can go on with it (`--resume-wait`).
        on_demand: for whom models are loaded when they are asked for, and when they are unloaded (`--on-demand`,
            `--pin`, `--ttl`, `--min-lifetime`).
        load_wait: seconds that a request waits for its model to be loaded (`--load-wait`).
        fetch_on_demand: also fetch models of the catalogue that are asked for (`--fetch-on-demand`).
        discovery: about Nostr.
        prompt_cache_bytes: most bytes of saved prompt caches on the disk (`--prompt-cache`); 0: none are saved.
        invite_scope: widest scope of invites for which nobody names one (`--invite-scope`): client, serve or split.
    """

    home: Path
    models: tuple[str, ...] = ()
    later: tuple[str, ...] = ()
    unavailable: tuple[UnavailableModel, ...] = ()
    join: tuple[str, ...] = ()
    client: bool = False
    name: str = ""
    api_port: int = API_PORT
    ollama_port: int | None = None
    console_port: int = CONSOLE_PORT
    console_listen: str = "127.0.0.1"
    console_origins: tuple[str, ...] = ()
    console_page: bool = True
    listen: str = "127.0.0.1"
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    api_keys: tuple[str, ...] = ()
    key_limits: Mapping[str, KeyLimit] = {}
    stranger_limits: StrangerLimits = StrangerLimits()
    max_memory_bytes: int | None = None
    devices: tuple[str, ...] = ()
    gpu: str = "auto"
    bin_dir: Path | None = None
    lend_unconfined: bool = False
    launch: LaunchOptions = LaunchOptions()
    model_settings: dict[str, ModelSettings] = {}
    aliases: dict[str, str] = {}
    split: SplitOptions = SplitOptions()
    models_dirs: tuple[Path, ...] = ()
    journal: Path | None = None
    quic_port: int = 0
    tls: bool = True
    relay: bool = True
    log_level: str = "info"
    fetch: bool = True
    lan: bool = False
    mesh_name: str = ""
    seed: bool = True
    seed_strangers: bool = False
    seed_limit: float | None = None
    yes: bool = False
    default_model: str = ""
    store: bool = True
    privacy: Privacy = Privacy.ANY
    group: tuple[OwnerId, ...] = ()
    canaries: bool = True
    canary_share: float = DEFAULT_SHARE
    receipts: bool = False
    drain: float = 30.0
    queue_wait: float = 60.0
    resume_wait: float = 30.0
    on_demand: OnDemandPolicy = OnDemandPolicy(scope="members")
    load_wait: float = 600.0
    fetch_on_demand: bool = False
    yields: YieldPolicy = YieldPolicy()
    use: float = 1.0
    discovery: DiscoverySettings = DiscoverySettings()
    invite_scope: str = "split"
    prompt_cache_bytes: int = PROMPT_CACHE_BYTES

    @property
    def node_name(self) -> str:
        """What people call this node."""
        return self.name or socket.gethostname()


class Configuration(msgspec.Struct, frozen=True, kw_only=True):
    """What the command line, variables and files say together.

    Attributes:
        settings: what it means.
        values: each option by its name in a file, to compare with what was read before. Holds secrets.
        files: the files that were read.
        exposed: files with API keys or invites that other users of this machine can read.
    """

    settings: Settings
    values: dict[str, str] = {}
    files: tuple[Path, ...] = ()
    exposed: tuple[Path, ...] = ()
