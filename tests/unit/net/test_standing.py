from pathlib import Path

import pytest
from tests.unit.net.members import START, Member, read

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.credentials import MeshStores, SigningKey, open_credentials
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
