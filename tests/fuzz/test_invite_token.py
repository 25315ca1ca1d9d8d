"""Random and changed tokens, certificates and revocations: decoders return a value, and changed ones are refused."""

import random

from hypothesis import given
from hypothesis import strategies as st
from tests.unit.wire.mesh.test_certificates import FOUNDER, MEMBER, MESH, NOW, admitted, founder
from tests.unit.wire.mesh.test_invites import by_founder
from tests.unit.wire.toy_keys import verify

from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Refusal
from mesh_llm.wire.mesh.certificates import Certificate, NothingRevoked, check_certificate, decode_certificate
from mesh_llm.wire.mesh.invites import (
    Invite,
    Revocation,
    check_invite,
    check_revocation,
    decode_invite,
    decode_revocation,
    format_invite,
    parse_invite,
)

INVITE = encode(by_founder())
TEXT = format_invite(by_founder())
CERTIFICATE = encode(admitted(founder(), FOUNDER, MEMBER))


def mutated(data: bytes, seed: int) -> bytes:
    chance = random.Random(seed)
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(changed))
        match chance.randrange(3):
            case 0:
                changed[place] ^= 1 << chance.randrange(8)
            case 1:
                changed.insert(place, chance.randrange(256))
            case _:
                del changed[place]
    return bytes(changed)


@given(st.text(max_size=500))
def test_any_text(text: str):
    assert isinstance(parse_invite(text), Invite | Refusal)
    assert isinstance(parse_invite("mesh2" + text), Invite | Refusal)


@given(st.binary(max_size=600))
def test_any_bytes(data: bytes):
    assert isinstance(decode_invite(data), Invite | Refusal)
    assert isinstance(decode_certificate(data), Certificate | Refusal)
    revocation = decode_revocation(data)
    if isinstance(revocation, Revocation):
        assert check_revocation(revocation, mesh=MESH.mesh_id, verify=verify) is not None


@given(st.integers())
def test_a_changed_invite_is_never_accepted(seed: int):
    data = mutated(INVITE, seed)
    invite = decode_invite(data)
    if isinstance(invite, Invite) and encode(invite) != INVITE:
        assert check_invite(invite, now=NOW, verify=verify, revoked=NothingRevoked()) is not None


@given(st.integers())
def test_a_changed_certificate_is_never_accepted(seed: int):
    data = mutated(CERTIFICATE, seed)
    certificate = decode_certificate(data)
    if isinstance(certificate, Certificate) and encode(certificate) != CERTIFICATE:
        refusal = check_certificate(
            certificate, mesh=MESH.mesh_id, node=certificate.node, now=NOW, verify=verify, revoked=NothingRevoked()
        )
        # Without its own link, what remains is the founder's valid certificate.
        assert refusal is not None or certificate.links == founder().links
