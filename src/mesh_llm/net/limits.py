"""Bounds on what this node takes from others and how long it waits for them. Times are seconds."""

import ipaddress
from collections import OrderedDict
from dataclasses import dataclass

import msgspec


class NetLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The bounds that tests and options change.

    Attributes:
        dial_timeout: for a connection when direct addresses are known.
        relay_dial_timeout: when only a relay or the lookup service knows the way.
        admission_timeout: from the handshake until the dialer must be admitted.
        header_timeout: from a stream's opening until its header must be there.
        open_timeout: for opening a stream, which waits while the peer allows no more.
        accept_timeout: until an acknowledged stream must be accepted; round trips are added.
        streams_per_connection: bidirectional streams that a peer may have open at once.
        streams_before_admission: the same, before it is admitted.
        admission_tries: streams that an unadmitted peer may open in all.
        pending_admissions: connections not admitted yet, in all.
        pending_per_address: the same, per source address.
        admissions_per_second: per source address, in the long run.
        admission_burst: per source address, at once.
        connections: admitted connections in all, three quarters of them of clients; further ones are refused.
        keep_open: above this number, idle connections are closed, first those that this node dialled.
        idle_after: a connection that was unused for this time is idle.
        idle_client_after: the same for connections of passive nodes; these are closed at any number.
        retry_base: pause after a failed dial; doubles up to `retry_most`.
        retry_most: longest pause.
        settle_timeout: at start, until this node knows its own addresses.
        approval_wait: how long a request to join without an invite waits for the user.
        approval_gone: a requester that does not repeat its request for this time has gone.
        sample_period: between two samples of every connection's path.
        ticket_timeout: from a TCP connection until its TLS handshake is over and its ticket is there.
        direct_timeout: for a TLS connection to a peer, from the request for a ticket on.
        direct_idle: a TLS connection that was unused for this time is closed.
    """

    dial_timeout: float = 4.0
    relay_dial_timeout: float = 10.0
    admission_timeout: float = 10.0
    header_timeout: float = 5.0
    open_timeout: float = 5.0
    accept_timeout: float = 2.5
    streams_per_connection: int = 512
    streams_before_admission: int = 2
    admission_tries: int = 6
    pending_admissions: int = 256
    pending_per_address: int = 64
    admissions_per_second: float = 20.0
    admission_burst: int = 100
    connections: int = 4096
    keep_open: int = 96
    idle_after: float = 30.0
    idle_client_after: float = 60.0
    retry_base: float = 0.5
    retry_most: float = 8.0
    settle_timeout: float = 3.0
    approval_wait: float = 600.0
    approval_gone: float = 20.0
    sample_period: float = 2.0
    ticket_timeout: float = 5.0
    direct_timeout: float = 3.0
    direct_idle: float = 45.0


# Streams that one peer may have open at once, by type.
HTTP_STREAMS_PER_PEER = 256
ROUTES_STREAMS_PER_PEER = 4
ADMIT_STREAMS_PER_PEER = 2
GOSSIP_STREAMS_PER_PEER = 2

# Memory per node, source or queue. When a table is full, the least recently used entry goes.
MAX_KNOWN_ADDRESSES = 16384
MAX_VERIFIED_DIGESTS = 16384
MAX_KNOWN_CERTIFICATES = 16384
MAX_BACKOFF_ENTRIES = 4096
MAX_CLONE_ENTRIES = 1024
MAX_ADMISSION_SOURCES = 4096
MAX_APPROVAL_SOURCES = 256
MAX_QUEUED_BYTES = 2 * 1024 * 1024
"""Bytes of one kind of message that wait for one peer."""
MAX_BATCH = 128 * 1024
"""Bytes of messages that one write carries."""

# Requests to join without an invite.
MAX_WAITING_REQUESTS = 16
MAX_WAITING_PER_SOURCE = 4
MAX_ANSWERED_REQUESTS = 64
NEW_REQUEST_BURST = 6
NEW_REQUEST_SECONDS = 30.0
"""New requests of one source: `NEW_REQUEST_BURST` at once, then one in this many seconds."""

# Routes for passive nodes.
MAX_LONG_POLLS = 256
"""Long polls held at once. Further clients get `COME_BACK`: memory does not grow with the number of clients."""
COME_BACK = 10.0
MAX_CLIENTS_COUNTED = 4096
MAX_ROUTE_SOURCES = 64

# Rates.
MESSAGES_PER_SECOND = 200.0
MESSAGE_BURST = 1000.0
"""Gossip messages that one stream takes; further ones wait in the sender's buffers."""
GRANT_STREAMS_PER_PEER = 1
CEILINGS_PER_SECOND = 1 / 60
CEILING_BURST = 32.0
"""New ceilings that one member may make in the long run, and at once: each replaces one, and goes to every node."""
REVOCATION_COST = 10.0
"""Messages that a new revocation counts as: up to nine signatures are verified, and all connections checked."""
WRITE_TIMEOUT = 10.0
"""A peer that takes no gossip for this time is disconnected."""
BAN_SECONDS = 60.0
"""How long a peer that broke the protocol is refused."""
BROKE_PROTOCOL = "it broke the protocol a moment ago"
MAX_BANS = 1024
STRANGERS_PER_ADDRESS = 16
"""Connections of strangers from one address; a new one beyond that is refused."""
REFUSAL_COST = 5.0
"""A refused admission costs its address as much as this many attempts."""
DUPLICATE_KEY_REPORT_SECONDS = 600.0
"""Two machines with one key are reported again after this time."""


