from typing import Any

import msgspec
from tests.unit.wire.test_certificate import FOUNDER, MEMBER, MESH, NOW, admitted, founder
from tests.unit.wire.test_invite import terms
from tests.unit.wire.toy_keys import ToyKey, verify

from mesh_llm.core.listing.content import ListedModel, Listing
from mesh_llm.wire.codec import Malformed
from mesh_llm.wire.discovery import (
    MAX_AHEAD,
    MAX_CONTENT,
    MAX_LIFE,
    Posting,
    author_proof,
    check_posting,
    check_times,
    decode_posting,
    encode_posting,
)
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.invites import Invite, format_invite, issue_invite

AUTHOR = ToyKey("a nostr key").public
LISTING = Listing(
    mesh=MESH.mesh_id,
    name="Sydney Lab",
    region="AU",
    nodes=3,
    clients=2,
    load=0.3,
    memory_bytes=48 * 10**9,
    serving=(ListedModel(name="qwen", context=8192),),
    wanted=(ListedModel(name="qwen"),),
    on_disk=(ListedModel(name="glm"),),
)


def token(issuer: ToyKey = FOUNDER, **changes: Any) -> str:
    certificate = None if issuer is FOUNDER else admitted(founder(), FOUNDER, issuer, Scope.SERVE)
    sign = MESH.sign if issuer is FOUNDER else issuer.sign
    invite = issue_invite(terms(issuer, **changes), certificate, sign)
    assert isinstance(invite, Invite)
    return format_invite(invite)


def posting(issuer: ToyKey = FOUNDER, listing: Listing = LISTING, **changes: Any) -> Posting:
    proof = author_proof(listing.mesh, AUTHOR, issuer.sign)
    return Posting(listing=listing, token=token(issuer, **changes), proof=proof)


def refused(shown: Posting, author: bytes = AUTHOR, now: float = NOW) -> str:
    outcome = check_posting(shown, author, now=now, verify=verify)
    assert isinstance(outcome, Malformed), outcome
    return outcome.reason


def test_it_comes_back_as_it_was() -> None:
    for issuer in (FOUNDER, MEMBER):
        shown = posting(issuer)
        read = decode_posting(encode_posting(shown))
        assert read == shown
        assert isinstance(read, Posting)
        assert isinstance(check_posting(read, AUTHOR, now=NOW, verify=verify), Invite)


def test_somebody_who_copies_an_invite_cannot_list_the_mesh() -> None:
    assert "named another author" in refused(posting(), author=ToyKey("somebody").public)
    forged = msgspec.structs.replace(posting(), proof=author_proof(MESH.mesh_id, AUTHOR, ToyKey("somebody").sign))
    assert "named another author" in refused(forged)


def test_the_invite_must_hold_and_be_what_the_listing_says() -> None:
    assert "expired" in refused(posting(), now=NOW + 1000)
    other = msgspec.structs.replace(LISTING, mesh=ToyKey("other").mesh_id)
    assert "its invite" in refused(msgspec.structs.replace(posting(listing=other), token=token()))
    wider = msgspec.structs.replace(LISTING, scope="split")
    assert "has scope serve, not split" in refused(posting(listing=wider))
    assert "limited number" in refused(posting(uses=3))
    assert "its invite" in refused(msgspec.structs.replace(posting(), token="mesh2" + "A" * 60))


def test_a_listing_that_is_too_long_leaves_out_models_that_nobody_serves() -> None:
    many = tuple(ListedModel(name=f"{number:02}" + "x" * 240) for number in range(32))
    full = msgspec.structs.replace(LISTING, serving=many, wanted=many, on_disk=many)
    content = encode_posting(msgspec.structs.replace(posting(), listing=full))
    assert len(content.encode()) <= MAX_CONTENT
    read = decode_posting(content)
    assert isinstance(read, Posting)
    assert len(read.listing.serving) == 32
    assert len(read.listing.on_disk) == 0


def test_times_are_believed_within_bounds() -> None:
    assert check_times(NOW, NOW + 120, NOW) == ""
    assert check_times(NOW - 121, NOW - 1, NOW) == "it expired"
    assert check_times(NOW - MAX_LIFE, NOW + 10**9, NOW) == "it expired"
    assert check_times(NOW + MAX_AHEAD + 1, NOW + 1000, NOW) == "it comes from the future"


def test_texts_that_steer_a_terminal_are_no_listing() -> None:
    for text in ("\x1b[2J\x1b[31mfree GPUs", "a\nb", "a\x9b31m", "a\x00"):
        encoded = encode_posting(
            msgspec.structs.replace(posting(), listing=msgspec.structs.replace(LISTING, name=text))
        )
        assert isinstance(decode_posting(encoded), Malformed)
        model = (ListedModel(name=text),)
        encoded = encode_posting(
            msgspec.structs.replace(posting(), listing=msgspec.structs.replace(LISTING, serving=model))
        )
        assert isinstance(decode_posting(encoded), Malformed)


def test_what_is_too_large_is_no_listing() -> None:
    assert isinstance(decode_posting("x" * (MAX_CONTENT + 1)), Malformed)
    assert isinstance(decode_posting("\u00e4" * MAX_CONTENT), Malformed)
    assert isinstance(decode_posting("[" * MAX_CONTENT), Malformed)
