"""Messages of the mesh: what is verified, what is dropped, and who is thrown out for it."""

import msgspec
from tests.integration.net_nodes import MeshNode, PlainCodec, join, running

from mesh_llm.core.types.announcement import SignedAnnouncement
from mesh_llm.core.types.events import MessageReceived, PeerLost, SendFailed
from mesh_llm.core.types.gossip import MAX_DIGESTS, Ack, Digest, Exchange, MeshMessage, Ping
from mesh_llm.core.types.ids import Incarnation, MeshId, NodeId
from mesh_llm.net.admission.credentials import SigningKey, verify
from mesh_llm.wire.codec import ANNOUNCEMENT, key_of, statement
from mesh_llm.wire.mesh.frames import StreamType

DAY = 86400.0


def is_exchange(event: MessageReceived) -> bool:
    return isinstance(event.message, Exchange)


def say(speaker: MeshNode, listener: MeshNode, message: MeshMessage) -> None:
    speaker.net.send(listener.net.node_id, message, listener.net.reachable().addresses)


async def test_messages_arrive_in_order_and_as_they_were():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            digest = Digest(node=member.net.node_id, incarnation=Incarnation(1), sequence=4)
            for nonce in range(50):
                say(member, founder, Ping(nonce=nonce))
            say(member, founder, Exchange(digests=(digest,), reply=True, fingerprint=7))
            say(founder, member, Ack(nonce=1, about=NodeId("a" * 64)))
            await founder.seen(MessageReceived, lambda event: event.message == Ping(nonce=49))
            exchange = await founder.seen(MessageReceived, is_exchange)
            assert exchange.message == Exchange(digests=(digest,), reply=True, fingerprint=7)
            assert (await member.seen(MessageReceived)).message == Ack(nonce=1, about=NodeId("a" * 64))
            pings = [
                event.message.nonce
                for event in founder.events
                if isinstance(event, MessageReceived) and isinstance(event.message, Ping)
            ]
            assert pings == list(range(50))


async def test_own_word_is_signed_once_and_carries_the_certificate():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            for _ in range(2):
                say(member, founder, Exchange(entries=(member.announcement(sequence=3),)))
            await founder.seen(MessageReceived, is_exchange)
            event = await founder.seen(MessageReceived, is_exchange)
            assert isinstance(event.message, Exchange)
            (entry,) = event.message.entries
            assert entry.announcement.certificate == member.net.credentials.encoded
            assert verify(key_of(member.net.node_id), statement(ANNOUNCEMENT, entry.payload), entry.signature)
            sealed = member.net.guard.seal(member.announcement(sequence=3))
            assert sealed is member.net.guard.seal(member.announcement(sequence=3))
            assert sealed is not member.net.guard.seal(member.announcement(sequence=4))


async def test_others_words_are_passed_on_and_verified_by_everybody():
    founder = MeshNode()
    async with running(founder):
        one, two = MeshNode(founder.net.invite_book.token()), MeshNode(founder.net.invite_book.token())
        async with running(one, two):
            await join(one, two)
            say(one, founder, Exchange(entries=(one.announcement(),)))
            event = await founder.seen(MessageReceived, is_exchange)
            assert isinstance(event.message, Exchange)
            say(founder, two, Exchange(entries=event.message.entries))
            passed = await two.seen(MessageReceived, is_exchange)
            assert isinstance(passed.message, Exchange)
            assert passed.message.entries == event.message.entries
            # Where it can be dialled is known from its own word.
            assert two.net.connections.addresses.find(one.net.node_id).addresses == one.net.reachable().addresses


def forged(liar: MeshNode, **changes: object) -> SignedAnnouncement:
    """A word that claims something else than what was signed."""
    sealed = liar.net.guard.seal(liar.announcement())
    announcement = msgspec.structs.replace(sealed.announcement, **changes)
    payload = PlainCodec().encode_announcement(announcement)
    return SignedAnnouncement(announcement=announcement, payload=payload, signature=sealed.signature)


async def expelled(liar: MeshNode, listener: MeshNode, entry: SignedAnnouncement) -> str:
    say(liar, listener, Exchange(entries=(entry,)))
    lost = await liar.seen(PeerLost, lambda event: event.node == listener.net.node_id)
    assert not [event for event in listener.events if isinstance(event, MessageReceived)]
    return lost.reason


