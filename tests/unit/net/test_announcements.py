"""Which certificate a node is held to, of those that its announcements carry."""

import msgspec
from tests.unit.net.members import Member
from tests.unit.net.test_revocations import admitted

from mesh_llm.core.types.announcement import Announcement, SignedAnnouncement
from mesh_llm.core.types.ids import Incarnation
from mesh_llm.net.admission.credentials import verify
from mesh_llm.net.gossip_transport import AnnouncementGuard
from mesh_llm.wire.mesh.admission import Reason
from mesh_llm.wire.mesh.certificates import Certificate

DAY = 86400


def guard(member: Member) -> AnnouncementGuard:
    return AnnouncementGuard(member.standing, member.registrar, verify, msgspec.msgpack.encode)


def word(member: Member, sequence: int) -> SignedAnnouncement:
    """What a member announces, with the certificate that it has now."""
    announcement = Announcement(
        mesh=member.standing.mesh, node=member.key.node_id, incarnation=Incarnation(1), sequence=sequence
    )
    return guard(member).seal(SignedAnnouncement(announcement=announcement))


def test_an_old_word_said_again_does_not_bring_an_old_certificate_back() -> None:
    founder = Member()
    member = admitted(founder)
    old, before = word(member, 1), member.standing.certificate
    for one in (founder, member):
        one.now += 60 * DAY
    assert isinstance(member.join(founder), Certificate)
    renewed = member.standing.certificate
    assert renewed is not None
    assert before is not None
    assert renewed.expires > before.expires
    heard = guard(founder)
    assert heard.check(word(member, 2)) is None
    # Somebody kept it: it is a true word still, and says nothing new.
    assert heard.check(old) is None
    assert heard.certificate(member.key.node_id) == renewed
    founder.now = before.expires + 1.0
    assert heard.drop_ended() == []
    refusal = heard.check(old)
    assert refusal is not None
    assert refusal.reason is Reason.EXPIRED
    founder.now = renewed.expires + 1.0
    assert heard.drop_ended() == [member.key.node_id]
