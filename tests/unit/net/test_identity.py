from pathlib import Path

import pytest

from mesh_llm.core.types.errors import MeshError
from mesh_llm.net.admission.credentials import SigningKey, load_key, node_key, verify, wants_ephemeral
from mesh_llm.runtime.home import Home


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
