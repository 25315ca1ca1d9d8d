"""Members are raised and lowered while they run: real iroh on loopback."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from unittest.mock import AsyncMock

import msgspec
import pytest
from tests.integration.net_nodes import MeshNode, join, running, within

from mesh_llm.core.types.announcement import SignedAnnouncement, SplitOffer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import (
    AddressesChanged,
    MessageReceived,
    PeerConnected,
    PeerLost,
    RevocationLearned,
    ScopeLimited,
    UserWarned,
)
from mesh_llm.core.types.gossip import Exchange
from mesh_llm.net import grants
from mesh_llm.net.quic.connection import Peer, PeerConnection
from mesh_llm.net.quic.streams import IrohStream
from mesh_llm.net.streams import PeerStream
from mesh_llm.runtime.supervision import TaskScope
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.frames import StreamType, encode_header
from mesh_llm.wire.mesh.invites import Invite, parse_invite

DAY = 86400.0


def token(node: MeshNode, scope: str) -> str:
    return node.net.create_invite(scope, DAY, None).token


def invite(text: str) -> Invite:
    found = parse_invite(text)
    assert isinstance(found, Invite)
    return found


@asynccontextmanager
async def joined(founder: MeshNode, *scopes: str) -> AsyncGenerator[list[MeshNode]]:
    """A founder, and members that it admitted for these scopes."""
    async with running(founder):
        members = [MeshNode(token(founder, scope)) for scope in scopes]
        async with running(*members):
            await join(*members)
            for member in members:
                await founder.seen(PeerConnected, lambda event, member=member: event.node == member.net.node_id)
            yield members


async def set_scope(granter: MeshNode, member: MeshNode, scope: Scope) -> None:
    await within(20.0, granter.net.grant(member.net.node_id, "bob", scope))


async def gossip(sender: MeshNode, receiver: MeshNode, *revocations: bytes, known: bool = True) -> None:
    """What a core does: send on what is known."""
    where = receiver.net.reachable().addresses if known else ()
    sender.net.send(receiver.net.node_id, Exchange(revocations=revocations), where)


def claiming(node: MeshNode, sequence: int) -> SignedAnnouncement:
    """An announcement of a node that offers its memory to split models."""
    plain = node.announcement(sequence)
    announcement = msgspec.structs.replace(plain.announcement, offer=SplitOffer(memory_bytes=1))
    return msgspec.structs.replace(plain, announcement=announcement)


async def test_a_member_is_raised_over_its_connection_and_others_hear_it() -> None:
    founder = MeshNode()
    async with joined(founder, "serve", "serve") as (member, other):
        assert founder.net.scope_of(member.net.node_id) is Scope.SERVE
        member.net.send(other.net.node_id, Exchange(), other.net.reachable().addresses)
        await other.seen(PeerConnected, lambda event: event.node == member.net.node_id)
        await set_scope(founder, member, Scope.SPLIT)
        assert member.net.scope is Scope.SPLIT
        assert founder.net.scope_of(member.net.node_id) is Scope.SPLIT
        # The member's own core is told, to announce itself with what it has now.
        await member.seen(AddressesChanged)
        # It has shown its new certificate to whomever it was connected to.
        await until(lambda: other.net.scope_of(member.net.node_id) is Scope.SPLIT)
        assert founder.net.scope_of(other.net.node_id) is Scope.SERVE
        assert invite(member.net.invite_book.token()).terms.scope is Scope.SPLIT


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20.0):
        while True:
            if holds():
                return
            await asyncio.sleep(0.02)


async def test_lowering_ends_the_streams_of_the_scope_and_reaches_everybody_without_the_member() -> None:
    founder, running_streams = MeshNode(), list[PeerStream]()
    began = asyncio.Event()

    async def serve(stream: PeerStream, _peer: Peer, _parameters: bytes) -> None:
        running_streams.append(stream)
        began.set()
        await stream.read(1)

    founder.net.streams.register(StreamType.RPC, serve, scope=Scope.SPLIT, per_peer=4)
    async with joined(founder, "split", "split") as (member, other):
        stream = await member.net.open(founder.net.node_id, StreamType.RPC)
        await stream.flush()
        await within(20.0, began.wait())
        http = await member.net.open(founder.net.node_id, StreamType.GOSSIP)
        await set_scope(founder, member, Scope.SERVE)
        with pytest.raises(ConnectionError):
            await within(20.0, stream.read(1))
        assert running_streams[0].ended
        again = await member.net.open(founder.net.node_id, StreamType.RPC)
        await again.flush()
        with pytest.raises(ConnectionError):
            await within(20.0, again.read(1))
        assert founder.net.streams.refused["wrong scope"] == 1
        # The connection and its other streams go on.
        connection = founder.net.connections.find(member.net.node_id)
        assert connection is not None
        assert connection.alive
        assert not http.ended
        # A node that never spoke with the member holds to it too, and tells its core if the member says otherwise.
        learned = await founder.seen(RevocationLearned)
        assert learned.nodes == ()
        other.net.send(founder.net.node_id, Exchange())
        founder.net.send(other.net.node_id, Exchange(revocations=(learned.revocation,)))
        await other.seen(RevocationLearned)
        other.net.send(member.net.node_id, Exchange(), member.net.reachable().addresses)
        await member.seen(PeerConnected, lambda event: event.node == other.net.node_id)
        member.net.send(other.net.node_id, Exchange(entries=(claiming(member, 1),)))
        assert (await other.seen(ScopeLimited)).scope == "serve"
        assert other.net.scope_of(member.net.node_id) is Scope.SERVE
        # The member itself is told by gossip, and holds to it.
        assert member.net.scope is Scope.SPLIT
        founder.net.send(member.net.node_id, Exchange(revocations=(learned.revocation,)))
        await member.seen(RevocationLearned)
        assert member.net.scope is Scope.SERVE
        with pytest.raises(MeshError):
            member.net.create_invite("split", DAY, None)
        # Raised again by whoever lowered it: its announcements count again.
        await set_scope(founder, member, Scope.SPLIT)
        raised = await founder.seen(RevocationLearned, lambda event: event.revocation != learned.revocation)
        assert raised.replaces == (learned.revocation,)
        for node in (other, member):
            founder.net.send(node.net.node_id, Exchange(revocations=(raised.revocation,)))
            await node.seen(RevocationLearned, lambda event: event.revocation == raised.revocation)
        assert (await other.seen(ScopeLimited, lambda event: not event.scope)).node == member.net.node_id
        assert member.net.scope is Scope.SPLIT
        # An older word, said again, changes nothing.
        member.net.send(founder.net.node_id, Exchange(revocations=(learned.revocation,)))
        other.net.send(founder.net.node_id, Exchange(revocations=(learned.revocation,)))
        await set_scope(founder, member, Scope.SPLIT)
        assert founder.net.scope_of(member.net.node_id) is Scope.SPLIT


async def test_both_outlive_restarts(tmp_path: Path) -> None:
    founder = MeshNode(home=tmp_path / "founder")
    async with running(founder):
        raised, lowered = (
            MeshNode(token(founder, scope), home=tmp_path / name)
            for scope, name in (("serve", "raised"), ("split", "lowered"))
        )
        async with running(raised, lowered):
            await join(raised, lowered)
            await set_scope(founder, raised, Scope.SPLIT)
            await set_scope(founder, lowered, Scope.SERVE)
            learned = await founder.seen(RevocationLearned)
            founder.net.send(lowered.net.node_id, Exchange(revocations=(learned.revocation,)))
            await lowered.seen(RevocationLearned)
    founder = MeshNode(home=tmp_path / "founder")
    async with running(founder):
        # The old tokens are given again, as a service does that was written with them.
        narrow, wide = token(founder, "serve"), token(founder, "split")
        raised, lowered = MeshNode(narrow, home=tmp_path / "raised"), MeshNode(wide, home=tmp_path / "lowered")
        async with running(raised, lowered):
            await join(raised, lowered)
            assert (raised.net.scope, lowered.net.scope) == (Scope.SPLIT, Scope.SERVE)
            assert founder.net.scope_of(raised.net.node_id) is Scope.SPLIT
            assert founder.net.scope_of(lowered.net.node_id) is Scope.SERVE


async def test_only_whoever_has_the_scope_and_the_right_grants() -> None:
    founder = MeshNode()
    async with joined(founder, "serve", "serve", "split") as (narrow, member, wide):
        for node in (narrow, wide):
            node.net.send(member.net.node_id, Exchange(), member.net.reachable().addresses)
            await node.seen(PeerConnected, lambda event: event.node == member.net.node_id)
        with pytest.raises(MeshError) as refused:
            await set_scope(narrow, member, Scope.SPLIT)
        assert refused.value.code == "invite_wrong_scope"
        # Whoever may invite to split may raise.
        await set_scope(wide, member, Scope.SPLIT)
        assert member.net.scope is Scope.SPLIT
        # The other way is for those on whom its admission rests.
        await set_scope(wide, member, Scope.SERVE)
        assert wide.net.scope_of(member.net.node_id) is Scope.SERVE
        with pytest.raises(MeshError) as refused:
            await set_scope(member, wide, Scope.SERVE)
        assert refused.value.code == "not_yours"
        # What the founder takes, no other member gives back; nor does a member raise the one it came in by.
        await set_scope(founder, member, Scope.SERVE)
        learned = [event for event in founder.events if isinstance(event, RevocationLearned)]
        for event in learned:
            founder.net.send(wide.net.node_id, Exchange(revocations=(event.revocation,)))
        await wide.seen(RevocationLearned, lambda event: event.revocation == learned[-1].revocation)
        with pytest.raises(MeshError, match="founded the mesh") as refused:
            await set_scope(wide, member, Scope.SPLIT)
        assert refused.value.code == "lowered_elsewhere"
        with pytest.raises(MeshError) as refused:
            await within(20.0, wide.net.grant(wide.net.node_id, "itself", Scope.SERVE))
        assert refused.value.code in {"node_unknown", "not_yours"}


async def test_a_grant_that_a_member_did_not_get_says_what_to_do() -> None:
    founder = MeshNode(dial_timeout=0.5)
    async with running(founder):
        member = MeshNode(token(founder, "serve"))
        async with running(member):
            await join(member)
            member.net.send(founder.net.node_id, Exchange(entries=(member.announcement(),)))
            await until(lambda: founder.net.guard.certificate(member.net.node_id) is not None)
        with pytest.raises(MeshError, match="bob did not get scope split") as refused:
            await set_scope(founder, member, Scope.SPLIT)
        assert (refused.value.code, refused.value.status) == ("grant_not_delivered", 503)
        assert "mesh-llm invite create --scope split" in refused.value.hint


async def test_false_grants_change_nothing() -> None:
    founder, stranger = MeshNode(), MeshNode()
    async with running(stranger), joined(founder, "serve", "split") as (member, other):
        other.net.send(member.net.node_id, Exchange(), member.net.reachable().addresses)
        await other.seen(PeerConnected, lambda event: event.node == member.net.node_id)
        before = member.net.credentials.encoded
        good = invite(token(other, "split"))
        terms = msgspec.structs.replace(good.terms, expires=good.terms.expires - 1)
        false = {
            "nonsense": b"nonsense",
            "nothing": b"",
            "of another mesh": encode(invite(token(stranger, "split"))),
            "another's": encode(invite(token(founder, "split"))),
            "changed": encode(msgspec.structs.replace(good, terms=terms)),
        }
        connection = await other.net.connections.get(member.net.node_id)
        for name, parameters in false.items():
            stream = await connection.open(StreamType.GRANT, parameters)
            await stream.flush()
            with pytest.raises(ConnectionError):
                await within(20.0, stream.read(1))
            assert member.net.credentials.encoded == before, name
        # One that gives what the member has is no lie, and no news.
        stream = await connection.open(StreamType.GRANT, encode(invite(token(other, "serve"))))
        await stream.flush()
        assert await within(20.0, stream.read(1)) == b""
        assert member.net.credentials.encoded == before
        # A client may not even open one.
        assert connection.alive
        guest = MeshNode(token(founder, "client"), client=True)
        async with running(guest):
            await join(guest)
            stream = await guest.net.open(founder.net.node_id, StreamType.GRANT, false["another's"])
            await stream.flush()
            with pytest.raises(ConnectionError):
                await within(20.0, stream.read(1))


async def test_a_lowered_member_has_no_way_in_by_a_header_that_it_kept_back() -> None:
    founder, served = MeshNode(header_timeout=30.0), list[Peer]()

    async def serve(_stream: PeerStream, peer: Peer, _parameters: bytes) -> None:
        served.append(peer)

    founder.net.streams.register(StreamType.RPC, serve, scope=Scope.SPLIT, per_peer=4)
    async with joined(founder, "split") as (member,):
        connection = await member.net.connections.get(founder.net.node_id)
        header = encode_header(StreamType.RPC)
        stream = IrohStream(await connection.raw.open_bi(), TaskScope("late"))
        await stream.write(header[:3])
        other = await member.net.open(founder.net.node_id, StreamType.GOSSIP)
        await other.flush()
        await until(lambda: founder.net.streams.open_streams(StreamType.GOSSIP) == 1)
        await set_scope(founder, member, Scope.SERVE)
        await stream.write(header[3:])
        with pytest.raises(ConnectionError):
            await within(20.0, stream.read(1))
        assert served == []


async def test_lowering_a_worker_ends_the_streams_of_its_host() -> None:
    founder, began = MeshNode(), asyncio.Event()

    async def serve(stream: PeerStream, _peer: Peer, _parameters: bytes) -> None:
        began.set()
        await stream.read(1)

    async with joined(founder, "split") as (worker,):
        worker.net.streams.register(StreamType.RPC, serve, scope=Scope.SPLIT, per_peer=4)
        stream = await founder.net.open(worker.net.node_id, StreamType.RPC, scope=Scope.SPLIT)
        await stream.flush()
        await within(20.0, began.wait())
        await set_scope(founder, worker, Scope.SERVE)
        assert stream.ended
        with pytest.raises(ConnectionError, match="serve only"):
            await founder.net.open(worker.net.node_id, StreamType.RPC, scope=Scope.SPLIT)


async def test_a_member_that_raises_another_cannot_throw_it_out() -> None:
    founder = MeshNode()
    async with joined(founder, "serve", "split") as (member, hostile):
        hostile.net.send(member.net.node_id, Exchange(), member.net.reachable().addresses)
        await hostile.seen(PeerConnected, lambda event: event.node == member.net.node_id)
        await set_scope(hostile, member, Scope.SPLIT)
        await until(lambda: founder.net.scope_of(member.net.node_id) is Scope.SPLIT)
        hostile.net.revoke_node(member.net.node_id)
        learned = await hostile.seen(RevocationLearned)
        hostile.net.send(founder.net.node_id, Exchange(revocations=(learned.revocation,)))
        await founder.seen(RevocationLearned)
        # The member has not heard of it, and comes back with what the founder gave it.
        await until(lambda: founder.net.connections.find(member.net.node_id) is None)
        await member.seen(PeerLost, lambda event: event.node == founder.net.node_id)
        connection = await within(20.0, member.net.connections.dial(founder.net.node_id))
        assert isinstance(connection, PeerConnection)
        await founder.connected_to(member)
        assert founder.net.scope_of(member.net.node_id) is Scope.SERVE
        assert member.net.scope is Scope.SPLIT
        assert not any(isinstance(event, UserWarned) for event in member.events)
        # It hears of it, and holds to the earlier admission.
        founder.net.send(member.net.node_id, Exchange(revocations=(learned.revocation,)))
        await member.seen(RevocationLearned)
        await until(lambda: member.net.scope is Scope.SERVE)
        member.net.send(founder.net.node_id, Exchange(entries=(member.announcement(2),)))
        await until(lambda: founder.net.guard.certificate(member.net.node_id) is not None)


async def test_the_founder_raises_whom_another_member_lowered() -> None:
    founder = MeshNode()
    async with joined(founder, "split") as (helper,):
        member = MeshNode(token(helper, "split"))
        async with running(member):
            await join(member)
            await helper.seen(PeerConnected, lambda event: event.node == member.net.node_id)
            member.net.send(founder.net.node_id, Exchange(), founder.net.reachable().addresses)
            await founder.seen(PeerConnected, lambda event: event.node == member.net.node_id)
            await set_scope(helper, member, Scope.SERVE)
            learned = await helper.seen(RevocationLearned)
            for node in (founder, member):
                helper.net.send(node.net.node_id, Exchange(revocations=(learned.revocation,)))
                await node.seen(RevocationLearned)
            assert founder.net.scope_of(member.net.node_id) is Scope.SERVE
            await set_scope(founder, member, Scope.SPLIT)
            assert member.net.scope is Scope.SPLIT
            await until(lambda: helper.net.scope_of(member.net.node_id) is Scope.SPLIT)


async def test_the_founder_changes_its_mind_fifty_times() -> None:
    founder = MeshNode()
    async with joined(founder, "split", "split") as (member, other):
        for _ in range(25):
            await set_scope(founder, member, Scope.SERVE)
            await set_scope(founder, member, Scope.SPLIT)
        words = [event for event in founder.events if isinstance(event, RevocationLearned)]
        assert len(words) == 50
        for event in (words[-1], words[0], words[-2]):
            for node in (member, other):
                founder.net.send(node.net.node_id, Exchange(revocations=(event.revocation,)))
        for node in (member, other):
            await node.seen(RevocationLearned)
            assert node.net.scope_of(member.net.node_id) in {None, Scope.SPLIT}
            assert len(node.net.revocations) == 1
        assert len(founder.net.revocations) == 1


async def test_a_member_whose_granter_left_for_good_stays_with_what_it_had() -> None:
    founder = MeshNode()
    async with joined(founder, "serve") as (member,):
        granter = MeshNode(token(founder, "split"))
        async with running(granter):
            await join(granter)
            granter.net.send(member.net.node_id, Exchange(), member.net.reachable().addresses)
            await granter.seen(PeerConnected, lambda event: event.node == member.net.node_id)
            await set_scope(granter, member, Scope.SPLIT)
            await until(lambda: founder.net.scope_of(member.net.node_id) is Scope.SPLIT)
        before = member.net.credentials.earlier
        assert before is not None
        for node in (founder, member):
            node.offset = 60 * DAY
        await member.net.joiner.renew_earlier()
        after = member.net.credentials.earlier
        assert after is not None
        assert after.expires > before.expires + 50 * DAY
        # Showing the earlier admission costs nothing.
        assert founder.net.scope_of(member.net.node_id) is Scope.SPLIT
        assert member.net.scope is Scope.SPLIT
        # One after the other: a request over a connection that the other side is just closing comes to nothing.
        founder.offset = 100 * DAY
        await member.seen(PeerLost, lambda event: event.node == founder.net.node_id)
        member.offset = 100 * DAY
        await until(lambda: member.net.scope is Scope.SERVE)
        connection = await within(20.0, member.net.connections.dial(founder.net.node_id))
        assert isinstance(connection, PeerConnection)
        await founder.connected_to(member)
        assert founder.net.scope_of(member.net.node_id) is Scope.SERVE


async def test_a_member_that_takes_a_grant_and_says_nothing_does_not_hold_the_granter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(grants, "_ANSWER_SECONDS", 0.5)
    founder = MeshNode()
    async with joined(founder, "serve") as (member,):

        async def mute(stream: PeerStream, _peer: Peer, _parameters: bytes) -> None:
            await stream.read(1)

        member.net.streams.register(StreamType.GRANT, mute, scope=Scope.SERVE, per_peer=4)
        with pytest.raises(MeshError, match="it did not answer within") as refused:
            await set_scope(founder, member, Scope.SPLIT)
        assert refused.value.code == "grant_not_delivered"


async def test_a_connection_that_began_with_an_older_certificate_goes_by_the_announced_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two dials of two nodes may cross: the connection that stays may have shown what the peer had before."""
    founder = MeshNode()
    async with joined(founder, "serve") as (member,):
        connection = founder.net.connections.find(member.net.node_id)
        assert connection is not None
        before = connection.peer
        shown = asyncio.Event()
        monkeypatch.setattr(member.net.connections, "present", AsyncMock(side_effect=shown.set))
        await set_scope(founder, member, Scope.SPLIT)
        await within(20.0, shown.wait())
        connection = founder.net.connections.find(member.net.node_id)
        assert connection is not None
        connection.peer = before
        with pytest.raises(ConnectionError, match="serve only"):
            await founder.net.open(member.net.node_id, StreamType.RPC, scope=Scope.SPLIT)
        await gossip_of(member, founder)
        await founder.net.open(member.net.node_id, StreamType.RPC, scope=Scope.SPLIT)
        assert founder.net.scope_of(member.net.node_id) is Scope.SPLIT


