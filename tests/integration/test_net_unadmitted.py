"""What an unadmitted connection can do: ask to be admitted, within bounds, and nothing else. Real iroh on loopback."""

import pytest
from tests.integration.net_nodes import MeshNode, running
from tests.integration.net_raw import stranger

from mesh_llm.net.streams import StreamResetError
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import AdmitRequest, Admitted, Reason, Refused
from mesh_llm.wire.mesh.frames import ResetCode, StreamType, frame
from mesh_llm.wire.mesh.invites import Invite, parse_invite

DAY = 86400.0


def invite_bytes(token: str) -> bytes:
    invite = parse_invite(token)
    assert isinstance(invite, Invite)
    return encode(invite)


@pytest.mark.parametrize("kind", [kind for kind in StreamType if kind is not StreamType.ADMIT])
async def test_every_other_stream_is_reset_before_admission(kind: StreamType):
    founder = MeshNode()
    async with running(founder), stranger(founder.net) as other:
        stream = await other.typed(kind, b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(StreamResetError) as reset:
            await stream.read(100)
        assert reset.value.code == ResetCode.NOT_ADMITTED


@pytest.mark.parametrize(
    "opening",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x04nope",
        frame(b"\x92\x01\xc4\x00") + b"\xff\xff\xff\xff",
        frame(b"\x92\x01\xc4\x00") + frame(b"garbage"),
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
)
async def test_garbage_is_reset_and_a_proper_request_may_follow(opening: bytes):
    founder = MeshNode()
    async with running(founder), stranger(founder.net) as other:
        stream = await other.stream(opening)
        with pytest.raises(ConnectionError):
            await stream.read(100)
        request = AdmitRequest(2, 2, "x", b"session1", b"", (invite_bytes(founder.net.invite_book.token()),))
        assert isinstance(await other.admit(encode(request)), Admitted)


async def test_whoever_keeps_trying_is_cut_off():
    founder = MeshNode(admission_tries=3)
    async with running(founder), stranger(founder.net) as other:
        for _ in range(3):
            stream = await other.typed(StreamType.HTTP)
            with pytest.raises(ConnectionError):
                await stream.read(1)
        assert "not admitted" in await other.closed()


async def test_whoever_says_nothing_is_cut_off():
    founder = MeshNode(admission_timeout=1.0)
    async with running(founder), stranger(founder.net) as other:
        assert "not admitted" in await other.closed()


async def test_too_many_attempts_from_one_address_are_refused():
    founder = MeshNode(admission_burst=3, admissions_per_second=0.01)
    async with running(founder), stranger(founder.net), stranger(founder.net), stranger(founder.net):
        with pytest.raises(ConnectionError):
            async with stranger(founder.net):
                pass


async def test_a_failed_admission_costs_more_than_a_good_one():
    founder = MeshNode(admission_burst=6, admissions_per_second=0.01)
    async with running(founder):
        async with stranger(founder.net) as other:
            reply = await other.admit(encode(AdmitRequest(2, 2, "x", b"session1")))
            assert isinstance(reply, Refused)
            assert reply.refusal.reason is Reason.NOTHING_SHOWN
            other.connection.close(0, b"")
            await other.closed()
        # One attempt, and five more for having been refused, leave nothing.
        with pytest.raises(ConnectionError):
            async with stranger(founder.net):
                pass