class TokenBucket:
    """Takes `burst` at once and `rate` per second in the long run. `now` is in seconds, by any one clock."""

    __slots__ = ("burst", "filled", "rate", "tokens")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self.rate = rate
        self.burst = burst
        self.tokens = burst
        self.filled = now

    def refill(self, now: float) -> float:
        """Add what the time since the last call brought; returns the tokens there are."""
        self.tokens = min(self.burst, self.tokens + max(0.0, now - self.filled) * self.rate)
        self.filled = now
        return self.tokens

    def take(self, now: float) -> bool:
        """Take one token. False when there is none."""
        if self.refill(now) < 1.0:
            return False
        self.tokens -= 1.0
        return True

    def charge(self, now: float, cost: float) -> float:
        """Take `cost` tokens, on credit if need be; returns the seconds until the debt is paid."""
        self.refill(now)
        self.tokens -= cost
        return max(0.0, -self.tokens / self.rate)


@dataclass(slots=True)
class _Source:
    bucket: TokenBucket
    pending: int = 0


class Ban(msgspec.Struct, frozen=True, kw_only=True):
    """Who is refused, why, and until when (monotonic seconds). `source`: the strangers of an address; else a key."""

    who: str
    source: bool
    until: float
    reason: str


class AdmissionRateLimit:
    """Bounds attempts to be admitted, per source and in all, and bans peers that broke the protocol or misused a node.

    It is asked before anything else is spent on a connection. `now` is monotonic seconds.
    """

    def __init__(self, limits: NetLimits) -> None:
        self._limits = limits
        self._sources: OrderedDict[str, _Source] = OrderedDict()
        self._bans: dict[tuple[bool, str], Ban] = {}
        self.pending = 0
        """Admissions under way."""

    def enter(self, source: str, now: float) -> bool:
        """Whether an attempt from this source may begin; if so, `leave` must follow."""
        entry = self._entry(source, now)
        full = self.pending >= self._limits.pending_admissions or entry.pending >= self._limits.pending_per_address
        if full or not entry.bucket.take(now):
            return False
        entry.pending += 1
        self.pending += 1
        return True

    def leave(self, source: str, now: float, *, refused: bool) -> None:
        """An attempt ended."""
        entry = self._entry(source, now)
        entry.pending = max(0, entry.pending - 1)
        self.pending = max(0, self.pending - 1)
        if refused:
            entry.bucket.tokens = max(0.0, entry.bucket.refill(now) - REFUSAL_COST)

    def ban(
        self,
        who: str,
        now: float,
        *,
        seconds: float = BAN_SECONDS,
        reason: str = BROKE_PROTOCOL,
        source: bool = False,
    ) -> None:
        """Refuse a node for a while, or the strangers of an address (`source`, as `source_key` names it)."""
        self._bans = {key: ban for key, ban in self._bans.items() if ban.until > now}
        if len(self._bans) >= MAX_BANS:
            del self._bans[min(self._bans, key=lambda key: self._bans[key].until)]
        self._bans[source, who] = Ban(who=who, source=source, until=now + seconds, reason=reason)

    def banned(self, who: str, now: float, *, source: bool = False) -> Ban | None:
        """Why, and how long, a node is refused, or the strangers of an address; None: they are not."""
        ban = self._bans.get((source, who))
        return ban if ban is not None and ban.until > now else None

    def bans(self, now: float) -> tuple[Ban, ...]:
        """Who is refused now, the longest first."""
        return tuple(sorted((ban for ban in self._bans.values() if ban.until > now), key=lambda ban: -ban.until))

    def _entry(self, source: str, now: float) -> _Source:
        key = source_key(source)
        entry = self._sources.pop(key, None)
        if entry is None:
            limits = self._limits
            entry = _Source(TokenBucket(limits.admissions_per_second, limits.admission_burst, now))
        self._sources[key] = entry
        while len(self._sources) > MAX_ADMISSION_SOURCES:
            self._sources.popitem(last=False)
        return entry


def source_key(address: str) -> str:
    """What counts as one source: an IPv4 address, an IPv6 /64, or everything that arrives by relays.

    An IPv4 address that is written as an IPv6 one counts as itself: by 6to4 (RFC 3056) it has 65,536 networks of /64.
    """
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        parsed = ipaddress.ip_address(host)
    except ValueError:
        return "relay"
    if isinstance(parsed, ipaddress.IPv6Address):
        within = parsed.ipv4_mapped or parsed.sixtofour
        if within is not None:
            return str(within)
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)
