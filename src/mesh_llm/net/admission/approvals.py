"""Requests to join without an invite, by machines of the same network (`--lan`).

`ApprovalBook` keeps the requests that this node received until the user answers. `ApprovalClient` sends such a request.
A requester repeats its request until it is answered: nothing is held open for it, and one that went away is forgotten.
An approval is an invite for the requester's key alone; everything after that is ordinary admission.
"""

import asyncio
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import structlog

from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.net.admission.credentials import SigningKey, verify
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.records import WaitingNode
from mesh_llm.net.limits import (
    MAX_ANSWERED_REQUESTS,
    MAX_APPROVAL_SOURCES,
    MAX_WAITING_PER_SOURCE,
    MAX_WAITING_REQUESTS,
    NEW_REQUEST_BURST,
    NEW_REQUEST_SECONDS,
    NetLimits,
    TokenBucket,
    source_key,
)
from mesh_llm.net.quic.endpoint import Endpoint, EndpointSettings
from mesh_llm.net.quic.streams import exchange_frames
from mesh_llm.runtime.network import is_near, local_networks
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import Malformed, encode, fingerprint, fingerprint_letters
from mesh_llm.wire.mesh.admission import (
    SESSION_BYTES,
    AdmitRequest,
    ApprovalRequest,
    Approved,
    Reason,
    Refusal,
    Refused,
    Scope,
    Subject,
    decode_admit_reply,
    refusal_error,
)
from mesh_llm.wire.mesh.certificates import NothingRevoked
from mesh_llm.wire.mesh.frames import MAX_ADMIT_FRAME, OLDEST_PROTOCOL, PROTOCOL, CloseCode, StreamType
from mesh_llm.wire.mesh.invites import Invite, check_invite, decode_invite

INVITE_SECONDS = 600.0
"""How long the invite of an approval can be used."""
ANSWER_SECONDS = 600.0
"""How long an answer is kept for its requester."""
MAX_ASKED = 4
"""Nodes of one mesh that get the request: the user sits at one of them."""
ASK_EVERY_SECONDS = 1.5
GIVE_UP_SECONDS = 30.0
"""When no node accepts the request."""
_LEAST_PREFIX = 4

_log = structlog.get_logger(__name__)


class Requester(NamedTuple):
    """A machine that asks: its key, proven by TLS, its address, and the version of its program."""

    node: NodeId
    source: str
    version: str


@dataclass(slots=True)
class _Request:
    id: str
    requester: Requester
    name: str
    scope: Scope
    since: float
    seen: float
    until: float
    state: str = "pending"
    invite: bytes = b""


