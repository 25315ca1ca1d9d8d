"""Admitted members that lie: forged announcements and deaths, ghosts and floods. Real nodes keep serving."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

import msgspec
import pytest
from tests.chaos.watch import grown, holding
from tests.support.fixtures import StartNode
from tests.support.node import NodeProcess
from tests.support.pool import alive, chat, content, until, warm
from tests.support.rogue import Rogue, Treason, logged, place, rogue

from mesh_llm.core.types.announcement import Serving, SignedAnnouncement
from mesh_llm.core.types.gossip import Ack, Digest, Exchange, MeshMessage, Ping, PingRequest, Verdict
from mesh_llm.core.types.ids import Incarnation, MeshId, ModelName, NodeId
from mesh_llm.core.types.model import ModelStatus
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.certificates import Certificate, issue_certificate
from mesh_llm.wire.mesh.frames import MAX_GOSSIP_FRAME, CloseCode, StreamType, encode_header, frame
from mesh_llm.wire.mesh.gossip import decode_message

pytestmark = pytest.mark.timeout(240)

GHOSTS = 200
FLOOD = 3000
MOST_GROWTH_MB = 120.0


class Mesh:
    """Two honest nodes, the keys of the first one, and traitors that it admitted."""

    def __init__(self, first: NodeProcess, second: NodeProcess, other: NodeId) -> None:
        self.first, self.second, self.other = first, second, other
        self.treason = Treason(first.options.home)

    @contextlib.asynccontextmanager
    async def traitor(self) -> AsyncGenerator[tuple[Rogue, Certificate]]:
        """A member of scope serve, connected to the first node."""
        key = SigningKey.generate()
        certificate = self.treason.certificate(key, Scope.SERVE)
        async with rogue(self.first, key) as liar:
            await liar.enter(certificate)
            yield liar, certificate

    async def serves(self) -> None:
        """Both answer, each sees the other, and neither was ever considered dead."""
        for node in (self.first, self.second):
            assert content(await chat(node, "tiny"))
        assert await self.lost() == []

    async def lost(self) -> list[str]:
        """Notices of the first node that the second was lost."""
        notices = (await self.first.console.get("/api/notices")).expect().json()
        listed = notices["notices"] if isinstance(notices, dict) else notices
        return [one["text"] for one in listed if one["code"] == "peer_lost" and self.other[:10] in one["text"]]

    async def life(self) -> Incarnation:
        """The second node's present incarnation, from the first node's gossip."""
        async with self.traitor() as (liar, _):
            return (await heard_of(liar, self.other)).announcement.incarnation


async def heard_of(liar: Rogue, node: NodeId) -> SignedAnnouncement:
    """Request a node's announcement, as any member may, and wait for it."""
    async with asyncio.timeout(20):
        await liar.gossip(Exchange(wanted=(node,), reply=True))
        while True:
            stream = await liar.accept()
            kind = await stream.read_frame(9000)
            while kind is not None and (payload := await stream.read_frame(MAX_GOSSIP_FRAME)) is not None:
                message = decode_message(payload)
                for entry in message.entries if isinstance(message, Exchange) else ():
                    if entry.announcement.node == node:
                        return entry


Lie = Callable[[Rogue, Certificate], Coroutine[Any, Any, MeshMessage | bytes]]


async def expelled(mesh: Mesh, say: Lie) -> str:
    """Send a false message as a traitor; the node disconnects it and gives the reason."""
    async with mesh.traitor() as (liar, certificate):
        said = await say(liar, certificate)
        if isinstance(said, bytes):
            await liar.raw(encode_header(StreamType.GOSSIP) + said)
        else:
            await liar.gossip(said)
        try:
            words, code = await liar.closed()
        except TimeoutError:
            raise AssertionError(f"{say.__name__}: not thrown out") from None
        assert code is CloseCode.PROTOCOL, (words, code)
    return words


async def forged_words(mesh: Mesh) -> None:
    """Announcements that differ from what their nodes signed."""

    async def by_another(liar: Rogue, certificate: Certificate) -> Exchange:
        return Exchange(entries=(liar.signed(liar.word(certificate), SigningKey.generate()),))

    async def in_anothers_name(liar: Rogue, certificate: Certificate) -> Exchange:
        return Exchange(entries=(liar.signed(liar.word(certificate, node=mesh.other, incarnation=2**50)),))

    async def last_word_of_another(liar: Rogue, _: Certificate) -> Exchange:
        true = await heard_of(liar, mesh.other)
        gone = msgspec.structs.replace(true.announcement, sequence=true.announcement.sequence + 1, left=True)
        return Exchange(entries=(liar.signed(gone),))

    async def of_another_mesh(liar: Rogue, certificate: Certificate) -> Exchange:
        return Exchange(entries=(liar.signed(liar.word(certificate, mesh=MeshId("e" * 64))),))

    async def with_anothers_papers(liar: Rogue, certificate: Certificate) -> Exchange:
        true = await heard_of(liar, mesh.other)
        return Exchange(entries=(liar.signed(liar.word(certificate, certificate=true.announcement.certificate)),))

    async def false_revocation(_: Rogue, __: Certificate) -> Exchange:
        return Exchange(revocations=(bytes(200),))

    async def garbage(_: Rogue, __: Certificate) -> bytes:
        return frame(b"\xc1" * 1000)

    async def endless_nesting(_: Rogue, __: Certificate) -> bytes:
        return frame(b"\x97" + b"\x91" * 20_000)

    async def too_many(liar: Rogue, _: Certificate) -> Exchange:
        return Exchange(verdicts=tuple(verdict(NodeId(f"{n:064x}"), 1, mesh.other) for n in range(300)))

    for say in (
        by_another,
        in_anothers_name,
        last_word_of_another,
        of_another_mesh,
        with_anothers_papers,
        false_revocation,
        garbage,
        endless_nesting,
        too_many,
    ):
        words = await expelled(mesh, say)
        assert "false" in words or "malformed" in words, (say.__name__, words)


