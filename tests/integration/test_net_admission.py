"""Who comes in, who does not, and who is thrown out: real iroh on loopback."""

import time
from pathlib import Path

import msgspec
import pytest
from tests.integration.net_nodes import MeshNode, join, running
from tests.integration.net_raw import stranger

from mesh_llm.core.types.effects import KnownPeer
from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.events import (
    MessageReceived,
    PeerConnected,
    PeerLost,
    Readmitted,
    RevocationLearned,
    UserWarned,
)
from mesh_llm.core.types.gossip import Exchange
from mesh_llm.net.admission.credentials import SigningKey
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import AdmitRequest, Reason, Refused, Scope, Subject
from mesh_llm.wire.mesh.invites import Invite, issue_invite, parse_invite

DAY = 86400.0


def invite_bytes(token: str) -> bytes:
    invite = parse_invite(token)
    assert isinstance(invite, Invite)
    return encode(invite)


@pytest.mark.parametrize("scope", ["client", "serve", "split"])
async def test_an_invited_node_comes_in_with_the_scope_of_its_invite(scope: str):
    founder = MeshNode()
    async with running(founder):
        joiner = MeshNode(founder.net.create_invite(scope, DAY, None).token)
        async with running(joiner):
            assert joiner.net.mesh_id == founder.net.mesh_id
            assert joiner.net.scope is None
            await join(joiner)
            assert joiner.net.scope is Scope.parse(scope)
            event = await joiner.seen(PeerConnected)
            assert event.node == founder.net.node_id


async def test_the_token_at_start_gives_scope_split_and_stays_the_same(tmp_path: Path):
    founder = MeshNode(home=tmp_path)
    async with running(founder):
        token = founder.net.invite_book.token()
        assert founder.net.invite_book.token() == token
        joiner = MeshNode(token)
        async with running(joiner):
            await join(joiner)
            assert joiner.net.scope is Scope.SPLIT


async def test_reconnects_by_certificate_alone(tmp_path: Path):
    founder = MeshNode(home=tmp_path / "founder")
    async with running(founder):
        joiner = MeshNode(founder.net.invite_book.token(), home=tmp_path / "joiner")
        async with running(joiner):
            await join(joiner)
        again = MeshNode(home=tmp_path / "joiner")
        assert again.net.node_id == joiner.net.node_id
        assert again.net.mesh_id == founder.net.mesh_id
        assert again.net.joins
        async with running(again):
            # Nobody tells it where to go: it remembers its last-known peers.
            await join(again)
            assert again.net.scope is Scope.SPLIT


async def test_a_token_from_before_its_issuer_moved_does_not_hide_where_that_went(tmp_path: Path):
    founder = MeshNode(home=tmp_path / "founder")
    async with running(founder):
        token = founder.net.invite_book.token()
        member = MeshNode(token, home=tmp_path / "member")
        await member.net.start()
        await join(member)
        member.net.send(founder.net.node_id, Exchange(entries=(member.announcement(),)))
        await founder.seen(MessageReceived)
    try:
        # Back on another port, it finds the member, and tells it where it is now.
        founder = MeshNode(home=tmp_path / "founder")
        async with running(founder):
            await join(founder)
            founder.net.send(member.net.node_id, Exchange(entries=(founder.announcement(),)))
            await member.seen(MessageReceived)
            await member.net.close()
            again = MeshNode(token, home=tmp_path / "member")
            async with running(again):
                await join(again)
    finally:
        await member.net.close()


async def test_a_member_admits_with_its_own_invites_and_others_know_the_chain():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            third = MeshNode(member.net.invite_book.token())
            async with running(third):
                await join(third)
                # The third node shows the founder a certificate that the founder never saw.
                third.net.send(founder.net.node_id, Exchange(), founder.net.reachable().addresses)
                connected = await founder.seen(PeerConnected, lambda event: event.node == third.net.node_id)
                assert connected


async def test_a_member_cannot_invite_to_more_than_it_has():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.create_invite("serve", DAY, None).token)
        async with running(member):
            await join(member)
            with pytest.raises(MeshError) as refused:
                member.net.create_invite("split", DAY, None)
            assert refused.value.code == "invite_wrong_scope"


async def test_a_better_invite_widens_the_scope_over_the_same_connection():
    founder = MeshNode()
    async with running(founder):
        narrow = founder.net.create_invite("serve", DAY, None).token
        first = MeshNode(narrow)
        async with running(first):
            await join(first)
        better = MeshNode(narrow, founder.net.create_invite("split", DAY, None).token, key=first.key)
        async with running(better):
            await join(better)
            assert better.net.scope is Scope.SPLIT


