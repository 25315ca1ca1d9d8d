"""Machines of this network that ask to join without an invite: kept for the user to decide, within bounds.

An asker comes again and again until it hears a yes or a no: nothing is held open for it, and one that went away is
forgotten. A yes is an invite for its key alone; everything after that is ordinary admission.

A machine without an invite asks nodes of a mesh to let it in, again and again until their user has answered.

Whom it asks is only known by key: what the network says of mesh and names is a claim. The invite that comes back is
checked against the mesh's key before anything is joined.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import iroh
import structlog

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import MeshId, NodeId
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.rate_limit import source_key
from mesh_llm.net.admission.records import WaitingNode
from mesh_llm.net.identity import SigningKey, verify
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.quic.bindings import stream_failure
from mesh_llm.net.quic.endpoint import Endpoint, EndpointSettings
from mesh_llm.net.quic.streams import IrohStream
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
from mesh_llm.wire.mesh.frames import MAX_ADMIT_FRAME, OLDEST_PROTOCOL, PROTOCOL, CloseCode, StreamType, encode_header
from mesh_llm.wire.mesh.invites import Invite, check_invite, decode_invite

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

    def ask(self, ask: ApprovalRequest, asker: Asker) -> bytes | Refusal:
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
        request.invite = encode(invite)
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

    def _take(self, ask: ApprovalRequest, asker: Asker, now: float) -> _Request:
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


MAX_ASKED = 4
"""Nodes of one mesh that are asked: somebody sits at one of them."""
ASK_EVERY_SECONDS = 1.5
GIVE_UP_SECONDS = 30.0
"""Where nobody even takes the request."""


class Asked(NamedTuple):
    """A node to ask, and where it is."""

    node: NodeId
    addresses: tuple[str, ...]


class Asking:
    """One request of this machine to one mesh."""

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
        """`endpoint`: how to bind; the port is another one than the mesh's, which comes after."""
        self._key = key
        self._mesh = mesh
        self._limits = limits or NetLimits()
        self._binding = endpoint
        self._request = encode(AdmitRequest(OLDEST_PROTOCOL, PROTOCOL, version, os.urandom(SESSION_BYTES), ask=ask))

    async def run(self, nodes: Sequence[Asked], on_waiting: Callable[[NodeId], None]) -> Invite:
        """Ask until somebody says yes; `on_waiting`: a node has taken the request, and its user is to answer.

        Raises MeshError: request_denied, request_expired, or why no node takes the request.
        """
        endpoint = await Endpoint.bind(self._key, self._binding)
        scope = TaskScope("asking")
        try:
            return await self._run(endpoint, scope, list(nodes[:MAX_ASKED]), on_waiting)
        finally:
            await scope.close()
            await endpoint.close()

    async def _run(
        self, endpoint: Endpoint, scope: TaskScope, nodes: list[Asked], on_waiting: Callable[[NodeId], None]
    ) -> Invite:
        began = time.monotonic()
        taken: set[NodeId] = set()
        problem = refusal_error(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
        while nodes:
            outcomes = await asyncio.gather(*(self._ask(endpoint, scope, asked) for asked in nodes))
            for asked, outcome in zip(list(nodes), outcomes, strict=True):
                if isinstance(outcome, Invite):
                    return outcome
                if isinstance(outcome, ConnectionError):
                    problem = _unreachable(outcome)
                    continue
                if outcome.subject is Subject.REQUEST and outcome.permanent:
                    raise refusal_error(outcome)
                if outcome.reason is Reason.PENDING:
                    if asked.node not in taken:
                        taken.add(asked.node)
                        on_waiting(asked.node)
                elif outcome.reason is not Reason.BUSY:
                    nodes.remove(asked)
                    problem = refusal_error(outcome)
                else:
                    problem = refusal_error(outcome)
            if time.monotonic() - began > (self._limits.approval_wait if taken else GIVE_UP_SECONDS):
                problem = refusal_error(Refusal(Reason.EXPIRED, Subject.REQUEST)) if taken else problem
                break
            await asyncio.sleep(ASK_EVERY_SECONDS)
        raise problem

    async def _ask(self, endpoint: Endpoint, scope: TaskScope, asked: Asked) -> Invite | Refusal | ConnectionError:
        try:
            connection = await endpoint.connect(asked.node, asked.addresses, "", self._limits.dial_timeout)
        except ConnectionError as error:
            return error
        try:
            async with asyncio.timeout(self._limits.admission_timeout):
                raw = await connection.open_bi()
                stream = IrohStream(raw, scope, unsent=encode_header(StreamType.ADMIT))
                try:
                    await stream.write_frame(self._request)
                    await stream.finish()
                    payload = await stream.read_frame(MAX_ADMIT_FRAME)
                finally:
                    stream.abort()
        except TimeoutError:
            return ConnectionError("it did not answer the request")
        except iroh.IrohError as error:
            return stream_failure(error)
        except ConnectionError as error:
            return error
        finally:
            connection.close(int(CloseCode.GOODBYE), b"asked")
        return self._read(payload, asked.node)

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
