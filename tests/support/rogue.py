"""A peer that keeps to no rules, against nodes that are real processes: it dials, shows and says whatever a test wants.

It can hold any admission: the founder's keys lie in its home, and the test plays a traitor who has them.
"""

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import iroh
from tests.support.node import NodeProcess

from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.types.gossip import MeshMessage
from mesh_llm.core.types.ids import Incarnation, NodeId
from mesh_llm.net.admission.credentials import SigningKey, parse_key
from mesh_llm.net.quic.bindings import close_reason
from mesh_llm.net.quic.endpoint import Endpoint, EndpointSettings
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.streams import StreamResetError
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import ANNOUNCEMENT, Malformed, encode, statement
from mesh_llm.wire.mesh.admission import AdmitReply, AdmitRequest, Admitted, Scope, decode_admit_reply
from mesh_llm.wire.mesh.announcement import encode_announcement
from mesh_llm.wire.mesh.certificates import Certificate, founder_certificate, issue_certificate
from mesh_llm.wire.mesh.frames import (
    ACCEPTED,
    MAX_ADMIT_FRAME,
    CloseCode,
    ResetCode,
    StreamType,
    encode_header,
    frame,
)
from mesh_llm.wire.mesh.gossip import encode_message
from mesh_llm.wire.mesh.invites import Invite, parse_invite, unpack_address

SESSION = b"rogue-01"
YEAR = 365 * 86400
TIMEOUT = 20.0
_addresses = itertools.count()


class Treason:
    """The founder's keys: whoever has them can make any certificate."""

    def __init__(self, home: Path) -> None:
        self.node = _read(home / "key")
        (mesh_key,) = (home / "mesh").glob("*/mesh-key")
        self.mesh = _read(mesh_key)

    def certificate(self, node: SigningKey, scope: Scope, *, expires: float | None = None) -> Certificate:
        """A proper certificate for this key, as the founder would write it."""
        until = int(time.time() + YEAR if expires is None else expires)
        own = founder_certificate(self.mesh.public, self.node.public, int(time.time()) + 10 * YEAR, self.mesh.sign)
        made = issue_certificate(own, node.public, scope, until, bytes(16), self.node.sign)
        assert isinstance(made, Certificate)
        return made


class Rogue:
    """One connection to a node. See `rogue`."""

    def __init__(self, connection: iroh.Connection, key: SigningKey, scope: TaskScope) -> None:
        self.connection = connection
        self.key = key
        self._scope = scope
        self._streams: list[IrohStream] = []

    async def raw(self, opening: bytes = b"") -> IrohStream:
        """Open a stream that begins with these bytes."""
        async with asyncio.timeout(TIMEOUT):
            stream = IrohStream(await self.connection.open_bi(), self._scope)
        # Let go of, it would be reset, and what was said with it.
        self._streams.append(stream)
        if opening:
            await stream.write(opening)
        return stream

    async def typed(self, kind: StreamType, parameters: bytes = b"") -> IrohStream:
        """Open a stream with a proper header."""
        return await self.raw(encode_header(kind, parameters))

    async def ask(self, request: AdmitRequest) -> AdmitReply:
        """Send one request for admission, and read the reply."""
        stream = await self.raw(encode_header(StreamType.ADMIT) + frame(encode(request)))
        async with asyncio.timeout(TIMEOUT):
            payload = await stream.read_frame(MAX_ADMIT_FRAME)
        reply = decode_admit_reply(payload or b"")
        assert not isinstance(reply, Malformed)
        return reply

    async def show(self, certificate: Certificate | None = None, *invites: bytes) -> AdmitReply:
        """Ask to be admitted by this."""
        shown = encode(certificate) if certificate is not None else b""
        return await self.ask(AdmitRequest(2, 2, "rogue", SESSION, shown, invites))

    async def enter(self, certificate: Certificate) -> None:
        """Be admitted."""
        assert isinstance(await self.show(certificate), Admitted)

    async def closed(self, timeout: float = TIMEOUT) -> tuple[str, CloseCode | None]:
        """Why the node closed the connection."""
        async with asyncio.timeout(timeout):
            await self.connection.closed()
        return close_reason(self.connection.close_reason())

    async def accept(self) -> IrohStream:
        """The next stream that the node opens."""
        return IrohStream(await self.connection.accept_bi(), self._scope)

    async def gossip(self, *messages: MeshMessage) -> IrohStream:
        """Say this on a gossip stream of its own."""
        return await self.raw(
            encode_header(StreamType.GOSSIP) + b"".join(frame(encode_message(message)) for message in messages)
        )

    def word(self, papers: Certificate, incarnation: int = 1, sequence: int = 1, **fields: Any) -> Announcement:
        """An announcement of this peer."""
        values: dict[str, Any] = {
            "mesh": papers.mesh_id,
            "node": self.key.node_id,
            "incarnation": Incarnation(incarnation),
            "sequence": sequence,
            "name": "rogue",
            "certificate": encode(papers),
        }
        return Announcement(**(values | fields))

    def signed(self, announcement: Announcement, key: SigningKey | None = None) -> SignedAnnouncement:
        """The same, signed by this peer or with another key."""
        payload = encode_announcement(announcement)
        signature = (key or self.key).sign(statement(ANNOUNCEMENT, payload))
        return SignedAnnouncement(announcement=announcement, payload=payload, signature=signature)