@pytest.mark.parametrize(
    ("make", "code"),
    [
        ("expired", "invite_expired"),
        ("revoked", "invite_revoked"),
        ("used up", "invite_uses_exhausted"),
    ],
)
async def test_invites_that_hold_no_more(make: str, code: str):
    founder = MeshNode()
    async with running(founder):
        record = founder.net.create_invite("serve", 60, 1 if make == "used up" else None)
        if make == "expired":
            founder.offset += 61
        elif make == "revoked":
            founder.net.revoke_invite(record.id)
        else:
            early = MeshNode(record.token)
            async with running(early):
                await join(early)
                # The same node again is no further use.
                await join(early)
        late = MeshNode(record.token)
        async with running(late):
            report = await late.net.joiner.join()
        assert report.admitted is None
        assert report.hopeless
        assert [problem.code for problem in report.problems] == [code]
        with pytest.raises(MeshError, match="invite"):
            report.raise_for_user()


async def test_uses_are_counted_over_a_restart_of_the_issuer(tmp_path: Path):
    founder = MeshNode(home=tmp_path)
    async with running(founder):
        token = founder.net.create_invite("serve", DAY, 1).token
        first = MeshNode(token)
        async with running(first):
            await join(first)
    founder = MeshNode(home=tmp_path)
    async with running(founder), stranger(founder.net) as other:
        assert [record.uses_left for record in founder.net.invites()] == [0]
        request = AdmitRequest(2, 2, "x", b"session1", b"", (invite_bytes(token),))
        reply = await other.admit(encode(request))
        assert isinstance(reply, Refused)
        assert reply.refusal.reason is Reason.USES_EXHAUSTED


async def test_a_limited_invite_is_accepted_by_its_issuer_only():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            token = founder.net.create_invite("serve", DAY, 1).token
            async with stranger(member.net) as other:
                request = AdmitRequest(2, 2, "x", b"session1", b"", (invite_bytes(token),))
                reply = await other.admit(encode(request))
            assert isinstance(reply, Refused)
            assert reply.refusal.reason is Reason.NOT_ISSUER


async def test_node_of_another_mesh():
    mine, theirs = MeshNode(), MeshNode()
    async with running(mine, theirs), stranger(mine.net) as other:
        request = AdmitRequest(2, 2, "x", b"session1", b"", (invite_bytes(theirs.net.invite_book.token()),))
        reply = await other.admit(encode(request))
    assert isinstance(reply, Refused)
    assert (reply.refusal.reason, reply.refusal.subject) == (Reason.OTHER_MESH, Subject.INVITE)


async def test_tokens_of_two_meshes_join_the_first_and_name_the_other():
    mine, theirs = MeshNode(), MeshNode()
    async with running(mine, theirs):
        joiner = MeshNode(mine.net.invite_book.token(), theirs.net.invite_book.token())
        async with running(joiner):
            report = await joiner.net.joiner.join()
            assert report.admitted == mine.net.node_id
            assert [problem.code for problem in report.problems] == ["invite_other_mesh"]


async def test_the_issuer_has_moved_to_another_mesh():
    key = SigningKey.generate()
    old = MeshNode(key=key)
    async with running(old):
        token = old.net.invite_book.token()
    new = MeshNode(key=key)
    async with running(new):
        joiner = MeshNode(token)
        async with running(joiner):
            joiner.net.send(new.net.node_id, Exchange(), new.net.reachable().addresses)
            report = await joiner.net.joiner.join()
    assert "invite_other_mesh" in [problem.code for problem in report.problems]


async def test_other_version():
    founder = MeshNode()
    async with running(founder), stranger(founder.net) as other:
        request = AdmitRequest(3, 4, "9.9", b"session1", b"", (invite_bytes(founder.net.invite_book.token()),))
        reply = await other.admit(encode(request))
    assert isinstance(reply, Refused)
    assert reply.refusal.reason is Reason.OTHER_VERSION
    assert "9.9" in reply.refusal.detail


@pytest.mark.parametrize("token", ["nonsense", "mesh2AAAA", "mesh9AAAA"])
def test_unreadable_tokens_are_told_before_anything_starts(token: str):
    with pytest.raises(MeshError) as refused:
        MeshNode(token)
    assert refused.value.code in {"invite_malformed", "invite_other_version"}
    assert refused.value.hint


def test_a_client_without_a_token_has_nobody_to_ask():
    with pytest.raises(MeshError) as refused:
        MeshNode(client=True)
    assert refused.value.code == "no_mesh"


async def test_unreachable_mesh_says_so_and_is_not_hopeless():
    founder = MeshNode()
    async with running(founder):
        token = founder.net.invite_book.token()
    joiner = MeshNode(token, dial_timeout=0.5)
    async with running(joiner):
        report = await joiner.net.joiner.join()
    assert report.admitted is None
    assert not report.hopeless
    assert [problem.code for problem in report.problems] == ["mesh_unreachable"]