async def test_a_changed_word_is_not_believed():
    founder = MeshNode()
    async with running(founder):
        liar = MeshNode(founder.net.invite_book.token())
        async with running(liar):
            await join(liar)
            assert "forged" in await expelled(liar, founder, forged(liar, name="somebody else"))


async def test_a_word_in_anothers_name_is_not_believed():
    founder = MeshNode()
    async with running(founder):
        liar = MeshNode(founder.net.invite_book.token())
        async with running(liar):
            await join(liar)
            assert "forged" in await expelled(liar, founder, forged(liar, node=founder.net.node_id))


async def test_a_word_of_another_mesh_is_not_believed():
    founder = MeshNode()
    async with running(founder):
        liar = MeshNode(founder.net.invite_book.token())
        async with running(liar):
            await join(liar)
            other = MeshId(SigningKey.generate().public.hex())
            assert "other_mesh" in await expelled(liar, founder, forged(liar, mesh=other))


async def test_a_node_without_admission_cannot_be_announced():
    founder = MeshNode()
    async with running(founder):
        liar = MeshNode(founder.net.invite_book.token())
        async with running(liar):
            await join(liar)
            # A key of its own making, properly signed, with the liar's certificate.
            ghost = SigningKey.generate()
            announcement = msgspec.structs.replace(
                liar.announcement().announcement, node=ghost.node_id, certificate=liar.net.credentials.encoded
            )
            payload = PlainCodec().encode_announcement(announcement)
            entry = SignedAnnouncement(
                announcement=announcement, payload=payload, signature=ghost.sign(statement(ANNOUNCEMENT, payload))
            )
            assert "forged" in await expelled(liar, founder, entry)


async def test_an_expired_word_is_dropped_but_whoever_passes_it_on_is_no_liar():
    founder = MeshNode()
    async with running(founder):
        one, two = (
            MeshNode(founder.net.invite_book.token()),
            MeshNode(founder.net.invite_book.token(), sample_period=DAY),
        )
        async with running(one, two):
            await join(one, two)
            # It must not check its connections meanwhile: by its clock the founder's admission has ended too.
            old = one.net.guard.seal(one.announcement())
            two.offset += 91 * DAY
            founder.net.send(two.net.node_id, Exchange(entries=(old,)), two.net.reachable().addresses)
            event = await two.seen(MessageReceived)
            assert isinstance(event.message, Exchange)
            assert event.message.entries == ()


async def test_a_malformed_message_ends_the_connection():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)

            class Garbling(PlainCodec):
                def encode(self, message: MeshMessage) -> bytes:
                    return b"\xc1 no message"

            member.net.gossip.codec = Garbling()
            say(member, founder, Ping(nonce=1))
            lost = await member.seen(PeerLost)
            assert "malformed" in lost.reason


async def test_a_flood_is_slowed_down_and_nothing_grows():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            digests = tuple(
                Digest(node=NodeId(f"{number:064x}"), incarnation=Incarnation(1), sequence=1)
                for number in range(MAX_DIGESTS)
            )
            for _ in range(200):
                say(member, founder, Exchange(digests=digests))
            say(member, founder, Ping(nonce=1))
            await founder.seen(MessageReceived, lambda event: event.message == Ping(nonce=1))
            assert member.net.gossip.queue(founder.net.node_id, StreamType.GOSSIP).dropped > 0
            assert not [event for event in member.events if isinstance(event, SendFailed | PeerLost)]


async def test_passive_nodes_neither_send_nor_get_gossip():
    founder = MeshNode()
    async with running(founder):
        client = MeshNode(founder.net.create_invite("client", 3600.0, None).token, client=True)
        async with running(client):
            await join(client)
            say(client, founder, Ping(nonce=1))
            say(founder, client, Ping(nonce=2))
            member = MeshNode(founder.net.invite_book.token())
            async with running(member):
                await join(member)
                say(member, founder, Ping(nonce=3))
                await founder.seen(MessageReceived, lambda event: event.message == Ping(nonce=3))
            assert not [event for event in client.events if isinstance(event, MessageReceived)]
            assert len([event for event in founder.events if isinstance(event, MessageReceived)]) == 1