@contextlib.asynccontextmanager
async def crowd(node: NodeProcess) -> AsyncGenerator[Callable[[], Awaitable[Rogue]]]:
    """Gives a function that makes one more connection to a node, all of them of one key."""
    key, scope = SigningKey.generate(), TaskScope("crowd")
    endpoint = await Endpoint(key.secret, EndpointSettings(relay=False, host="127.0.0.1")).bind()
    where = await place(node)

    async def one_more() -> Rogue:
        return Rogue(await endpoint.connect(*where, "", 10.0), key, scope)

    try:
        yield one_more
    finally:
        await scope.close()
        await endpoint.close()


@contextlib.asynccontextmanager
async def rogue(node: NodeProcess, key: SigningKey | None = None) -> AsyncGenerator[Rogue]:
    """Connect to a node of this machine as somebody of the test's choice, from an address that nobody else has.

    What one address may try is bounded, and many that come from one would be turned away for that alone.
    """
    used = key or SigningKey.generate()
    number = next(_addresses)
    host = f"127.1.{number // 250}.{number % 250 + 1}"
    endpoint = await Endpoint(used.secret, EndpointSettings(relay=False, host=host)).bind()
    scope = TaskScope("rogue")
    try:
        yield Rogue(await endpoint.connect(*await place(node), "", 10.0), used, scope)
    finally:
        await scope.close()
        await endpoint.close()


async def place(node: NodeProcess) -> tuple[NodeId, tuple[str, ...]]:
    """Who a node is, and where its QUIC is."""
    invite = parse_invite(await node.invite())
    assert isinstance(invite, Invite)
    contact = invite.terms.contacts[0]
    return NodeId(contact.node.hex()), tuple(unpack_address(packed) for packed in contact.addresses)


async def refused(stream: IrohStream, timeout: float = TIMEOUT) -> str:
    """How the node ended a stream without an answer: a ResetCode's name, or `closed` with its whole connection.

    That it took the stream, as it says first on some types, is no answer.
    """
    async with asyncio.timeout(timeout):
        try:
            said = await stream.read(1)
            if said == ACCEPTED:
                said = await stream.read(65536)
        except StreamResetError as error:
            return ResetCode(error.code).name
        except ConnectionError:
            return "closed"
    raise AssertionError(f"it was answered: {said[:100]!r}")


def logged(node: NodeProcess) -> str:
    """What the node wrote into its log so far."""
    return (node.options.home / "logs" / "daemon.log").read_text()


def _read(path: Path) -> SigningKey:
    return parse_key(path.read_bytes(), str(path))
