"""Machines of this network that ask to join without an invite: kept for the user to decide, within bounds.

An asker comes again and again until it hears a yes or a no: nothing is held open for it, and one that went away is
forgotten. A yes is an invite for its key alone; everything after that is ordinary admission.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from mesh_llm.core.console_values import WaitingNode
from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import NodeId
from mesh_llm.net.gate import source_key
from mesh_llm.net.invites import InviteBook
from mesh_llm.net.limits import NetLimits
from mesh_llm.runtime.local_networks import is_near, local_networks
from mesh_llm.wire.admit import Ask
from mesh_llm.wire.certificate import Scope
from mesh_llm.wire.fingerprint import fingerprint, normal
from mesh_llm.wire.invite import encode_invite
from mesh_llm.wire.refusal import Reason, Refusal, Subject

INVITE_SECONDS = 600.0
"""How long the invite of an approval can be used."""
TOLD_SECONDS = 600.0
"""How long an answer is kept for its asker."""
MAX_WAITING = 16
MAX_WAITING_PER_SOURCE = 4
MAX_ANSWERED = 64
NEW_BURST = 6
NEW_EVERY_SECONDS = 30.0
"""New requests of one source: so many at once, then one in so many seconds."""
_LEAST_PREFIX = 4
_MAX_SOURCES = 256

_log = structlog.get_logger(__name__)


class Asker(NamedTuple):
    """Who asks: its key, which TLS has proven, where from, and which program."""

    node: NodeId
    source: str
    version: str


@dataclass(slots=True)
class _Request:
    id: str
    asker: Asker
    name: str
    scope: Scope
    since: float
    seen: float
    until: float
    state: str = "pending"
    invite: bytes = b""


@dataclass(slots=True)
class _Allowance:
    left: float
    filled: float


class ApprovalBook:
    """See the module's text. `clock` gives UNIX seconds."""

    def __init__(
        self,
        invites: InviteBook,
        limits: NetLimits,
        clock: Callable[[], float] = time.time,
        is_local: Callable[[str], bool] = lambda source: is_near(source, local_networks()),
    ) -> None:
        """`is_local`: whether an address is on a network of this machine; others may not ask."""
        self._invites = invites
        self._limits = limits
        self._clock = clock
        self._is_local = is_local
        self._requests: dict[NodeId, _Request] = {}
        self._allowances: dict[str, _Allowance] = {}
        self._told: Callable[[WaitingNode], None] = lambda _: None

    def watch(self, told: Callable[[WaitingNode], None]) -> None:
        """Tell of each request when it is first made, and when it is answered or expires."""
        self._told = told

    def ask(self, ask: Ask, asker: Asker) -> bytes | Refusal:
        """Somebody asks, for the first time or again: the invite where the user said yes, else what to tell it."""
        now = self._clock()
        self._forget(now)
        request = self._requests.get(asker.node)
        if request is None:
            if refusal := self._refuse_new(asker, now):
                return refusal
            request = self._take(ask, asker, now)
        request.seen = now
        match request.state:
            case "approved":
                return request.invite
            case "denied":
                return Refusal(Reason.DENIED, Subject.REQUEST)
            case "expired":
                return Refusal(Reason.EXPIRED, Subject.REQUEST)
            case _:
                return Refusal(Reason.PENDING, Subject.REQUEST)

    def waiting(self) -> list[WaitingNode]:
        """Requests that nobody has answered, oldest first."""
        self._forget(self._clock())
        return [_record(request) for request in self._requests.values() if request.state == "pending"]

    def approve(self, name: str, scope: Scope | None = None) -> WaitingNode:
        """Let an asker in, with what it asks for or with another scope.

        Raises MeshError: not_waiting, approval_ambiguous, or what `InviteBook.create` raises.
        """
        request = self._find(name)
        invite = self._invites.create_for(request.asker.node, scope or request.scope, INVITE_SECONDS)
        request.invite = encode_invite(invite)
        request.scope = invite.terms.scope
        return self._answer(request, "approved")

    def deny(self, name: str) -> WaitingNode:
        """Turn an asker down; it is told. Raises MeshError: not_waiting, approval_ambiguous."""
        return self._answer(self._find(name), "denied")

    def _answer(self, request: _Request, state: str) -> WaitingNode:
        now = self._clock()
        request.state, request.seen, request.until = state, now, now + TOLD_SECONDS
        record = _record(request)
        _log.info("request to join", state=state, node=request.asker.node[:10], scope=request.scope.word)
        self._told(record)
        return record

    def _refuse_new(self, asker: Asker, now: float) -> Refusal | None:
        if not self._is_local(asker.source):
            # Somebody from elsewhere is told what it would be told without `--lan`.
            return Refusal(Reason.NOTHING_SHOWN, Subject.NODE)
        waiting = [request for request in self._requests.values() if request.state == "pending"]
        source = source_key(asker.source)
        of_source = sum(source_key(request.asker.source) == source for request in waiting)
        if len(waiting) >= MAX_WAITING or of_source >= MAX_WAITING_PER_SOURCE or not self._allow(source, now):
            _log.info("request to join refused: too many", source=asker.source, waiting=len(waiting))
            return Refusal(Reason.BUSY, Subject.REQUEST)
        return None

    def _allow(self, source: str, now: float) -> bool:
        entry = self._allowances.pop(source, None) or _Allowance(NEW_BURST, now)
        self._allowances[source] = entry
        if len(self._allowances) > _MAX_SOURCES:
            del self._allowances[next(iter(self._allowances))]
        entry.left = min(NEW_BURST, entry.left + max(0.0, now - entry.filled) / NEW_EVERY_SECONDS)
        entry.filled = now
        if entry.left < 1.0:
            return False
        entry.left -= 1.0
        return True

    def _take(self, ask: Ask, asker: Asker, now: float) -> _Request:
        version = _clean(asker.version)
        request = _Request(
            id=fingerprint(asker.node),
            asker=asker._replace(version=version),
            name=_clean(ask.name),
            # To lend RPC is granted knowingly, never because somebody asked for it.
            scope=min(ask.scope, Scope.SERVE),
            since=now,
            seen=now,
            until=now + self._limits.approval_wait,
        )
        self._requests[asker.node] = request
        _log.info("request to join", state="pending", node=asker.node[:10], source=asker.source)
        self._told(_record(request))
        return request

    def _forget(self, now: float) -> None:
        for request in list(self._requests.values()):
            if request.state != "pending":
                if request.until <= now:
                    del self._requests[request.asker.node]
            elif request.seen + self._limits.approval_gone <= min(now, request.until):
                _log.info("request to join", state="gone", node=request.asker.node[:10])
                del self._requests[request.asker.node]
            elif request.until <= now:
                self._answer(request, "expired")
        answered = [request for request in self._requests.values() if request.state != "pending"]
        for request in sorted(answered, key=lambda entry: entry.until)[: max(0, len(answered) - MAX_ANSWERED)]:
            del self._requests[request.asker.node]

    def _find(self, name: str) -> _Request:
        self._forget(self._clock())
        wanted = normal(name)
        waiting = [request for request in self._requests.values() if request.state == "pending"]
        found = [
            request for request in waiting if len(wanted) >= _LEAST_PREFIX and normal(request.id).startswith(wanted)
        ]
        if len(found) == 1:
            return found[0]
        raise MeshError(
            code="approval_ambiguous" if found else "not_waiting",
            message=f"{name[:40]!r} {'fits more than one request' if found else 'is no request that waits'}.",
            hint="Give the fingerprint that the asking machine shows; `mesh-llm approve` lists those that wait.",
            status=409 if found else 404,
        )


def _record(request: _Request) -> WaitingNode:
    return WaitingNode(
        id=request.id,
        node_id=request.asker.node,
        name=request.name,
        address=request.asker.source.rpartition(":")[0] or request.asker.source,
        scope=request.scope.word,
        since=request.since,
        expires=request.until,
        version=request.asker.version,
        state=request.state,
    )


def _clean(text: str) -> str:
    """A stranger's text, without anything that moves a cursor or turns a line around."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text).strip()