class ApprovalBook:
    """The requests that wait for this node's user, and recent answers. Bounded. `clock` gives UNIX seconds."""

    def __init__(
        self,
        invites: InviteBook,
        limits: NetLimits,
        clock: Callable[[], float] = time.time,
        is_local: Callable[[str], bool] = lambda source: is_near(source, local_networks()),
    ) -> None:
        """`is_local`: whether an address is on a network of this machine; requests from elsewhere are refused."""
        self._invites = invites
        self._limits = limits
        self._clock = clock
        self._is_local = is_local
        self._requests: dict[NodeId, _Request] = {}
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()
        self._on_change: Callable[[WaitingNode], None] = lambda _: None

    @property
    def size(self) -> int:
        """Requests and answers that are kept."""
        return len(self._requests)

    def watch(self, on_change: Callable[[WaitingNode], None]) -> None:
        """Call this with each request when it is first made, answered, or expires."""
        self._on_change = on_change

    def ask(self, ask: ApprovalRequest, requester: Requester) -> bytes | Refusal:
        """Take a first or repeated request; returns the invite if the user approved, else the refusal to send."""
        now = self._clock()
        self._forget(now)
        request = self._requests.get(requester.node)
        if request is None:
            if refusal := self._refuse_new(requester, now):
                return refusal
            request = self._add(ask, requester, now)
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
        """Requests without an answer, oldest first."""
        self._forget(self._clock())
        return [_record(request) for request in self._requests.values() if request.state == "pending"]

    def approve(self, name: str, scope: Scope | None = None) -> WaitingNode:
        """Approve a request, with the scope that it asks for or another one.

        Raises MeshError: not_waiting, approval_ambiguous, or what `InviteBook.create` raises.
        """
        request = self._find(name)
        invite = self._invites.create_for(request.requester.node, scope or request.scope, INVITE_SECONDS)
        request.invite = encode(invite)
        request.scope = invite.terms.scope
        return self._answer(request, "approved")

    def deny(self, name: str) -> WaitingNode:
        """Deny a request; the requester is notified. Raises MeshError: not_waiting, approval_ambiguous."""
        return self._answer(self._find(name), "denied")

    def _answer(self, request: _Request, state: str) -> WaitingNode:
        now = self._clock()
        request.state, request.seen, request.until = state, now, now + ANSWER_SECONDS
        record = _record(request)
        _log.info("request to join", state=state, node=request.requester.node[:10], scope=request.scope.word)
        self._on_change(record)
        return record

    def _refuse_new(self, requester: Requester, now: float) -> Refusal | None:
        if not self._is_local(requester.source):
            # A machine from elsewhere gets the same answer as without `--lan`.
            return Refusal(Reason.NOTHING_SHOWN, Subject.NODE)
        waiting = [request for request in self._requests.values() if request.state == "pending"]
        source = source_key(requester.source)
        of_source = sum(source_key(request.requester.source) == source for request in waiting)
        if len(waiting) >= MAX_WAITING_REQUESTS or of_source >= MAX_WAITING_PER_SOURCE or not self._allow(source, now):
            _log.info("request to join refused: too many", source=requester.source, waiting=len(waiting))
            return Refusal(Reason.BUSY, Subject.REQUEST)
        return None

    def _allow(self, source: str, now: float) -> bool:
        bucket = self._buckets.pop(source, None) or TokenBucket(1 / NEW_REQUEST_SECONDS, NEW_REQUEST_BURST, now)
        self._buckets[source] = bucket
        if len(self._buckets) > MAX_APPROVAL_SOURCES:
            self._buckets.popitem(last=False)
        return bucket.take(now)

    def _add(self, ask: ApprovalRequest, requester: Requester, now: float) -> _Request:
        version = _clean(requester.version)
        request = _Request(
            id=fingerprint(requester.node),
            requester=requester._replace(version=version),
            name=_clean(ask.name),
            # The split scope can run code on this machine: the user grants it, a request never does.
            scope=min(ask.scope, Scope.SERVE),
            since=now,
            seen=now,
            until=now + self._limits.approval_wait,
        )
        self._requests[requester.node] = request
        _log.info("request to join", state="pending", node=requester.node[:10], source=requester.source)
        self._on_change(_record(request))
        return request

    def _forget(self, now: float) -> None:
        for request in list(self._requests.values()):
            if request.state != "pending":
                if request.until <= now:
                    del self._requests[request.requester.node]
            elif request.seen + self._limits.approval_gone <= min(now, request.until):
                _log.info("request to join", state="gone", node=request.requester.node[:10])
                del self._requests[request.requester.node]
            elif request.until <= now:
                self._answer(request, "expired")
        answered = [request for request in self._requests.values() if request.state != "pending"]
        for request in sorted(answered, key=lambda entry: entry.until)[: max(0, len(answered) - MAX_ANSWERED_REQUESTS)]:
            del self._requests[request.requester.node]

    def _find(self, name: str) -> _Request:
        self._forget(self._clock())
        wanted = fingerprint_letters(name)
        waiting = [request for request in self._requests.values() if request.state == "pending"]
        found = [
            request
            for request in waiting
            if len(wanted) >= _LEAST_PREFIX and fingerprint_letters(request.id).startswith(wanted)
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
        node_id=request.requester.node,
        name=request.name,
        address=request.requester.source.rpartition(":")[0] or request.requester.source,
        scope=request.scope.word,
        since=request.since,
        expires=request.until,
        version=request.requester.version,
        state=request.state,
    )


