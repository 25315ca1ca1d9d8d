"""Whether a home has a mesh worth keeping to, before `--lan` looks for another one."""

from pathlib import Path

from tests.unit.net.members import Member

from mesh_llm.net.admission.credentials import PEERS_FILE, MeshStores, has_other_members
from mesh_llm.wire.mesh.admission import Scope


def test_a_new_home_has_none(tmp_path: Path):
    assert not has_other_members(MeshStores(tmp_path))
    assert not has_other_members(MeshStores(None))


def test_a_mesh_that_was_founded_for_lack_of_another_is_none(tmp_path: Path):
    stores = MeshStores(tmp_path)
    founder = Member(stores=stores)
    assert founder.book.token()
    assert not has_other_members(MeshStores(tmp_path))
    founder.standing.store.write(PEERS_FILE, b"[]")
    assert has_other_members(MeshStores(tmp_path))


def test_an_invite_made_by_hand_is_a_promise(tmp_path: Path):
    founder = Member(stores=MeshStores(tmp_path))
    founder.book.create(Scope.SERVE, 3600)
    assert has_other_members(MeshStores(tmp_path))


def test_a_member_keeps_to_its_mesh_and_one_that_never_got_in_does_not(tmp_path: Path):
    founder = Member()
    token = founder.book.create(Scope.SERVE, 3600).token
    member = Member(token, stores=MeshStores(tmp_path))
    assert not has_other_members(MeshStores(tmp_path))
    member.join(founder)
    assert has_other_members(MeshStores(tmp_path))


def test_a_damaged_list_of_invites_is_not_taken_for_an_empty_one(tmp_path: Path):
    founder = Member(stores=MeshStores(tmp_path))
    founder.standing.store.write("invites.json", b"{")
    assert has_other_members(MeshStores(tmp_path))
