"""Keys, and the mesh and the certificate that a home keeps."""

from pathlib import Path

import pytest
from tests.unit.net.members import START, Member, read

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.credentials import (
    PEERS_FILE,
    MeshStores,
    SigningKey,
    has_other_members,
    load_key,
    node_key,
    open_credentials,
    verify,
    wants_ephemeral,
)
from mesh_llm.runtime.home import Home
from mesh_llm.wire.mesh.admission import Scope
from mesh_llm.wire.mesh.certificates import Certificate


def stores(root: Path) -> MeshStores:
    return MeshStores(root / "mesh")


def test_a_founder_stays_founder_over_restarts(tmp_path: Path):
    first = Member(stores=stores(tmp_path))
    again = Member(stores=stores(tmp_path), key=first.key)
    assert again.standing.mesh == first.standing.mesh
    assert again.standing.mesh_key is not None
    assert again.standing.scope is Scope.SPLIT


def test_the_mesh_secret_is_private(tmp_path: Path):
    Member(stores=stores(tmp_path))
    (secret,) = tmp_path.glob("mesh/*/mesh-key")
    assert secret.stat().st_mode & 0o777 == 0o600


def test_a_member_comes_back_to_its_mesh_with_its_certificate(tmp_path: Path):
    founder = Member()
    member = Member(founder.book.token(), stores=stores(tmp_path))
    assert isinstance(member.join(founder), Certificate)
    again = Member(stores=stores(tmp_path), key=member.key)
    assert again.standing.mesh == founder.standing.mesh
    assert again.standing.certificate == member.standing.certificate


def test_whoever_never_got_in_founds_its_own_mesh_next_time(tmp_path: Path):
    founder = Member()
    member = Member(founder.book.token(), stores=stores(tmp_path))
    assert member.standing.scope is None
    again = Member(stores=stores(tmp_path), key=member.key)
    assert again.standing.mesh != founder.standing.mesh
    assert again.standing.scope is Scope.SPLIT


def test_an_invite_leads_away_from_the_own_mesh_and_back_is_possible(tmp_path: Path):
    own = Member(stores=stores(tmp_path))
    founder = Member()
    member = Member(founder.book.token(), stores=stores(tmp_path), key=own.key)
    assert member.standing.mesh == founder.standing.mesh
    back = Member(own.book.token(), stores=stores(tmp_path), key=own.key)
    assert back.standing.mesh == own.standing.mesh
    assert back.standing.mesh_key is not None


def test_a_certificate_of_an_older_key_is_left_alone(tmp_path: Path):
    founder = Member()
    member = Member(founder.book.token(), stores=stores(tmp_path))
    member.join(founder)
    assert Member(stores=stores(tmp_path)).standing.certificate is None


def test_nothing_is_written_without_a_place():
    first = Member()
    assert Member(key=first.key).standing.mesh != first.standing.mesh


def test_a_client_must_be_told_which_mesh():
    with pytest.raises(MeshError) as refused:
        open_credentials(MeshStores(None), SigningKey.generate(), [], START, client=True)
    assert refused.value.code == "no_mesh"
    founder = Member()
    invite = read(founder.book.token())
    standing = open_credentials(MeshStores(None), SigningKey.generate(), [invite], START, client=True)
    assert standing.mesh == founder.standing.mesh


def test_a_damaged_mesh_key_is_said(tmp_path: Path):
    member = Member(stores=stores(tmp_path))
    (secret,) = tmp_path.glob("mesh/*/mesh-key")
    secret.write_text("damaged")
    with pytest.raises(MeshError) as refused:
        Member(stores=stores(tmp_path), key=member.key)
    assert refused.value.code == "key_unreadable"


def test_the_key_is_made_once_private_and_kept(tmp_path: Path):
    home = Home(tmp_path)
    key = node_key(home, ephemeral=False)
    assert home.key.stat().st_mode & 0o777 == 0o600
    assert len(home.key.read_text().strip()) == 64
    assert node_key(home, ephemeral=False).node_id == key.node_id


def test_an_ephemeral_key_leaves_nothing_behind(tmp_path: Path):
    home = Home(tmp_path)
    assert node_key(home, ephemeral=True).node_id != node_key(home, ephemeral=True).node_id
    assert not home.key.exists()


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("yes", True), ("0", False), ("", False), (None, False)])
def test_the_variable(value: str | None, wanted: bool):
    environment = {} if value is None else {"MESH_LLM_EPHEMERAL_KEY": value}
    assert wants_ephemeral(environment) is wanted


def test_a_key_that_others_can_read_is_put_right(tmp_path: Path):
    home = Home(tmp_path)
    node_key(home, ephemeral=False)
    home.key.chmod(0o644)
    node_key(home, ephemeral=False)
    assert home.key.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("content", ["", "zz", "ab" * 31, "ab" * 33, "é" * 32])
def test_a_damaged_key_is_said_and_not_replaced(tmp_path: Path, content: str):
    home = Home(tmp_path)
    home.key.write_text(content)
    with pytest.raises(MeshError) as refused:
        node_key(home, ephemeral=False)
    assert refused.value.code == "key_unreadable"
    assert home.key.read_text() == content


def test_no_key_is_none(tmp_path: Path):
    assert load_key(tmp_path / "key") is None


def test_signatures():
    key, other = SigningKey.generate(), SigningKey.generate()
    signature = key.sign(b"payload")
    assert len(signature) == 64
    assert verify(key.public, b"payload", signature)
    assert not verify(key.public, b"payloae", signature)
    assert not verify(other.public, b"payload", signature)
    assert not verify(key.public, b"payload", b"short")
    assert not verify(b"short", b"payload", signature)
    assert not verify(bytes(32), b"payload", bytes(64))


def test_the_same_secret_is_the_same_node():
    key = SigningKey.generate()
    assert SigningKey(key.secret).node_id == key.node_id
    assert key.secret.hex() not in repr(key)


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


def test_a_home_holds_the_meshes_that_it_founded_or_was_admitted_to(tmp_path: Path):
    kept = stores(tmp_path)
    founder = Member(stores=kept)
    assert kept.holds(founder.standing.mesh)
    stranger = SigningKey.generate().mesh_id
    assert not kept.holds(stranger)
    # A mesh that an invite named, and that never admitted this node, is not held.
    kept.choose(stranger)
    assert not kept.holds(stranger)
    kept.open(stranger).write("certificate", b"any")
    assert MeshStores(tmp_path / "mesh").holds(stranger)
    assert not MeshStores(None).holds(founder.standing.mesh)