def _clean(text: str) -> str:
    """A stranger's text without control characters, which could move the cursor or reverse a line."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text).strip()


class ApprovalClient:
    """One request of this machine to one mesh, repeated until the user of one of its nodes has answered.

    A node is known by its key only: what it announces on the network about mesh and names is a claim. The invite that
    comes back is checked against the mesh's key before anything is joined.
    """

    def __init__(
        self,
        key: SigningKey,
        mesh: MeshId,
        ask: ApprovalRequest,
        *,
        version: str,
        endpoint: EndpointSettings,
        limits: NetLimits | None = None,
    ) -> None:
        """`endpoint`: how to bind; it is closed before the mesh binds its own."""
        self._key = key
        self._mesh = mesh
        self._limits = limits or NetLimits()
        self._binding = endpoint
        self._request = encode(AdmitRequest(OLDEST_PROTOCOL, PROTOCOL, version, os.urandom(SESSION_BYTES), ask=ask))

    async def run(self, nodes: Sequence[KnownPeer], on_waiting: Callable[[NodeId], None]) -> Invite:
        """Repeat the request until it is approved; `on_waiting`: a node accepted it, and its user is to answer.

        Raises MeshError: request_denied, request_expired, or why no node accepts the request.
        """
        endpoint = await Endpoint(self._key.secret, self._binding).bind()
        scope = TaskScope("approval")
        try:
            return await self._run(endpoint, scope, list(nodes[:MAX_ASKED]), on_waiting)
        finally:
            await scope.close()
            await endpoint.close()

    async def _run(
        self, endpoint: Endpoint, scope: TaskScope, nodes: list[KnownPeer], on_waiting: Callable[[NodeId], None]
    ) -> Invite:
        began = time.monotonic()
        accepted: set[NodeId] = set()
        problem = refusal_error(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
        while nodes:
            outcomes = await asyncio.gather(*(self._ask(endpoint, scope, peer) for peer in nodes))
            for peer, outcome in zip(list(nodes), outcomes, strict=True):
                if isinstance(outcome, Invite):
                    return outcome
                if isinstance(outcome, ConnectionError):
                    problem = _unreachable(outcome)
                    continue
                if outcome.subject is Subject.REQUEST and outcome.permanent:
                    raise refusal_error(outcome)
                if outcome.reason is Reason.PENDING:
                    if peer.node not in accepted:
                        accepted.add(peer.node)
                        on_waiting(peer.node)
                elif outcome.reason is not Reason.BUSY:
                    nodes.remove(peer)
                    problem = refusal_error(outcome)
                else:
                    problem = refusal_error(outcome)
            if time.monotonic() - began > (self._limits.approval_wait if accepted else GIVE_UP_SECONDS):
                problem = refusal_error(Refusal(Reason.EXPIRED, Subject.REQUEST)) if accepted else problem
                break
            await asyncio.sleep(ASK_EVERY_SECONDS)
        raise problem

    async def _ask(self, endpoint: Endpoint, scope: TaskScope, peer: KnownPeer) -> Invite | Refusal | ConnectionError:
        try:
            connection = await endpoint.connect(peer.node, peer.addresses, "", self._limits.dial_timeout)
        except ConnectionError as error:
            return error
        try:
            async with asyncio.timeout(self._limits.admission_timeout):
                payload = await exchange_frames(connection, StreamType.ADMIT, self._request, scope, MAX_ADMIT_FRAME)
        except TimeoutError:
            return ConnectionError("it did not answer the request")
        except ConnectionError as error:
            return error
        finally:
            connection.close(int(CloseCode.GOODBYE), b"asked")
        return self._read(payload, peer.node)

    def _read(self, payload: bytes | None, node: NodeId) -> Invite | Refusal:
        reply = Malformed("no reply") if payload is None else decode_admit_reply(payload)
        if isinstance(reply, Refused):
            return reply.refusal
        if not isinstance(reply, Approved):
            return Refusal(Reason.MALFORMED, Subject.NODE)
        invite = decode_invite(reply.invite)
        if isinstance(invite, Refusal):
            return invite
        refusal = check_invite(invite, now=time.time(), verify=verify, revoked=NothingRevoked(), mesh=self._mesh)
        if refusal is None and invite.issuer != node:
            refusal = Refusal(Reason.FORGED, Subject.INVITE, "another node's")
        return refusal or invite


def _unreachable(error: ConnectionError) -> MeshError:
    return MeshError(
        code="mesh_unreachable",
        message=f"The mesh that was found on this network cannot be reached: {error}.",
        hint="Check that the network lets UDP through between the two machines.",
        status=503,
    )
