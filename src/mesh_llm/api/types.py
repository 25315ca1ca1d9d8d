"""Plain values of the API: settings, paths, and what it reports to the console and the status. Cheap to import."""

import re
from collections.abc import Mapping
from pathlib import Path

import msgspec

from mesh_llm.core.trust.circle import Owners, Privacy
from mesh_llm.core.trust.strangers import StrangerLimits
from mesh_llm.core.types.model import ModelKind

MIB = 1024 * 1024


UNNAMED = "unnamed"
"""The name of all API keys that have none."""
_NAMED_KEY = re.compile(r"([A-Za-z][A-Za-z0-9_-]{0,31}):(.+)", re.DOTALL)


def split_key(key: str) -> tuple[str, str]:
    """The name and the secret of a key as the user wrote it."""
    found = _NAMED_KEY.fullmatch(key)
    return (found[1], found[2]) if found is not None else (UNNAMED, key)


class KeyLimit(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the API keys of one name (`--key-limit`); 0: none.

    Attributes:
        tokens_per_day: of prompts and answers together, from midnight UTC.
        concurrent: requests at once.
        privacy: how far their prompts may go; it can only be stricter than `--privacy`.
    """

    tokens_per_day: int = 0
    concurrent: int = 0
    privacy: Privacy = Privacy.ANY


class ApiConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The API's settings.

    Attributes:
        host: address to bind (`--listen`).
        port: port to bind (`--port`); 0 picks a free one.
        ollama_port: a second port, for clients of Ollama (`--ollama-port`); 0 picks a free one, None: there is none.
        default_model: answers requests that name no model, or one that no node knows (`--default-model`); empty: none.
        allowed_hosts: further names in `Host` by which this machine may be asked (`--allow-host`).
        allowed_origins: pages and programs that may ask from a browser, as `canonical_origin` writes them
            (`--allow-origin`).
        store: directory of answers to Responses that clients can come back to; None: none are kept (`--no-store`).
        key_limits: limits of keys by name (`--key-limit`).
        usage_file: where what the keys have used is kept; None: in memory only.
        stranger_limits: quotas of nodes that came by a public listing (`--stranger-limit`).
        stranger_file: where what they have used today is kept; None: in memory only.
        keys: accepted API keys; may be empty only where `host` is a loopback address.
        queue_wait: how long a request may wait for its model to be ready, and then for a place (`--queue-wait`); 0: it
            is refused where it cannot begin at once.
        max_in_flight: requests held at once, queued ones included, from clients and peers together; one more gets 429.
            It bounds memory beside `buffered_bytes`.
        max_connections: open client connections; one more is refused.
        body_bytes: largest request body.
        buffered_bytes: all request bodies held at once.
        head_bytes: largest request head, and largest response head of a target.
        head_seconds: time for a client to send a request's head, from its first byte (or from connecting).
        body_seconds: time for a client to send a body, on top of what `body_rate` allows for its size.
        body_rate: slowest body, bytes per second, once `body_seconds` have passed.
        keep_alive_seconds: how long an idle client connection is kept.
        connect_seconds: time to connect to a target.
        first_byte_seconds: time for a target to begin its answer; long, because prompts take long and requests queue.
        prompt_rate: bytes of a request per further second of that time, for a long prompt.
        chunk_seconds: longest silence in the middle of an answer.
        node_seconds: extra time that a remote node gets for both, so that it gives up first and reports the cause.
        load_wait: how long a request waits for its model to be loaded (`--load-wait`); 0: not at all.
        keep_alive_event_seconds: a streamed request that waits gets a comment after so long, and then ever again.
        attempts: targets tried for one request, at most.
        resume_wait: how long an interrupted answer waits for a node that can resume it (`--resume-wait`); 0: never.
        resume_bytes: longest answer that is kept so that it can be resumed.
        resume_budget_bytes: memory for all answers that are kept, beyond the first 64 KiB of each.
        whole_bytes: longest answer without streaming that is held until it is whole, so that a loss can be hidden.
        privacy: how far prompts may go (`--privacy`).
        owners: the owner of this node, and the owners in its user's group.
        receipts: each answer gets a receipt (`--receipts`); else those whose request asks for one.
        idle_connections: idle keep-alive connections per local engine.
        idle_seconds: how long such a connection is kept; llama-server itself closes after 5 s.
    """

    host: str = "127.0.0.1"
    port: int = 9337
    ollama_port: int | None = None
    default_model: str = ""
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    store: Path | None = None
    keys: tuple[str, ...] = ()
    key_limits: Mapping[str, KeyLimit] = {}
    usage_file: Path | None = None
    stranger_limits: StrangerLimits = StrangerLimits()
    stranger_file: Path | None = None
    queue_wait: float = 60.0
    max_in_flight: int = 2048
    max_connections: int = 4096
    body_bytes: int = 64 * MIB
    buffered_bytes: int = 256 * MIB
    head_bytes: int = 64 * 1024
    head_seconds: float = 15.0
    body_seconds: float = 20.0
    body_rate: float = 64 * 1024.0
    keep_alive_seconds: float = 75.0
    connect_seconds: float = 5.0
    first_byte_seconds: float = 600.0
    prompt_rate: float = 200.0
    chunk_seconds: float = 120.0
    node_seconds: float = 15.0
    load_wait: float = 0.0
    keep_alive_event_seconds: float = 5.0
    attempts: int = 3
    resume_wait: float = 30.0
    resume_bytes: int = 8 * MIB
    resume_budget_bytes: int = 64 * MIB
    whole_bytes: int = 256 * 1024
    privacy: Privacy = Privacy.ANY
    owners: Owners = Owners()
    receipts: bool = False
    idle_connections: int = 16
    idle_seconds: float = 3.0


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A path that is passed on to an engine.

    Attributes:
        method: the one that it takes.
        kinds: of models that can answer, where the answer is computed by the model; such a request takes a slot of the
            engine. Empty: any engine answers at once.
    """

    method: str = "POST"
    kinds: frozenset[ModelKind] = frozenset()


TRANSCRIPTIONS = "/v1/audio/transcriptions"
"""Takes a form in place of JSON."""

_GENERATES = Endpoint(kinds=frozenset({ModelKind.CHAT}))
_EMBEDS = Endpoint(kinds=frozenset({ModelKind.CHAT, ModelKind.EMBEDDING}))

ENDPOINTS: dict[str, Endpoint] = {
    "/v1/chat/completions": _GENERATES,
    "/v1/completions": _GENERATES,
    "/v1/responses": _GENERATES,
    "/v1/messages": _GENERATES,
    "/v1/embeddings": _EMBEDS,
    "/v1/rerank": Endpoint(kinds=frozenset({ModelKind.RERANK})),
    "/v1/messages/count_tokens": Endpoint(),
    "/v1/chat/completions/input_tokens": Endpoint(),
    "/v1/responses/input_tokens": Endpoint(),
    TRANSCRIPTIONS: _GENERATES,
    # llama.cpp's own: without /v1 it answers in another form.
    "/completion": _GENERATES,
    "/completions": _GENERATES,
    "/embedding": _EMBEDS,
    "/embeddings": _EMBEDS,
    "/infill": _GENERATES,
    "/tokenize": Endpoint(),
    "/detokenize": Endpoint(),
    "/apply-template": Endpoint(),
    "/props": Endpoint(method="GET"),
    "/slots": Endpoint(method="GET"),
    "/lora-adapters": Endpoint(method="GET"),
}
"""All paths that are passed on to an engine. A new one is added here; see also `resume.RESUMABLE`."""

_OTHER_NAMES = {
    "/chat/completions": "/v1/chat/completions",
    "/chat/completions/input_tokens": "/v1/chat/completions/input_tokens",
    "/responses/input_tokens": "/v1/responses/input_tokens",
    "/audio/transcriptions": TRANSCRIPTIONS,
    "/responses": "/v1/responses",
    "/models": "/v1/models",
    "/rerank": "/v1/rerank",
    "/reranking": "/v1/rerank",
    "/v1/reranking": "/v1/rerank",
    "/v1/health": "/health",
}
_BASES = ("/api/v1/", "/openai/v1/")
_SLASHES = re.compile("/{2,}")


def canonical_path(path: str) -> str:
    """The path by the one name that authentication, limits and routing know.

    Clients put slashes at the ends of addresses and between their parts, expect the API below `/api/v1` or
    `/openai/v1`, or leave `/v1` out where llama.cpp answers the same without it.
    """
    path = _SLASHES.sub("/", path).removesuffix("/") or "/"
    for base in _BASES:
        if path.startswith(base):
            path = "/v1/" + path.removeprefix(base)
            break
    if path.startswith("/models/"):
        return f"/v1{path}"
    return _OTHER_NAMES.get(path, path)


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of one answer, as the engine counted them; 0 where it did not say.

    Attributes:
        prompt: tokens of the prompt, cached ones included.
        cached: those of them that the engine still had in its cache.
        generated: tokens of the answer.
        seconds: time spent on generating them; 0.0 unknown.
        prompt_seconds: time spent on the prompt's tokens that were not cached; 0.0 unknown.
        guessed: tokens that the engine guessed ahead.
        accepted: those of them that were right.
    """

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    guessed: int = 0
    accepted: int = 0


class RankedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could have answered a request, as it was ranked then.

    `expected_s`: how long a typical answer would take there; the lowest is tried first. `warm_bytes`: how much of the
    prompt's beginning it has seen. `why`: the facts in words.
    """

    node_id: str
    name: str
    local: bool
    expected_s: float
    in_flight: int = 0
    load: float = 0.0
    slots: int = 0
    tokens_per_second: float = 0.0
    rtt_ms: float = 0.0
    warm_bytes: int = 0
    why: str = ""


class Attempt(msgspec.Struct, frozen=True, kw_only=True):
    """One target that was tried. `outcome`: answered, refused, lost or left (the client went)."""

    node_id: str
    outcome: str
    reason: str = ""


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """How one request was routed, and what came of it.

    `via`: client or peer. `chosen`: the node that answered; empty if none did. `outcome`: answered, refused, lost or
    left; `status`: as the client got it, 499 where it left. `ttfb_ms` null: no byte of an answer came.
    """

    id: int
    at: float
    model: str
    path: str
    via: str
    targets: tuple[RankedTarget, ...]
    attempts: tuple[Attempt, ...]
    chosen: str
    outcome: str
    status: int
    seconds: float
    ttfb_ms: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0


class Bucket(msgspec.Struct, frozen=True, kw_only=True):
    """What ended in one period. Percentiles are null where nothing was measured."""

    at: float
    requests: int = 0
    failed: int = 0
    tokens: int = 0
    prompt_tokens: int = 0
    ttfb_ms_p50: float | None = None
    ttfb_ms_p95: float | None = None
    seconds_p50: float | None = None
    seconds_p95: float | None = None


class History(msgspec.Struct, frozen=True, kw_only=True):
    """The API's last hour, oldest first, without gaps; the last bucket is still being filled."""

    period_s: int
    buckets: tuple[Bucket, ...]


class KeyUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What the API keys of one name have used, and their limits; 0: no limit.

    `failed`: requests that were answered with an error. `tokens`: of answers.
    """

    name: str
    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    tokens_today: int = 0
    running: int = 0
    tokens_per_day: int = 0
    concurrent: int = 0


class StrangerUse(msgspec.Struct, frozen=True, kw_only=True):
    """What one node that came by a public listing has used here today."""

    node_id: str
    tokens_today: int = 0


class StrangerUsage(msgspec.Struct, frozen=True, kw_only=True):
    """What nodes that came by a public listing use of this node, and their quotas; 0: no limit.

    Attributes:
        running: their requests now.
        nodes: how many of them have used tokens today.
        tokens_today: of prompts and answers, from midnight UTC.
        refused_today: their requests that were refused, since the start at the earliest.
        most: those that used most.
        concurrent, tokens_per_day: of one node, and of one address.
        all_concurrent, all_tokens_per_day: of all of them together.
    """

    running: int = 0
    nodes: int = 0
    tokens_today: int = 0
    refused_today: int = 0
    most: tuple[StrangerUse, ...] = ()
    concurrent: int = 0
    tokens_per_day: int = 0
    all_concurrent: int = 0
    all_tokens_per_day: int = 0


class StatusRequests(msgspec.Struct, frozen=True, kw_only=True):
    """The API's work: over the last minute, except `in_flight`, `keys` (what each API key has used) and `strangers`."""

    in_flight: int = 0
    per_minute: float = 0.0
    tokens_per_second: float = 0.0
    ttfb_ms_p50: float = 0.0
    keys: tuple[KeyUsage, ...] = ()
    strangers: StrangerUsage = StrangerUsage()
