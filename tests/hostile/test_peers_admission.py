"""Strangers at the door of a real node: whatever they show, say or leave out, they stay out, and the mesh serves."""

import asyncio
import contextlib
import struct
import time
from typing import Any

import msgspec
import pytest
from tests.chaos.watch import grown, holding
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import alive, chat, content, until
from tests.support.rogue import YEAR, Rogue, Treason, crowd, logged, refused, rogue

from mesh_llm.core.types.gossip import Ping
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import AdmitRequest, Admitted, Reason, Refused, Scope
from mesh_llm.wire.mesh.certificates import Certificate, Link, decode_certificate, founder_certificate
from mesh_llm.wire.mesh.frames import CloseCode, StreamType, encode_header, frame
from mesh_llm.wire.mesh.gossip import encode_message
from mesh_llm.wire.mesh.invites import Invite, issue_invite, parse_invite

pytestmark = pytest.mark.timeout(240)

KNOCKS = 150
MOST_GROWTH_MB = 120.0
KINDS = [kind for kind in StreamType if kind is not StreamType.ADMIT]


async def serves(*nodes: NodeProcess) -> None:
    """Each node sees the other, and answers."""
    for node in nodes:
        await until(node, lambda status: any(peer["state"] == "alive" for peer in status["peers"]), "with the other")
        assert content(await chat(node, "tiny"))


async def uninvited(node: NodeProcess) -> None:
    """Every stream but ADMIT, and types that do not exist; then the door is shut."""
    async with rogue(node) as stranger:
        for kind in (*KINDS[:5], 200):
            header = encode_header(kind) if isinstance(kind, StreamType) else frame(b"\x92\xcc\xc8\xc4\x00")
            assert await refused(await stranger.raw(header)) in {"NOT_ADMITTED", "closed"}
        assert (await stranger.closed())[1] is CloseCode.NOT_ADMITTED


async def false_papers(node: NodeProcess, other: NodeProcess) -> None:
    """Certificates that are forged, run out, stolen, of another mesh, or give more than their issuer had."""
    treason, key, self_made = Treason(node.options.home), SigningKey.generate(), SigningKey.generate()
    good = treason.certificate(key, Scope.SERVE)
    (stolen_file,) = (other.options.home / "mesh").glob("*/certificate")
    stolen = decode_certificate(stolen_file.read_bytes())
    assert isinstance(stolen, Certificate)
    client = treason.certificate(SigningKey.generate(), Scope.CLIENT)
    widened = Certificate(
        client.mesh,
        (*client.links, Link(key.public, Scope.SPLIT, client.expires, bytes(16), bytes(64), client.links[-1].node)),
    )
    papers = {
        Reason.EXPIRED: treason.certificate(key, Scope.SERVE, expires=time.time() - 60),
        Reason.OTHER_MESH: founder_certificate(self_made.public, key.public, good.expires, self_made.sign),
        Reason.FORGED: _with_last(good, scope=Scope.SPLIT),
        Reason.WRONG_SCOPE: widened,
        # It does not say whose invite it came by.
        Reason.OTHER_VERSION: _with_last(good, inviter=None),
    }

    async def try_with(reason: Reason, paper: Certificate) -> None:
        async with rogue(node, key) as stranger:
            reply = await stranger.show(paper)
            assert isinstance(reply, Refused), reason
            assert reply.refusal.reason is reason
            # It is told why, and may do no more than before.
            assert await refused(await stranger.typed(StreamType.GOSSIP)) in {"NOT_ADMITTED", "closed"}

    await asyncio.gather(*(try_with(*pair) for pair in [*papers.items(), (Reason.FORGED, stolen)]))


def _with_last(certificate: Certificate, **changes: Any) -> Certificate:
    last = msgspec.structs.replace(certificate.links[-1], **changes)
    return Certificate(certificate.mesh, (*certificate.links[:-1], last))


async def false_invites(node: NodeProcess) -> None:
    """Invites that are used up, revoked or changed; shown again and again."""
    code, text = await node.cli("invite", "create", "--scope", "serve", "--uses", "1")
    assert code == 0
    single = _invite(text)
    async with rogue(node) as first:
        assert isinstance(await first.show(None, encode(single)), Admitted)
    # A member's key signs for longer than it is a member itself, and after that.
    treason, member = Treason(node.options.home), SigningKey.generate()
    bold = {
        Reason.WRONG_SCOPE: _by(member, treason.certificate(member, Scope.SERVE, expires=time.time() + 9000), single),
        Reason.EXPIRED: _by(member, treason.certificate(member, Scope.SERVE, expires=time.time() - 60), single),
    }
    forged = Invite(single.terms, single.chain, single.signature[:-1] + bytes([single.signature[-1] ^ 1]))
    revoked = _invite((await node.cli("invite", "create", "--scope", "serve"))[1])
    assert (await node.cli("invite", "revoke", revoked.id.hex()[:16]))[0] == 0
    for invite, reason in (
        (single, Reason.USES_EXHAUSTED),
        (forged, Reason.FORGED),
        (revoked, Reason.REVOKED),
        *((invite, reason) for reason, invite in bold.items()),
    ):
        async with rogue(node) as stranger:
            reply = await stranger.show(None, encode(invite))
            assert isinstance(reply, Refused)
            assert reply.refusal.reason is reason