# Revocation


async def test_revoking_an_invite_cuts_whoever_it_admitted_everywhere_and_for_ever(tmp_path: Path):
    founder = MeshNode()
    async with running(founder):
        bad_invite = founder.net.create_invite("serve", DAY, None)
        other, guest = MeshNode(founder.net.invite_book.token(), home=tmp_path), MeshNode(bad_invite.token)
        async with running(other, guest):
            await join(other, guest)
            guest.net.send(
                other.net.node_id, Exchange(entries=(guest.announcement(),)), other.net.reachable().addresses
            )
            await other.seen(PeerConnected, lambda event: event.node == guest.net.node_id)
            founder.net.revoke_invite(bad_invite.id[:8])
            # At once: what only falls silent is noticed after 30 s.
            lost = await guest.seen(PeerLost, lambda event: event.node == founder.net.node_id)
            assert lost.reason == "revoked"
            # The core of the founder is told, and gossips it; here its message is made by hand.
            learned = await founder.seen(RevocationLearned)
            assert learned.nodes == (guest.net.node_id,)
            founder.net.send(other.net.node_id, Exchange(revocations=(learned.revocation,)))
            heard = await other.seen(RevocationLearned)
            assert heard.nodes == (guest.net.node_id,)
            await guest.seen(PeerLost, lambda event: event.node == other.net.node_id)
            report = await guest.net.joiner.join()
            # One of each node that it remembers by now.
            assert {problem.code for problem in report.problems} == {"invite_revoked"}
        # What was heard outlives a restart.
        other = MeshNode(home=tmp_path)
        async with running(other):
            assert (await other.seen(RevocationLearned)).revocation == learned.revocation


async def test_a_revoked_node_is_let_in_by_no_invite():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            guest = MeshNode(member.net.invite_book.token())
            async with running(guest):
                await join(guest)
                with pytest.raises(MeshError) as refused:
                    guest.net.revoke_node(member.net.node_id)
                assert refused.value.code == "not_yours"
                above = (founder.net.node_id, member.net.node_id)
                assert member.net.above(guest.net.node_id) == above
                assert guest.net.above(member.net.node_id) == (founder.net.node_id,)
                assert member.net.above(founder.net.node_id) == ()
                assert member.net.revoke_node(guest.net.node_id) == (guest.net.node_id,)
                assert (await guest.seen(PeerLost)).reason == "revoked"
                assert (await member.seen(RevocationLearned)).nodes == (guest.net.node_id,)
            again = MeshNode(member.net.create_invite("client", DAY, None).token, key=guest.key)
            async with running(again):
                report = await again.net.joiner.join()
            assert [problem.code for problem in report.problems] == ["certificate_revoked"]


async def test_a_false_revocation_expels_whoever_brings_it():
    founder = MeshNode()
    async with running(founder):
        liar = MeshNode(founder.net.invite_book.token())
        async with running(liar):
            await join(liar)
            liar.net.send(founder.net.node_id, Exchange(revocations=(b"nonsense",)))
            lost = await liar.seen(PeerLost)
            assert "false revocation" in lost.reason
            with pytest.raises(MeshError):
                (await liar.net.joiner.join()).raise_for_user()


async def test_an_expired_certificate_ends_the_connection_and_is_not_taken_again():
    founder = MeshNode(idle_after=0.4)
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            founder.offset += 91 * DAY
            lost = await member.seen(PeerLost)
            assert lost.reason == "expired"
            member.net.send(founder.net.node_id, Exchange())
            report = await member.net.joiner.join()
            assert report.admitted is None


async def test_a_certificate_past_half_its_life_is_renewed_on_reconnection():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
        founder.offset += 60 * DAY
        again = MeshNode(founder.net.invite_book.token(), key=member.key)
        async with running(again):
            await join(again)
            assert again.net.scope is Scope.SPLIT


# Whoever a certificate rests on


async def connected(node: MeshNode, other: MeshNode) -> None:
    await node.seen(PeerConnected, lambda event: event.node == other.net.node_id)


async def acquainted(node: MeshNode, *others: MeshNode) -> None:
    """A node's word reaches others, over connections of its own."""
    for other in others:
        node.net.send(other.net.node_id, Exchange(entries=(node.announcement(),)), other.net.reachable().addresses)
        await connected(other, node)
        await connected(node, other)


