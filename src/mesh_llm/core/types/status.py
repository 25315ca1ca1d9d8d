"""What other packages produce for the management API."""

import msgspec


class RankedTarget(msgspec.Struct, frozen=True, kw_only=True):
    """A node that could have answered a request, as the front door judged it then.

    `expected_s`: how long a typical answer would take there; the least is asked first. `warm_bytes`: how much of the
    prompt's beginning it has seen. `why`: the same in words.
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
    """One target that was asked. `outcome`: answered, refused, lost or left (the client went)."""

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
    """The front door's last hour, oldest first, without gaps; the last bucket is still being filled."""

    period_s: int
    buckets: tuple[Bucket, ...]


class StatusRequests(msgspec.Struct, frozen=True, kw_only=True):
    """The front door's work: over the last minute, except `in_flight`."""

    in_flight: int = 0
    per_minute: float = 0.0
    tokens_per_second: float = 0.0
    ttfb_ms_p50: float = 0.0
