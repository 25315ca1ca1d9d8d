"""A disk without room: what a node knows holds all the same, and is only not there after a restart."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from tests.unit.net.members import Member

from mesh_llm.core.types.errors import MeshError
from mesh_llm.core.types.ids import NodeId
from mesh_llm.net.admission import credentials as store
from mesh_llm.net.admission.credentials import PEERS_FILE, MeshStores
from mesh_llm.net.admission.invites import InviteBook
from mesh_llm.net.admission.revocations import revoke_node
from mesh_llm.net.quic.endpoint import Reachable
from mesh_llm.wire.codec import encode
from mesh_llm.wire.mesh.admission import Reason, Scope
from mesh_llm.wire.mesh.certificates import Certificate
from mesh_llm.wire.mesh.invites import Invite, Revocation, parse_invite


@pytest.fixture
def fill(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def write(path: Path, data: bytes, mode: int = 0o600) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return lambda: monkeypatch.setattr(store, "write_atomic", write)


def test_what_can_be_lost_is_no_failure(tmp_path: Path, fill: Callable[[], None]) -> None:
    kept = MeshStores(tmp_path).open(Member().standing.mesh)
    assert kept.try_write(PEERS_FILE, b"1")
    fill()
    assert not kept.try_write(PEERS_FILE, b"2")
    assert kept.read(PEERS_FILE) == b"1"
    with pytest.raises(OSError, match="No space"):
        kept.write(PEERS_FILE, b"3")


def test_a_disk_that_stays_full_is_said_once(
    tmp_path: Path, fill: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = MeshStores(tmp_path).open(Member().standing.mesh)
    with capture_logs() as logs:
        fill()
        assert not kept.try_write(PEERS_FILE, b"1")
        assert not kept.try_write(PEERS_FILE, b"2")
        assert not kept.retry()
        assert [entry["log_level"] for entry in logs] == ["warning"]
        monkeypatch.undo()
        assert kept.retry()
        assert kept.read(PEERS_FILE) == b"2"
        assert [entry["log_level"] for entry in logs] == ["warning", "info"]
    assert kept.try_write(PEERS_FILE, b"3")
    with capture_logs() as logs:
        fill()
        assert not kept.try_write(PEERS_FILE, b"4")
        assert [entry["log_level"] for entry in logs] == ["warning"]


def test_a_revocation_holds_though_it_cannot_be_kept(tmp_path: Path, fill: Callable[[], None]) -> None:
    founder = Member(stores=MeshStores(tmp_path))
    member = Member(founder.book.create(Scope.SERVE, 86400).token)
    assert isinstance(member.join(founder), Certificate)
    assert member.standing.certificate is not None
    fill()
    data = encode(revoke_node(founder.standing, member.standing.certificate, founder.now))
    assert isinstance(founder.revocations.add(data), Revocation)
    assert founder.revocations.covers(member.standing.certificate.links)


def test_an_invite_that_cannot_be_written_down_is_not_made(
    tmp_path: Path, fill: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    founder = Member(stores=MeshStores(tmp_path))
    limited = founder.book.create(Scope.SERVE, 86400, 1)
    shown = founder.book.token()
    assert shown
    fill()
    with pytest.raises(MeshError) as caught:
        founder.book.create(Scope.SERVE, 86400)
    assert (caught.value.code, caught.value.status) == ("invite_not_kept", 507)
    assert "Make room" in caught.value.hint
    assert len(founder.book.records()) == 2
    # Whoever cannot be counted is not let in, and a node that has one goes on showing its invite.
    invite = parse_invite(limited.token)
    assert isinstance(invite, Invite)
    refusal = founder.book.redeem(invite, NodeId("ab" * 32))
    assert refusal is not None
    assert refusal.reason is Reason.BUSY
    assert founder.book.token() == shown
    # A revocation holds at once, and is written as soon as there is room.
    record, _ = founder.book.revoke(limited.id)
    assert record.revoked
    monkeypatch.undo()
    assert founder.standing.store.retry()
    again = InviteBook(founder.standing, lambda: Reachable((), ""), lambda: founder.now)
    assert [entry.revoked for entry in again.records() if entry.id == limited.id] == [True]


def test_a_full_disk_does_not_stop_the_invite_that_is_shown(tmp_path: Path, fill: Callable[[], None]) -> None:
    founder = Member(stores=MeshStores(tmp_path))
    fill()
    token = founder.book.token()
    assert token
    assert founder.book.token() == token