async def gossip_of(sender: MeshNode, receiver: MeshNode) -> None:
    """The sender announces itself to the receiver."""
    entries = (sender.announcement(9),)
    sender.net.send(receiver.net.node_id, Exchange(entries=entries), receiver.net.reachable().addresses)
    await receiver.seen(MessageReceived, lambda event: bool(getattr(event.message, "entries", ())))


async def test_a_stranger_is_known_to_every_node_by_what_its_admission_rests_on() -> None:
    founder = MeshNode()
    async with joined(founder, "serve") as (friend,):
        listed, proof = await founder.net.listing_invite("serve", b"a" * 32)
        assert proof
        assert (await founder.net.listing_invite("serve", b"a" * 32))[0] == listed
        stranger = MeshNode(listed)
        async with running(stranger):
            await join(stranger)
            guest = MeshNode(token(stranger, "serve"))
            async with running(guest):
                await join(guest)
                ids = {one: one.net.node_id for one in (founder, friend, stranger, guest)}
                guest.net.connections.addresses.learn(ids[founder], founder.net.reachable().addresses, "")
                await guest.net.connections.get(ids[founder])
                await founder.seen(PeerConnected, lambda event: event.node == ids[guest])
                # Nobody published anything of which this node was told: the chains alone say it.
                await friend.net.connections.get(ids[founder])
                for one in (stranger, guest):
                    friend.net.connections.addresses.learn(ids[one], one.net.reachable().addresses, "")
                    await friend.net.connections.get(ids[one])
                for judge in (founder, friend):
                    standings = [judge.net.standing_of(ids[one]) for one in (stranger, guest)]
                    assert standings == ["stranger", "stranger"]
                assert founder.net.standing_of(ids[friend]) == "member"
                assert friend.net.standing_of(ids[founder]) == "member"
                # Of a publisher of an older version nobody knows which invites were public.
                assert guest.net.standing_of(ids[founder], {ids[founder]}) == "member"
                assert stranger.net.standing_of(ids[friend], {ids[founder]}) == "stranger"
                # An invite of its own makes it a member; so does each wider scope.
                await founder.net.grant(ids[stranger], "stranger", Scope.SPLIT)
                assert founder.net.standing_of(ids[stranger]) == "member"
                await gossip_of(stranger, friend)
                assert friend.net.standing_of(ids[stranger]) == "member"
                assert friend.net.standing_of(ids[guest]) == "stranger"


async def test_a_stranger_that_starts_with_an_invite_of_its_own_is_a_member(tmp_path: Path) -> None:
    founder = MeshNode()
    async with joined(founder, "serve") as (friend,):
        listed, _ = await founder.net.listing_invite("serve", b"a" * 32)
        stranger = MeshNode(listed, home=tmp_path)
        async with running(stranger):
            await join(stranger)
            assert founder.net.standing_of(stranger.net.node_id) == "stranger"
        stranger = MeshNode(token(friend, "serve"), home=tmp_path)
        async with running(stranger):
            await join(stranger)
            # It asks the founder as well, which it remembers, and which may be the first to admit it.
            await friend.connected_to(stranger)
            assert friend.net.standing_of(stranger.net.node_id) == "member"
