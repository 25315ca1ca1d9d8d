"""A machine without an invite asks nodes of a mesh to let it in, again and again until their user has answered.

Whom it asks is only known by key: what the network says of mesh and names is a claim. The invite that comes back is
checked against the mesh's key before anything is joined.
"""

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import iroh

from mesh_llm.core.errors import MeshError
from mesh_llm.core.ids import MeshId, NodeId
from mesh_llm.net.endpoint import Endpoint, EndpointSettings
from mesh_llm.net.identity import SigningKey, verify
from mesh_llm.net.iroh_errors import stream_failure
from mesh_llm.net.limits import NetLimits
from mesh_llm.net.streams import IrohStream
from mesh_llm.runtime.tasks import TaskScope
from mesh_llm.wire.admit import SESSION_BYTES, AdmitRequest, Approved, Ask, Refused, decode_reply, encode_request
from mesh_llm.wire.certificate import NothingRevoked
from mesh_llm.wire.decoding import Malformed
from mesh_llm.wire.frames import MAX_ADMIT_FRAME, OLDEST_PROTOCOL, PROTOCOL, CloseCode, StreamType, encode_header
from mesh_llm.wire.invite import Invite, check_invite, decode_invite
from mesh_llm.wire.refusal import Reason, Refusal, Subject, describe

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
        ask: Ask,
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
        self._request = encode_request(
            AdmitRequest(OLDEST_PROTOCOL, PROTOCOL, version, os.urandom(SESSION_BYTES), ask=ask)
        )

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
        problem = describe(Refusal(Reason.NOTHING_SHOWN, Subject.NODE))
        while nodes:
            outcomes = await asyncio.gather(*(self._ask(endpoint, scope, asked) for asked in nodes))
            for asked, outcome in zip(list(nodes), outcomes, strict=True):
                if isinstance(outcome, Invite):
                    return outcome
                if isinstance(outcome, ConnectionError):
                    problem = _unreachable(outcome)
                    continue
                if outcome.subject is Subject.REQUEST and outcome.permanent:
                    raise describe(outcome)
                if outcome.reason is Reason.PENDING:
                    if asked.node not in taken:
                        taken.add(asked.node)
                        on_waiting(asked.node)
                elif outcome.reason is not Reason.BUSY:
                    nodes.remove(asked)
                    problem = describe(outcome)
                else:
                    problem = describe(outcome)
            if time.monotonic() - began > (self._limits.approval_wait if taken else GIVE_UP_SECONDS):
                problem = describe(Refusal(Reason.EXPIRED, Subject.REQUEST)) if taken else problem
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
        reply = Malformed("no reply") if payload is None else decode_reply(payload)
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