def _by(member: SigningKey, papers: Certificate, example: Invite) -> Invite:
    """An invite of ten years by this member."""
    contact = msgspec.structs.replace(example.terms.contacts[0], node=member.public)
    expires = int(time.time()) + 10 * YEAR
    terms = msgspec.structs.replace(example.terms, contacts=(contact,), expires=expires, uses=0)
    invite = issue_invite(terms, None, member.sign)
    assert isinstance(invite, Invite)
    return msgspec.structs.replace(invite, chain=papers.links)


def _invite(text: str) -> Invite:
    invite = parse_invite(text.strip())
    assert isinstance(invite, Invite)
    return invite


async def bad_manners(node: NodeProcess) -> None:
    """Huge, broken off, out of order, no MessagePack, nested without end."""
    admit = encode_header(StreamType.ADMIT)
    request = frame(encode(AdmitRequest(2, 2, "rogue", b"session1")))
    openings = [
        struct.pack(">I", 2**32 - 1) + b"x",
        frame(b"\x92\x01\xc5\xff\xff" + bytes(9000)),
        admit + struct.pack(">I", 2**31) + b"x" * 1000,
        admit + frame(bytes(32 * 1024 + 1)),
        admit + frame(b"\xc1"),
        admit + frame(b"\x91" * 10_000),
        admit + frame(encode(Admitted(2, "v", b"session1", b"", b""))),
        admit + frame(encode_message(Ping(nonce=1))),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        request,
    ]
    for opening in openings:
        async with rogue(node) as stranger:
            assert await refused(await stranger.raw(opening)) in {"PROTOCOL", "NOT_ADMITTED"}
    for cut in (2, 6, len(admit), len(admit) + 2, len(admit) + len(request) - 1):
        async with rogue(node) as stranger:
            stream = await stranger.raw((admit + request)[:cut])
            await stream.finish()
            assert await refused(stream) == "PROTOCOL"


async def slow(node: NodeProcess) -> None:
    """Nothing, or a byte now and then: the door shuts ten seconds after the handshake."""

    async def drip(stranger: Rogue) -> None:
        stream = await stranger.raw()
        for byte in encode_header(StreamType.ADMIT) + bytes(100):
            await stream.write(bytes([byte]))
            await asyncio.sleep(0.5)

    async with rogue(node) as silent, rogue(node) as dripping:
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(_until_broken(drip(dripping)))
            assert (await silent.closed())[1] is CloseCode.NOT_ADMITTED
            assert (await dripping.closed())[1] is CloseCode.NOT_ADMITTED
            await task
        assert time.monotonic() - began < 18.0


async def _until_broken(speaking: object) -> None:
    with contextlib.suppress(ConnectionError):
        await speaking  # type: ignore[misc]


async def flood(node: NodeProcess) -> int:
    """Far more connections than may be, all at once; how many were let to the door."""

    async with crowd(node) as one_more:

        async def knock() -> bool:
            try:
                return isinstance(await (await one_more()).show(), Refused)
            except (ConnectionError, TimeoutError):
                return False

        return sum(await asyncio.gather(*(knock() for _ in range(KNOCKS))))


async def test_strangers_stay_outside_and_the_mesh_serves(start_node: StartNode) -> None:
    arguments = ["--log-level", "debug"]
    first = await start_node("a", models=["tiny"], arguments=arguments)
    second = await start_node("b", models=["tiny"], join=[await first.invite()], arguments=arguments)
    await until(first, alive(1), "with the second")
    await serves(first, second)
    before = await holding(first)
    await asyncio.gather(
        slow(first), uninvited(first), false_papers(first, second), false_invites(first), bad_manners(first)
    )
    await serves(first, second)
    assert await flood(first) < KNOCKS
    await serves(first, second)
    peak = await holding(first)
    assert await flood(first) < KNOCKS
    await serves(first, second)
    assert [peer["name"] for peer in (await first.status())["peers"]] == [(await second.status())["name"]]
    log = logged(first)
    for reason in ("expired", "other_mesh", "forged", "wrong_scope", "uses_exhausted", "revoked"):
        assert f"reason={reason}" in log, reason
    assert "task failed" not in log
    after = await holding(first)
    # Those that were still being turned away go within their deadlines.
    async with asyncio.timeout(60):
        while grown(before, after, rss_mb=MOST_GROWTH_MB) or grown(peak, after):
            after = await holding(first)
    assert not grown(before, after, rss_mb=MOST_GROWTH_MB), (before, after)
    # What a flood leaves is room that the next one uses, and no more.
    assert not grown(peak, after), (peak, after)