async def test_revocation_reaches_whom_the_revoked_let_in_though_it_was_away():
    founder = MeshNode()
    async with running(founder):
        to_b = founder.net.create_invite("serve", DAY, None)
        a, b = MeshNode(founder.net.invite_book.token()), MeshNode(to_b.token)
        async with running(a):
            await join(a)
            async with running(b):
                await join(b)
                contacts = b.net.create_invite("serve", DAY, None).token
            await founder.only_connected_to(a)
            # B is gone. Its invite leads to B alone, so X is told where A is; so is Y, that comes by X's.
            x = MeshNode(contacts)
            async with running(x):
                x.net.joiner.rejoin((KnownPeer(node=a.net.node_id, addresses=a.net.reachable().addresses),))
                await x.seen(PeerConnected, lambda event: event.node == a.net.node_id)
                y = MeshNode(x.net.invite_book.token())
                async with running(y):
                    await join(y)
                    await acquainted(x, founder)
                    await acquainted(y, a, founder)
                    founder.net.revoke_invite(to_b.id)
                    learned = await founder.seen(RevocationLearned)
                    assert set(learned.nodes) == {x.net.node_id, y.net.node_id}
                    for node in (x, y):
                        lost = await node.seen(PeerLost, lambda event: event.node == founder.net.node_id)
                        assert lost.reason == "revoked"
                        told = await node.seen(UserWarned)
                        assert (told.code, told.serious) == ("certificate_revoked", True)
                    founder.net.send(a.net.node_id, Exchange(revocations=(learned.revocation,)))
                    heard = await a.seen(RevocationLearned)
                    assert set(heard.nodes) == {x.net.node_id, y.net.node_id}
                    # Nor does anybody come in any more by what they hold.
                    for token in (contacts, x.net.create_invite("serve", DAY, None).token):
                        async with stranger(a.net) as late:
                            reply = await late.admit(
                                encode(AdmitRequest(2, 2, "x", b"session1", b"", (invite_bytes(token),)))
                            )
                        assert isinstance(reply, Refused)
                        assert reply.refusal.reason is Reason.REVOKED


async def test_nothing_outlives_its_issuer():
    founder = MeshNode()
    async with running(founder):
        member = MeshNode(founder.net.invite_book.token())
        async with running(member):
            await join(member)
            record = member.net.create_invite("serve", 366 * DAY, None)
            assert record.expires - time.time() < 91 * DAY
            # A program that signs what it likes: ten years, by a member of 90 days; and one by an expired member.
            honest = parse_invite(record.token)
            assert isinstance(honest, Invite)
            for expires, offset, reason in (
                (int(time.time()) + 3650 * 86400, 0.0, Reason.WRONG_SCOPE),
                (int(time.time()) + 3650 * 86400, 91 * DAY, Reason.EXPIRED),
            ):
                terms = msgspec.structs.replace(honest.terms, expires=expires)
                bold = issue_invite(terms, None, member.key.sign)
                assert isinstance(bold, Invite)
                shown = encode(msgspec.structs.replace(bold, chain=honest.chain))
                founder.offset = offset
                async with stranger(founder.net) as other:
                    request = AdmitRequest(2, 2, "x", b"session1", b"", (shown,))
                    reply = await other.admit(encode(request))
                assert isinstance(reply, Refused), reply
                assert (reply.refusal.reason, reply.refusal.subject) == (reason, Subject.INVITE)


async def test_a_member_is_cut_at_the_moment_its_admission_ends(monkeypatch: pytest.MonkeyPatch):
    # The end does not wait for housekeeping, which does not come here.
    monkeypatch.setattr("mesh_llm.net.maintenance._HOUSEKEEPING_SECONDS", DAY)
    founder = MeshNode(idle_after=2 * DAY)
    async with running(founder):
        token = founder.net.create_invite("serve", 366 * DAY, None).token
        founder.offset -= 90 * DAY - 4.0
        member = MeshNode(token)
        member.offset = founder.offset
        async with running(member):
            await join(member)
            held = member.net.credentials.certificate
            assert held is not None
            founder.offset = member.offset = 0.0
            lost = await member.seen(PeerLost)
            assert lost.reason == "expired"
            assert time.time() >= held.expires
            told = await member.seen(UserWarned)
            assert told.code == "certificate_expired"


async def test_who_was_revoked_is_a_member_again_by_another_invite():
    founder = MeshNode()
    async with running(founder):
        bad, good = (
            MeshNode(founder.net.create_invite("serve", DAY, None).token),
            MeshNode(founder.net.invite_book.token()),
        )
        async with running(bad, good):
            await join(bad, good)
            guest = MeshNode(bad.net.invite_book.token())
            async with running(guest):
                await join(guest)
                await acquainted(guest, founder)
                founder.net.revoke_invite(founder.net.invites()[-1].id)
                learned = await founder.seen(RevocationLearned)
                assert guest.net.node_id in learned.nodes
            again = MeshNode(founder.net.invite_book.token(), key=guest.key)
            async with running(again):
                await join(again)
                readmitted = await founder.seen(Readmitted)
                assert readmitted.node == guest.net.node_id
