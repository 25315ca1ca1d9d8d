import msgspec
import pytest

from mesh_llm.wire.codec import Malformed, encode
from mesh_llm.wire.mesh.admission import (
    MAX_ASKER_NAME,
    MAX_INVITE_BYTES,
    MAX_INVITES,
    AdmitRequest,
    Admitted,
    ApprovalRequest,
    Approved,
    Reason,
    Refusal,
    Refused,
    Scope,
    Subject,
    common_protocol,
    decode_admit_reply,
    decode_admit_request,
)
from mesh_llm.wire.mesh.frames import PROTOCOL

REQUEST = AdmitRequest(1, 1, "1.0", b"session1", b"certificate", (b"invite",))


def test_requests_and_replies_round_trip():
    assert decode_admit_request(encode(REQUEST)) == REQUEST
    admitted = Admitted(1, "1.0", b"session2", b"own", b"granted")
    refused = Refused(Refusal(Reason.EXPIRED, Subject.INVITE, "yesterday"), "1.0")
    assert decode_admit_reply(encode(admitted)) == admitted
    assert decode_admit_reply(encode(refused)) == refused
    asking = AdmitRequest(1, 1, "1.0", b"session1", ask=ApprovalRequest("shelf", Scope.SERVE))
    assert decode_admit_request(encode(asking)) == asking
    approved = Approved(b"invite", "1.0")
    assert decode_admit_reply(encode(approved)) == approved


def test_a_request_without_the_ask_field_is_read():
    fields = [1, 1, "1.0", b"session1", b"certificate", [b"invite"]]
    assert decode_admit_request(msgspec.msgpack.encode(fields)) == REQUEST


@pytest.mark.parametrize(
    "request_",
    [
        AdmitRequest(1, 1, "v" * 65, b"session1"),
        AdmitRequest(1, 1, "1.0", b"short"),
        AdmitRequest(1, 1, "1.0", b"session1", bytes(2049)),
        AdmitRequest(1, 1, "1.0", b"session1", b"", (bytes(4097),)),
        AdmitRequest(1, 1, "1.0", b"session1", b"", (b"",) * (MAX_INVITES + 1)),
        AdmitRequest(-1, 1, "1.0", b"session1"),
        AdmitRequest(1, 1, "1.0", b"session1", ask=ApprovalRequest("n" * (MAX_ASKER_NAME + 1), Scope.SERVE)),
    ],
)
def test_everything_is_bounded(request_: AdmitRequest):
    assert isinstance(decode_admit_request(encode(request_)), Malformed)


@pytest.mark.parametrize("ask", [["shelf", 9], ["shelf"], [7, 2], "shelf", b"\xff", {"name": "shelf"}])
def test_malformed_approval_requests(ask: object):
    fields = [1, 1, "1.0", b"session1", b"", [], ask]
    assert isinstance(decode_admit_request(msgspec.msgpack.encode(fields)), Malformed)


@pytest.mark.parametrize("invite", [bytes(MAX_INVITE_BYTES + 1), "text", None])
def test_an_approval_is_bounded(invite: object):
    assert isinstance(decode_admit_reply(msgspec.msgpack.encode(["approved", invite, "1.0"])), Malformed)


@pytest.mark.parametrize(
    ("oldest", "newest", "common"), [(2, 2, PROTOCOL), (1, 99, PROTOCOL), (0, 2, PROTOCOL), (3, 9, None), (1, 1, None)]
)
def test_the_newest_common_protocol_is_chosen(oldest: int, newest: int, common: int | None):
    assert common_protocol(AdmitRequest(oldest, newest, "", b"session1")) == common