def verdict(node: NodeId, life: int, by: NodeId) -> Verdict:
    return Verdict(node=node, incarnation=Incarnation(life), state="d", by=by)


async def forged_deaths(mesh: Mesh) -> None:
    """Living nodes are reported dead, in every node's name, a hundred times."""
    life = await mesh.life()
    accusers = [mesh.other, mesh.treason.node.node_id, *(SigningKey.generate().node_id for _ in range(20))]
    async with mesh.traitor() as (liar, _), mesh.traitor() as (accomplice, _):
        for _ in range(100):
            deaths = Exchange(verdicts=tuple(verdict(mesh.other, life, by) for by in accusers))
            digests = Exchange(digests=(Digest(mesh.other, life, 2**40, "d"),), reply=True)
            await asyncio.gather(*(one.gossip(deaths, digests) for one in (liar, accomplice)))
            if liar.connection.close_reason() is not None:
                break
        await mesh.serves()
    await until(mesh.first, lambda status: seen_alive(status, mesh.other), "seeing the second alive")


def seen_alive(status: dict[str, object], node: NodeId) -> bool:
    peers = status["peers"]
    assert isinstance(peers, list)
    return any(peer["node_id"] == node and peer["state"] == "alive" for peer in peers)


async def replays(mesh: Mesh) -> None:
    """A valid announcement, sent again and again; and an outdated one."""
    async with mesh.traitor() as (liar, _):
        true = await heard_of(liar, mesh.other)
        for _ in range(50):
            await liar.gossip(Exchange(entries=(true,) * 20))
            if liar.connection.close_reason() is not None:
                break
    assert await mesh.life() >= true.announcement.incarnation


async def ghosts(mesh: Mesh) -> None:
    """A member invites two hundred machines that do not exist, all announced as warm, idle and very fast."""
    async with mesh.traitor() as (liar, certificate):
        serving = Serving(model=ModelName("tiny"), status=ModelStatus.WARM, slots=100, tokens_per_second=1e6)
        entries: list[SignedAnnouncement] = []
        for number in range(GHOSTS):
            ghost = SigningKey.generate()
            made = issue_certificate(
                certificate, ghost.public, Scope.SERVE, certificate.expires, bytes(16), liar.key.sign
            )
            assert isinstance(made, Certificate)
            word = liar.word(
                certificate,
                node=ghost.node_id,
                certificate=encode(made),
                serving=(serving,),
                addresses=(f"127.0.0.1:{20_000 + number}",),
            )
            entries.append(liar.signed(word, ghost))
        for start in range(0, GHOSTS, 10):
            await liar.gossip(Exchange(entries=tuple(entries[start : start + 10])))
        for _ in range(5):
            began = time.monotonic()
            assert content(await chat(mesh.first, "tiny"))
            assert time.monotonic() - began < 15.0
    await mesh.serves()


async def floods(mesh: Mesh) -> None:
    """As much gossip and as many probes as a connection carries, as long as the node reads them."""
    async with mesh.traitor() as (liar, _):
        digests = tuple(Digest(NodeId(f"{number:064x}"), Incarnation(1), 1) for number in range(192))
        gossip = await liar.gossip(Exchange(digests=digests, reply=True))
        probes = await liar.raw(encode_header(StreamType.PROBE))
        async with asyncio.TaskGroup() as group:
            flooding = [
                group.create_task(pour(gossip, Exchange(digests=digests, reply=True))),
                group.create_task(pour(probes, PingRequest(nonce=1, target=mesh.other), Ping(nonce=2), Ack(nonce=3))),
            ]
            for _ in range(20):
                await mesh.serves()
            for task in flooding:
                task.cancel()


async def pour(stream: object, *messages: MeshMessage) -> None:
    from mesh_llm.net.quic.streams import IrohStream
    from mesh_llm.wire.mesh.gossip import encode_message

    assert isinstance(stream, IrohStream)
    block = b"".join(frame(encode_message(message)) for message in messages) * 8
    with contextlib.suppress(ConnectionError):
        for _ in range(FLOOD):
            await stream.write(block)


async def test_liars_and_floods_change_nothing_and_the_mesh_serves(start_node: StartNode) -> None:
    arguments = ["--log-level", "debug"]
    first = await start_node("a", models=["tiny"], arguments=arguments)
    second = await start_node("b", models=["tiny"], join=[await first.invite()], arguments=arguments)
    await asyncio.gather(until(first, alive(1), "with the second"), until(second, warm("tiny", 2), "serving"))
    mesh = Mesh(first, second, (await place(second))[0])
    await mesh.serves()
    before = await holding(first)
    for attack in (forged_words, forged_deaths, replays, floods, ghosts):
        began = time.monotonic()
        await attack(mesh)
        await mesh.serves()
        print(f"{attack.__name__}: {time.monotonic() - began:.1f} s")
    log = logged(first)
    for reason in ("a false announcement: forged", "a false announcement: other_mesh", "a malformed message"):
        assert reason in log, reason
    assert "a false revocation" in log
    assert "task failed" not in log
    # The node notices that the ghosts do not exist, and forgets them.
    gone = await until(first, lambda status: [p["node_id"] for p in status["peers"]] == [mesh.other], "rid of all", 120)
    print(f"forgotten after {gone:.1f} s")
    async with asyncio.timeout(60):
        while grown(before, await holding(first), rss_mb=MOST_GROWTH_MB):
            await mesh.serves()
    print(f"{before}\n{await holding(first)}")
